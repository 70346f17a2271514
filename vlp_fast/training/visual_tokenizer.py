"""Trains a `VqTokenizer` on images, before the pretraining that predicts its ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_fast.models.visual_tokenizer import VqCodes, VqTokenizer

__all__ = ["VqStep", "train_visual_tokenizer", "visual_tokenizer_losses"]

WARM_UP = 20  # steps


class VqStep(NamedTuple):
    """What one step measured: both losses, and how many different codes the batch's patches chose."""

    reconstruction: float
    commitment: float
    codes_used: int


def visual_tokenizer_losses(
    tokenizer: VqTokenizer, images: Tensor, teacher: Callable[[Tensor], Tensor] | None = None
) -> tuple[dict[str, Tensor], VqCodes]:
    """The losses of one step, for a training loop of your own, which then gives the `VqCodes` to `update_codes`.

    "reconstruction": the mean squared error of pixels; with a teacher, 1 - cosine between its features and what is decoded (BEiT v2,
    equation 3). "commitment": how far the patches' vectors are from their codes, squared (van den Oord et al., equation 3).

    Args:
        tokenizer: to train. images: ``[batch, 3, image_size, image_size]``. teacher: images -> features ``[batch, P, target_dim]``,
            called without gradient.

    Returns: (scalars by name, what the step found as `VqCodes`).
    Raises: ValueError if the teacher's features have another shape than the decoder's.
    """
    decoded, found = tokenizer(images)
    if teacher is None:
        targets = tokenizer.patches(images)
    else:
        with torch.no_grad():
            targets = teacher(images).flatten(0, 1)
    if targets.shape != decoded.shape:
        raise ValueError(
            f"targets must be [batch * patches, target_dim] = {list(decoded.shape)}; received {list(targets.shape)} from "
            f"{'the pixels' if teacher is None else 'the teacher'}."
        )
    wide = decoded.to(torch.promote_types(decoded.dtype, torch.float32))
    if teacher is None:
        reconstruction = F.mse_loss(wide, targets.to(wide.dtype))
    else:
        reconstruction = 1 - F.cosine_similarity(wide, targets.to(wide.dtype), dim=1).mean()
    commitment = (found.rows - found.codes).square().sum(1).mean()
    return {"reconstruction": reconstruction, "commitment": commitment}, found


def train_visual_tokenizer(
    tokenizer: VqTokenizer,
    batches: Iterable[Tensor],
    *,
    lr: float = 1e-3,
    commitment: float = 0.05,
    teacher: Callable[[Tensor], Tensor] | None = None,
) -> list[VqStep]:
    """One step of AdamW and one of the codes for each batch of images; the tokenizer is changed in place.

    Args:
        tokenizer: on the device where it shall train. batches: images ``[batch, 3, image_size, image_size]``, one a step.
        lr: reached after 20 steps. commitment: weight of that loss. teacher: as in `visual_tokenizer_losses`.

    Returns: what each step measured, read from the device at the end.
    """
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=lr)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARM_UP, total_iters=WARM_UP)
    device, steps = tokenizer.codes.device, []
    for images in batches:
        losses, found = visual_tokenizer_losses(tokenizer, images.to(device), teacher)
        optimizer.zero_grad(set_to_none=True)
        (losses["reconstruction"] + commitment * losses["commitment"]).backward()
        optimizer.step()
        warm_up.step()
        tokenizer.update_codes(found)
        used = torch.zeros(tokenizer.num_codes, device=device).index_fill(0, found.ids, 1.0).sum()
        steps.append(torch.stack([losses["reconstruction"].detach(), losses["commitment"].detach(), used]))
    return [VqStep(a, b, int(c)) for a, b, c in (step.tolist() for step in steps)]
