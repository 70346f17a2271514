"""Decode attention in plain PyTorch: views of regular slots without a copy, a padded gather of all others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(q, k, v, tensors, parts, segments, max_rows, max_keys, scale, need_lse) -> tuple[Tensor, Tensor]:
    """out and, with need_lse, the log-sum-exp ``[rows, heads]`` (else an empty tensor)."""
    if q.numel() == 0 or max_keys == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format), lse_like(q, need_lse).fill_(-float("inf"))
    if parts:
        return _regular(q, k, v, parts, segments, max_rows, scale, need_lse)
    return _gathered(q, k, v, tensors, segments, max_rows, max_keys, scale, need_lse)


def lse_like(q: Tensor, need_lse: bool) -> Tensor:
    """Room for the log-sum-exp."""
    return q.new_empty(q.shape[:2] if need_lse else (0,), dtype=torch.promote_types(q.dtype, torch.float32))


def _regular(q, k, v, parts, segments, per_segment, scale, need_lse):
    rows, heads, _ = q.shape
    heads_k, pieces = k.shape[1], []
    for i in range(0, len(parts), 4):
        start, repeat, step, length = parts[i : i + 4]
        if length:
            groups = segments // repeat
            pieces.append((groups, *(_slots(t, start, step, groups, length) for t in (k, v))))
    if len(pieces) == 1 and not need_lse:
        groups, keys, values = pieces[0]
        out = F.scaled_dot_product_attention(_fold(q, groups, heads_k), keys, values, scale=scale)
        return _unfold(out, rows, heads), lse_like(q, False)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = []
    for groups, keys, _ in pieces:
        score = (_fold(q, groups, heads_k).to(wide) * scale) @ keys.to(wide).transpose(-1, -2)
        scores.append(_unfold(score, rows, heads))
    joined = torch.cat(scores, -1)
    weights = torch.softmax(joined, -1).split([s.shape[-1] for s in scores], -1)
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    for w, (groups, _, values) in zip(weights, pieces, strict=True):
        out += _unfold(_fold(w, groups, heads_k) @ values.to(wide), rows, heads)
    return out.to(q.dtype), torch.logsumexp(joined, -1) if need_lse else lse_like(q, False)


def _slots(buffer: Tensor, start: int, step: int, groups: int, length: int) -> Tensor:
    """View ``[groups, heads_k, length, head_dim]``."""
    row, head, dim = buffer.stride()
    shape, strides = (groups, buffer.shape[1], length, buffer.shape[2]), (step * row, head, row, dim)
    return buffer.as_strided(shape, strides, buffer.storage_offset() + start * row)


def _fold(rows: Tensor, groups: int, heads_k: int) -> Tensor:
    """[rows, heads, n] to [groups, heads_k, rows of a group and heads that share a key head, n]."""
    n = rows.shape[-1]
    split = rows.reshape(groups, -1, heads_k, rows.shape[1] // heads_k, n)
    return split.transpose(1, 2).reshape(groups, heads_k, -1, n)


def _unfold(folded: Tensor, rows: int, heads: int) -> Tensor:
    groups, heads_k, _, n = folded.shape
    split = folded.reshape(groups, heads_k, rows // groups, heads // heads_k, n)
    return split.transpose(1, 2).reshape(rows, heads, n)


def _gathered(q, k, v, tensors, segments, max_rows, max_keys, scale, need_lse):
    query_offsets, edge_offsets, edge_key, key_starts, key_lengths = (t.long() for t in tensors)
    ends = F.pad(key_lengths[edge_key].cumsum(0), (1, 0))  # keys before each edge, all segments in one line
    first, last = ends[edge_offsets[:-1], None], ends[edge_offsets[1:], None]
    place = first + torch.arange(max_keys, device=q.device)  # [segments, max_keys]
    seen = place < last
    edge = (torch.searchsorted(ends, place, right=True) - 1).clamp(max=edge_key.numel() - 1)
    index = torch.where(seen, key_starts[edge_key[edge]] + place - ends[edge], 0)
    row = query_offsets[:-1, None] + torch.arange(max_rows, device=q.device)  # [segments, max_rows]
    present = row < query_offsets[1:, None]
    wide, group = torch.promote_types(q.dtype, torch.float32), q.shape[1] // k.shape[1]
    shape = (segments, max_rows, k.shape[1], group, q.shape[2])
    queries = q[torch.where(present, row, 0)].to(wide).reshape(shape) * scale
    keys = k[index].to(wide).masked_fill(~seen[..., None, None], 0.0)
    values = v[index].to(wide).masked_fill(~seen[..., None, None], 0.0)
    scores = torch.einsum("smhgd,snhd->smhgn", queries, keys).masked_fill(~seen[:, None, None, None], -float("inf"))
    weights = torch.softmax(scores, -1).masked_fill(~seen[:, None, None, None], 0.0)
    padded = torch.einsum("smhgn,snhd->smhgd", weights, values).to(q.dtype).flatten(2, 3)
    segment = torch.searchsorted(query_offsets, torch.arange(q.shape[0], device=q.device), right=True) - 1
    flat = segment * max_rows + torch.arange(q.shape[0], device=q.device) - query_offsets[segment]
    lse = torch.logsumexp(scores, -1).flatten(2, 3).flatten(0, 1)[flat] if need_lse else lse_like(q, False)
    return padded.flatten(0, 1)[flat], lse
