"""LayerNorm over experts' runs of rows: the statistics of a row are its own, scale and shift are its expert's.

A program takes some consecutive rows of one expert, one after another, each in one block. In the backward it sums what they give to
dweight and dbias in registers and writes one partial sum of each; a second kernel adds an expert's partial sums in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_common import on_device_of
from ._configs import ELEMENTWISE, NORM_REDUCE_COLUMNS, NORM_REDUCE_ROWS, multiway_norm_config
from ._multiway_common import (
    _tile_of_expert,
    _tiles_before,
    computed,
    computed_dtype,
    count_tiles,
    device_offsets,
    readable_rows,
)


@triton.jit(do_not_specialize=["num_experts", "rows_per_program"])
def _multiway_layer_norm_kernel(
    # pointers in
    x, weight, bias, offsets,
    # pointers out
    out, mean, rstd,
    # sizes
    num_experts, rows_per_program,
    # strides
    x_row_stride,
    # scalars
    eps,
    # constexpr
    DIM: tl.constexpr,
):  # fmt: skip
    expert, first_row, end = _tile_of_expert(offsets, num_experts, tl.program_id(0), rows_per_program)
    columns = tl.arange(0, triton.next_power_of_2(DIM))  # [BLOCK]
    mask = columns < DIM
    scale = tl.load(weight + tl.cast(expert, tl.int64) * DIM + columns, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(bias + tl.cast(expert, tl.int64) * DIM + columns, mask=mask, other=0.0).to(tl.float32)
    for index in range(first_row, tl.minimum(first_row + rows_per_program, end)):
        row = tl.cast(index, tl.int64)
        values = tl.load(x + row * x_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        average = tl.sum(values, 0) / DIM
        centred = tl.where(mask, values - average, 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / DIM + eps)
        tl.store(out + row * DIM + columns, (centred * inverse * scale + shift).to(out.dtype.element_ty), mask=mask)
        tl.store(mean + row, average)
        tl.store(rstd + row, inverse)


@triton.jit(do_not_specialize=["num_experts", "rows_per_program"])
def _multiway_layer_norm_backward_kernel(
    # pointers in
    dout, x, mean, rstd, weight, offsets,
    # pointers out
    dx, partial,
    # sizes
    num_experts, rows_per_program,
    # strides
    dout_row_stride, x_row_stride,
    # constexpr
    DIM: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    expert, first_row, end = _tile_of_expert(offsets, num_experts, program, rows_per_program)
    BLOCK: tl.constexpr = triton.next_power_of_2(DIM)
    columns = tl.arange(0, BLOCK)  # [BLOCK]
    mask = columns < DIM
    scale = tl.load(weight + tl.cast(expert, tl.int64) * DIM + columns, mask=mask, other=0.0).to(tl.float32)
    sum_weight = tl.zeros([BLOCK], tl.float32)
    sum_bias = tl.zeros([BLOCK], tl.float32)
    for index in range(first_row, tl.minimum(first_row + rows_per_program, end)):
        row = tl.cast(index, tl.int64)
        d = tl.load(dout + row * dout_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(x + row * x_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row)
        normal = tl.where(mask, (values - tl.load(mean + row)) * inverse, 0.0)
        sum_weight += d * normal
        sum_bias += d
        scaled = d * scale
        along_ones = tl.sum(scaled, 0) / DIM
        along_normal = tl.sum(scaled * normal, 0) / DIM
        d = (scaled - along_ones - normal * along_normal) * inverse
        tl.store(dx + row * DIM + columns, d.to(dx.dtype.element_ty), mask=mask)
    sums = partial + tl.cast(program, tl.int64) * 2 * DIM + columns
    tl.store(sums, sum_weight, mask=mask)
    tl.store(sums + DIM, sum_bias, mask=mask)


@triton.jit(do_not_specialize=["rows_per_program"])
def _multiway_layer_norm_reduce_kernel(
    # pointers in
    partial, offsets,
    # pointers out
    dweight, dbias,
    # sizes
    rows_per_program, dim,
    # constexpr
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of one expert in the order of its rows; zeros where it has none. Weight and bias lie side by side."""
    expert = tl.program_id(0)
    first = _tiles_before(offsets, expert, rows_per_program)
    last = _tiles_before(offsets, expert + 1, rows_per_program)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    rows = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for index in range(first, last, BLOCK_M):
        pointers = partial + (index + rows).to(tl.int64)[:, None] * (2 * dim) + columns[None, :]
        acc += tl.load(pointers, mask=(index + rows < last)[:, None] & (columns < 2 * dim)[None, :], other=0.0)
    total = tl.sum(acc, 0)
    base = tl.cast(expert, tl.int64) * dim
    tl.store(dweight + base + columns, total.to(dweight.dtype.element_ty), mask=columns < dim)
    of_bias = (columns >= dim) & (columns < 2 * dim)
    tl.store(dbias + base + columns - dim, total.to(dbias.dtype.element_ty), mask=of_bias)


def multiway_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: list[int], eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of every row with the scale and shift of its expert, rows ``offsets[e]:offsets[e + 1]``.

    Args:
        x: ``[rows, dim]``, dim up to 8192. weight, bias: ``[num_experts, dim]``. offsets: host numbers. eps: added to the variance.

    Returns:
        out ``[rows, dim]`` in out_dtype; mean and 1 / deviation of every row, fp32 ``[rows, 1]``.
    """
    rows, dim = x.shape
    config = multiway_norm_config(dim)
    x, weight, bias = readable_rows(x), computed(weight).contiguous(), computed(bias).contiguous()
    out = torch.empty((rows, dim), dtype=computed_dtype(out_dtype), device=x.device)
    mean, rstd = (torch.empty((rows, 1), dtype=torch.float32, device=x.device) for _ in range(2))
    if out.numel():
        rows_per_program = config.rows_per_program(rows)
        with on_device_of(x):
            _multiway_layer_norm_kernel[(count_tiles(offsets, rows_per_program),)](
                x, weight, bias, device_offsets(offsets, x.device),
                out, mean, rstd,
                weight.shape[0], rows_per_program,
                x.stride(0), eps,
                DIM=dim, **config.options,
            )  # fmt: skip
    return out.to(out_dtype), mean, rstd


def multiway_layer_norm_backward(
    dout: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, offsets: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; `dout` may have stride 0."""
    x_dtype, weight_dtype, (rows, dim) = x.dtype, weight.dtype, x.shape
    config = multiway_norm_config(dim)
    dout, x, weight = readable_rows(dout), readable_rows(x), computed(weight).contiguous()
    dx = torch.empty((rows, dim), dtype=x.dtype, device=x.device)
    dweight, dbias = (torch.empty(weight.shape, dtype=computed_dtype(weight_dtype), device=x.device) for _ in range(2))
    if dx.numel() == 0:
        return dx.to(x_dtype), dweight.zero_().to(weight_dtype), dbias.zero_().to(weight_dtype)
    rows_per_program = config.rows_per_program(rows)
    programs, on_device = count_tiles(offsets, rows_per_program), device_offsets(offsets, x.device)
    partial = torch.empty((programs, 2, dim), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _multiway_layer_norm_backward_kernel[(programs,)](
            dout, x, mean, rstd, weight, on_device,
            dx, partial,
            weight.shape[0], rows_per_program,
            dout.stride(0), x.stride(0),
            DIM=dim, **config.options,
        )  # fmt: skip
        _multiway_layer_norm_reduce_kernel[(weight.shape[0], triton.cdiv(2 * dim, NORM_REDUCE_COLUMNS))](
            partial, on_device,
            dweight, dbias,
            rows_per_program, dim,
            BLOCK_M=NORM_REDUCE_ROWS, BLOCK_N=NORM_REDUCE_COLUMNS, **ELEMENTWISE,
        )  # fmt: skip
    return dx.to(x_dtype), dweight.to(weight_dtype), dbias.to(weight_dtype)
