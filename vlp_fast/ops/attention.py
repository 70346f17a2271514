"""Attention over packed rows: validation, choice of backend, and the registered torch ops of the Triton kernel."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.ops import _attention_libraries, _attention_torch
from vlp_fast.ops._autocast import autocast_to_compute
from vlp_fast.ops._backends import choose_backend

__all__ = ["attention"]

HEAD_DIMS = "a multiple of 8 from 16 to 128"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softmax_scale * q k^T) v, where each query segment reads the key segments its edges name.

    Equivalent to: `vlp_fast.reference.attention`.

    Args:
        q: ``[rows_q, num_heads, head_dim]``, packed by ``plan.query``; with ``AttentionPlan.pooling`` the rows that all segments
            share, ``[plan.query_rows, ...]``. Strided views (of one fused qkv buffer) are not copied.
        k, v: ``[rows_k, num_heads_k, head_dim]``, packed by ``plan.key``; `num_heads_k` divides `num_heads` (multi-query: 1).
        plan: who reads whom. Causal edges are aligned to the bottom right: the last query row reads all keys.
        softmax_scale: above 0; default ``head_dim ** -0.5``.
        dropout_p: in [0, 1): weights set to 0; the rest is divided by ``1 - dropout_p``. The mask is drawn from torch's default
            generator (one number), is the same in forward and backward and for every backend of ours.
        backend: "triton", "torch", "xformers", "flash_attn", or None for the device's default (`vlp-fast info` tells).
        return_lse: also return the log of the sum of exponentials, natural logarithm, fp32.

    Returns:
        out ``[rows_q, num_heads, head_dim]`` in q's dtype; with `return_lse` also lse ``[num_heads, rows_q]``. Empty segments are
        allowed; a row that reads no key gives zeros, lse -inf and zero gradients.

    Raises:
        ValueError: shapes, dtypes, devices or sizes that break a rule above, named in the message.
        RuntimeError: a backend that cannot run here.
        NotImplementedError: a plan or option that the chosen library cannot express.

    Memory: the triton backend keeps out and lse, never a score; its backward uses no atomics, so the same inputs give the same
    bits. The torch backend pads inside the call only, and keeps scores only with dropout or `return_lse`.
    Source: Dao, FlashAttention-2 (2023), section 3; varlen batching as in its ``cu_seqlens`` interface.
    """
    q, k, v = autocast_to_compute(q, k, v)  # type: ignore[assignment]
    name = choose_backend(backend, q.device.type)
    scale = float(q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    _check(q, k, v, plan, scale, dropout_p)
    seed = torch.randint(2**62, (1,), dtype=torch.int64, device=q.device) if dropout_p > 0.0 else None
    if name == "torch":
        return _attention_torch.attention(q, k, v, plan, scale, dropout_p, seed, return_lse)
    if name != "triton":
        return _attention_libraries.attention(q, k, v, plan, scale, dropout_p, return_lse, name)
    _check_triton(q)
    out, lse = _attention_forward(
        q,
        k,
        v,
        plan.query.offsets,
        plan.key.offsets,
        plan.edge_offsets,
        plan.edge_key,
        plan.edge_causal,
        plan.key_edge_offsets,
        plan.key_edge_query,
        plan.key_edge_causal,
        seed,
        plan.query.rows,
        plan.facts.max_seqlen_q,
        plan.facts.max_seqlen_k,
        plan.pairs,
        scale,
        dropout_p,
        plan.facts.has_causal,
        plan.facts.one_to_one,
    )
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, dropout_p: float) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must be packed as [rows, heads, head_dim]; received shape {list(tensor.shape)}.")
        if tensor.device != q.device or tensor.dtype != q.dtype:
            raise ValueError(
                f"q, k and v must share one device and dtype; q is {q.dtype} on {q.device}, {name} is {tensor.dtype} on {tensor.device}."
            )
    if plan.device != q.device:
        raise ValueError(
            f"plan must be on the device of q; the plan is on {plan.device}, q on {q.device}: use plan.to({str(q.device)!r})."
        )
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape; received {list(k.shape)} and {list(v.shape)}.")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"q and k must have the same head_dim; received {q.shape[2]} and {k.shape[2]}.")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"num_heads_k must divide num_heads; received {k.shape[1]} key heads for {q.shape[1]} query heads.")
    for name, tensor, rows in (("q", q, plan.query_rows), ("k", k, plan.key.rows)):
        if tensor.shape[0] != rows:
            raise ValueError(
                f"{name} must hold the rows of the plan's segments; it has {tensor.shape[0]} rows, the segments {rows}."
            )
    if not scale > 0.0:
        raise ValueError(f"softmax_scale must be above 0; received {scale}.")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1); received {dropout_p}.")


def _check_triton(q: Tensor) -> None:
    if q.dtype not in DTYPES:
        raise ValueError(f"backend 'triton' computes in float32, float16 or bfloat16; received {q.dtype}.")
    if not 16 <= q.shape[2] <= 128 or q.shape[2] % 8:
        raise ValueError(f"backend 'triton' needs a head_dim that is {HEAD_DIMS}; received {q.shape[2]}.")


@torch.library.custom_op("vlp_fast::attention_forward_v2", mutates_args=())
def _attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    edge_offsets: Tensor,
    edge_key: Tensor,
    edge_causal: Tensor,
    key_edge_offsets: Tensor,
    key_edge_query: Tensor,
    key_edge_causal: Tensor,
    seed: Tensor | None,
    rows_q: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    pairs: int,
    softmax_scale: float,
    dropout_p: float,
    has_causal: bool,
    one_to_one: bool,
) -> tuple[Tensor, Tensor]:
    from vlp_fast.kernels.attention_forward import attention_forward

    return attention_forward(
        q,
        k,
        v,
        query_offsets,
        key_offsets,
        edge_offsets,
        edge_key,
        edge_causal,
        seed,
        rows_q,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        dropout_p,
        has_causal,
        one_to_one,
    )


@_attention_forward.register_fake
def _(q, k, v, *plan_and_scalars):
    rows_q = plan_and_scalars[9]
    return q.new_empty((rows_q, *q.shape[1:])), q.new_empty((q.shape[1], rows_q), dtype=torch.float32)


@torch.library.custom_op("vlp_fast::attention_backward_v2", mutates_args=())
def _attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    edge_offsets: Tensor,
    edge_key: Tensor,
    edge_causal: Tensor,
    key_edge_offsets: Tensor,
    key_edge_query: Tensor,
    key_edge_causal: Tensor,
    seed: Tensor | None,
    rows_q: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    pairs: int,
    softmax_scale: float,
    dropout_p: float,
    has_causal: bool,
    one_to_one: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from vlp_fast.kernels.attention_backward import attention_backward

    return attention_backward(
        dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        query_offsets,
        key_offsets,
        edge_offsets,
        edge_key,
        edge_causal,
        key_edge_offsets,
        key_edge_query,
        key_edge_causal,
        seed,
        rows_q,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        dropout_p,
        has_causal,
        one_to_one,
    )


@_attention_backward.register_fake
def _(dout, dlse, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, *plan_and_seed = inputs[:12]
    ctx.save_for_backward(q, k, v, *output, *plan_and_seed)
    ctx.scalars = inputs[12:]
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    q, k, v, out, lse, *plan_and_seed = ctx.saved_tensors
    nothing = (None,) * 17
    if dout is None and dlse is None:
        return (None, None, None, *nothing)
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv = _attention_backward(dout, dlse, q, k, v, out, lse, *plan_and_seed, *ctx.scalars)
    return (dq, dk, dv, *nothing)


_attention_forward.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.vlp_fast.attention_forward_v2)
def _forward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Two products over the pairs inside the edges' masks, 2 FLOPs a multiply-add."""
    pairs = args[12]
    return 4 * pairs * q_shape[1] * q_shape[2]


@register_flop_formula(torch.ops.vlp_fast.attention_backward_v2)
def _backward_flops(dout_shape, dlse_shape, q_shape, *args, out_shape=None, **kwargs) -> int:
    """Five products by convention (scores again, dv, dp, dq, dk); the two-kernel backward forms two of them twice."""
    pairs = args[16]
    return 10 * pairs * q_shape[1] * q_shape[2]
