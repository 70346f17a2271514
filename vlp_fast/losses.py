"""The losses of vision-language pretraining, on features and logits that a model has already made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "contrastive_loss",
    "hard_negatives",
    "matching_loss",
    "momentum_contrastive_loss",
    "similarities",
]


def similarities(features: Tensor, keys: Tensor, temperature: Tensor) -> Tensor:
    """``features @ keys.T / temperature`` in fp32: ``[batch, dim]`` and ``[keys, dim]`` -> ``[batch, keys]``."""
    return features.float() @ keys.float().T / temperature.float()


def contrastive_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """InfoNCE in both directions, averaged: pair i is (image i, text i), all others of the batch are negatives.

    Args:
        image_features, text_features: ``[batch, dim]``, L2-normalised. logit_scale: scalar that multiplies the similarities.

    Raises: ValueError for shapes that differ.
    Source: Radford et al., CLIP (2021), figure 3; CoCa, equation 4.
    """
    if image_features.shape != text_features.shape:
        raise ValueError(
            f"image_features and text_features must have one shape; received {list(image_features.shape)} and {list(text_features.shape)}."
        )
    logits = logit_scale.float() * image_features.float() @ text_features.float().T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def momentum_contrastive_loss(
    similarity_i2t: Tensor, similarity_t2i: Tensor, momentum_i2t: Tensor, momentum_t2i: Tensor, alpha: float
) -> Tensor:
    """Image-text contrast against momentum keys and a queue, with soft targets from the momentum encoders.

    Targets are ``alpha * softmax(momentum similarities) + (1 - alpha) * identity``.

    Args:
        similarity_*: online features against the momentum keys, ``[batch, batch + queue]``, already divided by the temperature.
        momentum_*: momentum features against the same keys (no gradient). alpha: share of the soft targets, in [0, 1].

    Source: Li et al., ALBEF (2021), section 3.2 and equation 6; BLIP uses the same.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1]; received {alpha}.")

    def one_way(similarity: Tensor, momentum: Tensor) -> Tensor:
        with torch.no_grad():
            targets = alpha * torch.softmax(momentum, 1)
            targets.diagonal().add_(1.0 - alpha)
        return -(targets * torch.log_softmax(similarity, 1)).sum(1).mean()

    return (one_way(similarity_i2t, momentum_i2t) + one_way(similarity_t2i, momentum_t2i)) / 2


@torch.no_grad()
def hard_negatives(similarity: Tensor, *, floor: float = 1e-4, generator: torch.Generator | None = None) -> Tensor:
    """For each row one column other than its own, drawn with weights softmax(similarity) + floor; no wait for the device.

    Args:
        similarity: ``[batch, batch]``; pair i is its diagonal. floor: added to every weight (BLIP; ALBEF: 0).
        generator: of the draw.

    Returns: int64 ``[batch]`` on the device of similarity.
    Raises: ValueError for a batch of one pair, which has no negative.
    """
    if len(similarity) < 2:
        raise ValueError(f"hard negatives need at least 2 pairs in the batch; received {len(similarity)}.")
    weights = torch.softmax(similarity.float(), 1) + floor
    weights.fill_diagonal_(0.0)
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)


def matching_loss(logits: Tensor, num_positive: int) -> Tensor:
    """Image-text matching: rows ``[:num_positive]`` are matched pairs (class 1), the rest are not (class 0); mean cross-entropy.

    Args:
        logits: ``[pairs, 2]``.
    Source: ALBEF, equation 4; BLIP, section 3.2.
    """
    labels = (torch.arange(len(logits), device=logits.device) < num_positive).long()
    return F.cross_entropy(logits.float(), labels)
