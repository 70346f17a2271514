"""Grouped matrix products over experts' runs of rows: out = act(x W_e^T + b_e) + residual, and the gradients of x, W and b.

The forward and the gradient of x are one kernel: rows times a matrix of the rows' expert, which lies [out, in] for the one and is read
across for the other. The gradient of W reduces over an expert's rows: one program per expert and tile of W walks them all, in order,
and the programs of the first tile of columns sum the bias's gradient on the way. The GELU's backward is a pass of its own over
[rows, out]: as a prologue, every tile of it would be formed again for each tile of columns of dx and of dW, erf and exp included, and
could no longer travel to the matrix units by asynchronous copies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_common import input_precision, on_device_of
from ._configs import ELEMENTWISE, GELU_BLOCK, multiway_linear_config
from ._multiway_common import (
    _grouped_order,
    _tile_of_expert,
    computed,
    computed_dtype,
    count_tiles,
    device_offsets,
    readable_rows,
)

SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_ZERO = tl.constexpr(0.3989422804014327)  # of the normal distribution


@triton.jit
def _normal_distribution(x):
    return 0.5 * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit
def _store_finished(
    acc, residual, residual_base, out, pre, base, row_mask, width_left, width, residual_row_stride, IS_GELU: tl.constexpr
):  # fmt: skip
    """Store a tile as it is in pre, and finished in out. `base`: where it begins in both. `width_left`: columns from there on."""
    rows = tl.arange(0, acc.shape[0])
    columns = tl.arange(0, acc.shape[1])
    mask = row_mask[:, None] & (columns < width_left)[None, :]
    in_tile = rows[:, None] * width + columns[None, :]  # the tile's shape
    if pre is not None:
        tl.store(pre + base + in_tile, acc.to(pre.dtype.element_ty), mask=mask)
    if IS_GELU:
        acc = acc * _normal_distribution(acc)
    if residual is not None:
        residual_pointers = residual + residual_base + (rows[:, None] * residual_row_stride + columns[None, :])
        acc += tl.load(residual_pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + base + in_tile, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tiles_m", "num_experts"])
def _multiway_linear_kernel(
    # pointers in
    x, weight, bias, residual, offsets,
    # pointers out
    out, pre,
    # sizes
    num_experts, tiles_m, tiles_n, width, depth,
    # strides
    x_row_stride, residual_row_stride, weight_column_stride, weight_depth_stride,
    # constexpr
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, IS_GELU: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of act(x W_e + b_e) + residual, where W_e has a stride for each of its sides."""
    tile_m, tile_n = _grouped_order(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    expert, first_row, end = _tile_of_expert(offsets, num_experts, tile_m, BLOCK_M)
    first_column = tile_n * BLOCK_N
    rows = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    steps = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    row_count = end - first_row
    column_mask = columns < width - first_column

    # rows beyond the expert's last read that one again: what they give is not stored, and no load of x needs a mask for them
    x_pointers = x + tl.cast(first_row, tl.int64) * x_row_stride
    x_pointers += tl.minimum(rows, row_count - 1)[:, None] * x_row_stride + steps[None, :]  # [BLOCK_M, BLOCK_K]
    matrix = weight + tl.cast(expert, tl.int64) * width * depth + tl.cast(first_column, tl.int64) * weight_column_stride
    w_pointers = matrix + (steps[:, None] * weight_depth_stride + columns[None, :] * weight_column_stride)  # [BLOCK_K, BLOCK_N]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first_step in tl.range(0, depth, BLOCK_K):
        if EVEN_K:
            x_tile = tl.load(x_pointers)
        else:
            x_tile = tl.load(x_pointers, mask=(steps < depth - first_step)[None, :], other=0.0)
        if EVEN_K and EVEN_N:
            w_tile = tl.load(w_pointers)
        else:
            w_mask = (steps < depth - first_step)[:, None] & column_mask[None, :]
            w_tile = tl.load(w_pointers, mask=w_mask, other=0.0)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=INPUT_PRECISION)
        x_pointers += BLOCK_K
        w_pointers += BLOCK_K * weight_depth_stride

    if bias is not None:
        bias_pointers = bias + tl.cast(expert, tl.int64) * width + first_column + columns
        acc += tl.load(bias_pointers, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    row_mask, width_left = rows < row_count, width - first_column
    base = tl.cast(first_row, tl.int64) * width + first_column
    residual_base = tl.cast(first_row, tl.int64) * residual_row_stride + first_column
    if IS_GELU and residual is not None:
        # a whole tile of the two together needs more registers than there are: first the left half of the columns, then the right
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, HALF]), (0, 2, 1)))  # [BLOCK_M, HALF]
        _store_finished(
            left, residual, residual_base, out, pre, base, row_mask, width_left, width, residual_row_stride, IS_GELU
        )
        width_left, base, residual_base = width_left - HALF, base + HALF, residual_base + HALF
        _store_finished(
            right, residual, residual_base, out, pre, base, row_mask, width_left, width, residual_row_stride, IS_GELU
        )
    else:
        _store_finished(acc, residual, residual_base, out, pre, base, row_mask, width_left, width, residual_row_stride, IS_GELU)


@triton.jit(do_not_specialize=["num_experts"])
def _multiway_linear_weight_kernel(
    # pointers in
    dout, x, offsets,
    # pointers out
    dweight, dbias,
    # sizes
    num_experts, tiles_n, tiles_k, width, depth,
    # strides
    dout_row_stride, x_row_stride,
    # constexpr
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_N: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of dout^T x over one expert's rows, BLOCK_M at a time; an expert without rows gets zeros. BLOCK_K: columns of x."""
    program = tl.program_id(0)
    expert = program // (tiles_n * tiles_k)
    tile_n, tile_k = _grouped_order(program % (tiles_n * tiles_k), tiles_n, tiles_k, GROUP_N)
    start, stop = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    rows = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    inputs = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    d_pointers = dout + tl.cast(start, tl.int64) * dout_row_stride + (rows[:, None] * dout_row_stride + columns[None, :])
    x_pointers = x + tl.cast(start, tl.int64) * x_row_stride + (rows[:, None] * x_row_stride + inputs[None, :])

    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_bias = tl.zeros([BLOCK_N], tl.float32)
    for first_row in tl.range(start, stop, BLOCK_M):
        row_mask = (rows < stop - first_row)[:, None]
        if EVEN_N:
            d_tile = tl.load(d_pointers, mask=row_mask, other=0.0)  # [BLOCK_M, BLOCK_N]
        else:
            d_tile = tl.load(d_pointers, mask=row_mask & (columns < width)[None, :], other=0.0)
        if dweight is not None:
            if EVEN_K:
                x_tile = tl.load(x_pointers, mask=row_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
            else:
                x_tile = tl.load(x_pointers, mask=row_mask & (inputs < depth)[None, :], other=0.0)
            acc = tl.dot(tl.trans(d_tile), x_tile, acc, input_precision=INPUT_PRECISION)
            x_pointers += BLOCK_M * x_row_stride
        if dbias is not None:
            if tile_k == 0:
                acc_bias += tl.sum(d_tile.to(tl.float32), 0)
        d_pointers += BLOCK_M * dout_row_stride

    column_mask = columns < width
    first = tl.cast(expert, tl.int64) * width
    if dweight is not None:
        pointers = dweight + (first + columns.to(tl.int64))[:, None] * depth + inputs[None, :]
        tl.store(pointers, acc.to(dweight.dtype.element_ty), mask=column_mask[:, None] & (inputs < depth)[None, :])
    if dbias is not None:
        if tile_k == 0:
            tl.store(dbias + first + columns, acc_bias.to(dbias.dtype.element_ty), mask=column_mask)


@triton.jit
def _gelu_backward_kernel(
    # pointers in
    dout, pre,
    # pointers out
    dpre,
    # sizes
    width,
    # strides
    dout_row_stride,
    # constexpr
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dout * gelu'(pre), BLOCK columns of one row; only dout may have strides."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = columns < width
    d = tl.load(dout + row * dout_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(pre + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    slope = _normal_distribution(value) + value * DENSITY_AT_ZERO * tl.exp(-0.5 * value * value)
    tl.store(dpre + row * width + columns, (d * slope).to(dpre.dtype.element_ty), mask=mask)


def multiway_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    offsets: list[int],
    activation: str,
    save_pre: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """act(x W_e^T + b_e) + residual, for the rows ``offsets[e]:offsets[e + 1]`` of every expert e.

    Args:
        x: ``[rows, in]``. weight: ``[num_experts, out, in]``. bias: ``[num_experts, out]`` or None. residual: ``[rows, out]`` or None.
        offsets: host numbers. activation: "" or "gelu". save_pre: whether to keep the values before it. out_dtype: of the result.

    Returns:
        out ``[rows, out]``, and the values before the activation in x's dtype, empty unless kept.
    """
    dtype, rows, width = x.dtype, x.shape[0], weight.shape[1]
    x, weight = readable_rows(x), computed(weight).contiguous()
    bias = None if bias is None else computed(bias).contiguous()
    residual = None if residual is None else readable_rows(residual)
    out = torch.empty((rows, width), dtype=computed_dtype(out_dtype), device=x.device)
    pre = torch.empty((rows, width) if activation and save_pre else (0,), dtype=x.dtype, device=x.device)
    if out.numel():
        _product(x, weight, False, bias, residual, offsets, activation, out, pre if pre.numel() else None)
    return out.to(out_dtype), pre.to(dtype)


def multiway_linear_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    pre: Tensor,
    offsets: list[int],
    activation: str,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; those not needed are empty. `dout` is in x's dtype and may have stride 0; `pre` as saved."""
    dtype, num_experts, (width, depth) = x.dtype, weight.shape[0], weight.shape[1:]
    dout, x, weight = readable_rows(dout), readable_rows(x), computed(weight).contiguous()
    if activation and dout.numel():
        dpre = torch.empty_like(dout, memory_format=torch.contiguous_format)
        with on_device_of(dout):
            _gelu_backward_kernel[(dout.shape[0], triton.cdiv(width, GELU_BLOCK))](
                dout, computed(pre).contiguous(), dpre, width, dout.stride(0), BLOCK=GELU_BLOCK, **ELEMENTWISE
            )
        dout = dpre
    dx = torch.empty(x.shape if needs_dx else (0,), dtype=x.dtype, device=x.device)
    if dx.numel():
        _product(dout, weight, True, None, None, offsets, "", dx, None)
    dweight = torch.empty(weight.shape if needs_dweight else (0,), dtype=x.dtype, device=x.device)
    dbias = torch.empty((num_experts, width) if needs_dbias else (0,), dtype=x.dtype, device=x.device)
    if dweight.numel() or dbias.numel():
        config = multiway_linear_config("weight", x.element_size(), max(b - a for a, b in zip(offsets, offsets[1:])))  # noqa: B905
        tiles_n = triton.cdiv(width, config.block_n)
        tiles_k = triton.cdiv(depth, config.block_k) if dweight.numel() else 1
        with on_device_of(x):
            _multiway_linear_weight_kernel[(num_experts * tiles_n * tiles_k,)](
                dout, x, device_offsets(offsets, x.device),
                dweight if dweight.numel() else None, dbias if dbias.numel() else None,
                num_experts, tiles_n, tiles_k, width, depth,
                dout.stride(0), x.stride(0),
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_N=config.group,
                EVEN_N=width % config.block_n == 0, EVEN_K=depth % config.block_k == 0,
                INPUT_PRECISION=input_precision(x.dtype), **config.options,
            )  # fmt: skip
    return dx.to(dtype), dweight.to(dtype), dbias.to(dtype)


def _product(
    x: Tensor,
    weight: Tensor,
    transposed: bool,
    bias: Tensor | None,
    residual: Tensor | None,
    offsets: list[int],
    activation: str,
    out: Tensor,
    pre: Tensor | None,
) -> None:
    """Launch the product into `out`: x W_e^T, or with `transposed` x W_e."""
    depth, width = x.shape[1], out.shape[1]
    config = multiway_linear_config("product", x.element_size(), max(b - a for a, b in zip(offsets, offsets[1:])))  # noqa: B905
    tiles_m, tiles_n = count_tiles(offsets, config.block_m), triton.cdiv(width, config.block_n)
    with on_device_of(x):
        _multiway_linear_kernel[(tiles_m * tiles_n,)](
            x, weight, bias, residual, device_offsets(offsets, x.device),
            out, pre,
            weight.shape[0], tiles_m, tiles_n, width, depth,
            x.stride(0), 0 if residual is None else residual.stride(0), *((1, width) if transposed else (depth, 1)),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group,
            EVEN_N=width % config.block_n == 0, EVEN_K=depth % config.block_k == 0, IS_GELU=activation == "gelu",
            INPUT_PRECISION=input_precision(x.dtype), **config.options,
        )  # fmt: skip
