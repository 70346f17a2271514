"""The torch backend of attention pooling: segments in groups that fit the caches, each read from memory once."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["backward", "forward", "statistics"]

GROUP_ROWS = 1024  # rows worked on together: a few MB, which stay in the caches between the steps


def statistics(dtype: torch.dtype) -> torch.dtype:
    """Of means, deviations and log-sum-exps."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(x: Tensor, queries: Tensor, lengths: list[int], eps: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out ``[segments, num_queries, dim]``, lse ``[segments, num_queries]``, mean and rstd ``[rows]`` (empty without a norm)."""
    dtype, (num_queries, dim), n = statistics(x.dtype), queries.shape, len(lengths)
    out = x.new_zeros(n, num_queries, dim)
    lse = x.new_full((n, num_queries), -math.inf, dtype=dtype)
    rows = 0 if eps is None else x.shape[0]
    mean, rstd = x.new_empty(rows, dtype=dtype), x.new_empty(rows, dtype=dtype)
    q, buffer = queries.to(dtype), _buffer(x, lengths)
    for segment, count, first, length in _groups(lengths):
        part = slice(first, first + count * length)
        normal = x[part].to(dtype)
        if eps is not None:
            torch.mean(normal, 1, out=mean[part])
            normal = torch.sub(normal, mean[part, None], out=buffer[: count * length])
            square = torch.linalg.vector_norm(normal, dim=1).square_()
            torch.rsqrt(square.div_(dim).add_(eps), out=rstd[part])
        scores = normal @ q.T
        if eps is not None:  # rows keep their differences from the mean; rstd enters with the scores and with the weights
            scores.mul_(rstd[part, None])
        scores = scores.view(count, length, num_queries)
        lse[segment : segment + count] = torch.logsumexp(scores, 1)
        weights = torch.softmax(scores, 1)
        if eps is not None:
            weights.mul_(rstd[part].view(count, length, 1))
        out[segment : segment + count] = weights.transpose(1, 2) @ normal.view(count, length, dim)
    return out, lse, mean, rstd


def backward(
    dout: Tensor, x: Tensor, queries: Tensor, mean: Tensor, rstd: Tensor, lengths: list[int], eps: float | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and queries. The two means of LayerNorm's gradient come from products that are there already.

    The weights are a new softmax of the new scores, so that they sum to 1 however large the scores and their rounding are.
    """
    dtype, (num_queries, dim) = statistics(x.dtype), queries.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dqueries = torch.zeros(queries.shape, dtype=dtype, device=x.device)
    q, dout = queries.to(dtype), dout.to(dtype)
    buffer, drows_buffer = _buffer(x, lengths), _buffer(x, lengths)
    for segment, count, first, length in _groups(lengths):
        part, own = slice(first, first + count * length), slice(segment, segment + count)
        normal = x[part].to(dtype)
        if eps is not None:
            normal = torch.sub(normal, mean[part, None], out=buffer[: count * length]).mul_(rstd[part, None])
        grouped = normal.view(count, length, dim)
        both = torch.cat([q.expand(count, -1, -1), dout[own]], 1)  # [count, 2 * num_queries, dim]
        scores, dweights = (grouped @ both.transpose(1, 2)).split(num_queries, 2)  # [count, length, num_queries]
        weights = torch.softmax(scores, 1)
        dscores = weights * dweights
        dscores.addcmul_(weights, dscores.sum(1, keepdim=True), value=-1.0)
        dqueries.addmm_(dscores.flatten(0, 1).T, normal)
        factors = torch.cat([dscores, weights], 2)  # of `both`, in the rows' gradient
        if eps is not None:
            dmean = (factors @ both.sum(2, keepdim=True)).div_(-dim)  # [count, length, 1]
            dscale = (dscores * scores).add_(dweights.mul_(weights)).sum(2, keepdim=True).div_(dim)
            factors, both = torch.cat([factors, dmean], 2), torch.cat([both, both.new_ones(count, 1, dim)], 1)
            factors.mul_(rstd[part].view(count, length, 1))
        drows = torch.bmm(factors, both, out=drows_buffer[: count * length].view(count, length, dim))
        if eps is not None:
            drows.addcmul_(grouped, dscale.mul_(rstd[part].view(count, length, 1)), value=-1.0)
        dx[part] = drows.flatten(0, 1)
    return dx, dqueries.to(queries.dtype)


def _buffer(x: Tensor, lengths: list[int]) -> Tensor:
    """Room for the rows of any group: memory that stays in the caches from one to the next."""
    rows = max((count * length for _, count, _, length in _groups(lengths)), default=0)
    return torch.empty(rows, x.shape[1], dtype=statistics(x.dtype), device=x.device)


def _groups(lengths: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """(first segment, segments, first row, rows of each): neighbours of one length together, empty segments left out."""
    segment = first = 0
    while segment < len(lengths):
        length, count = lengths[segment], 1
        while segment + count < len(lengths) and lengths[segment + count] == length and (count + 1) * length <= GROUP_ROWS:
            count += 1
        if length:
            yield segment, count, first, length
        segment, first = segment + count, first + count * length
