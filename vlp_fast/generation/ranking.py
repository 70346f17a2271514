"""Captions ranked by BLIP's matching head, answers by their likelihood: what they read is encoded, and projected in each layer, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlp_fast.generation.decoders import Questions, _own_backend
from vlp_fast.models.blip import Matching
from vlp_fast.models.blip_tasks import BlipVqa
from vlp_fast.ops import linear_cross_entropy
from vlp_fast.segments import Segments

__all__ = ["AnswerRanking", "Ranking", "rank_answers", "rank_captions"]


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


class AnswerRanking(NamedTuple):
    """scores: fp32 (fp64 for fp64) ``[questions, answers]``, -inf for answers that were left out. order: int64 ``[questions, kept]``,
    the answers to each question, the best first."""

    scores: Tensor
    order: Tensor


@torch.no_grad()
def rank_answers(
    vqa: BlipVqa,
    images: Tensor,
    questions: Questions,
    token_ids: Tensor,
    segments: Segments,
    *,
    keep: int | None = None,
    label_smoothing: float = 0.0,
) -> AnswerRanking:
    """How probable each answer of a list is to each question: the log-likelihood of its words, given question and image.

    Equivalent to: one forward of the decoder for each question with each answer, and the sum of the log probabilities of the answer's
    tokens after the first. Images and questions are encoded once, and all answers to all questions are one packed forward.

    Args:
        vqa: in eval mode. images: ``[batch, 3, image_size, image_size]``. questions: `Questions` about them.
        token_ids, segments: the answers, packed: [CLS] or [DEC], words, [SEP]; the first token is replaced by [DEC].
        keep: score the answers to a question whose first word is among the `keep` most probable, as BLIP's code does (128 of
            3,128); default: all. Of answers that begin with one word, those that come first are kept.
        label_smoothing: BLIP's code ranks by its training loss, whose smoothing is 0.1; default: 0, the likelihood itself.

    Waiting for the device: once, to learn which answers are kept.
    Raises: ValueError: a question without an image, an answer of fewer than two tokens, a `keep` below 1, or a model in training mode.
    """
    if vqa.training:
        raise ValueError("rank_answers needs the model in eval mode; call vqa.eval() first.")
    if min(segments.lengths, default=2) < 2:
        raise ValueError(f"answers need a word after their first token; received one of {min(segments.lengths)} tokens.")
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1; received {keep}.")
    about = questions.image_of_each(len(images))
    asked, answers = len(about), len(segments)
    context = vqa.encode_questions(questions.token_ids, questions.segments, vqa.encode_image(images), about)
    kept = answers if keep is None else min(keep, answers)
    chosen = torch.arange(answers, device=images.device).expand(asked, -1)
    if kept < answers:
        starts = Segments([1] * asked, images.device)
        start = vqa.answer_pass(token_ids.new_zeros(asked), starts, range(asked))
        (rows,) = vqa.text_tower([start], context, questions.segments)
        first_words = token_ids[segments.first_rows() + 1]
        chosen = torch.argsort(vqa.word_logits(rows)[:, first_words], dim=1, descending=True, stable=True)[:, :kept]
    rows_of, packed = segments.take(chosen.flatten().tolist())
    ids = token_ids[rows_of]
    reading = vqa.answer_pass(ids, packed, [i for i in range(asked) for _ in range(kept)])
    (rows,) = vqa.text_tower([reading], context, questions.segments)
    predicts = packed.rows_before_last(1)
    weight, bias = vqa.word_weights()
    losses = linear_cross_entropy(
        vqa.word_hidden(rows[predicts]),
        weight,
        ids[predicts + 1],
        bias,
        label_smoothing=label_smoothing,
        reduction="none",
        backend=_own_backend(vqa.config.backend),
    )
    # each answer's losses in a row of their own, zeros behind: sums in a fixed order
    counts = torch.tensor([n - 1 for n in packed.lengths], dtype=torch.long, device=losses.device)
    owner = torch.arange(len(packed), device=losses.device).repeat_interleave(counts, output_size=len(losses))
    padded = losses.new_zeros(len(packed), packed.max_length)
    padded[owner, packed.positions()[predicts]] = losses
    likelihood = -padded.sum(1).view(asked, kept)
    scores = likelihood.new_full((asked, answers), -float("inf")).scatter(1, chosen, likelihood)
    return AnswerRanking(scores, torch.argsort(scores, dim=1, descending=True, stable=True)[:, :kept])
