"""What the contrastive kernels share: a tile of similarities a b^T, and log-sum-exps of its rows and columns.

A program forms one tile and leaves one number per row and one per column of it: the log-sum-exp of what it saw. A second kernel puts
these parts together in their order. So both directions of a loss come from one product, and what is in memory is the matrix's
128th part or so, for a block of rows at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_common import LN_2, LOG2_E, input_precision, on_device_of
from ._configs import COMBINE_BLOCK, ELEMENTWISE, LinearConfig, similarity_config
from ._multiway_common import _grouped_order, readable_rows

PART_BYTES = 64 * 2**20  # of parts in memory at once


@triton.jit
def _similarity_tile(
    a, b, first_row, first_column, rows_a, rows_b, dim, a_row_stride, b_row_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_M, BLOCK_N] of a b^T from a row and a column on; beyond the last row or column that one stands again."""
    rows = tl.minimum(tl.arange(0, BLOCK_M), rows_a - 1 - first_row)  # [BLOCK_M]
    columns = tl.minimum(tl.arange(0, BLOCK_N), rows_b - 1 - first_column)  # [BLOCK_N]
    steps = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    a_pointers = a + tl.cast(first_row, tl.int64) * a_row_stride + (rows[:, None] * a_row_stride + steps[None, :])
    b_pointers = b + tl.cast(first_column, tl.int64) * b_row_stride + (steps[:, None] + columns[None, :] * b_row_stride)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first_step in tl.range(0, dim, BLOCK_K):
        if EVEN_K:
            a_tile, b_tile = tl.load(a_pointers), tl.load(b_pointers)  # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
        else:
            inside = steps < dim - first_step
            a_tile = tl.load(a_pointers, mask=inside[None, :], other=0.0)
            b_tile = tl.load(b_pointers, mask=inside[:, None], other=0.0)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=INPUT_PRECISION)
        a_pointers += BLOCK_K
        b_pointers += BLOCK_K
    return acc


@triton.jit
def _own_pairs(first_row, first_column, first, rows_a, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """bool [BLOCK_M, BLOCK_N]: where row i meets column ``first + i``, of which it is the pair."""
    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = first_column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    return ((rows + first)[:, None] == columns[None, :]) & (rows < rows_a)[:, None]


@triton.jit
def _exp(x):
    """Callers take differences before: in base 2, large similarities would lose digits in both products."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _lse_along(values, AXIS: tl.constexpr):
    """Log-sum-exp; -inf where all values are."""
    largest = tl.max(values, AXIS)
    finite = tl.where(largest == -float("inf"), 0.0, largest)
    return finite + tl.log2(tl.sum(_exp(values - tl.expand_dims(finite, AXIS)), AXIS)) * LN_2


@triton.jit(do_not_specialize=["tiles_m", "first"])
def _similarity_lse_kernel(
    # pointers in
    a, b, scale,
    # pointers out
    row_parts, column_parts, own,
    # sizes
    rows_a, rows_b, dim, tiles_m, tiles_n, first,
    # strides
    a_row_stride, b_row_stride,
    # constexpr
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, EXCLUDES_OWN: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one tile: log-sum-exps along rows and columns, and the similarities of the pairs in it."""
    tile_m, tile_n = _grouped_order(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    first_row, first_column = tile_m * BLOCK_M, tile_n * BLOCK_N
    acc = _similarity_tile(
        a, b, first_row, first_column, rows_a, rows_b, dim, a_row_stride, b_row_stride,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, INPUT_PRECISION,
    )  # fmt: skip
    acc *= tl.load(scale)
    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = first_column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    pairs = _own_pairs(first_row, first_column, first, rows_a, BLOCK_M, BLOCK_N)
    has_pair = (rows < rows_a) & (rows + first >= first_column) & (rows + first < first_column + BLOCK_N)
    tl.store(own + rows, tl.sum(tl.where(pairs, acc, 0.0), 1), mask=has_pair)
    counted = (columns < rows_b)[None, :]
    if EXCLUDES_OWN:
        counted = counted & ~pairs
    row_lse = _lse_along(tl.where(counted, acc, -float("inf")), 1)
    tl.store(row_parts + tl.cast(tile_n, tl.int64) * rows_a + rows, row_lse, mask=rows < rows_a)
    if column_parts is not None:
        column_lse = _lse_along(tl.where((rows < rows_a)[:, None], acc, -float("inf")), 0)
        tl.store(column_parts + tl.cast(tile_m, tl.int64) * rows_b + columns, column_lse, mask=columns < rows_b)


@triton.jit(do_not_specialize=["parts", "count"])
def _combine_lse_kernel(
    # pointers in
    values,
    # pointers in and out
    lse,
    # sizes
    parts, count,
    # constexpr
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds parts [parts, count] to what `lse` holds, in their order."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = places < count
    largest = tl.load(lse + places, mask=mask, other=0.0)
    total = tl.where(largest == -float("inf"), 0.0, 1.0)
    for part in range(parts):
        value = tl.load(values + tl.cast(part, tl.int64) * count + places, mask=mask, other=0.0)
        new = tl.maximum(largest, value)
        finite = tl.where(new == -float("inf"), 0.0, new)
        total = total * _exp(largest - finite) + _exp(value - finite)
        largest = new
    tl.store(lse + places, largest + tl.log2(total) * LN_2, mask=mask)


# --------------------------------------------------------------------------------------------------------------- launchers


def similarity_options(a: Tensor, config: LinearConfig) -> dict[str, object]:
    """Constants and options of a launch over tiles of similarities."""
    return {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group,
        "EVEN_K": a.shape[1] % config.block_k == 0, "INPUT_PRECISION": input_precision(a.dtype), **config.options,
    }  # fmt: skip


def row_blocks(rows: int, bytes_per_row: float, budget: int, block_m: int) -> list[slice]:
    """Whole tiles of rows whose bytes stay within the budget; at least one tile."""
    size = max(int(budget / max(bytes_per_row, 1)) // block_m, 1) * block_m
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def similarity_lse(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps of s = scale a b^T along its rows and its columns, and the similarities of the pairs (i, i).

    Args:
        a: ``[n, dim]``. b: ``[m, dim]``, m at least n, of one dtype. scale: fp32, one number.

    Returns:
        fp32 ``[n]``, ``[m]``, ``[n]``.
    """
    a, b = readable_rows(a), readable_rows(b)
    config = similarity_config("lse", a.element_size())
    n, m = a.shape[0], b.shape[0]
    row_lse, own = a.new_full((n,), -torch.inf, dtype=torch.float32), a.new_empty(n, dtype=torch.float32)
    column_lse = a.new_full((m,), -torch.inf, dtype=torch.float32)
    tiles_n = triton.cdiv(m, config.block_n)
    for rows in row_blocks(n, 4 * (tiles_n + m / config.block_m), PART_BYTES, config.block_m):
        row_parts, column_parts = _launch_lse(a[rows], b, scale, own[rows], rows.start, config, has_columns=True)
        assert column_parts is not None
        combine_lse(row_parts, row_lse[rows])
        combine_lse(column_parts, column_lse)
    return row_lse, column_lse, own


def similarity_parts(a: Tensor, b: Tensor, scale: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exps of each row of scale a b^T in each tile of columns, its pair ``first + i`` left out, and the pairs' similarities.

    Returns:
        fp32 ``[tiles, n]``, and ``[n]``; the tiles are those of `similarity_config`.
    """
    a, b = readable_rows(a), readable_rows(b)
    own = a.new_empty(a.shape[0], dtype=torch.float32)
    parts, _ = _launch_lse(a, b, scale, own, first, similarity_config("lse", a.element_size()), has_columns=False)
    return parts, own


def _launch_lse(
    a: Tensor, b: Tensor, scale: Tensor, own: Tensor, first: int, config: LinearConfig, has_columns: bool
) -> tuple[Tensor, Tensor | None]:
    (n, dim), m = a.shape, b.shape[0]
    tiles_m, tiles_n = triton.cdiv(n, config.block_m), triton.cdiv(m, config.block_n)
    row_parts = a.new_empty((tiles_n, n), dtype=torch.float32)
    column_parts = a.new_empty((tiles_m, m), dtype=torch.float32) if has_columns else None
    with on_device_of(a):
        _similarity_lse_kernel[(tiles_m * tiles_n,)](
            a, b, scale,
            row_parts, column_parts, own,
            n, m, dim, tiles_m, tiles_n, first,
            a.stride(0), b.stride(0),
            EXCLUDES_OWN=not has_columns, **similarity_options(a, config),
        )  # fmt: skip
    return row_parts, column_parts


def combine_lse(parts: Tensor, lse: Tensor) -> None:
    """Adds fp32 log-sum-exps ``[parts, count]`` to `lse` ``[count]``, dense, in place."""
    with on_device_of(lse):
        _combine_lse_kernel[(triton.cdiv(lse.numel(), COMBINE_BLOCK),)](
            parts, lse, parts.shape[0], lse.numel(), BLOCK=COMBINE_BLOCK, **ELEMENTWISE
        )
