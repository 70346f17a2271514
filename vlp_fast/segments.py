"""Who is where: segments of packed rows.

All tokens of a batch lie packed in one ``[rows, dim]`` tensor. A *segment* is a contiguous run of rows: an image, a caption, a
set of pooling queries. `Segments` are built once per batch from lengths known on the host, so building them never waits for a
device, and every layer reuses them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["KeptTensors", "Segments", "keep_host_tensors"]

MAX_ROWS = 2**31 - 1  # offsets are int32; addresses in kernels are int64

# (dtype, shape, numbers, device) of what was made on the host -> its tensor
KeptTensors = dict[tuple[str, tuple[int, ...], bytes, str], Tensor]
_KEPT: ContextVar[KeptTensors | None] = ContextVar("vlp_fast_kept_tensors", default=None)


@contextlib.contextmanager
def keep_host_tensors(kept: KeptTensors) -> Iterator[None]:
    """Inside, what segments and plans copy from the host goes into `kept`, and is taken from there where the same numbers come again.

    For a CUDA graph, which copies nothing from the host and has the addresses of what it reads: `kept` must live as long as it does.
    """
    token = _KEPT.set(kept)
    try:
        yield
    finally:
        _KEPT.reset(token)


class Segments:
    """Contiguous runs of rows of a packed tensor: segment i is rows ``offsets[i]`` to ``offsets[i + 1]``.

    Args:
        lengths: rows of each segment, in order; 0 is allowed (an empty segment).
        device: where `offsets` lives.

    Attributes:
        lengths: tuple of ints, on the host.
        offsets: int32 ``[num_segments + 1]`` on `device`, starts at 0, ends at `rows` (FlashAttention's ``cu_seqlens``).
        max_length: the longest segment, 0 if there is none.

    Raises:
        ValueError: a negative or fractional length, or more than 2**31 - 1 rows.
    """

    def __init__(self, lengths: Iterable[int], device: torch.device | str | None = None) -> None:
        array = _int_array(lengths, "lengths")
        if array.size and array.min() < 0:
            bad = int(np.argmin(array))
            raise ValueError(f"lengths must not be negative; lengths[{bad}] is {array[bad]}.")
        if int(array.sum()) > MAX_ROWS:
            raise ValueError(f"lengths must sum to at most {MAX_ROWS} rows; they sum to {int(array.sum())}.")
        self.host_offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(array)])
        self.lengths: tuple[int, ...] = tuple(array.tolist())
        self.rows = int(self.host_offsets[-1])
        self.max_length = int(array.max()) if array.size else 0
        self.offsets = _to_device(self.host_offsets.astype(np.int32), device)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor | Sequence[int], device: torch.device | str | None = None) -> Segments:
        """Segments from FlashAttention-style cumulative lengths ``[n + 1]`` (read on the host: a CUDA tensor is copied, once)."""
        values = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
        array = _int_array(values, "cu_seqlens")
        if array.size == 0 or array[0] != 0:
            raise ValueError(f"cu_seqlens must start at 0; received {values[:4]}.")
        if (np.diff(array) < 0).any():
            bad = int(np.argmax(np.diff(array) < 0))
            raise ValueError(
                f"cu_seqlens must not decrease; cu_seqlens[{bad + 1}]={array[bad + 1]} is below cu_seqlens[{bad}]={array[bad]}."
            )
        if device is None and isinstance(cu_seqlens, Tensor):
            device = cu_seqlens.device
        return cls(np.diff(array), device)

    @property
    def device(self) -> torch.device:
        return self.offsets.device

    @property
    def cu_seqlens(self) -> Tensor:
        """`offsets`, under the name FlashAttention gives them."""
        return self.offsets

    def __len__(self) -> int:
        return len(self.lengths)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Segments) and self.lengths == other.lengths

    def __hash__(self) -> int:
        return hash(self.lengths)

    def __repr__(self) -> str:
        return f"Segments(segments={len(self)}, rows={self.rows}, max_length={self.max_length}, device='{self.device}')"

    def to(self, device: torch.device | str) -> Segments:
        """The same segments with `offsets` on `device`."""
        return self if torch.device(device) == self.device else Segments(self.lengths, device)

    def first_rows(self) -> Tensor:
        """int64 ``[num_segments]``: the first row of each segment (the [CLS] of a caption). An empty segment has none.

        Raises:
            ValueError: a segment is empty.
        """
        return self._ends(self.host_offsets[:-1], "first")

    def last_rows(self) -> Tensor:
        """int64 ``[num_segments]``: the last row of each segment (CoCa's CLS, packed at the caption's end).

        Raises:
            ValueError: a segment is empty.
        """
        return self._ends(self.host_offsets[1:] - 1, "last")

    def positions(self) -> Tensor:
        """int64 ``[rows]``: each row's position within its segment, counted from 0."""
        return _to_device(self._host_positions(), self.device)

    def segment_of_rows(self) -> Tensor:
        """int64 ``[rows]``: the segment that each row belongs to."""
        return _to_device(np.repeat(np.arange(len(self)), np.asarray(self.lengths, np.int64)), self.device)

    def take(self, index: Sequence[int]) -> tuple[Tensor, Segments]:
        """The segments named by `index`, in that order and possibly repeated: (int64 rows to pick, their `Segments`).

        Raises:
            ValueError: an index that names no segment.
        """
        chosen = _int_array(index, "index")
        outside = (chosen < 0) | (chosen >= len(self))
        if outside.any():
            raise ValueError(f"index must name segments 0 to {len(self) - 1}; received {chosen[int(np.argmax(outside))]}.")
        taken = Segments(np.asarray(self.lengths, np.int64)[chosen], self.device)
        shift = np.repeat(self.host_offsets[:-1][chosen] - taken.host_offsets[:-1], np.asarray(taken.lengths, np.int64))
        return _to_device(np.arange(taken.rows) + shift, self.device), taken

    def rows_before_last(self, drop: int) -> Tensor:
        """int64: every row but the last `drop` of each segment, in order (the rows that still have a next token to predict)."""
        left = np.asarray(self.lengths, np.int64)
        return _to_device(np.flatnonzero(self._host_positions() < np.repeat(left - drop, left)), self.device)

    def _host_positions(self) -> np.ndarray:
        lengths = np.asarray(self.lengths, np.int64)
        return np.arange(self.rows) - np.repeat(self.host_offsets[:-1], lengths)

    def _ends(self, rows: np.ndarray, which: str) -> Tensor:
        if 0 in self.lengths:
            raise ValueError(f"an empty segment has no {which} row; segment {self.lengths.index(0)} is empty.")
        return _to_device(rows, self.device)


def _int_array(values: object, name: str) -> np.ndarray:
    array = np.asarray(values.tolist() if isinstance(values, Tensor) else list(values))  # type: ignore[call-overload]
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.bool_)):
        raise ValueError(f"{name} must be a flat list of whole numbers; received {array.dtype} of shape {list(array.shape)}.")
    return array.astype(np.int64)


_CPU = torch.device("cpu")


def _to_device(array: np.ndarray, device: torch.device | str | None) -> Tensor:
    """What is made of host numbers, on the device without waiting for it. Nobody writes to it: it may be kept."""
    kept = _KEPT.get()
    if kept is None:
        return _copied(array, device)
    key = (array.dtype.str, array.shape, array.tobytes(), str(device))
    if key not in kept:
        kept[key] = _copied(array, device)
    return kept[key]


def _copied(array: np.ndarray, device: torch.device | str | None) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device is None or device == _CPU:
        return tensor
    device = torch.device(device)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _int32(array: np.ndarray, device: torch.device) -> Tensor:
    return _to_device(array.astype(np.int32), device)


def _offsets(counts: np.ndarray, device: torch.device) -> Tensor:
    return _int32(np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]), device)
