"""Attention pooling over packed rows: a few queries, the same for every segment, read its rows once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vlp_fast.ops import _attention_pool_torch
from vlp_fast.ops._autocast import autocast_to_compute
from vlp_fast.ops._backends import choose_own_backend
from vlp_fast.segments import Segments

__all__ = ["attention_pool"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def attention_pool(
    x: Tensor, queries: Tensor, segments: Segments, *, eps: float | None = None, backend: str | None = None
) -> Tensor:
    """For each segment and query, the average of the segment's rows weighted by a softmax of their products with the query.

    Equivalent to: ``softmax(queries @ n.T) @ n`` for the rows n of each segment, where n is
    ``F.layer_norm(x, [dim], eps=eps)``, or x itself where eps is None. One head of attention whose keys and values are the rows
    themselves: projections of keys, queries and values, a softmax scale and the norm's affine part fold into the queries before
    and into the result after (`vlp_fast.modules.AttentionalPooler` does so), so that K and V are never formed.

    Args:
        x: ``[rows, dim]``, packed by `segments`. queries: ``[num_queries, dim]``, one per head and pooled row.
        segments: whose rows are averaged. eps: added to the variance of a row; None leaves the norm out.
        backend: "triton", "torch" or None for the device's default.

    Returns:
        ``[segments, num_queries, dim]`` in x's dtype. An empty segment gives zeros.

    Raises:
        ValueError: shapes, dtypes, devices or sizes that break a rule above, named in the message; the triton backend needs a dim
            that is a multiple of 8.
        RuntimeError: a backend that cannot run here.

    Memory: two numbers per row and the result; the backward adds the gradients. x is read once forward, and once backward,
    which writes its gradient (triton: once for every 16 queries). No atomics: the same inputs give the same bits.
    Source: Yu et al., CoCa (2022), section 3.2 (attentional pooling).
    """
    x, queries = autocast_to_compute(x, queries)  # type: ignore[assignment]
    name = choose_own_backend(backend, x.device.type, "attention_pool")
    _check(x, queries, segments, eps, name)
    lengths = list(segments.lengths) if name == "torch" else []
    return _forward(x, queries, segments.offsets, lengths, segments.max_length, eps, name)[0]


def _check(x: Tensor, queries: Tensor, segments: Segments, eps: float | None, backend: str) -> None:
    for name, tensor in (("x", x), ("queries", queries)):
        if tensor.dim() != 2:
            raise ValueError(f"{name} must be packed as [rows, dim]; received shape {list(tensor.shape)}.")
    if queries.device != x.device or queries.dtype != x.dtype or segments.device != x.device:
        raise ValueError(
            f"x, queries and segments must share one device, and x and queries one dtype; x is {x.dtype} on {x.device}, queries "
            f"{queries.dtype} on {queries.device}, segments on {segments.device}."
        )
    if queries.shape[1] != x.shape[1]:
        raise ValueError(f"queries must have x's width {x.shape[1]}; received {queries.shape[1]}.")
    if x.shape[0] != segments.rows:
        raise ValueError(f"x must hold the rows of the segments; it has {x.shape[0]} rows, the segments {segments.rows}.")
    if eps is not None and not eps >= 0.0:
        raise ValueError(f"eps must be at least 0; received {eps}.")
    if backend == "triton":
        if x.dtype not in DTYPES:
            raise ValueError(f"backend 'triton' computes in float32, float16 or bfloat16; received {x.dtype}.")
        if x.shape[1] % 8:
            raise ValueError(f"backend 'triton' needs a dim that is a multiple of 8; received {x.shape[1]}.")


@torch.library.custom_op("vlp_fast::attention_pool_forward_v1", mutates_args=())
def _forward(
    x: Tensor, queries: Tensor, offsets: Tensor, lengths: list[int], max_seqlen: int, eps: float | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend == "torch":
        return _attention_pool_torch.forward(x, queries, lengths, eps)
    from vlp_fast.kernels.attention_pool import attention_pool_forward

    out, lse, mean, rstd = attention_pool_forward(x, queries, offsets, max_seqlen, eps)
    nothing = x.new_empty(0, dtype=torch.float32)
    return out, lse, nothing if mean is None else mean, nothing.clone() if rstd is None else rstd


@_forward.register_fake
def _(x, queries, offsets, lengths, max_seqlen, eps, backend):
    segments, (num_queries, dim) = offsets.shape[0] - 1, queries.shape
    statistic = _attention_pool_torch.statistics(x.dtype)
    return (
        x.new_empty(segments, num_queries, dim),
        x.new_empty((segments, num_queries), dtype=statistic),
        *(x.new_empty(0 if eps is None else x.shape[0], dtype=statistic) for _ in range(2)),
    )


@torch.library.custom_op("vlp_fast::attention_pool_backward_v1", mutates_args=())
def _backward(
    dout: Tensor,
    x: Tensor,
    queries: Tensor,
    out: Tensor,
    lse: Tensor,
    mean: Tensor,
    rstd: Tensor,
    offsets: Tensor,
    lengths: list[int],
    max_seqlen: int,
    eps: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "torch":
        return _attention_pool_torch.backward(dout, x, queries, mean, rstd, lengths, eps)
    from vlp_fast.kernels.attention_pool import attention_pool_backward

    has_norm = eps is not None
    return attention_pool_backward(
        dout, x, queries, out, lse, mean if has_norm else None, rstd if has_norm else None, offsets, max_seqlen
    )


@_backward.register_fake
def _(dout, x, queries, *rest):
    return x.new_empty(x.shape), queries.new_empty(queries.shape)


def _setup_context(ctx, inputs, output):
    x, queries, offsets, lengths, max_seqlen, eps, backend = inputs
    out, lse, mean, rstd = output
    ctx.save_for_backward(x, queries, out, lse, mean, rstd, offsets)
    ctx.mark_non_differentiable(lse, mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.scalars = (lengths, max_seqlen, eps, backend)


def _grad(ctx, dout, *_):
    if dout is None:
        return (None,) * 7
    dx, dqueries = _backward(dout, *ctx.saved_tensors, *ctx.scalars)
    return dx, dqueries, None, None, None, None, None


_forward.register_autograd(_grad, setup_context=_setup_context)


@register_flop_formula(torch.ops.vlp_fast.attention_pool_forward_v1)
def _forward_flops(x_shape, queries_shape, *args, out_shape=None, **kwargs) -> int:
    """Two narrow products over the rows: scores and weighted sum."""
    return 4 * x_shape[0] * queries_shape[0] * queries_shape[1]


@register_flop_formula(torch.ops.vlp_fast.attention_pool_backward_v1)
def _backward_flops(dout_shape, x_shape, queries_shape, *args, out_shape=None, **kwargs) -> int:
    """Five: scores again, their gradient from dout, the gradient of the rows as keys and as values, that of the queries."""
    return 10 * x_shape[0] * queries_shape[0] * queries_shape[1]
