"""Features of all processes of a group, for losses whose negatives are those of every process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather_features", "world"]


def world(group: object | None = None) -> tuple[int, int]:
    """(rank, size) of this process in `group`, by default in all; (0, 1) where torch.distributed is not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)  # type: ignore[arg-type]


def gather_features(x: Tensor, group: object | None = None) -> Tensor:
    """The rows of all processes, in the order of their ranks, with a gradient.

    The gradient of a row is the sum of what every process's loss gives it. So where each process computes the loss of its own rows
    against all, the mean of the processes' gradients, which DDP takes, is the gradient of the loss over the whole batch.

    Args:
        x: ``[rows, dim]``, equally many on every process. group: of processes; default: all.

    Returns: ``[size * rows, dim]``; x itself where there is one process.
    Raises: ValueError, on every process, where the numbers of rows differ. Finding out waits for the device.
    """
    _, size = world(group)
    if size == 1:
        return x
    rows = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(size)]
    dist.all_gather(rows, torch.tensor([x.shape[0]], device=x.device), group=group)
    counts = [int(n) for n in rows]
    if len(set(counts)) > 1:
        raise ValueError(f"x must have equally many rows on every process; received {counts} by rank: drop the last batch.")
    return _Gather.apply(x, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.rows = group, x.shape[0]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world(group)[1])]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        first = world(ctx.group)[0] * ctx.rows
        return grad[first : first + ctx.rows], None
