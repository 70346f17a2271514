"""Learned positions of image patches, carried over to another image size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["resize_positions"]


def resize_positions(positions: Tensor, grid: int, first: int = 1, *, antialias: bool = False) -> Tensor:
    """Positions of a square grid of patches, interpolated to another.

    Args:
        positions: ``[first + old_grid**2, dim]``. grid: patches along a side. first: rows before the patches (class token), kept.
        antialias: as open_clip does it; the bicubic kernel is another one then, enlarging too (a = -0.5 in place of -0.75).

    Returns: ``[first + grid**2, dim]``, positions itself where the grid is the same.
    Raises: ValueError where the patches are no square.
    Source: bicubic without aligned corners, as BLIP, ALBEF, BEiT-3 and timm do when they load weights at another size.
    """
    kept, patches = positions[:first], positions[first:]
    old = round(patches.shape[0] ** 0.5)
    if old * old != patches.shape[0]:
        raise ValueError(
            f"positions must hold a square grid of patches after {first} rows; received {positions.shape[0]} rows."
        )
    if old == grid:
        return positions
    image = patches.to(torch.promote_types(patches.dtype, torch.float32)).T.reshape(1, -1, old, old)
    resized = F.interpolate(image, (grid, grid), mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([kept, resized.flatten(2)[0].T.to(positions.dtype)])
