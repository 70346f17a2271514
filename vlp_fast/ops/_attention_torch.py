"""The torch backend of attention, traceable by torch.compile: scaled_dot_product_attention over the plan's padded groups.

bf16 on CPUs where that is slow goes to batched products (`_attention_bf16`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.ops import _attention_bf16
from vlp_fast.padding import PaddedBucket, padded_plan

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    return_lse: bool,
    biases: Sequence[Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The torch twin of `vlp_fast.reference.attention`, on arguments already checked.

    biases: added to the scores of each bucket, ``[groups or 1, heads, seqlen_q, seqlen_k]``; for full edges, without dropout or lse.
    """
    padded = padded_plan(plan)
    outs, lses = [], []
    hashes = None if seed is None else _hash_heads(seed, q.shape[1])
    for number, bucket in enumerate(padded.buckets):
        if plan.shares_queries:
            qb = q.transpose(0, 1).expand(bucket.groups, -1, -1, -1)
        else:
            qb = _pack(q, bucket.query_rows, bucket.query_start, bucket.groups, bucket.seqlen_q)
        kb = _pack(k, bucket.key_rows, bucket.key_start, bucket.groups, bucket.seqlen_k)
        vb = _pack(v, bucket.key_rows, bucket.key_start, bucket.groups, bucket.seqlen_k)
        products = biases is None and not return_lse and _attention_bf16.is_for_products(qb, kb, vb, bucket.mask, dropout_p)
        if products:
            keep = None if hashes is None else _keep(hashes, bucket, dropout_p)
            out = _attention_bf16.attention(qb, kb, vb, bucket.mask, bucket.causal, scale, keep, dropout_p)
        elif dropout_p > 0.0 or return_lse:
            out, lse = _explicit(qb, kb, vb, bucket, scale, dropout_p, hashes)
            lses.append(lse.transpose(0, 1).reshape(q.shape[1], -1))  # [heads, slots]
        else:
            mask = bucket.mask
            if biases is not None:
                bias = biases[number].to(q.dtype)
                mask = bias if mask is None else bias.masked_fill(~mask, -math.inf)
            out = F.scaled_dot_product_attention(
                qb, kb, vb, attn_mask=mask, is_causal=bucket.causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        outs.append(out.transpose(1, 2).reshape(-1, q.shape[1], q.shape[2]))  # [slots, heads, head_dim]
    if padded.slots is None:
        return (outs[0], lses[0]) if return_lse else outs[0]
    out = torch.cat([*outs, q.new_zeros(1, q.shape[1], q.shape[2])]).index_select(0, padded.slots)
    if not return_lse:
        return out
    lse = torch.cat([*lses, torch.full((q.shape[1], 1), -math.inf, dtype=_statistics(q), device=q.device)], 1)
    return out, lse.index_select(1, padded.slots)


def _pack(x: Tensor, rows: Tensor, start: int, groups: int, length: int) -> Tensor:
    """``[rows, heads, head_dim]`` -> ``[groups, heads, length, head_dim]``, a view where the rows are consecutive."""
    picked = x.narrow(0, start, groups * length) if start >= 0 else x.index_select(0, rows)
    return picked.unflatten(0, (groups, length)).transpose(1, 2)


def _statistics(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, bucket: PaddedBucket, scale: float, dropout_p: float, hashes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores in memory: for dropout with a mask of our own, and for the log-sum-exp, neither of which SDPA offers."""
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).to(_statistics(q)) * scale  # [groups, heads, seqlen_q, seqlen_k]
    mask = bucket.mask
    if bucket.causal:
        mask = torch.ones(bucket.seqlen_q, bucket.seqlen_k, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    if dropout_p > 0.0:
        assert hashes is not None
        weights = weights * _keep(hashes, bucket, dropout_p) * (1.0 / (1.0 - dropout_p))
    return weights.to(q.dtype) @ v, lse


def _hash_heads(seed: Tensor, heads: int) -> Tensor:
    """Of `reference.dropout_keep`, what depends on seed and head: int32 ``[heads]``."""
    bits = seed.view(torch.int32)  # low half, high half (little-endian)
    head = torch.arange(heads, dtype=torch.int32, device=seed.device)
    return _mix(_mix(bits[0] ^ _signed(0x9E3779B9)) ^ bits[1] ^ (head * _signed(0x85EBCA77)))


def _keep(hashes: Tensor, bucket: PaddedBucket, dropout_p: float) -> Tensor:
    """`reference.dropout_keep` for every slot, bool ``[groups, heads, seqlen_q, seqlen_k]``, in int32 arithmetic that wraps."""
    query_rows = bucket.query_rows.to(torch.int32).view(bucket.groups, 1, bucket.seqlen_q)
    per_query = _mix(hashes[None, :, None] ^ query_rows)
    per_key = _mix(bucket.key_rows.to(torch.int32).view(bucket.groups, 1, 1, bucket.seqlen_k) ^ _signed(0xC2B2AE3D))
    hashed = _mix(per_query[..., None] ^ per_key)
    # unsigned comparison: flipping the sign bit orders int32 as uint32
    return (hashed ^ _signed(0x80000000)) >= _signed(int(dropout_p * 2**32) ^ 0x80000000)


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


def _mix(x: Tensor) -> Tensor:
    """murmur3's finaliser; x is given up."""
    x = x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_signed(0x85EBCA6B))
    x = x.bitwise_xor_((x >> 13).bitwise_and_(0x7FFFF)).mul_(_signed(0xC2B2AE35))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
