"""Attention of a decoding step: new rows against caches that grow, and images that the beams of a caption share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vlp_fast.decode_plan import DecodePlan
from vlp_fast.ops import _decode_attention_torch
from vlp_fast.ops._autocast import autocast_to_compute
from vlp_fast.ops._backends import choose_own_backend
from vlp_fast.ops._direct import runs_directly

__all__ = ["bind_decode_attention", "decode_attention"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: DecodePlan,
    *,
    softmax_scale: float | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softmax_scale * q k^T) v, where each query segment reads the slots its edges name, as long as they are now.

    Equivalent to: `vlp_fast.reference.decode_attention`. Forward only.

    Args:
        q: ``[rows, num_heads, head_dim]``, packed by ``plan.query``.
        k, v: ``[buffer_rows, num_heads_k, head_dim]``, the buffers that the slots lie in; `num_heads_k` divides `num_heads`. Rows
            outside the slots' lengths are never read, whatever they hold.
        plan: who reads which slots, all in one softmax, none masked. softmax_scale: above 0; default ``head_dim ** -0.5``.
        backend: "triton", "torch" or None for the device's default. return_lse: also return the log of the sum of exponentials.

    Returns:
        out ``[rows, num_heads, head_dim]`` in q's dtype; with `return_lse` also lse fp32 ``[num_heads, rows]``. A row that reads no
        key gives zeros and -inf.

    Raises:
        ValueError: shapes, dtypes, devices or sizes that break a rule above, named in the message.
        RuntimeError: an input that needs a gradient while gradients are recorded, or a backend that cannot run here.

    Memory: regular slots are read in place; an image is read once for all beams of its caption that are one segment (triton: from
    the cache for those that are not). The triton backend reads lengths on the device and launches by capacities, so that a step
    can be captured in a CUDA graph. Parts of split keys are put together in their order: the same inputs give the same bits.
    Source: Dao et al., Flash-Decoding for long-context inference (2023), for the split over keys.
    """
    q, k, v = autocast_to_compute(q, k, v)  # type: ignore[assignment]
    name = choose_own_backend(backend, q.device.type, "decode_attention")
    scale = float(q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    _check(q, k, v, plan, scale, name)
    tensors = (plan.query.offsets, plan.edge_offsets, plan.edge_key, plan.key_starts, plan.key_lengths)
    max_keys = plan.max_keys if name == "torch" else plan.most_keys
    parts = plan.parts if name == "torch" else []
    if runs_directly(name, q, k, v):
        sizes = (len(plan.query), plan.query.max_length, max_keys)
        out, lse = _decode_attention_torch.forward(q, k, v, tensors, parts, *sizes, scale, return_lse)
    else:
        out, lse = _decode(q, k, v, *tensors, parts, plan.query.max_length, max_keys, plan.pairs, scale, return_lse, name)
    return (out, lse.T) if return_lse else out


def bind_decode_attention(k: Tensor, v: Tensor, plan: DecodePlan, *, backend: str | None = None) -> Callable[[Tensor], Tensor]:
    """`decode_attention` of these buffers as a function of q alone, which may be of another dtype: out is of q's.

    For the steps of a text: checks are made now, and buffers and plan stay the same but for what is written into them and `plan.advance`.
    Arguments and errors as in `decode_attention`; a q of another shape than the plan's rows and the buffers' heads is an error of PyTorch.
    """
    name = choose_own_backend(backend, k.device.type, "decode_attention")
    if (
        name == "torch"
        and plan.device == k.device
        and not torch.is_autocast_enabled(k.device.type)
        and runs_directly(name, k, v)
    ):
        bound = _decode_attention_torch.bind(k, v, plan)
        if bound is not None:
            return bound

    def call(q: Tensor) -> Tensor:
        out = decode_attention(q.to(k.dtype), k, v, plan, backend=backend)
        assert isinstance(out, Tensor)
        return out.to(q.dtype)

    return call


def _check(q: Tensor, k: Tensor, v: Tensor, plan: DecodePlan, scale: float, backend: str) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must be packed as [rows, heads, head_dim]; received shape {list(tensor.shape)}.")
        if tensor.device != q.device or tensor.dtype != q.dtype:
            raise ValueError(
                f"q, k and v must share one device and dtype; q is {q.dtype} on {q.device}, {name} is {tensor.dtype} on {tensor.device}."
            )
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(
                f"decode_attention has no backward; {name} needs a gradient: call it under torch.no_grad() or use ops.attention."
            )
    if plan.device != q.device:
        raise ValueError(f"plan must be on the device of q; the plan is on {plan.device}, q on {q.device}.")
    if k.shape != v.shape or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"k and v must have one shape and q's head_dim {q.shape[2]}; received {list(k.shape)} and {list(v.shape)}."
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"num_heads_k must divide num_heads; received {k.shape[1]} key heads for {q.shape[1]} query heads.")
    if q.shape[0] != plan.query.rows:
        raise ValueError(
            f"q must hold the rows of the plan's segments; it has {q.shape[0]} rows, the segments {plan.query.rows}."
        )
    if k.shape[0] < plan.buffer_rows:
        raise ValueError(f"k and v must hold the plan's slots, {plan.buffer_rows} rows; they have {k.shape[0]}.")
    if not scale > 0.0:
        raise ValueError(f"softmax_scale must be above 0; received {scale}.")
    if backend == "triton":
        if q.dtype not in DTYPES:
            raise ValueError(f"backend 'triton' computes in float32, float16 or bfloat16; received {q.dtype}.")
        if not 16 <= q.shape[2] <= 128 or q.shape[2] % 8:
            raise ValueError(
                f"backend 'triton' needs a head_dim that is a multiple of 8 from 16 to 128; received {q.shape[2]}."
            )


@torch.library.custom_op("vlp_fast::decode_attention_v1", mutates_args=())
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offsets: Tensor,
    edge_offsets: Tensor,
    edge_key: Tensor,
    key_starts: Tensor,
    key_lengths: Tensor,
    parts: list[int],
    max_rows: int,
    max_keys: int,
    pairs: int,
    softmax_scale: float,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tensors = (query_offsets, edge_offsets, edge_key, key_starts, key_lengths)
    if backend == "torch":
        segments = query_offsets.numel() - 1
        return _decode_attention_torch.forward(q, k, v, tensors, parts, segments, max_rows, max_keys, softmax_scale, return_lse)
    from vlp_fast.kernels.decode_attention import decode_attention as launch

    out, lse = launch(q, k, v, *tensors, max_rows, max_keys, softmax_scale)
    return out, lse if return_lse else lse.new_empty(0)


@_decode.register_fake
def _(q, k, v, query_offsets, edge_offsets, edge_key, key_starts, key_lengths, *settings):
    return_lse = settings[5]
    return q.new_empty(q.shape), _decode_attention_torch.lse_like(q, return_lse)


@register_flop_formula(torch.ops.vlp_fast.decode_attention_v1)
def _flops(q_shape, *args, out_shape=None, **kwargs) -> int:
    """Two products over the pairs of query rows and keys."""
    pairs = args[10]
    return 4 * pairs * q_shape[1] * q_shape[2]
