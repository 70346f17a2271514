"""Attention through xformers and flash-attn: their variable-length calls, for the plans those can express."""

from __future__ import annotations

import torch
from torch import Tensor

from vlp_fast.attention_plan import AttentionPlan

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scale: float,
    dropout_p: float,
    return_lse: bool,
    backend: str,
) -> Tensor:
    """Plans in which query segment i reads key segment i, all edges full or all causal.

    Raises:
        NotImplementedError: any other plan, or an option the library lacks, said in a sentence.
    """
    facts = plan.facts
    if not facts.one_to_one:
        raise NotImplementedError(
            f"backend {backend!r} expresses only plans in which query segment i reads key segment i; use 'triton' or 'torch' for this plan."
        )
    if facts.has_causal and not facts.all_causal:
        raise NotImplementedError(f"backend {backend!r} cannot mix causal and full edges in one call; use 'triton' or 'torch'.")
    if q.dtype not in (torch.float16, torch.bfloat16) and backend == "flash_attn":
        raise NotImplementedError(f"backend 'flash_attn' computes in float16 or bfloat16; received {q.dtype}.")
    if return_lse:
        raise NotImplementedError(
            f"backend {backend!r} does not return the log-sum-exp with a gradient; use 'triton' or 'torch'."
        )
    if plan.shares_queries:  # neither library reads one set of queries for many sequences
        q = q.repeat(len(plan.query), 1, 1)
    run = _flash_attn if backend == "flash_attn" else _xformers
    return run(q, k, v, plan, scale, dropout_p)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, dropout_p: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    cu_q, cu_k, max_q, max_k = plan.cu_seqlens()
    return flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=dropout_p, softmax_scale=scale, causal=plan.facts.has_causal
    )


def _xformers(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, dropout_p: float) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    bias = BlockDiagonalMask.from_seqlens(list(plan.query.lengths), list(plan.key.lengths), device=q.device)
    if plan.facts.has_causal:
        bias = bias.make_causal_from_bottomright()
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias, p=dropout_p, scale=scale)[0]
