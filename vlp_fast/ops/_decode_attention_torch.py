"""Decode attention in plain PyTorch: views of regular slots without a copy, a padded gather of all others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_fast.decode_plan import DecodePlan


def forward(q, k, v, tensors, parts, segments, max_rows, max_keys, scale, need_lse) -> tuple[Tensor, Tensor]:
    """out and, with need_lse, the log-sum-exp ``[rows, heads]`` (else an empty tensor)."""
    if q.numel() == 0 or max_keys == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format), lse_like(q, need_lse).fill_(-float("inf"))
    if parts:
        return _regular(q, k, v, parts, segments, max_rows, scale, need_lse)
    return _gathered(q, k, v, tensors, segments, max_rows, max_keys, scale, need_lse)


def bind(k: Tensor, v: Tensor, plan: DecodePlan) -> BoundAttention | None:
    """The attention to these buffers as a function of q, where the slots are regular, one a segment, and the rows of a head follow one
    another in fp32 or fp64; else None."""
    if len(plan.parts) != 4 or plan.query.rows == 0 or plan.max_keys == 0 or k.dtype not in (torch.float32, torch.float64):
        return None
    if k.shape != v.shape or k.dtype != v.dtype or k.shape[0] < plan.buffer_rows or k.shape[1] == 0:
        return None
    start, repeat, step, _ = plan.parts
    room = plan.capacities[plan.host_edges[:, 1]]
    groups = len(plan.query) // repeat
    _, heads, dim = k.shape
    one_line = all(_by_heads(t) and (groups == 1 or t.stride(1) == groups * step * t.stride(0)) for t in (k, v))
    if (room != room[0]).any() or not one_line:
        return None
    keys, values = (_slots(t, start, step, groups, int(room[0])).view(heads * groups, int(room[0]), dim) for t in (k, v))
    return BoundAttention(keys, values, plan, heads, groups)


class BoundAttention:
    """`_regular` for one part and q of any dtype, with the views of the buffers made once.

    Args: keys, values: ``[heads_k * groups, capacity, head_dim]``; a group is the rows that read one slot.
    """

    def __init__(self, keys: Tensor, values: Tensor, plan: DecodePlan, heads_k: int, groups: int) -> None:
        self._all, self._plan, self._length = (keys, values), plan, -1
        self._keys, self._values = keys, values
        dim = keys.shape[2]
        self._shape = (groups, plan.query.rows // groups, heads_k, -1, dim)
        self._scale, self._zero = dim**-0.5, keys.new_zeros(1)

    def __call__(self, q: Tensor) -> Tensor:
        if self._plan.max_keys != self._length:
            self._length = self._plan.max_keys
            keys, self._values = (t[:, : self._length] for t in self._all)
            self._keys = keys.transpose(1, 2)
        split = q.view(self._shape).permute(2, 0, 1, 3, 4)  # heads_k, groups, rows, heads that share a key head, head_dim
        folded = self._zero.new_empty(split.shape).copy_(split)
        queries = folded.view(self._keys.shape[0], -1, self._shape[4])
        scores = torch.baddbmm(self._zero, queries, self._keys, beta=0, alpha=self._scale)
        out = torch.bmm(torch.softmax(scores, -1), self._values).view(split.shape).permute(1, 2, 0, 3, 4)
        return q.new_empty(out.shape).copy_(out).view(q.shape)


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
    if len(pieces) == 1 and not need_lse and not _by_heads(k):
        groups, keys, values = pieces[0]
        queries, keys, values = _fold(q, groups, heads_k).transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1)
        out = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
        return _unfold(out.transpose(0, 1), rows, heads), lse_like(q, False)
    wide = torch.promote_types(q.dtype, torch.float32)
    q, scores = q.to(wide) * scale, []
    for groups, keys, _ in pieces:
        score = _product(_fold(q, groups, heads_k), keys.to(wide).transpose(-1, -2))
        scores.append(score if len(pieces) == 1 else _unfold(score, rows, heads))
    joined = scores[0] if len(scores) == 1 else torch.cat(scores, -1)
    weights = torch.softmax(joined, -1)
    lse = torch.logsumexp(joined, -1) if need_lse else lse_like(q, False)
    if len(pieces) == 1:
        out = _unfold(_product(weights, pieces[0][2].to(wide)), rows, heads)
        return out.to(k.dtype), _unfold(lse[..., None], rows, heads)[..., 0] if need_lse else lse
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    for w, (groups, _, values) in zip(weights.split([s.shape[-1] for s in scores], -1), pieces, strict=True):
        out += _unfold(_product(_fold(w, groups, heads_k), values.to(wide)), rows, heads)
    return out.to(k.dtype), lse


def _slots(buffer: Tensor, start: int, step: int, groups: int, length: int) -> Tensor:
    """View ``[heads_k, groups, length, head_dim]``."""
    row, head, dim = buffer.stride()
    shape, strides = (buffer.shape[1], groups, length, buffer.shape[2]), (head, step * row, row, dim)
    return buffer.as_strided(shape, strides, buffer.storage_offset() + start * row)


def _by_heads(buffer: Tensor) -> bool:
    """Whether the rows of a head lie one after the other, which few query rows are fastest with: plain products of matrices."""
    return buffer.stride(0) == buffer.shape[2] and buffer.stride(1) >= buffer.shape[0] * buffer.shape[2]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of ``[heads_k, groups, ...]``; a view, and no copy, of slots that follow one another."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def _fold(rows: Tensor, groups: int, heads_k: int) -> Tensor:
    """[rows, heads, n] to [heads_k, groups, rows of a group and heads that share a key head, n]."""
    n = rows.shape[-1]
    split = rows.reshape(groups, -1, heads_k, rows.shape[1] // heads_k, n)
    return split.permute(2, 0, 1, 3, 4).reshape(heads_k, groups, -1, n)


def _unfold(folded: Tensor, rows: int, heads: int) -> Tensor:
    heads_k, groups, _, n = folded.shape
    split = folded.reshape(heads_k, groups, rows // groups, heads // heads_k, n)
    return split.permute(1, 2, 0, 3, 4).reshape(rows, heads, n)


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
