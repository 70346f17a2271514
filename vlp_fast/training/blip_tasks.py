"""Losses of fine-tuning BLIP: captioning with a prompt, visual question answering, NLVR2 (section 5 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_fast.models.blip import Captioning, ImageOutput, ImageRows
from vlp_fast.models.blip_tasks import BlipNlvr2, BlipVqa
from vlp_fast.ops import attention_only, linear_cross_entropy
from vlp_fast.segments import Segments
from vlp_fast.training.blip import LABEL_SMOOTHING

__all__ = ["captioning_loss", "nlvr2_loss", "vqa_loss"]


def captioning_loss(
    model: Captioning,
    image: ImageRows | ImageOutput,
    token_ids: Tensor,
    segments: Segments,
    images: Sequence[int] | Tensor,
    *,
    prompt_length: int = 1,
    label_smoothing: float = LABEL_SMOOTHING,
) -> Tensor:
    """Mean cross-entropy of the next word of captions, of which caption i describes image ``images[i]``.

    Args:
        model: `Blip` or `BlipCaptioner`. image: of its `encode_image`. token_ids, segments: captions, [CLS] words [SEP], packed.
        prompt_length: tokens at the start of each caption that are given and not predicted, the first one among them.
        label_smoothing: 0.1 in BLIP's code.

    Returns: a scalar.
    Raises: ValueError for a prompt that is not at least one token long.
    """
    if prompt_length < 1:
        raise ValueError(f"prompt_length counts the first token and must be at least 1; received {prompt_length}.")
    text_pass = model.captioning_pass(token_ids, segments, images)
    (rows,) = model.text_tower([text_pass], image.rows, image.segments)
    return _word_loss(model, rows, token_ids, segments, prompt_length, label_smoothing, "mean")


def vqa_loss(
    model: BlipVqa,
    images: Tensor,
    questions: tuple[Tensor, Segments],
    answers: tuple[Tensor, Segments],
    answered: Sequence[int] | Tensor,
    weights: Tensor,
    *,
    label_smoothing: float = LABEL_SMOOTHING,
) -> Tensor:
    """Each answer's summed cross-entropy times its weight, divided by the number of images.

    Args:
        images: ``[batch, 3, image_size, image_size]``. questions: token ids and segments, one question per image.
        answers: token ids and segments; answer i is one to question ``answered[i]``. weights: ``[answers]``, such as the share of people
            who gave it.

    Returns: a scalar.
    Raises: ValueError where questions, or weights, are not as many as they should be.
    """
    (question_ids, question_segments), (answer_ids, answer_segments) = questions, answers
    if len(question_segments) != len(images):
        raise ValueError(f"every image needs one question; received {len(question_segments)} for {len(images)} images.")
    if weights.shape != (len(answer_segments),):
        raise ValueError(f"weights must be [{len(answer_segments)}], one per answer; received {list(weights.shape)}.")
    image = model.encode_image(images)
    context = model.encode_questions(question_ids, question_segments, image, range(len(images)))
    text_pass = model.answer_pass(answer_ids, answer_segments, answered)
    (rows,) = model.text_tower([text_pass], context, question_segments)
    words = _word_loss(model, rows, answer_ids, answer_segments, 1, label_smoothing, "none")
    counts = torch.from_numpy(np.maximum(np.asarray(answer_segments.lengths) - 1, 0)).to(weights.device)
    return (words * weights.repeat_interleave(counts, output_size=len(words))).sum() / len(images)


def nlvr2_loss(
    model: BlipNlvr2, first: Tensor, second: Tensor, token_ids: Tensor, segments: Segments, targets: Tensor
) -> Tensor:
    """Mean cross-entropy of whether caption i is true (1) of images ``first[i]`` and ``second[i]``, or not (0)."""
    return F.cross_entropy(model(first, second, token_ids, segments), targets)


def _word_loss(
    model: Captioning,
    rows: Tensor,
    token_ids: Tensor,
    segments: Segments,
    prompt_length: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """Cross-entropy of the word after each row but a caption's last; inside the prompt nothing is predicted."""
    predicts = segments.rows_before_last(1)
    words = token_ids[predicts + 1]
    if prompt_length > 1:
        words = words.masked_fill(segments.positions()[predicts] + 1 < prompt_length, -100)
    weight, bias = model.word_weights()
    backend = model.config.backend
    return linear_cross_entropy(
        model.word_hidden(rows[predicts]),
        weight,
        words,
        bias,
        label_smoothing=label_smoothing,
        reduction=reduction,
        backend=None if attention_only(backend) else backend,
    )
