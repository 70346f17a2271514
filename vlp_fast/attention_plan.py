"""Who reads whom: the graph of attention between segments of packed rows.

An *edge* says "query segment i reads key segment j", fully or causally. An `AttentionPlan` is built once per batch from lengths
known on the host, so building it never waits for a device, and every layer reuses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlp_fast.segments import Segments, _int32, _int_array, _offsets

__all__ = ["AttentionPlan", "PlanFacts"]


class PlanFacts(NamedTuple):
    """What a kernel configuration or a cache may depend on: plain host numbers, hashable, equal for equal workloads."""

    num_query_segments: int
    num_key_segments: int
    max_seqlen_q: int
    max_seqlen_k: int
    max_edges: int
    has_causal: bool
    all_causal: bool
    one_to_one: bool  # query segment i reads key segment i and nothing else
    uniform: bool  # all query segments are equally long, and so are all key segments


class AttentionPlan:
    """Which key segments each query segment reads: the graph that one attention call walks.

    Build it with `from_edges` or a named builder; the constructor takes what they have prepared. `edge_*` are the edges in
    compressed sparse rows by query segment; `key_edge_*` the same edges by key segment, which the backward walks, so that the
    gradient of a key segment read by many is a sum in a fixed order.

    Attributes:
        query, key: `Segments` of the query rows and of the key/value rows.
        edge_offsets: int32 ``[num_query_segments + 1]``; the edges of query segment i are ``edge_offsets[i]:edge_offsets[i+1]``.
        edge_key: int32 ``[edges]``, the key segment each edge reads.
        edge_causal: int32 ``[edges]``, 1 where the edge is causal. Causal is aligned to the bottom right: query row i of ``n``
            reads key rows ``0 .. i + m - n`` of ``m``, so that the last query row reads all keys.
        key_edge_offsets, key_edge_query, key_edge_causal: the transposed edges.
        host_edges: int64 array ``[edges, 3]`` of (query segment, key segment, causal) in the order of `edge_key`, or None where
            the targets are known on the device only.
        facts: `PlanFacts`.
        query_rows: rows of q, those of `query`; with `pooling` those of one segment, which all segments share.
        pairs: query-key pairs inside the edges' masks (the work of one head); for targets known on the device only, what it is
            when every edge reads the longest key segment.
    """

    def __init__(
        self,
        query: Segments,
        key: Segments,
        csr: tuple[Tensor, Tensor, Tensor],
        transposed: tuple[Tensor, Tensor, Tensor],
        host_edges: np.ndarray | None,
        facts: PlanFacts,
        pairs: int,
        query_rows: int | None = None,
    ) -> None:
        self.query, self.key = query, key
        self.query_rows = query.rows if query_rows is None else query_rows
        self.edge_offsets, self.edge_key, self.edge_causal = csr
        self.key_edge_offsets, self.key_edge_query, self.key_edge_causal = transposed
        self.host_edges, self.facts, self.pairs = host_edges, facts, pairs
        self._padded: object | None = None

    # ------------------------------------------------------------------------------------------------------------ builders

    @classmethod
    def from_edges(
        cls,
        query_lengths: Segments | Iterable[int],
        key_lengths: Segments | Iterable[int],
        edges: Iterable[tuple[int, int, bool]],
        device: torch.device | str | None = None,
        *,
        query_rows: int | None = None,
    ) -> AttentionPlan:
        """The general constructor: any graph of segments.

        Args:
            query_lengths: rows of each query segment (or `Segments`).
            key_lengths: rows of each key segment (or `Segments`).
            edges: (query segment, key segment, causal) in any order; several edges per query segment are read in the order
                given. A query segment without an edge yields zeros.
            device: where the plan's tensors live; default: the device of `Segments` given, else the CPU.
            query_rows: rows of q where all query segments share them (see `pooling`), each being so long.

        Raises:
            ValueError: an edge outside the segments, or the same (query, key) pair twice.
        """
        query, key = _segments(query_lengths, device), _segments(key_lengths, device)
        device = query.device
        array = edges if isinstance(edges, np.ndarray) else np.array([(int(q), int(k), bool(c)) for q, k, c in edges], np.int64)
        array = array.astype(np.int64).reshape(-1, 3)
        index = np.arange(len(query))
        if len(query) == len(key) == len(array) and bool((array[:, :2] == index[:, None]).all()):
            by_key, counts_q = array, np.ones_like(index)  # nothing to check, nothing to sort
            counts_k = counts_q
        else:
            array, by_key = _sorted_edges(array, len(query), len(key))
            counts_q = np.bincount(array[:, 0], minlength=len(query))
            counts_k = np.bincount(array[:, 1], minlength=len(key))
        facts = _facts(query, key, array, int(counts_q.max()) if counts_q.size else 0)
        csr = (_offsets(counts_q, device), _int32(array[:, 1], device), _int32(array[:, 2], device))
        transposed = csr
        if by_key is not array:
            transposed = (_offsets(counts_k, device), _int32(by_key[:, 0], device), _int32(by_key[:, 2], device))
        plan = cls(
            query,
            key,
            csr,
            transposed,
            array,
            facts,
            _pairs(query, key, array),
            query_rows,
        )
        if device.type == "cpu":  # what the CPU's backend reads; made here so that torch.compile finds it ready
            from vlp_fast.padding import padded_plan

            padded_plan(plan)
        return plan

    @classmethod
    def self_attention(
        cls, lengths: Segments | Iterable[int], *, causal: bool = False, device: torch.device | str | None = None
    ) -> AttentionPlan:
        """Every segment reads itself: an image encoder, a text encoder, a causal decoder."""
        segments = _segments(lengths, device)
        index = np.arange(len(segments))
        return cls.from_edges(segments, segments, np.stack([index, index, np.full_like(index, causal)], 1))

    @classmethod
    def cross_attention(
        cls,
        query_lengths: Segments | Iterable[int],
        key_lengths: Segments | Iterable[int],
        index: Sequence[int] | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> AttentionPlan:
        """Query segment i reads all of key segment ``index[i]``: captions that each read an image, any image.

        Args:
            query_lengths, key_lengths: rows of each segment (or `Segments`).
            index: key segment per query segment, ``[num_query_segments]``; default: i reads i. A tensor on a device other than
                the CPU (hard negatives chosen there) is used where it is, without waiting for it; it must lie in range, which
                is asserted on the device.
            device: as in `from_edges`.

        Raises:
            ValueError: as many indices as query segments are needed, each naming a key segment.
        """
        if isinstance(index, Tensor) and index.device.type != "cpu":
            return cls._device_cross_attention(
                _segments(query_lengths, index.device), _segments(key_lengths, index.device), index
            )
        query, key = _segments(query_lengths, device), _segments(key_lengths, device)
        if index is None and len(query) != len(key):
            raise ValueError(
                f"cross-attention without an index needs one key segment per query segment; received {len(query)} query and "
                f"{len(key)} key segments."
            )
        targets = np.arange(len(query)) if index is None else _int_array(index, "index")
        _check_index_size(targets.size, query)
        return cls.from_edges(query, key, np.stack([np.arange(len(query)), targets, np.zeros_like(targets)], 1))

    @classmethod
    def pooling(
        cls, num_queries: int, key_lengths: Segments | Iterable[int], device: torch.device | str | None = None
    ) -> AttentionPlan:
        """The same `num_queries` rows of q read every key segment: attentional pooling with learned queries, held once.

        q has `num_queries` rows, the result ``num_queries * len(key_lengths)``, one set per key segment.

        Raises:
            ValueError: num_queries below 1.
        """
        if num_queries < 1:
            raise ValueError(f"num_queries must be at least 1; received {num_queries}.")
        key = _segments(key_lengths, device)
        query, index = Segments([num_queries] * len(key), key.device), np.arange(len(key))
        edges = np.stack([index, index, np.zeros_like(index)], 1)
        return cls.from_edges(query, key, edges, query_rows=num_queries)

    @classmethod
    def _device_cross_attention(cls, query: Segments, key: Segments, index: Tensor) -> AttentionPlan:
        _check_index_size(index.numel(), query)
        index = index.reshape(-1)
        if index.device.type == "cuda":
            torch._assert_async(((index >= 0) & (index < len(key))).all(), "index names a key segment that does not exist")
        ordered, by_key = torch.sort(index, stable=True)
        bounds = torch.arange(len(key) + 1, device=index.device, dtype=index.dtype)
        zeros = torch.zeros(len(query), dtype=torch.int32, device=index.device)
        facts = PlanFacts(
            len(query), len(key), query.max_length, key.max_length, 1, False, False, False, _equal(query) and _equal(key)
        )
        return cls(
            query,
            key,
            (torch.arange(len(query) + 1, dtype=torch.int32, device=index.device), index.to(torch.int32), zeros),
            (torch.searchsorted(ordered, bounds).to(torch.int32), by_key.to(torch.int32), zeros),
            None,
            facts,
            query.rows * key.max_length,
        )

    @classmethod
    def joint(
        cls,
        first_lengths: Sequence[int],
        second_lengths: Sequence[int],
        device: torch.device | str | None = None,
    ) -> AttentionPlan:
        """Samples of two parts that lie apart: sample i is first segment i and second segment i, and all its rows read both.

        Rows are all first parts (images), then all second parts (texts): ``2 n`` segments. A sample without one part has
        length 0 there, so image-only, text-only and paired samples mix in one batch (BEiT-3, VLMo).

        Raises:
            ValueError: the two lists must be equally long.
        """
        n = _check_two_parts(first_lengths, second_lengths)
        index = np.arange(n)
        edges = [(i, j) for i in (index, index + n) for j in (index, index + n)]
        both = np.concatenate([np.stack([q, k, np.zeros_like(q)], 1) for q, k in edges])
        lengths = Segments([*first_lengths, *second_lengths], device)
        present = np.asarray(lengths.lengths)[both[:, 1]] > 0
        return cls.from_edges(lengths, lengths, both[present])

    @classmethod
    def prefix_causal(
        cls,
        prefix_lengths: Sequence[int],
        text_lengths: Sequence[int],
        device: torch.device | str | None = None,
    ) -> AttentionPlan:
        """Captioning over joint samples: a prefix (image) reads itself; a text reads its prefix fully and itself causally.

        Rows are all prefixes, then all texts, as in `joint`.

        Raises:
            ValueError: the two lists must be equally long.
        """
        n = _check_two_parts(prefix_lengths, text_lengths)
        i = np.arange(n)
        zero, one = np.zeros_like(i), np.ones_like(i)
        edges = np.concatenate([np.stack(e, 1) for e in ((i, i, zero), (i + n, i, zero), (i + n, i + n, one))])
        lengths = Segments([*prefix_lengths, *text_lengths], device)
        return cls.from_edges(lengths, lengths, edges)

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens_q: Tensor | Sequence[int], cu_seqlens_k: Tensor | Sequence[int], *, causal: bool = False
    ) -> AttentionPlan:
        """FlashAttention's variable-length call: query sequence i reads key sequence i.

        Raises:
            ValueError: different numbers of sequences, or cumulative lengths that do not start at 0 or decrease.
        """
        query, key = Segments.from_cu_seqlens(cu_seqlens_q), Segments.from_cu_seqlens(cu_seqlens_k)
        if len(query) != len(key):
            raise ValueError(
                f"cu_seqlens_q and cu_seqlens_k must describe equally many sequences; received {len(query)} and {len(key)}."
            )
        index = np.arange(len(query))
        return cls.from_edges(query, key, np.stack([index, index, np.full_like(index, causal)], 1))

    # ------------------------------------------------------------------------------------------------------------- reading

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def num_edges(self) -> int:
        return int(self.edge_key.shape[0])

    @property
    def shares_queries(self) -> bool:
        """Whether all query segments are the same rows of q."""
        return self.query_rows != self.query.rows

    def cu_seqlens(self) -> tuple[Tensor, Tensor, int, int]:
        """(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) for a variable-length attention library.

        Raises:
            ValueError: the plan is not "query sequence i reads key sequence i", the only graph such a call can express.
        """
        if not self.facts.one_to_one:
            raise ValueError(
                "cu_seqlens express only plans in which query segment i reads key segment i; this plan has other edges."
            )
        return self.query.offsets, self.key.offsets, self.facts.max_seqlen_q, self.facts.max_seqlen_k

    def to(self, device: torch.device | str) -> AttentionPlan:
        """The same plan with its tensors on `device`."""
        if torch.device(device) == self.device:
            return self
        if self.host_edges is None:
            index = self.edge_key.to(device)
            return AttentionPlan.cross_attention(self.query.to(device), self.key.to(device), index)
        rows = self.query_rows if self.shares_queries else None
        return AttentionPlan.from_edges(self.query.to(device), self.key.to(device), self.host_edges, query_rows=rows)

    def __repr__(self) -> str:
        return f"AttentionPlan(query={self.query!r}, key={self.key!r}, edges={self.num_edges}, pairs={self.pairs})"


def _segments(lengths: Segments | Iterable[int], device: torch.device | str | None) -> Segments:
    if isinstance(lengths, Segments):
        return lengths if device is None else lengths.to(device)
    return Segments(lengths, device)


def _sorted_edges(array: np.ndarray, num_queries: int, num_keys: int) -> tuple[np.ndarray, np.ndarray]:
    """The edges by query segment and by key segment; raises where one is outside or there twice."""
    for column, count, side in ((0, num_queries, "query"), (1, num_keys, "key")):
        outside = (array[:, column] < 0) | (array[:, column] >= count)
        if outside.any():
            bad = array[int(np.argmax(outside))]
            raise ValueError(
                f"edges must name existing segments; edge ({bad[0]}, {bad[1]}, {bool(bad[2])}) names {side} segment "
                f"{bad[column]} of {count}."
            )
    array = array[np.argsort(array[:, 0], kind="stable")]
    codes = array[:, 0] * max(num_keys, 1) + array[:, 1]
    if np.unique(codes).size != codes.size:
        values, counts = np.unique(codes, return_counts=True)
        twice = divmod(int(values[np.argmax(counts > 1)]), num_keys)
        raise ValueError(f"edges must not repeat; query segment {twice[0]} reads key segment {twice[1]} more than once.")
    return array, array[np.argsort(array[:, 1], kind="stable")]


def _equal(segments: Segments) -> bool:
    return len(set(segments.lengths)) <= 1


def _facts(query: Segments, key: Segments, edges: np.ndarray, max_edges: int) -> PlanFacts:
    identity = len(edges) == len(query) == len(key) and bool((edges[:, 0] == edges[:, 1]).all())
    has_causal = bool(edges[:, 2].any())
    return PlanFacts(
        num_query_segments=len(query),
        num_key_segments=len(key),
        max_seqlen_q=query.max_length,
        max_seqlen_k=key.max_length,
        max_edges=max_edges,
        has_causal=has_causal,
        all_causal=has_causal and bool(edges[:, 2].all()),
        one_to_one=identity,
        uniform=_equal(query) and _equal(key),
    )


def _pairs(query: Segments, key: Segments, edges: np.ndarray) -> int:
    n = np.asarray(query.lengths, np.int64)[edges[:, 0]]
    m = np.asarray(key.lengths, np.int64)[edges[:, 1]]
    if not edges[:, 2].any():
        return int((n * m).sum())
    shown = np.minimum(n, m)  # causal rows that read any key: the last min(n, m); row r of them reads r + 1 + max(m - n, 0)
    causal = shown * (shown + 1) // 2 + shown * np.maximum(m - n, 0)
    return int(np.where(edges[:, 2] > 0, causal, n * m).sum())


def _check_index_size(size: int, query: Segments) -> None:
    if size != len(query):
        raise ValueError(f"index must name one key segment per query segment; received {size} for {len(query)} query segments.")


def _check_two_parts(first: Sequence[int], second: Sequence[int]) -> int:
    if len(first) != len(second):
        raise ValueError(
            f"a joint plan needs both lengths of every sample; received {len(first)} first and {len(second)} second."
        )
    return len(first)
