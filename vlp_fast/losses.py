"""The losses of vision-language pretraining, on features, hidden rows and logits that a model has already made.

Those that are operations come from `vlp_fast.ops`; contrast over the batches of several processes and the matching loss are here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_fast import ops
from vlp_fast.distributed import gather_features, world
from vlp_fast.ops import distilled_contrastive_loss, hard_negatives, linear_cross_entropy, sigmoid_contrastive_loss

__all__ = [
    "contrastive_loss",
    "distilled_contrastive_loss",
    "hard_negatives",
    "linear_cross_entropy",
    "matching_loss",
    "sigmoid_contrastive_loss",
]


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *, group: object | None = None
) -> Tensor:
    """InfoNCE in both directions, averaged: pair i is (image i, text i), all others of all processes' batches are negatives.

    Args:
        image_features, text_features: ``[batch, dim]``, L2-normalised. logit_scale: scalar that multiplies the similarities.
        group: of processes; default: all, where torch.distributed is initialised. Each computes the loss of its own pairs against
            all rows; the mean of their losses, and of their gradients, is that of the whole batch.

    Raises: ValueError for shapes that differ, or batches of different sizes.
    Source: Radford et al., CLIP (2021), figure 3; CoCa, equation 4.
    """
    rank, size = world(group)
    if size == 1:
        return ops.contrastive_loss(image_features, text_features, logit_scale)
    if image_features.shape != text_features.shape:
        raise ValueError(
            f"image_features and text_features must have one shape; received {list(image_features.shape)} and "
            f"{list(text_features.shape)}."
        )
    image, text = (x if x.dtype == torch.float64 else x.float() for x in (image_features, text_features))
    images, texts = gather_features(image, group), gather_features(text, group)
    scale, own = logit_scale.to(image.dtype), torch.arange(len(image), device=image.device) + rank * len(image)
    with torch.autocast(image.device.type, enabled=False):
        one, other = linear_cross_entropy(image * scale, texts, own), linear_cross_entropy(text * scale, images, own)
    return (one + other) / 2


def matching_loss(logits: Tensor, num_positive: int) -> Tensor:
    """Image-text matching: rows ``[:num_positive]`` are matched pairs (class 1), the rest are not (class 0); mean cross-entropy.

    Args:
        logits: ``[pairs, 2]``.
    Source: ALBEF, equation 4; BLIP, section 3.2.
    """
    labels = (torch.arange(len(logits), device=logits.device) < num_positive).long()
    return F.cross_entropy(logits.float(), labels)
