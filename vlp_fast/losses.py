"""The losses of vision-language pretraining, on features, hidden rows and logits that a model has already made.

Those that are operations come from `vlp_fast.ops`; contrast over the batches of several processes and the matching loss are here. In a
group of processes, each computes the loss of its own pairs against all rows; the mean of their losses, and of their gradients, is that
of the whole batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_fast import ops
from vlp_fast.distributed import gather_features, world
from vlp_fast.ops import distilled_contrastive_loss, linear_cross_entropy

__all__ = [
    "contrastive_loss",
    "distilled_contrastive_loss",
    "distilled_cross_entropy",
    "hard_negatives",
    "linear_cross_entropy",
    "matching_loss",
    "sigmoid_contrastive_loss",
]


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    group: object | None = None,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE in both directions, averaged: pair i is (image i, text i), all others of all processes' batches are negatives.

    Args:
        image_features, text_features: ``[batch, dim]``, L2-normalised. logit_scale: scalar that multiplies the similarities.
        group: of processes; default: all, where torch.distributed is initialised. backend: "triton", "torch" or None.

    Raises: ValueError for shapes that differ, or batches of different sizes.
    Source: Radford et al., CLIP (2021), figure 3; CoCa, equation 4.
    """
    rank, size = world(group)
    if size == 1:
        return ops.contrastive_loss(image_features, text_features, logit_scale, backend=backend)
    _check_pairs(image_features, text_features)
    image, text = (x if x.dtype == torch.float64 else x.float() for x in (image_features, text_features))
    images, texts = gather_features(image, group), gather_features(text, group)
    scale, own = logit_scale.to(image.dtype), torch.arange(len(image), device=image.device) + rank * len(image)
    with torch.autocast(image.device.type, enabled=False):
        one = linear_cross_entropy(image * scale, texts, own, backend=backend)
        other = linear_cross_entropy(text * scale, images, own, backend=backend)
    return (one + other) / 2


def sigmoid_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    group: object | None = None,
    backend: str | None = None,
) -> Tensor:
    """Every (image, text) of all processes' batches as a question of its own; summed over pairs, averaged over images.

    Args:
        image_features, text_features: ``[batch, dim]``, L2-normalised. logit_scale, logit_bias: scalars.
        group, backend: as in `contrastive_loss`.

    Raises: ValueError for shapes that differ, or batches of different sizes.
    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training (2023), equation 1.
    """
    _check_pairs(image_features, text_features)
    rank, _ = world(group)
    texts, first = gather_features(text_features, group), rank * len(text_features)
    return ops.sigmoid_contrastive_loss(image_features, texts, logit_scale, logit_bias, first=first, backend=backend)


@torch.no_grad()
def hard_negatives(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    *,
    floor: float = 1e-4,
    generator: torch.Generator | None = None,
    all_processes: bool = False,
    group: object | None = None,
    backend: str | None = None,
) -> Tensor:
    """For each row one key other than its own, drawn with weights softmax(similarities) + floor; on the device.

    Args:
        queries, keys: ``[batch, dim]``; key i belongs to row i. logit_scale, floor, generator, backend: as in
            `vlp_fast.ops.hard_negatives`.
        all_processes: draw from the keys of all processes of `group` (default: all), not only from those of this one. The numbers
            returned then count through the batches in the order of ranks, as the rows of `vlp_fast.distributed.gather_features`,
            which waits for the device once to compare sizes; nothing else here does.

    Returns: int64 ``[batch]``.
    Raises: ValueError for shapes that differ, a single pair, or batches of different sizes.
    Source: Li et al., BLIP (2022), section 3.2; its retrieval fine-tuning draws from all processes.
    """
    _check_pairs(queries, keys, "queries", "keys")
    first = 0
    if all_processes:
        first = world(group)[0] * len(keys)
        keys = gather_features(keys, group)
    return ops.hard_negatives(queries, keys, logit_scale, floor=floor, first=first, generator=generator, backend=backend)


def _check_pairs(one: Tensor, other: Tensor, name: str = "image_features", other_name: str = "text_features") -> None:
    if one.shape != other.shape:
        raise ValueError(f"{name} and {other_name} must have one shape; received {list(one.shape)} and {list(other.shape)}.")


def matching_loss(logits: Tensor, num_positive: int) -> Tensor:
    """Image-text matching: rows ``[:num_positive]`` are matched pairs (class 1), the rest are not (class 0); mean cross-entropy.

    Args:
        logits: ``[pairs, 2]``.
    Source: ALBEF, equation 4; BLIP, section 3.2.
    """
    labels = (torch.arange(len(logits), device=logits.device) < num_positive).long()
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)


def distilled_cross_entropy(logits: Tensor, teacher_logits: Tensor, targets: Tensor, alpha: float) -> Tensor:
    """The loss of predicting a word from each row, with soft targets from a teacher; the mean over rows, 0 where there is none.

    Equivalent to: ``F.cross_entropy(logits, (1 - alpha) * one_hot(targets) + alpha * teacher_logits.softmax(1))`` in fp32.

    Args:
        logits, teacher_logits: ``[rows, vocab_size]``; the teacher's are constants. targets: int64 ``[rows]``. alpha: share of the
            soft targets, in [0, 1]; 0 is the loss with hard targets.

    Returns: a scalar, fp32 (fp64 for fp64).
    Raises: ValueError for shapes that differ, or alpha outside [0, 1].
    Memory: a few times the logits, so only the rows to be predicted should enter (of masked captions about a seventh).
    Source: Li et al., ALBEF (2021), equation 7.
    """
    _check_pairs(logits, teacher_logits, "logits", "teacher_logits")
    if targets.shape != logits.shape[:1]:
        raise ValueError(f"targets must be [{len(logits)}], one per row of logits; received shape {list(targets.shape)}.")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1]; received {alpha}.")
    ours, teacher = (x if x.dtype == torch.float64 else x.float() for x in (logits, teacher_logits.detach()))
    log_p = ours.log_softmax(1)
    hard = -log_p.gather(1, targets[:, None])[:, 0]
    soft = -(teacher.softmax(1) * log_p).sum(1)
    return ((1.0 - alpha) * hard + alpha * soft).sum() / max(len(targets), 1)
