"""Which caption belongs to which image, as BEiT-3's pretraining alone can tell: by hidden words and how well the image predicts them.

Pretraining has no contrastive loss, but it fills in words of a caption from the other words and the image (section 2.2 of the
paper). The likelihood of the words so found is a score of the pair: a pseudo-log-likelihood (Salazar et al., Masked Language Model
Scoring, 2020), with half of the words hidden at a time, as pretraining hides them, instead of one. For retrieval at scale fine-tune
`Beit3Retrieval`: these scores cost two forwards of every pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlp_fast.models.beit3 import Beit3MaskedModel
from vlp_fast.ops import attention_only, linear_cross_entropy
from vlp_fast.segments import Segments

__all__ = ["masked_word_scores"]

PAIRS_AT_ONCE = 256


@torch.no_grad()
def masked_word_scores(
    model: Beit3MaskedModel, images: Tensor, token_ids: Tensor, segments: Segments, *, mask_id: int, special_ids: Sequence[int]
) -> Tensor:
    """The logarithm of the likelihood of each caption's words given each image.

    Equivalent to: the sum over the caption's words of log p(word | image, the words of the other half), where the halves are every
    other word; special tokens are neither hidden nor scored.

    Args:
        model: in eval mode. images: ``[images, 3, S, S]``. token_ids, segments: captions, packed, on the device of the model.
        mask_id, special_ids: of the text tokenizer, as in `Beit3Pretraining`.

    Returns: fp32 ``[captions, images]``. The words of one caption weigh alike for all images, so a row ranks images as it is. Captions
        differ in how likely their words are without any image: take a row's mean from it before a column ranks captions.
    Raises: ValueError for a model in training mode.
    """
    if model.training:
        raise ValueError("masked_word_scores needs the model in eval mode; call model.eval() first.")
    device = token_ids.device
    captions, count = len(segments), len(images)
    scores = torch.zeros(captions * count, device=device)
    halves = _halves(token_ids, segments, special_ids)
    backend = None if attention_only(model.config.backend) else model.config.backend
    pairs = torch.arange(captions * count)
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        part = pairs[start : start + PAIRS_AT_ONCE]
        rows, chosen = segments.take((part // count).tolist())
        words, half, shown = token_ids[rows], halves[rows], images[(part % count).to(device)]
        pair = torch.arange(len(part)).repeat_interleave(torch.tensor(chosen.lengths)).to(device)
        for hidden in (half == 0, half == 1):
            out = model.encode_pairs(shown, words.masked_fill(hidden, mask_id), chosen)
            at = hidden.nonzero().flatten()
            head = model.word_head
            losses = linear_cross_entropy(
                out.text, head.weight, words[at], head.bias, rows=at, reduction="none", backend=backend
            )
            scores.index_add_(0, start + pair[at], -losses.float())
    return scores.view(captions, count)


def _halves(token_ids: Tensor, segments: Segments, special_ids: Sequence[int]) -> Tensor:
    """Of each row 0 or 1, taking turns over the words of its caption, or -1 for a special token."""
    ordinary = ~torch.isin(token_ids, torch.tensor(list(special_ids), device=token_ids.device))
    words = torch.cat([ordinary.new_zeros(1, dtype=torch.long), ordinary.cumsum(0)])  # before each row
    first = torch.arange(len(token_ids), device=token_ids.device) - segments.positions()
    return torch.where(ordinary, (words[:-1] - words[first]) % 2, -1)
