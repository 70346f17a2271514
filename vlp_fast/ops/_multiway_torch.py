"""The torch backend of the multiway operations: one call of PyTorch per expert's run of rows, each writing into its slice of one output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlp_fast.ops._products import fuses_gelu, linear_gelu, mm

CACHED = 2**18  # numbers of a part of the rows

__all__ = ["layer_norm", "layer_norm_backward", "linear", "linear_backward", "statistics_dtype"]

_gelu, _gelu_, _gelu_backward = torch.ops.aten.gelu.out, torch.ops.aten.gelu_.default, torch.ops.aten.gelu_backward.grad_input


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    offsets: Sequence[int],
    activation: str,
    save_pre: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """out, and the values before the activation (empty unless `save_pre`)."""
    rows, width, runs = x.shape[0], weight.shape[1], _runs(offsets)
    # a product can start from the residual only where nothing comes between and no rounding to a narrower dtype
    onto_residual = residual is not None and not activation and residual.dtype == x.dtype
    if activation and not save_pre and len(runs) == 1 and fuses_gelu(x, weight.shape[1]):
        e = runs[0][0]
        out = linear_gelu(x, weight[e], None if bias is None else bias[e])
        return (out if residual is None else out + residual), out.new_empty(0)
    product = x.new_empty(rows, width) if len(runs) != 1 else None
    for e, a, b in runs:
        onto = residual[a:b] if residual is not None and onto_residual else None
        into = None if product is None else product[a:b]
        result = mm(x[a:b], weight[e].t(), None if bias is None else bias[e], residual=onto, out=into)
        product = result if product is None else product
    assert product is not None
    pre, out = product.new_empty(0), product
    if activation and save_pre:
        # PyTorch computes the GELU of 16-bit values in fp32
        pre, out = product, _gelu(product, out=torch.empty_like(product))
    elif activation:
        out = _gelu_(product)
    if residual is not None and not onto_residual:
        out = out.add_(residual) if out.dtype == out_dtype else out + residual
    return out, pre


def linear_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    pre: Tensor,
    offsets: Sequence[int],
    activation: str,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    *,
    dx_into: Tensor | None = None,
    dpre_into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias; those not needed are empty. dx_into: memory that dx may take, x itself too; dpre_into: that the gradient before
    the activation takes, dout itself too."""
    dweight = weight.new_empty(weight.shape if needs_dweight else (0,))
    dbias = weight.new_empty(weight.shape[:2] if needs_dbias else (0,))
    dpre = dout
    if activation:
        dpre = _gelu_backward(dout, pre, grad_input=torch.empty_like(pre) if dpre_into is None else dpre_into)
    for e in _idle(offsets):
        if needs_dweight:
            dweight[e].zero_()
        if needs_dbias:
            dbias[e].zero_()
    runs = _runs(offsets)
    for e, a, b in runs:
        if needs_dweight:
            mm(dpre[a:b].t(), x[a:b], out=dweight[e])
        if needs_dbias:
            torch.sum(dpre[a:b], 0, out=dbias[e])
    if not needs_dx:
        return x.new_empty(0), dweight, dbias
    if len(runs) == 1:
        return mm(dpre, weight[runs[0][0]], scratch=dx_into).contiguous(), dweight, dbias
    dx = x.new_empty(x.shape) if dx_into is None else dx_into
    for e, a, b in runs:
        mm(dpre[a:b], weight[e], out=dx[a:b])
    return dx, dweight, dbias


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Sequence[int], eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """out, mean, rstd.

    PyTorch's norm cannot write into a slice, nor in another dtype than its input's. Where that is the dtype wanted, all rows pass
    through the norm of the expert with the most rows, and the few rows of the others are computed again and written over. Elsewhere the
    rows pass a part at a time, and what is between lives in the processor's cache.
    """
    weight, bias, width = _beside(x, weight), _beside(x, bias), [x.shape[1]]
    most, *others = _by_size(offsets)
    if out_dtype == x.dtype or x.shape[0] == 0:
        out, mean, rstd = torch.native_layer_norm(x, width, weight[most[0]], bias[most[0]], eps)
        for e, a, b in others:
            out[a:b] = torch.native_layer_norm(x[a:b], width, weight[e], bias[e], eps)[0]
        return out.to(out_dtype), mean, rstd
    wide = statistics_dtype(x.dtype)
    out = x.new_empty(x.shape, dtype=out_dtype)
    mean, rstd = (x.new_empty((x.shape[0], 1), dtype=wide) for _ in range(2))
    for e, a, b in _parts(x, offsets):
        out[a:b], mean[a:b], rstd[a:b] = torch.native_layer_norm(
            x[a:b].to(wide), width, weight[e].to(wide), bias[e].to(wide), eps
        )
    return out, mean, rstd


def layer_norm_backward(
    dout: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, offsets: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias; dx goes the way of `layer_norm`.

    16-bit rows are widened: PyTorch's kernel on a CPU sums their dweight in 16 bits, wrong by percents after a hundred rows.
    """
    dweight, dbias = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (weight, bias))
    width, wide = [x.shape[1]], statistics_dtype(x.dtype)
    for e in _idle(offsets):
        dweight[e].zero_()
        dbias[e].zero_()

    def gradients(e: int, a: int, b: int, *wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
        rows = (t[a:b].to(wide).contiguous() for t in (dout, x))
        scale, shift = weight[e].to(wide), bias[e].to(wide)
        return torch.ops.aten.native_layer_norm_backward(*rows, width, mean[a:b], rstd[a:b], scale, shift, wanted)

    most, *others = _by_size(offsets)
    if x.shape[0] == 0:
        return torch.empty_like(x), dweight, dbias
    if x.dtype == wide == dout.dtype:
        if not others:
            dx, dweight[most[0]], dbias[most[0]] = gradients(*most, True, True, True)
            return dx, dweight, dbias
        dx = gradients(most[0], 0, x.shape[0], True, False, False)[0]
        _, dweight[most[0]], dbias[most[0]] = gradients(*most, False, True, True)
        for e, a, b in others:
            dx[a:b], dweight[e], dbias[e] = gradients(e, a, b, True, True, True)
        return dx, dweight, dbias
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    for e, a, b in _parts(x, offsets):
        dx[a:b], of_weight, of_bias = gradients(e, a, b, True, True, True)
        sums[e] = (sums[e][0].add_(of_weight), sums[e][1].add_(of_bias)) if e in sums else (of_weight, of_bias)
    for e, (of_weight, of_bias) in sums.items():
        dweight[e], dbias[e] = of_weight, of_bias
    return dx, dweight, dbias


def _parts(x: Tensor, offsets: Sequence[int]) -> list[tuple[int, int, int]]:
    """The runs that have rows, on a CPU cut into parts of which some fp32 copies fit in its cache."""
    step = max(CACHED // x.shape[1], 1) if x.device.type == "cpu" else x.shape[0]
    return [(e, i, min(i + step, b)) for e, a, b in _runs(offsets) for i in range(a, b, step)]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of mean and rstd of rows of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _runs(offsets: Sequence[int]) -> list[tuple[int, int, int]]:
    return [(e, offsets[e], offsets[e + 1]) for e in range(len(offsets) - 1) if offsets[e + 1] > offsets[e]]


def _idle(offsets: Sequence[int]) -> list[int]:
    return [e for e in range(len(offsets) - 1) if offsets[e + 1] == offsets[e]]


def _by_size(offsets: Sequence[int]) -> list[tuple[int, int, int]]:
    """The runs that have rows, the longest first; one empty run where there are no rows."""
    return sorted(_runs(offsets), key=lambda run: run[1] - run[2]) or [(0, 0, 0)]


def _beside(x: Tensor, weight: Tensor) -> Tensor:
    """In x's dtype; fp32 beside 16-bit rows on the CPU, where PyTorch's kernels keep fp32 statistics only so."""
    return weight.to(statistics_dtype(x.dtype) if x.device.type == "cpu" else x.dtype)
