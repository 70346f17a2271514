"""The specification: every operation of the library in plain PyTorch, readable, differentiable, and exact in float64.

Kernels and fast backends are tested against this file. Nothing here is fast, and nothing here knows how others compute it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.decode_plan import DecodePlan
from vlp_fast.segments import Segments

__all__ = [
    "attention",
    "attention_pool",
    "contrastive_loss",
    "decode_attention",
    "distilled_contrastive_loss",
    "dropout_keep",
    "hard_negatives",
    "linear_cross_entropy",
    "multiway_layer_norm",
    "multiway_linear",
    "multiway_mlp",
    "sigmoid_contrastive_loss",
]

_MASK32 = 0xFFFFFFFF


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the keys that each query segment's edges name.

    Args:
        q: ``[plan.query_rows, num_heads, head_dim]``. k, v: ``[rows_k, num_heads_k, head_dim]``; `num_heads_k` divides `num_heads`, and
            query head h reads key head ``h * num_heads_k // num_heads``.
        plan: the graph; causal edges are aligned to the bottom right.
        softmax_scale: default ``head_dim ** -0.5``.
        dropout_p: probability with which a weight is set to 0; the rest is divided by ``1 - dropout_p``.
        seed: int64 ``[1]``; with `dropout_keep` it decides which weights are kept.
        return_lse: also return the log of the sum of exponentials (before dropout), natural logarithm.

    Returns:
        out ``[rows_q, num_heads, head_dim]``, and lse ``[num_heads, rows_q]`` if asked for. A row that reads no key gives zeros
        and -inf.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if plan.shares_queries:
        q = q.repeat(len(plan.query), 1, 1)
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out_parts, lse_parts = [], []
    edge_offsets, edge_key, edge_causal = (t.tolist() for t in (plan.edge_offsets, plan.edge_key, plan.edge_causal))
    key_starts = plan.key.host_offsets.tolist()
    for segment, length in enumerate(plan.query.lengths):
        first = int(plan.query.host_offsets[segment])
        rows = torch.arange(first, first + length, device=q.device)
        columns, visible = [], []
        for edge in range(edge_offsets[segment], edge_offsets[segment + 1]):
            j = edge_key[edge]
            keys = torch.arange(key_starts[j], key_starts[j + 1], device=q.device)
            last = (
                torch.arange(length, device=q.device) + len(keys) - length
                if edge_causal[edge]
                else rows.new_full((length,), len(keys))
            )
            columns.append(keys)
            visible.append(torch.arange(len(keys), device=q.device)[None, :] <= last[:, None])
        column = torch.cat(columns) if columns else rows.new_zeros(0)
        mask = torch.cat(visible, 1) if visible else torch.zeros(length, 0, dtype=torch.bool, device=q.device)
        k_heads = k[column].repeat_interleave(group, 1)  # [keys, heads, head_dim]
        v_heads = v[column].repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q[rows], k_heads) * scale
        scores = scores.masked_fill(~mask, -math.inf)
        none = ~mask.any(1)  # rows that read no key
        lse = torch.logsumexp(scores, -1) if column.numel() else scores.new_full((heads, length), -math.inf)
        weights = torch.exp(scores - lse.masked_fill(none, 0.0)[..., None])
        if dropout_p > 0.0:
            assert seed is not None
            keep = torch.stack([dropout_keep(seed, head, rows, column, dropout_p) for head in range(heads)])
            weights = weights * keep / (1.0 - dropout_p)
        out_parts.append(torch.einsum("hqk,khd->qhd", weights, v_heads))
        lse_parts.append(lse)
    out = torch.cat(out_parts) if out_parts else torch.zeros_like(q)
    if not return_lse:
        return out
    return out, torch.cat(lse_parts, 1) if lse_parts else q.new_zeros(heads, 0)


def dropout_keep(seed: Tensor, head: int | Tensor, query_rows: Tensor, key_rows: Tensor, dropout_p: float) -> Tensor:
    """Which attention weights are kept: bool ``[..., query rows, key rows]``, a function of (seed, head, query row, key row) only.

    Every weight gets 32 bits by hashing: ``mix(hash(seed, head, query row) ^ hash(key row))`` with murmur3's 32-bit finaliser
    `mix`; it is kept when they are at least ``dropout_p * 2**32``. So the mask is the same in the forward, in the backward and for
    every tile size.

    Args:
        seed: int64 ``[1]``. head: a head, or int64 ``[heads, 1, 1]``. query_rows, key_rows: int64 packed rows, 1-D.
    """
    low, high = seed.reshape(()) & _MASK32, (seed.reshape(()) >> 32) & _MASK32
    per_head = _mix32(
        _mix32(low ^ 0x9E3779B9) ^ high ^ ((torch.as_tensor(head, device=query_rows.device) * 0x85EBCA77) & _MASK32)
    )
    per_query = _mix32(per_head ^ query_rows[:, None])
    per_key = _mix32(key_rows ^ 0xC2B2AE3D)
    return _mix32(per_query ^ per_key) >= int(dropout_p * 2**32)


def _mix32(x: Tensor) -> Tensor:
    """murmur3's 32-bit finaliser on uint32 values held in int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def multiway_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_offsets: tuple[int, ...],
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Rows ``expert_offsets[e]`` to ``expert_offsets[e + 1]`` of `x` times the transpose of ``weight[e]``, plus ``bias[e]``.

    Args:
        x: ``[rows, in]``. weight: ``[num_experts, out, in]``. bias: ``[num_experts, out]`` or None.
        expert_offsets: ``num_experts + 1`` whole numbers from 0 to rows.
        activation: None, or "gelu" (with erf): applied to the sums, in fp32 where they are 16-bit.
        residual: ``[rows, out]`` or None, added at the end.

    Returns:
        ``[rows, out]``, in the wider of the dtypes of x and residual.
    """
    parts = []
    for e, (a, b) in enumerate(zip(expert_offsets[:-1], expert_offsets[1:], strict=True)):
        y = x[a:b] @ weight[e].T
        parts.append(y if bias is None else y + bias[e])
    out = torch.cat(parts)
    if activation == "gelu":
        wide = out.to(torch.promote_types(out.dtype, torch.float32))
        out = (0.5 * wide * (1.0 + torch.erf(wide * math.sqrt(0.5)))).to(out.dtype)
    return out if residual is None else out + residual


def multiway_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, expert_offsets: tuple[int, ...], eps: float) -> Tensor:
    """LayerNorm over the last dimension with the scale and shift of each row's expert.

    Args:
        x: ``[rows, dim]``. weight, bias: ``[num_experts, dim]``. expert_offsets: as in `multiway_linear`. eps: added to the variance.
    """
    centred = x - x.mean(-1, keepdim=True)
    normal = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    parts = []
    for e, (a, b) in enumerate(zip(expert_offsets[:-1], expert_offsets[1:], strict=True)):
        parts.append(normal[a:b] * weight[e] + bias[e])
    return torch.cat(parts)


def multiway_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    expert_offsets: tuple[int, ...],
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    """`multiway_linear` with GELU, `multiway_layer_norm` if there is one, and `multiway_linear` with the residual."""
    hidden = multiway_linear(x, weight1, bias1, expert_offsets, activation="gelu")
    if norm is not None:
        hidden = multiway_layer_norm(hidden, *norm, expert_offsets, eps)
    return multiway_linear(hidden, weight2, bias2, expert_offsets, residual=residual)


def attention_pool(x: Tensor, queries: Tensor, segments: Segments, *, eps: float | None = None) -> Tensor:
    """softmax(queries n^T) n for the rows n of each segment; n is x, or with `eps` LayerNorm of x without scale and shift.

    Args:
        x: ``[rows, dim]``. queries: ``[num_queries, dim]``. segments: of x's rows. eps: added to the variance.

    Returns:
        ``[segments, num_queries, dim]``; zeros for an empty segment.
    """
    if eps is not None:
        centred = x - x.mean(-1, keepdim=True)
        x = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    parts = []
    for rows in x.split(list(segments.lengths)):
        weights = torch.softmax(queries @ rows.T, -1)
        parts.append(weights @ rows)
    return torch.stack(parts) if parts else x.new_zeros(0, *queries.shape)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of ``hidden[rows] @ weight.T + bias`` against a word per row.

    Args:
        hidden: ``[n, dim]``. weight: ``[vocab_size, dim]``. targets: int64, a word per row that enters, or `ignore_index`.
        bias: ``[vocab_size]`` or None. rows: int64 or None for all. label_smoothing: share of the target spread over all words.
        reduction: "mean" over the rows that have a target (0 where none has), "sum" or "none".
    """
    logits = (hidden if rows is None else hidden[rows]) @ weight.T
    log_probabilities = torch.log_softmax(logits if bias is None else logits + bias, -1)
    valid = targets != ignore_index
    picked = log_probabilities.gather(1, targets.where(valid, 0)[:, None])[:, 0]
    losses = -(1.0 - label_smoothing) * picked - label_smoothing * log_probabilities.mean(-1)
    losses = losses.where(valid, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / (valid.sum().clamp(min=1) if reduction == "mean" else 1)


def contrastive_loss(a: Tensor, b: Tensor, logit_scale: Tensor) -> Tensor:
    """InfoNCE in both directions, averaged: row i of `a` belongs to row i of `b`.

    Args:
        a, b: ``[batch, dim]``. logit_scale: scalar that multiplies the similarities.
    """
    similarities = logit_scale * a @ b.T
    return -(torch.log_softmax(similarities, 1) + torch.log_softmax(similarities, 0)).diagonal().mean() / 2


def distilled_contrastive_loss(features: Tensor, teacher: Tensor, keys: Tensor, logit_scale: Tensor, alpha: float) -> Tensor:
    """Cross-entropy of softmax(scale features keys^T) with alpha softmax(scale teacher keys^T) + (1 - alpha) of key i for row i.

    Args:
        features, teacher: ``[batch, dim]``. keys: ``[at least batch, dim]``. The targets are constants.
    """
    with torch.no_grad():
        targets = alpha * torch.softmax(logit_scale * teacher @ keys.T, 1)
        targets.diagonal().add_(1.0 - alpha)
    return -(targets * torch.log_softmax(logit_scale * features @ keys.T, 1)).sum(1).mean()


def sigmoid_contrastive_loss(a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor, *, first: int = 0) -> Tensor:
    """-log sigmoid(z (scale a b^T + bias)), summed over all pairs, averaged over rows of a; z is 1 for row i and i + first, else -1.

    Args:
        a: ``[batch, dim]``. b: ``[at least first + batch, dim]``.
    """
    z = -torch.ones(len(a), len(b), dtype=a.dtype, device=a.device)
    z.diagonal(first).fill_(1.0)
    return -torch.nn.functional.logsigmoid(z * (logit_scale * a @ b.T + logit_bias)).sum() / len(a)


def hard_negatives(
    queries: Tensor, keys: Tensor, logit_scale: Tensor, uniform: Tensor, *, floor: float = 1e-4, first: int = 0
) -> Tensor:
    """For each row the first key whose running sum of weights passes ``uniform`` times their total.

    Args:
        queries: ``[batch, dim]``. keys: ``[at least first + batch, dim]``. uniform: ``[batch]`` in [0, 1).

    The weights are softmax(scale queries keys^T) + floor, and 0 for a row's own key, i + first.
    """
    weights = torch.softmax(logit_scale * queries @ keys.T, 1) + floor
    weights.diagonal(first).fill_(0.0)
    running = weights.cumsum(1)
    return (running <= (uniform * running[:, -1])[:, None]).sum(1)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: DecodePlan, *, softmax_scale: float | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the slots that each query segment reads, as long as they are now.

    Args:
        q: ``[rows, num_heads, head_dim]``. k, v: ``[buffer_rows, num_heads_k, head_dim]``. plan, softmax_scale, return_lse: as in
            `vlp_fast.ops.decode_attention`.

    Returns:
        out ``[rows, num_heads, head_dim]``, and lse ``[num_heads, rows]`` if asked for; zeros and -inf where nothing is read.
    """
    scale, group = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, q.shape[1] // k.shape[1]
    edge_offsets, edge_key, starts, lengths = (
        t.tolist() for t in (plan.edge_offsets, plan.edge_key, plan.key_starts, plan.key_lengths)
    )
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -math.inf)
    for segment, (first, last) in enumerate(zip(plan.query.host_offsets[:-1], plan.query.host_offsets[1:], strict=True)):
        slots = edge_key[edge_offsets[segment] : edge_offsets[segment + 1]]
        rows = [row for slot in slots for row in range(starts[slot], starts[slot] + lengths[slot])]
        if rows and last > first:
            scores = torch.einsum("qhd,khd->qhk", q[first:last], k[rows].repeat_interleave(group, 1)) * scale
            out[first:last] = torch.einsum("qhk,khd->qhd", torch.softmax(scores, -1), v[rows].repeat_interleave(group, 1))
            lse[first:last] = torch.logsumexp(scores, -1)
    return (out, lse.T) if return_lse else out
