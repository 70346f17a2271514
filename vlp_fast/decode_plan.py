"""Who reads which cached keys while text is generated: slots of one buffer, of fixed capacity, with lengths that grow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from vlp_fast.segments import Segments, _int32, _int_array, _offsets

__all__ = ["DecodePlan"]


class DecodePlan:
    """Query segments and the slots of keys they read, in one softmax, without a causal mask.

    A slot is rows ``key_starts[i]`` to ``key_starts[i] + key_lengths[i]`` of a buffer of keys (and of values). The rows of a query
    segment all read the same keys.

    Attributes:
        query: `Segments` of the rows of q.
        key_starts, key_lengths: int32 ``[slots]`` on the device.
        edge_offsets, edge_key: int32; query segment i reads slots ``edge_key[edge_offsets[i]:edge_offsets[i + 1]]``, in that order.
        max_keys: the most keys that a query segment reads now; most_keys: when all slots are full. pairs: (query row, key) pairs now.
            All are known on the host.
        buffer_rows: rows that the buffer must have at least.
        parts: where the slots are regular, 4 numbers per edge of a segment: query segment s reads `length` rows from
            ``start + s // repeat * step``, as (start, repeat, step, length); otherwise empty.
    """

    def __init__(
        self,
        query: Segments,
        starts: np.ndarray,
        lengths: np.ndarray,
        capacities: np.ndarray,
        growing: np.ndarray,
        edges: np.ndarray,
    ) -> None:
        self.query = query
        self.host_starts, self.host_lengths, self.capacities = starts, lengths, capacities
        self.growing, self.host_edges = growing, edges
        counts = np.bincount(edges[:, 0], minlength=len(query))
        self.key_starts = _int32(starts, query.device)
        self.key_lengths = _int32(lengths, query.device)
        self.edge_offsets = _offsets(counts, query.device)
        self.edge_key = _int32(edges[:, 1], query.device)
        room = np.bincount(edges[:, 0], capacities[edges[:, 1]], len(query))
        self.most_keys = int(room.max()) if room.size else 0
        self._growing = _int32(growing, query.device)
        self.buffer_rows = int((starts + capacities).max()) if starts.size else 0
        self._per_segment = int(counts[0]) if counts.size and (counts == counts[0]).all() else 0
        self._update()

    @classmethod
    def from_edges(
        cls,
        query_lengths: Segments | Iterable[int],
        key_starts: Sequence[int],
        key_lengths: Sequence[int],
        edges: Iterable[tuple[int, int]],
        *,
        capacities: Sequence[int] | None = None,
        growing: Sequence[bool] | None = None,
        device: torch.device | str | None = None,
    ) -> DecodePlan:
        """Any graph: edges are (query segment, slot), read in the order given.

        Args:
            capacities: rows a slot may grow to; default: its length. growing: whether `advance` adds to it; default: none.

        Raises:
            ValueError: lists of different lengths, negative numbers, a length above its capacity, or an edge outside.
        """
        query = query_lengths if isinstance(query_lengths, Segments) else Segments(query_lengths, device)
        if device is not None:
            query = query.to(device)
        starts, lengths = _int_array(key_starts, "key_starts"), _int_array(key_lengths, "key_lengths")
        room = lengths.copy() if capacities is None else _int_array(capacities, "capacities")
        grows = np.zeros(lengths.size, np.int64) if growing is None else _int_array(growing, "growing")
        if not starts.size == lengths.size == room.size == grows.size:
            raise ValueError(
                f"key_starts, key_lengths, capacities and growing need one number per slot; received {starts.size}, "
                f"{lengths.size}, {room.size} and {grows.size}."
            )
        wrong = (starts < 0) | (lengths < 0) | (lengths > room)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise ValueError(
                f"slots need a start and a length of at least 0 and a length within their capacity; slot {i} has start "
                f"{starts[i]}, length {lengths[i]} and capacity {room[i]}."
            )
        array = np.array([(int(q), int(k)) for q, k in edges], np.int64).reshape(-1, 2)
        outside = (array < 0).any(1) | (array[:, 0] >= len(query)) | (array[:, 1] >= starts.size)
        if outside.any():
            bad = array[int(np.argmax(outside))]
            raise ValueError(
                f"edges must name one of {len(query)} query segments and {starts.size} slots; received ({bad[0]}, {bad[1]})."
            )
        return cls(query, starts, lengths, room, grows, array[np.argsort(array[:, 0], kind="stable")])

    @classmethod
    def self_cache(cls, num_beams: int, capacity: int, length: int, device: torch.device | str | None = None) -> DecodePlan:
        """Row i reads its own slot, the rows from ``i * capacity``; the slots grow."""
        i = range(num_beams)
        return cls.from_edges(
            [1] * num_beams, [b * capacity for b in i], [length] * num_beams, [(b, b) for b in i],
            capacities=[capacity] * num_beams, growing=[True] * num_beams, device=device,
        )  # fmt: skip

    @classmethod
    def cross(cls, image_lengths: Sequence[int], beams: int, device: torch.device | str | None = None) -> DecodePlan:
        """The `beams` rows of caption i read image i of a packed buffer of images."""
        _check_beams(beams)
        images = Segments(image_lengths)
        return cls.from_edges(
            [beams] * len(images), images.host_offsets[:-1].tolist(), images.lengths, [(i, i) for i in range(len(images))],
            device=device,
        )  # fmt: skip

    @classmethod
    def joint(
        cls, image_lengths: Sequence[int], beams: int, capacity: int, length: int, device: torch.device | str | None = None
    ) -> DecodePlan:
        """Row i reads image ``i // beams`` and its own slot in one softmax; the buffer holds all images, then the slots."""
        _check_beams(beams)
        images = Segments(image_lengths)
        n, rows = len(images), len(images) * beams
        return cls.from_edges(
            [1] * rows,
            [*images.host_offsets[:-1].tolist(), *(images.rows + capacity * b for b in range(rows))],
            [*images.lengths, *[length] * rows],
            [edge for b in range(rows) for edge in ((b, b // beams), (b, n + b))],
            capacities=[*images.lengths, *[capacity] * rows],
            growing=[False] * n + [True] * rows,
            device=device,
        )

    @property
    def device(self) -> torch.device:
        return self.query.device

    def advance(self, n: int = 1) -> None:
        """Adds n rows to every growing slot, in place on the device and on the host.

        Raises:
            ValueError: n below 0, or a slot without room.
        """
        grown = self.host_lengths + n * self.growing
        if n < 0 or (grown > self.capacities).any():
            raise ValueError(f"advance needs n of at least 0 and room in every growing slot; received n = {n}.")
        self.host_lengths = grown
        self.key_lengths.add_(self._growing, alpha=n)
        self._update()

    def _update(self) -> None:
        keys = np.bincount(self.host_edges[:, 0], self.host_lengths[self.host_edges[:, 1]], len(self.query)).astype(np.int64)
        self.max_keys = int(keys.max()) if keys.size else 0
        self.pairs = int((keys * np.asarray(self.query.lengths, np.int64)).sum())
        self.parts = self._find_parts()

    def _find_parts(self) -> list[int]:
        if not self._per_segment or len(set(self.query.lengths)) != 1:
            return []
        parts: list[int] = []
        for slots in self.host_edges[:, 1].reshape(-1, self._per_segment).T:
            starts, lengths = self.host_starts[slots], self.host_lengths[slots]
            changes = np.flatnonzero(np.diff(starts))
            repeat = int(changes[0]) + 1 if changes.size else starts.size
            step = int(starts[repeat] - starts[0]) if changes.size else 0
            regular = starts[0] + np.arange(starts.size) // repeat * step
            if step < 0 or starts.size % repeat or (lengths != lengths[0]).any() or (starts != regular).any():
                return []
            parts += [int(starts[0]), repeat, step, int(lengths[0])]
        return parts


def _check_beams(beams: int) -> None:
    if beams < 1:
        raise ValueError(f"beams must be at least 1; received {beams}.")
