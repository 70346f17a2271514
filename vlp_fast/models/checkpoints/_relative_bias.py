"""A learned bias per offset between image patches, carried over to another image size."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["resize_relative_bias"]

DEGREE = 3


def resize_relative_bias(bias: Tensor, grid: int) -> Tensor:
    """Biases of all offsets between the patches of a square grid, interpolated to those of another grid.

    The old offsets are spread over the new range in steps that grow geometrically from 1, so that near offsets keep their biases and
    only far ones are stretched; between them runs a bicubic spline.

    Args:
        bias: ``[(2 * old_grid - 1)**2, ...]``, vertical offset first. grid: patches along a side.

    Returns: ``[(2 * grid - 1)**2, ...]``, bias itself where the grid is the same.
    Raises: ValueError where the offsets are no square, or the old grid has fewer than 3 patches along a side.
    Source: BEiT's fine-tuning code, which VLMo's repeats; splines as FITPACK makes them (de Boor's basis, the knots next to both ends
        left out).
    """
    old, new = round(bias.shape[0] ** 0.5), 2 * grid - 1
    if old * old != bias.shape[0] or old % 2 == 0:
        raise ValueError(f"bias must have a row for each offset of a square grid; received {bias.shape[0]} rows.")
    if old == new:
        return bias
    if old <= DEGREE:
        raise ValueError(f"bias can be interpolated from grids of at least 3 by 3 patches; received {(old + 1) // 2}.")
    known = _spread(old // 2, new // 2)
    wanted = torch.arange(-(new // 2), new // 2 + 1, dtype=torch.float64)
    knots = torch.cat([known[:1].expand(DEGREE + 1), known[2:-2], known[-1:].expand(DEGREE + 1)])
    weights = torch.linalg.solve(_basis(known, knots).T, _basis(wanted, knots).T).T  # [new, old]
    image = bias.double().reshape(old, old, -1)
    resized = torch.einsum("yi,xj,ijc->yxc", weights, weights, image)
    return resized.reshape(new * new, *bias.shape[1:]).to(bias.dtype)


def _spread(old: int, new: int) -> Tensor:
    """Offsets -old .. old as places whose last is about `new`: partial sums of a geometric series, its ratio found by halving."""
    left, right = 1.01, 1.5
    while right - left > 1e-6:
        ratio = (left + right) / 2
        if (1 - ratio**old) / (1 - ratio) > new:
            right = ratio
        else:
            left = ratio
    places = torch.cumsum(ratio ** torch.arange(old, dtype=torch.float64), 0)
    return torch.cat([-places.flip(0), torch.zeros(1, dtype=torch.float64), places])


def _basis(x: Tensor, knots: Tensor) -> Tensor:
    """Values of the B-splines over `knots` at x, which is kept within them: ``[len(x), len(knots) - DEGREE - 1]``."""
    x = x.clamp(knots[0], knots[-1])[:, None]
    interval = torch.searchsorted(knots, x, right=True) - 1
    interval = interval.clamp(DEGREE, len(knots) - DEGREE - 2)  # the last place belongs to the last interval
    values = torch.zeros(len(x), len(knots) - 1, dtype=x.dtype).scatter_(1, interval, 1.0)
    for d in range(1, DEGREE + 1):
        rise, fall = knots[d:-1] - knots[: -d - 1], knots[d + 1 :] - knots[1:-d]
        up = torch.where(rise > 0, (x - knots[: -d - 1]) / rise.clamp(min=1e-30), 0.0)
        down = torch.where(fall > 0, (knots[d + 1 :] - x) / fall.clamp(min=1e-30), 0.0)
        values = up * values[:, :-1] + down * values[:, 1:]
    return values
