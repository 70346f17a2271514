"""bf16 attention on a CPU as batched products: PyTorch's fused one computes at a seventh of its products' rate there.

Scores are bf16, their softmax is summed in fp32, weights are bf16 again: the roundings of the models' published code under autocast.
What is kept for the backward is q, k and v, and which weights dropout keeps; scores are formed again, those of some groups at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["attention", "is_for_products"]

# scores below which the fused call is as fast (measured at 2 to 12 heads of 64), alone and with its backward
LEAST, LEAST_LEARNING = 3 * 2**15, 2**13
BLOCK = 2**20  # scores formed at once, so that they stay in a core's cache


@torch.compiler.assume_constant_result
def _products_are_faster() -> bool:
    """AVX-512 with bf16 products and no tiles (AMX), for which PyTorch's fused attention has a path of its own."""
    cpu = torch.cpu
    return bool(
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and cpu._is_avx512_bf16_supported()
        and not cpu._is_amx_tile_supported()
    )


def is_for_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> bool:
    """Whether `attention` is for such operands: bf16 on such a CPU, as many heads of q as of k, a mask of keys or none."""
    least = LEAST_LEARNING if dropout_p > 0.0 or _learns(q, k, v) else LEAST
    return (
        q.dtype == torch.bfloat16
        and q.device.type == "cpu"
        and q.shape[1] == k.shape[1]
        and (mask is None or mask.shape[2] == 1)
        and q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] >= least
        and _products_are_faster()
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``[groups, heads, seqlen_q, head_dim]`` in, the same out.

    mask: bool ``[groups or 1, 1, 1, seqlen_k]``, False where no query reads. causal: query i reads keys up to i. keep: bool
    ``[groups, heads, seqlen_q, seqlen_k]``, False where dropout with `dropout_p` makes a weight 0; None: no dropout.
    """
    kept_scale = 1.0 / (1.0 - dropout_p)
    if not _learns(q, k, v):  # what autograd.Function costs a call is a tenth of an image's attention
        return _forward(q, k, v, mask, causal, scale, keep, kept_scale)
    out: Tensor = _Attention.apply(q, k, v, mask, causal, scale, keep, kept_scale)
    return out


def _learns(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _blocks(q: Tensor, k: Tensor) -> list[slice]:
    step = max(1, BLOCK // (q.shape[1] * q.shape[2] * k.shape[2]))
    return [slice(start, start + step) for start in range(0, q.shape[0], step)]


def _by_head(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[2], x.shape[3])


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b, scaled before it is rounded."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0.0, alpha=scale)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, heads: int) -> Tensor:
    scores = _scaled(q, k.transpose(1, 2), scale)
    if mask is not None:
        scores.unflatten(0, (-1, heads)).masked_fill_(~mask, -torch.inf)
    if causal:
        scores.masked_fill_(torch.ones(scores.shape[1:], dtype=torch.bool).triu_(1), -torch.inf)
    return torch.ops.aten._softmax(scores, -1, False)  # unlike torch.softmax, bf16 under autocast too


def _part(mask: Tensor | None, block: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[0] == 1 else mask[block]


def _kept(weights: Tensor, keep: Tensor | None, block: slice) -> Tensor:
    return weights if keep is None else weights * keep[block].flatten(0, 1)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    keep: Tensor | None,
    kept_scale: float,
) -> Tensor:
    groups, heads, length, head_dim = q.shape
    out = q.new_empty(groups, length, heads, head_dim)
    for block in _blocks(q, k):
        qb, kb, vb = (_by_head(x[block]) for x in (q, k, v))
        weights = _kept(_weights(qb, kb, _part(mask, block), causal, scale, heads), keep, block)
        out[block] = _scaled(weights, vb, kept_scale).unflatten(0, (-1, heads)).transpose(1, 2)
    return out.transpose(1, 2)


class _Attention(torch.autograd.Function):
    forward = staticmethod(_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, v, mask, ctx.causal, ctx.scale, keep, ctx.kept_scale = inputs
        ctx.save_for_backward(q, k, v, mask, keep)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, keep = ctx.saved_tensors
        heads = q.shape[1]
        dq, dk, dv = (x.new_empty(x.shape[0], x.shape[2], heads, x.shape[3]) for x in (q, k, v))
        for block in _blocks(q, k):
            qb, kb, vb, db = (_by_head(x[block]) for x in (q, k, v, dout))
            weights = _weights(qb, kb, _part(mask, block), ctx.causal, ctx.scale, heads)
            dweights = _kept(_scaled(db, vb.transpose(1, 2), ctx.kept_scale), keep, block)
            dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
            for out, found in (
                (dq, _scaled(dscores, kb, ctx.scale)),
                (dk, _scaled(dscores.transpose(1, 2), qb, ctx.scale)),
                (dv, _scaled(_kept(weights, keep, block).transpose(1, 2), db, ctx.kept_scale)),
            ):
                out[block] = found.unflatten(0, (-1, heads)).transpose(1, 2)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None, None, None, None, None
