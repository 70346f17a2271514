"""An attention plan as dense padded groups: what a library that attends over ``[groups, heads, length, head_dim]`` needs.

Rows stay packed everywhere else; only inside attention are ragged groups padded. All query rows that read the same keys fully
form one group, wherever their segments lie, so the keys and values of a shared image are read once, not once per caption.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.segments import _to_device

__all__ = ["PaddedBucket", "PaddedPlan", "padded_plan"]

WASTE = 2.0  # a bucket takes another group while its padded query-key pairs stay within this multiple of the real ones
FREE_PAIRS = 4096  # and below this many padded pairs always: a separate call costs more than it saves
APART = 2**14  # pairs that a call of its own must save, to be made in any case


class PaddedBucket(NamedTuple):
    """Groups of similar size, padded to the largest.

    Attributes:
        groups, seqlen_q, seqlen_k: sizes of the padded call.
        query_rows: int64 ``[groups * seqlen_q]``, the packed row in each slot; a padding slot repeats a row and is never read.
        key_rows: int64 ``[groups * seqlen_k]``; a padding slot repeats a row and is masked.
        query_start, key_start: the first row, where the slots are consecutive rows (no gather needed), else -1.
        mask: bool, True where a query may read a key, ``[groups, 1, 1 or seqlen_q, seqlen_k]``, or None where no mask is needed.
        causal: the causal triangle (``seqlen_q == seqlen_k``) is the whole mask.
    """

    groups: int
    seqlen_q: int
    seqlen_k: int
    query_rows: Tensor
    key_rows: Tensor
    query_start: int
    key_start: int
    mask: Tensor | None
    causal: bool


class PaddedPlan(NamedTuple):
    """Buckets, and where each packed query row finds its result.

    Attributes:
        buckets: tuple of `PaddedBucket`.
        slots: int64 ``[rows_q]`` into the buckets' slots laid end to end; rows without a key point one past them, at zeros.
            None where the only bucket holds exactly the packed rows in order.
    """

    buckets: tuple[PaddedBucket, ...]
    slots: Tensor | None


def padded_plan(plan: AttentionPlan) -> PaddedPlan:
    """The plan as padded groups, built on the first call and kept with the plan.

    On a CPU plan the first call happens when the plan is built, so that `torch.compile` finds it ready; elsewhere it must be
    made once outside a compiled region.
    """
    if plan._padded is None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "backend 'torch' on a device other than the CPU needs vlp_fast.padding.padded_plan(plan) once before torch.compile."
            )
        plan._padded = _from_device(plan) if plan.host_edges is None else _from_host(plan)
    return plan._padded  # type: ignore[return-value]


class _Group:
    __slots__ = ("edges", "keys", "queries")

    def __init__(self, queries: list[int], keys: list[int], edges: list[tuple[int, bool]]) -> None:
        self.queries, self.keys, self.edges = queries, keys, edges


def _groups(plan: AttentionPlan) -> list[tuple[int, int, _Group]]:
    """(keys, queries, group) of all query rows that read the same keys fully, or that read some causally."""
    assert plan.host_edges is not None
    lengths_q, lengths_k = plan.query.lengths, plan.key.lengths
    reads: dict[int, list[tuple[int, bool]]] = {}
    for query, key, causal in plan.host_edges.tolist():
        if lengths_q[query] and lengths_k[key]:
            reads.setdefault(query, []).append((key, bool(causal)))
    groups: dict[object, _Group] = {}
    for query, edges in reads.items():
        shared = not any(causal for _, causal in edges)
        name = tuple(edges) if shared else (query,)
        if shared and ("full", name) in groups:
            groups["full", name].queries.append(query)
        else:
            groups["full" if shared else "causal", name] = _Group([query], [key for key, _ in edges], edges)

    sized = []
    for group in groups.values():
        n = sum(lengths_q[i] for i in group.queries)
        m = sum(lengths_k[j] for j in group.keys)
        sized.append((m, n, group))
    return sized


def _pairs(plan: AttentionPlan) -> list[tuple[int, int, _Group]]:
    """`_groups` where query segment i reads key segment i alone."""
    assert plan.host_edges is not None
    edges = zip(plan.query.lengths, plan.key.lengths, plan.host_edges[:, 2].tolist(), strict=True)
    return [(m, n, _Group([i], [i], [(i, bool(causal))])) for i, (n, m, causal) in enumerate(edges) if n and m]


def _uniform(plan: AttentionPlan) -> PaddedPlan | None:
    """The plan of equally long pairs, all full or all causal triangles: the packed rows as they are. None for others."""
    facts = plan.facts
    n, m = facts.max_seqlen_q, facts.max_seqlen_k
    triangles = facts.all_causal and n == m
    if not (facts.one_to_one and facts.uniform and n and m and (triangles or not facts.has_causal)):
        return None
    count = facts.num_query_segments
    query_rows, key_rows = (_to_device(np.arange(count * length), plan.device) for length in (n, m))
    return PaddedPlan((PaddedBucket(count, n, m, query_rows, key_rows, 0, 0, None, triangles),), None)


def _from_host(plan: AttentionPlan) -> PaddedPlan:
    uniform = _uniform(plan)
    if uniform is not None:
        return uniform
    sized = _pairs(plan) if plan.facts.one_to_one else _groups(plan)
    order = sorted(range(len(sized)), key=lambda i: sized[i][:2])
    chunks: list[list[int]] = []
    useful = most_q = most_k = 0
    for i in order:
        m, n, _ = sized[i]
        count = len(chunks[-1]) if chunks else 0
        together, apart = (count + 1) * max(most_q, n) * max(most_k, m), count * most_q * most_k + m * n
        if not chunks or together > max(FREE_PAIRS, WASTE * (useful + m * n)) or together > apart + APART:
            chunks.append([])
            useful = most_q = most_k = 0
        chunks[-1].append(i)
        useful, most_q, most_k = useful + m * n, max(most_q, n), max(most_k, m)

    slots = np.full(plan.query.rows, -1, np.int64)
    buckets, used = [], 0
    for chunk in chunks:
        bucket = _bucket(plan, [sized[i] for i in sorted(chunk)], slots, used)
        used += bucket.groups * bucket.seqlen_q
        buckets.append(bucket)
    if len(buckets) == 1 and np.array_equal(slots, np.arange(used)):
        return PaddedPlan(tuple(buckets), None)
    slots[slots < 0] = used
    return PaddedPlan(tuple(buckets), _to_device(slots, plan.device))


def _bucket(plan: AttentionPlan, sized: list[tuple[int, int, _Group]], slots: np.ndarray, used: int) -> PaddedBucket:
    """Pads the groups ``(keys, queries, group)`` to the largest and enters their query rows into `slots`."""
    count, seqlen_k, seqlen_q = len(sized), max(s[0] for s in sized), max(s[1] for s in sized)
    query_rows = np.zeros((count, seqlen_q), np.int64)
    key_rows = np.zeros((count, seqlen_k), np.int64)
    plain_causal = all(len(g.edges) == 1 and g.edges[0][1] and len(g.queries) == 1 and m == n for m, n, g in sized)
    any_causal = any(causal for _, _, g in sized for _, causal in g.edges)
    needs_mask = not plain_causal and (any_causal or any(m != seqlen_k for m, _, _ in sized))
    mask = np.zeros((count, 1, seqlen_q if any_causal else 1, seqlen_k), bool) if needs_mask else None
    fill = _fill_pairs if plan.facts.one_to_one else _fill_groups
    fill(plan, sized, slots, used, query_rows, key_rows, mask)
    return PaddedBucket(
        count,
        seqlen_q,
        seqlen_k,
        _to_device(query_rows.reshape(-1), plan.device),
        _to_device(key_rows.reshape(-1), plan.device),
        _consecutive(query_rows),
        _consecutive(key_rows),
        None if mask is None else _to_device(mask, plan.device),
        plain_causal,
    )


def _fill_groups(
    plan: AttentionPlan,
    sized: list[tuple[int, int, _Group]],
    slots: np.ndarray,
    used: int,
    query_rows: np.ndarray,
    key_rows: np.ndarray,
    mask: np.ndarray | None,
) -> None:
    """Enters the rows of groups, their masks, and where each query row finds its result."""
    starts_q, starts_k = plan.query.host_offsets, plan.key.host_offsets
    for i, (m, n, group) in enumerate(sized):
        rows = np.concatenate([np.arange(starts_q[q], starts_q[q + 1]) for q in group.queries])
        keys = np.concatenate([np.arange(starts_k[j], starts_k[j + 1]) for j in group.keys])
        query_rows[i, :n], query_rows[i, n:] = rows, rows[0]
        key_rows[i, :m], key_rows[i, m:] = keys, keys[0]
        slots[rows] = used + i * query_rows.shape[1] + np.arange(n)
        if mask is not None:
            mask[i, 0, :, :m] = True
            column = 0
            if any(causal for _, causal in group.edges):
                for key, causal in group.edges:
                    width = plan.key.lengths[key]
                    if causal:
                        last = np.arange(n) + width - n
                        mask[i, 0, :n, column : column + width] = np.arange(width)[None] <= last[:, None]
                    column += width


def _fill_pairs(
    plan: AttentionPlan,
    sized: list[tuple[int, int, _Group]],
    slots: np.ndarray,
    used: int,
    query_rows: np.ndarray,
    key_rows: np.ndarray,
    mask: np.ndarray | None,
) -> None:
    """`_fill_groups` for groups of one query and one key segment: all at once."""
    index = [group.queries[0] for _, _, group in sized]
    m, n = (np.array([s[side] for s in sized])[:, None] for side in (0, 1))
    for rows, lengths, offsets in ((query_rows, n, plan.query.host_offsets), (key_rows, m, plan.key.host_offsets)):
        column = np.arange(rows.shape[1])[None]
        rows[:] = offsets[index][:, None] + np.where(column < lengths, column, 0)
    slot = used + np.arange(query_rows.size).reshape(query_rows.shape)
    there = np.arange(query_rows.shape[1])[None] < n
    slots[query_rows[there]] = slot[there]
    if mask is None:
        return
    key = np.arange(key_rows.shape[1])[None, None]
    mask[:, 0] = key < m[..., None]
    causal = np.array([group.edges[0][1] for _, _, group in sized])
    if causal.any():
        last = np.arange(query_rows.shape[1])[None] + (m - n)  # the last key that a query reads
        mask[:, 0] &= (key <= last[..., None]) | ~causal[:, None, None]


def _consecutive(rows: np.ndarray) -> int:
    flat = rows.reshape(-1)
    return int(flat[0]) if np.array_equal(flat, np.arange(flat[0], flat[0] + flat.size)) else -1


def _from_device(plan: AttentionPlan) -> PaddedPlan:
    """One group per query segment; which keys it reads is computed where the index lives."""
    facts, query = plan.facts, plan.query
    n, m = facts.max_seqlen_q, facts.max_seqlen_k
    if query.rows == 0 or m == 0:
        return PaddedPlan((), torch.zeros(query.rows, dtype=torch.int64, device=plan.device))
    starts, lengths = query.host_offsets[:-1], np.asarray(query.lengths, np.int64)
    rows = np.minimum(starts[:, None] + np.arange(n)[None], query.rows - 1)
    index = plan.edge_key.long()
    key_starts = plan.key.offsets[:-1].long()[index]
    key_lengths = (plan.key.offsets[1:] - plan.key.offsets[:-1]).long()[index]
    column = torch.arange(m, device=plan.device)
    visible = column[None] < key_lengths[:, None]
    key_rows = torch.where(visible, key_starts[:, None] + column[None], 0)
    mask = None if facts.uniform else visible[:, None, None, :]
    slots = np.repeat(np.arange(len(query)) * n - starts, lengths) + np.arange(query.rows)
    bucket = PaddedBucket(
        len(query), n, m, _to_device(rows.reshape(-1), plan.device), key_rows.reshape(-1), _consecutive(rows), -1, mask, False
    )
    return PaddedPlan((bucket,), None if bucket.query_start == 0 else _to_device(slots, plan.device))
