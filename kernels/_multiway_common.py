"""What the multiway kernels share: which expert a tile of rows belongs to, the order of tiles, offsets on the device.

Rows lie expert after expert, so a tile number counts through the tiles of expert 0, then of expert 1, and so on. A tile never reaches
into the next expert's rows: the last one of an expert is ragged. Models have two or three experts, so a program finds its own by a
loop over all of them; nothing is sorted and no table of tiles exists.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_common import INTERPRETED


@triton.jit
def _tile_of_expert(offsets, num_experts, tile, rows_per_tile):
    """Expert of a tile, its first row and the end of the expert's rows."""
    expert, first_row, end, before = 0, 0, 0, 0
    for e in range(num_experts):
        start, stop = tl.load(offsets + e), tl.load(offsets + e + 1)
        tiles = (stop - start + rows_per_tile - 1) // rows_per_tile
        here = (tile >= before) & (tile < before + tiles)
        expert = tl.where(here, e, expert)
        first_row = tl.where(here, start + (tile - before) * rows_per_tile, first_row)
        end = tl.where(here, stop, end)
        before += tiles
    return expert, first_row, end


@triton.jit
def _tiles_before(offsets, expert, rows_per_tile):
    """How many tiles the experts before `expert` have."""
    before = 0
    for e in range(expert):
        before += (tl.load(offsets + e + 1) - tl.load(offsets + e) + rows_per_tile - 1) // rows_per_tile
    return before


@triton.jit
def _grouped_order(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(tile of rows, tile of columns): GROUP_M tiles of rows go through all columns together, so that both stay in the L2 cache."""
    group = program // (GROUP_M * tiles_n)
    first = group * GROUP_M
    size = tl.minimum(tiles_m - first, GROUP_M)
    inside = program - group * (GROUP_M * tiles_n)
    return first + inside % size, inside // size


def count_tiles(offsets: list[int], rows_per_tile: int) -> int:
    """Tiles of all experts together."""
    return sum(triton.cdiv(b - a, rows_per_tile) for a, b in zip(offsets[:-1], offsets[1:], strict=True))


def device_offsets(offsets: list[int], device: torch.device) -> Tensor:
    """int32 ``[num_experts + 1]`` on the device, without waiting for it. Kept, as every layer of a step asks for the same."""
    # of the stream, so that whoever finds it there comes after the copy
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _device_offsets(tuple(offsets), device, stream)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _CAPTURED[found.data_ptr()] = found
    return found


# a CUDA graph has the address of what it reads, and may live longer than an entry of the cache
_CAPTURED: dict[int, Tensor] = {}


@lru_cache(maxsize=256)
def _device_offsets(offsets: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    host = torch.tensor(offsets, dtype=torch.int32)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def readable_rows(tensor: Tensor) -> Tensor:
    """The rows as kernels read them: dense along the columns, a tile of rows within int32. The interpreter computes bf16 wrongly: fp32."""
    tensor = computed(tensor)
    if tensor.stride(1) != 1 or tensor.stride(0) >= 2**23:
        return tensor.contiguous()
    return tensor


def computed(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that kernels compute with."""
    return tensor.to(computed_dtype(tensor.dtype))


def computed_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for bf16 in the interpreter, which computes that wrongly; the dtype itself elsewhere."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype
