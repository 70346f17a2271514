"""Contrastive losses and their gradients: InfoNCE in both directions, with soft targets, and pair by pair (sigmoid).

The gradient of a loss by its similarities is formed from a product in the kernel, for a block of rows at a time; the two products
that carry it on to the features stay with the vendor's library. InfoNCE's forward keeps no similarity at all (_similarity.py). The loss
with soft targets reads whole rows of a block twice, like linear_cross_entropy.py: a student's and a teacher's, against one set of keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_common import LN_2, on_device_of
from ._configs import LinearConfig, distilled_config, similarity_config
from ._multiway_common import _grouped_order, readable_rows
from ._similarity import _exp, _own_pairs, _similarity_tile, row_blocks, similarity_lse, similarity_options

BLOCK_BYTES = 64 * 2**20  # of similarities or their gradients in memory at once


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], to the last digits also of tiny ones: 2 artanh(x / (2 + x)) by its series."""
    z = x / (2.0 + x)
    y = z * z
    series = 1.0 / 11.0 + y * (1.0 / 13.0 + y * (1.0 / 15.0))
    series = 1.0 / 5.0 + y * (1.0 / 7.0 + y * (1.0 / 9.0 + y * series))
    return 2.0 * z * (1.0 + y * (1.0 / 3.0 + y * series))


@triton.jit(do_not_specialize=["tiles_m", "first"])
def _similarity_gradient_kernel(
    # pointers in
    a, b, scale, bias, row_lse, column_lse,
    # pointers out
    gradient, sums,
    # sizes
    rows_a, rows_b, dim, tiles_m, tiles_n, first,
    # strides
    a_row_stride, b_row_stride,
    # constexpr
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient by s = scale a b^T + bias of one tile, and the tile's sums of gradient * a b^T, of the loss, and of the gradient.

    With a bias, the loss is that of each pair of rows; without, InfoNCE in both directions, times 2, whose log-sum-exps are known.
    """
    IS_SIGMOID: tl.constexpr = bias is not None
    program = tl.program_id(0)
    tile_m, tile_n = _grouped_order(program, tiles_m, tiles_n, GROUP_M)
    first_row, first_column = tile_m * BLOCK_M, tile_n * BLOCK_N
    acc = _similarity_tile(
        a, b, first_row, first_column, rows_a, rows_b, dim, a_row_stride, b_row_stride,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, INPUT_PRECISION,
    )  # fmt: skip
    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = first_column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row_mask, column_mask = rows < rows_a, columns < rows_b
    mask = row_mask[:, None] & column_mask[None, :]
    pairs = _own_pairs(first_row, first_column, first, rows_a, BLOCK_M, BLOCK_N)
    if IS_SIGMOID:
        # a pair's loss is softplus(-s), any other's softplus(s): with the sign turned first, no digits of small ones are lost
        s = acc * tl.load(scale) + tl.load(bias)
        s = tl.where(pairs, -s, s)
        small = _exp(-tl.abs(s))
        loss = tl.maximum(s, 0.0) + _log1p(small)
        d = tl.where(s >= 0.0, 1.0, small) / (1.0 + small)
        d = tl.where(pairs, -d, d)
        place = sums + tl.num_programs(0) + program
        tl.store(place, tl.sum(tl.where(mask, loss, 0.0)))
        tl.store(place + tl.num_programs(0), tl.sum(tl.where(mask, d, 0.0)))
    else:
        s = acc * tl.load(scale)
        along_rows = tl.load(row_lse + rows, mask=row_mask, other=float("inf"))
        along_columns = tl.load(column_lse + columns, mask=column_mask, other=float("inf"))
        d = _exp(s - along_rows[:, None]) + _exp(s - along_columns[None, :]) - tl.where(pairs, 2.0, 0.0)
    tl.store(sums + program, tl.sum(tl.where(mask, d * acc, 0.0)))
    if gradient is not None:
        base = gradient + tl.cast(first_row, tl.int64) * rows_b + first_column
        in_tile = tl.cast(tl.arange(0, BLOCK_M), tl.int64)[:, None] * rows_b + tl.arange(0, BLOCK_N)[None, :]
        tl.store(base + in_tile, d.to(gradient.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["alpha", "first"])
def _distilled_rows_kernel(
    # pointers in and out
    similarities,
    # pointers in
    teacher, scale,
    # pointers out
    loss,
    # sizes
    count, first,
    # scalars
    alpha,
    # constexpr
    HAS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's cross-entropy with alpha softmax(teacher) + (1 - alpha) of column ``first + row``; its gradient in place of the row."""
    row = tl.program_id(0).to(tl.int64)
    base = similarities + row * count
    factor = tl.load(scale)
    columns = tl.arange(0, BLOCK)  # [BLOCK]
    pair = row + first
    own = tl.load(base + pair) * factor  # before the reductions, whose barriers keep it ahead of the stores below
    largest = tl.full([BLOCK], -float("inf"), tl.float32)  # per lane: one reduction at the end, not one per block
    total = tl.zeros([BLOCK], tl.float32)
    teacher_largest = tl.full([BLOCK], -float("inf"), tl.float32)
    teacher_total = tl.zeros([BLOCK], tl.float32)
    expected = tl.zeros([BLOCK], tl.float32)
    for first_column in tl.range(0, count, BLOCK):
        inside = first_column + columns < count
        value = tl.load(base + first_column + columns, mask=inside, other=0.0) * factor
        counted = tl.where(inside, value, -float("inf"))
        new = tl.maximum(largest, counted)
        finite = tl.where(new == -float("inf"), 0.0, new)
        total = total * _exp(largest - finite) + _exp(counted - finite)
        largest = new
        if teacher is not None:
            soft = tl.load(teacher + row * count + first_column + columns, mask=inside, other=0.0) * factor
            soft = tl.where(inside, soft, -float("inf"))
            new = tl.maximum(teacher_largest, soft)
            finite = tl.where(new == -float("inf"), 0.0, new)
            weight = _exp(soft - finite)
            shrink = _exp(teacher_largest - finite)
            teacher_total = teacher_total * shrink + weight
            expected = expected * shrink + weight * value
            teacher_largest = new
    row_max = tl.max(largest, 0)
    row_lse = row_max + tl.log2(tl.sum(total * _exp(largest - row_max), 0)) * LN_2
    row_loss = row_lse - (1.0 - alpha) * own
    teacher_lse = 0.0
    if teacher is not None:
        teacher_max = tl.max(teacher_largest, 0)
        weight = _exp(teacher_largest - teacher_max)
        teacher_sum = tl.sum(teacher_total * weight, 0)
        teacher_lse = teacher_max + tl.log2(teacher_sum) * LN_2
        row_loss -= alpha * tl.sum(expected * weight, 0) / teacher_sum
    tl.store(loss + row, row_loss)
    if HAS_GRADIENT:
        for first_column in tl.range(0, count, BLOCK):
            inside = first_column + columns < count
            value = tl.load(base + first_column + columns, mask=inside, other=0.0) * factor
            d = _exp(value - row_lse) - tl.where(first_column + columns == pair, 1.0 - alpha, 0.0)
            if teacher is not None:
                soft = tl.load(teacher + row * count + first_column + columns, mask=inside, other=0.0) * factor
                d -= alpha * _exp(soft - teacher_lse)
            tl.store(base + first_column + columns, d, mask=inside)


# --------------------------------------------------------------------------------------------------------------- launchers


def contrastive_forward(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """InfoNCE in both directions, averaged; row i of a belongs to row i of b.

    Args:
        a, b: ``[n, dim]`` of one dtype. scale: fp32, one number.

    Returns:
        The loss, and the log-sum-exps of the similarities' rows and columns; fp32.
    """
    row_lse, column_lse, own = similarity_lse(a, b, scale)
    return ((row_lse + column_lse) / 2 - own).mean(), row_lse, column_lse


def contrastive_backward(
    dloss: Tensor, a: Tensor, b: Tensor, scale: Tensor, row_lse: Tensor, column_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and scale."""
    da, db, sums = _gradients(a, b, scale, None, row_lse, column_lse, 0, True)
    share = dloss / (2 * a.shape[0])
    dscale = (sums[0] * share).reshape(scale.shape)
    share = share * scale.reshape(())
    return (da * share).to(a.dtype), (db * share).to(b.dtype), dscale


def sigmoid_contrastive_forward(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, first: int, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-log sigmoid(z (scale a b^T + bias)) summed over pairs, averaged over rows of a; z is 1 for (i, first + i), else -1.

    Returns:
        The loss, and its gradients by a, b, scale and bias, fp32: in 16 bits small ones would be lost before the loss's gradient
        scales them; empty tensors and zeros where they are not needed.
    """
    n = a.shape[0]
    da, db, sums = _gradients(a, b, scale, bias, None, None, first, needs_grad)
    share = scale.reshape(()) / n
    dscale, loss, dbias = (sums / n).unbind()
    # clones: outputs must not be views of one tensor
    return loss.clone(), da.float() * share, db.float() * share, dscale.clone().view_as(scale), dbias.clone().view_as(bias)


def _gradients(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None, row_lse: Tensor | None, column_lse: Tensor | None, first: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Products of the similarities' gradient with b and with a, and its three sums, fp32."""
    a, b = readable_rows(a), readable_rows(b)
    config = similarity_config("gradient", a.element_size())
    (n, dim), m = a.shape, b.shape[0]
    blocks = row_blocks(n, m * a.element_size(), BLOCK_BYTES, config.block_m)
    da, db = (a.new_empty((n, dim)), b.new_empty((m, dim))) if needs_grad else (a.new_empty(0), b.new_empty(0))
    if needs_grad and len(blocks) > 1:
        db = torch.zeros((m, dim), dtype=torch.float32, device=b.device)
    buffer = a.new_empty((blocks[0].stop if needs_grad else 0, m))
    sums = torch.zeros(3, dtype=torch.float32, device=a.device)
    for rows in blocks:
        part, ds = a[rows], buffer[: rows.stop - rows.start] if needs_grad else None
        lse = None if row_lse is None else row_lse[rows]
        sums += _launch_gradient(part, b, scale, bias, lse, column_lse, ds, rows.start + first, config)
        if ds is None:
            continue
        torch.mm(ds, b, out=da[rows])
        if len(blocks) == 1:
            torch.mm(ds.T, part, out=db)
        elif db.dtype == part.dtype:
            db.addmm_(ds.T, part)
        else:
            db += torch.mm(ds.T, part)  # 16-bit products, summed in fp32
    return da, db, sums


def _launch_gradient(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None, row_lse: Tensor | None, column_lse: Tensor | None,
    gradient: Tensor | None, first: int, config: LinearConfig,
) -> Tensor:  # fmt: skip
    """The three sums of all tiles."""
    (n, dim), m = a.shape, b.shape[0]
    tiles_m, tiles_n = triton.cdiv(n, config.block_m), triton.cdiv(m, config.block_n)
    sums = torch.zeros((3, tiles_m * tiles_n), dtype=torch.float32, device=a.device)
    with on_device_of(a):
        _similarity_gradient_kernel[(tiles_m * tiles_n,)](
            a, b, scale, bias, row_lse, column_lse,
            gradient, sums,
            n, m, dim, tiles_m, tiles_n, first,
            a.stride(0), b.stride(0),
            **similarity_options(a, config),
        )  # fmt: skip
    return sums.sum(1)


def distilled_contrastive_forward(
    features: Tensor, teacher: Tensor, keys: Tensor, scale: Tensor, alpha: float, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Contrast of each row with all keys, with soft targets from a teacher's features; the mean over rows.

    Args:
        features, teacher: fp32 ``[n, dim]``. keys: fp32 ``[m, dim]``, key i is that of row i. scale: fp32, one number.

    Returns:
        The loss, and its gradients by features and scale; an empty tensor and zero where they are not needed.
    """
    (n, dim), m = features.shape, keys.shape[0]
    losses = features.new_empty(n)
    dfeatures = features.new_empty((n, dim) if needs_grad else (0,))
    config = distilled_config(m)
    blocks = row_blocks(n, 4 * m, BLOCK_BYTES, 1)
    buffers = features.new_empty((2 if alpha > 0.0 else 1, blocks[0].stop, m))
    for rows in blocks:
        student, *rest = buffers[:, : rows.stop - rows.start].unbind()
        torch.mm(features[rows], keys.T, out=student)
        if rest:
            torch.mm(teacher[rows], keys.T, out=rest[0])
        with on_device_of(features):
            _distilled_rows_kernel[(rows.stop - rows.start,)](
                student,
                rest[0] if rest else None, scale,
                losses[rows],
                m, rows.start,
                alpha,
                HAS_GRADIENT=needs_grad, BLOCK=config.block, **config.options,
            )  # fmt: skip
        if needs_grad:
            torch.mm(student, keys, out=dfeatures[rows])
    dscale = ((dfeatures * features).sum() / n if needs_grad else features.new_zeros(())).reshape(scale.shape)
    return losses.mean(), dfeatures.mul_(scale.reshape(()) / n), dscale
