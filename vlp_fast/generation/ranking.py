"""Captions ranked by BLIP's matching head: many captions read one image, whose keys and values are made once per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlp_fast.models.blip import Matching
from vlp_fast.segments import Segments

__all__ = ["Ranking", "rank_captions"]


class Ranking(NamedTuple):
    """logits: ``[captions, 2]``, class 1 is "matches". scores: fp32 ``[captions]``, the probability of class 1. order: int64
    ``[captions]``, image after image, within an image the best first."""

    logits: Tensor
    scores: Tensor
    order: Tensor


@torch.no_grad()
def rank_captions(
    blip: Matching, images: Tensor, token_ids: Tensor, segments: Segments, index: Sequence[int] | None = None
) -> Ranking:
    """How well captions describe their images, in one packed pass of all captions.

    Equivalent to: one matching pass per caption with its image, but images are encoded, and projected to keys and values, once.

    Args:
        blip: `Blip` or `BlipRetriever`, in eval mode. images: ``[batch, 3, image_size, image_size]``.
        token_ids, segments: the captions, packed: [CLS] or [DEC], words, [SEP]; the first token is replaced by [ENC].
        index: the image of each caption; default: a single image, which all describe.

    Raises: ValueError: more images than one without an index, an index of another length, or a model in training mode.
    """
    if blip.training:
        raise ValueError("rank_captions needs the model in eval mode; call blip.eval() first.")
    if index is None and len(images) != 1:
        raise ValueError(f"index must say which of the {len(images)} images each caption describes; received None.")
    chosen = [0] * len(segments) if index is None else [int(i) for i in index]
    if len(chosen) != len(segments):
        raise ValueError(f"index must have one image per caption; received {len(chosen)} for {len(segments)} captions.")
    image_rows = blip.image_encoder(images)
    image_segments = blip.image_encoder.segments(len(images), image_rows.device)
    matching = blip.matching_pass("itm_ranking", token_ids, segments, chosen)
    (rows,) = blip.text_tower([matching], image_rows, image_segments)
    logits = blip.matching_logits(rows)
    scores = logits.float().softmax(-1)[:, 1]
    # two stable sorts: by score, then by image
    order = torch.argsort(scores, descending=True, stable=True)
    of = torch.tensor(chosen, device=order.device)
    return Ranking(logits, scores, order[torch.argsort(of[order], stable=True)])
