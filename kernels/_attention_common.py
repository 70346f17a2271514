"""What the attention kernels share: where a tile lies, which keys a row sees, which weights dropout keeps, what a launcher derives.

Every position below is counted within a segment; `rows` and `columns` are positions of queries and keys. Addresses are int64,
statistics and accumulators fp32, exponentials base 2.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # read when kernels are decorated: later changes have no effect

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# ------------------------------------------------------------------------------------------------------------------- tiles


@triton.jit
def _segment(offsets, index):
    """First packed row (int64) and number of rows (int32) of a segment."""
    first = tl.load(offsets + index)
    return first.to(tl.int64), tl.load(offsets + index + 1) - first


@triton.jit
def _query_base(q, query_first, head, row_stride, head_stride, SHARES_QUERIES: tl.constexpr):
    """Where a segment's queries of one head begin; with SHARES_QUERIES all segments have the same."""
    base = q + head.to(tl.int64) * head_stride
    return base if SHARES_QUERIES else base + query_first * row_stride


@triton.jit
def _tile_pointers(base, first_row, length, row_stride, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Pointers and mask of BLOCK rows of one head of one segment, padded to a power of two columns."""
    rows = tl.arange(0, BLOCK)  # [BLOCK]
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))  # [BLOCK_D]
    first = tl.cast(first_row, tl.int64) * row_stride
    pointers = base + first + (rows[:, None] * row_stride + dims[None, :])  # [BLOCK, BLOCK_D], int32 within the tile
    return pointers, (rows < length - first_row)[:, None] & (dims < HEAD_DIM)[None, :]


@triton.jit
def _load_tile(base, first_row, length, row_stride, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[BLOCK, BLOCK_D]; rows from `length` on and the padding are 0."""
    pointers, mask = _tile_pointers(base, first_row, length, row_stride, BLOCK, HEAD_DIM)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _store_tile(base, tile, first_row, length, row_stride, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Write what `_load_tile` would read, in the dtype of `base`."""
    pointers, mask = _tile_pointers(base, first_row, length, row_stride, BLOCK, HEAD_DIM)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


# -------------------------------------------------------------------------------------------------------------------- mask


@triton.jit
def _visible_end(rows, query_length, key_length, causal, HAS_CAUSAL: tl.constexpr):
    """The first key that each row does not see: causal is aligned to the bottom right, so the last row sees all keys."""
    if HAS_CAUSAL:
        return tl.minimum(key_length, tl.where(causal != 0, rows + (key_length - query_length + 1), key_length))
    return tl.zeros_like(rows) + key_length


@triton.jit
def _key_range(
    first_row, query_length, key_length, causal, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_CAUSAL: tl.constexpr
):
    """For a query tile: keys [0, full_end) are seen by all of its rows, in whole key tiles; [full_end, end) need the mask."""
    last_row = tl.minimum(first_row + BLOCK_M, query_length) - 1
    end = tl.maximum(_visible_end(last_row, query_length, key_length, causal, HAS_CAUSAL), 0)
    full_end = tl.maximum(_visible_end(first_row, query_length, key_length, causal, HAS_CAUSAL), 0) // BLOCK_N * BLOCK_N
    return full_end, end


@triton.jit
def _query_range(
    first_key, query_length, key_length, causal, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_CAUSAL: tl.constexpr
):
    """For a key tile: query rows below `first`, a whole number of tiles, see none of it; tiles from `full_first` on see all of it."""
    if HAS_CAUSAL:
        row = tl.where(causal != 0, first_key - (key_length - query_length), 0)  # the first row that sees first_key
        first = tl.maximum(row, 0) // BLOCK_M * BLOCK_M
        return first, tl.where(causal != 0, tl.maximum(row + BLOCK_N - 1, 0), 0)
    return query_length * 0, query_length * 0


# ----------------------------------------------------------------------------------------------------------------- dropout


@triton.jit
def _mix32(x):
    """murmur3's 32-bit finaliser, on uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _query_hash(seed, head, rows):
    """uint32 per packed query row; with `_key_hash` and `_dropout_factor` the bits of `reference.dropout_keep`."""
    value = tl.load(seed)
    low, high = value.to(tl.uint32), (value >> 32).to(tl.uint32)
    per_head = _mix32(_mix32(low ^ 0x9E3779B9) ^ high ^ (head.to(tl.uint32) * 0x85EBCA77))
    return _mix32(per_head ^ rows.to(tl.uint32))


@triton.jit
def _key_hash(rows):
    """uint32 per packed key row."""
    return _mix32(rows.to(tl.uint32) ^ 0xC2B2AE3D)


@triton.jit
def _dropout_factor(query_hash, key_hash, threshold):
    """0 where a weight is dropped, 1 / (1 - dropout_p) elsewhere; the hashes broadcast against each other."""
    threshold = threshold.to(tl.uint32, bitcast=True)
    dropout_p = threshold.to(tl.float32) * (1.0 / 4294967296.0)
    return tl.where(_mix32(query_hash ^ key_hash) >= threshold, 1.0 / (1.0 - dropout_p), 0.0)


# --------------------------------------------------------------------------------------------------------------- launchers


def threshold_bits(dropout_p: float) -> int:
    """``int(dropout_p * 2**32)``, the bits below which a weight is dropped, as the int32 that has these bits."""
    threshold = int(dropout_p * 2**32)
    return threshold - 2**32 if threshold >= 2**31 else threshold


def input_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: fp32 exactly, unless the user allowed TF32 for matrix products; 16-bit has one way only."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def readable(*tensors: Tensor) -> list[Tensor]:
    """The tensors as kernels read them: dense along the head dimension, strided alike, 128 rows within int32.

    The interpreter computes bf16 wrongly: there they become fp32.
    """
    if INTERPRETED:
        tensors = tuple(t.float() if t.dtype == torch.bfloat16 else t for t in tensors)
    strides = tensors[0].stride()
    if strides[-1] != 1 or strides[0] >= 2**24 or any(t.stride() != strides for t in tensors):
        return [t.contiguous() for t in tensors]
    return list(tensors)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; this makes it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def before_sm90(tensor: Tensor) -> bool:
    """Whether the tensor lies on an NVIDIA GPU older than Hopper, for whose compiler a few configurations are smaller."""
    return tensor.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) < (9, 0)
