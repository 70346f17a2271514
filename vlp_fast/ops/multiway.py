"""Expert runs: linear and LayerNorm whose weights depend on the run of rows, rows ``expert_offsets[e]:expert_offsets[e+1]``.

BEiT-3's Multiway, VLMo's modality experts and BLIP's two sets of self-attention weights are this one operation. No row moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vlp_fast.ops._autocast import autocast_to_compute

__all__ = ["multiway_layer_norm", "multiway_linear"]


def multiway_linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert_offsets: Sequence[int]) -> Tensor:
    """Each run of rows times the transpose of its expert's weight, plus its bias.

    Equivalent to: ``cat([F.linear(x[a:b], weight[e], bias[e]) ...])``, written into one output without the copy.

    Args:
        x: ``[rows, in]``, rows laid out expert after expert. weight: ``[num_experts, out, in]``. bias: ``[num_experts, out]`` or None.
        expert_offsets: ``num_experts + 1`` host numbers, from 0 to rows, not decreasing; an expert may be empty.

    Returns:
        ``[rows, out]`` in x's dtype.

    Raises:
        ValueError: shapes that disagree, or offsets that are not a partition of the rows.
    """
    _check(x, weight, bias, expert_offsets, 3)
    if x.shape[1] != weight.shape[2]:
        raise ValueError(f"x must have weight's input width {weight.shape[2]}; received {x.shape[1]}.")
    x, weight, bias = autocast_to_compute(x, weight, bias)  # type: ignore[assignment]
    return _linear(x, weight, bias, list(expert_offsets))


def multiway_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, expert_offsets: Sequence[int], eps: float = 1e-5) -> Tensor:
    """LayerNorm with fp32 statistics and the scale and shift of each run's expert.

    Equivalent to: ``cat([F.layer_norm(x[a:b], [dim], weight[e], bias[e], eps) ...])``.

    Args:
        x: ``[rows, dim]``. weight, bias: ``[num_experts, dim]``. expert_offsets: as in `multiway_linear`. eps: added to the variance.

    Returns:
        ``[rows, dim]`` in the wider of the dtypes of x and weight, as autocast's layer_norm does.

    Raises:
        ValueError: shapes that disagree, or offsets that are not a partition of the rows.
    """
    _check(x, weight, bias, expert_offsets, 2)
    if x.shape[1] != weight.shape[1] or bias.shape != weight.shape:
        raise ValueError(
            f"weight and bias must both be [num_experts, {x.shape[1]}]; received {list(weight.shape)} and {list(bias.shape)}."
        )
    return _layer_norm(x.to(torch.promote_types(x.dtype, weight.dtype)), weight, bias, list(expert_offsets), eps)[0]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Sequence[int], weight_dim: int) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be packed as [rows, width]; received shape {list(x.shape)}.")
    if weight.dim() != weight_dim:
        raise ValueError(f"weight must have {weight_dim} dimensions, experts first; received shape {list(weight.shape)}.")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"bias must be {list(weight.shape[:2])}, a row per expert; received {list(bias.shape)}.")
    if len(offsets) != weight.shape[0] + 1:
        raise ValueError(
            f"expert_offsets must have one entry more than the {weight.shape[0]} experts; received {len(offsets)}."
        )
    if offsets[0] != 0 or offsets[-1] != x.shape[0] or any(a > b for a, b in zip(offsets, offsets[1:])):  # noqa: B905
        raise ValueError(f"expert_offsets must rise from 0 to the {x.shape[0]} rows; received {list(offsets)}.")


def _runs(offsets: Sequence[int]) -> list[tuple[int, int, int]]:
    return [(e, offsets[e], offsets[e + 1]) for e in range(len(offsets) - 1) if offsets[e + 1] > offsets[e]]


@torch.library.custom_op("vlp_fast::multiway_linear_v1", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert_offsets: list[int]) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    for e, a, b in _runs(expert_offsets):
        if bias is None:
            torch.mm(x[a:b], weight[e].t(), out=out[a:b])
        else:
            torch.addmm(bias[e], x[a:b], weight[e].t(), out=out[a:b])
    return out


@_linear.register_fake
def _(x, weight, bias, expert_offsets):
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("vlp_fast::multiway_linear_backward_v1", mutates_args=())
def _linear_backward(
    dout: Tensor, x: Tensor, weight: Tensor, expert_offsets: list[int], needs_dx: bool, needs_dweight: bool, needs_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if needs_dx else (0,))
    dweight = weight.new_zeros(weight.shape if needs_dweight else (0,))
    dbias = weight.new_zeros(weight.shape[:2] if needs_dbias else (0,))
    for e, a, b in _runs(expert_offsets):
        d = dout[a:b]
        if needs_dx:
            torch.mm(d, weight[e], out=dx[a:b])
        if needs_dweight:
            torch.mm(d.t(), x[a:b], out=dweight[e])
        if needs_dbias:
            torch.sum(d, 0, out=dbias[e])
    return dx, dweight, dbias


@_linear_backward.register_fake
def _(dout, x, weight, expert_offsets, needs_dx, needs_dweight, needs_dbias):
    return (
        x.new_empty(x.shape if needs_dx else (0,)),
        weight.new_empty(weight.shape if needs_dweight else (0,)),
        weight.new_empty(weight.shape[:2] if needs_dbias else (0,)),
    )


def _linear_setup(ctx, inputs, output):
    x, weight, bias, offsets = inputs
    ctx.save_for_backward(x, weight)
    ctx.offsets, ctx.has_bias = offsets, bias is not None


def _linear_grad(ctx, dout):
    x, weight = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    grads = _linear_backward(dout, x, weight, ctx.offsets, *needs)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), None)


_linear.register_autograd(_linear_grad, setup_context=_linear_setup)


@torch.library.custom_op("vlp_fast::multiway_layer_norm_v1", mutates_args=())
def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, expert_offsets: list[int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = x.new_empty((x.shape[0], 1), dtype=_statistics(x.dtype))
    rstd = torch.empty_like(mean)
    weight, bias = _beside_statistics(weight), _beside_statistics(bias)
    for e, a, b in _runs(expert_offsets):
        y, m, r = torch.native_layer_norm(x[a:b], [x.shape[1]], weight[e], bias[e], eps)
        out[a:b], mean[a:b], rstd[a:b] = y, m, r
    return out, mean, rstd


@_layer_norm.register_fake
def _(x, weight, bias, expert_offsets, eps):
    statistic = x.new_empty((x.shape[0], 1), dtype=_statistics(x.dtype))
    return x.new_empty(x.shape), statistic, torch.empty_like(statistic)


@torch.library.custom_op("vlp_fast::multiway_layer_norm_backward_v1", mutates_args=())
def _layer_norm_backward(
    dout: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, expert_offsets: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight, dbias = torch.zeros_like(weight), torch.zeros_like(bias)
    weight, bias = _beside_statistics(weight), _beside_statistics(bias)
    for e, a, b in _runs(expert_offsets):
        dx[a:b], dweight[e], dbias[e] = torch.ops.aten.native_layer_norm_backward(
            dout[a:b].contiguous(), x[a:b], [x.shape[1]], mean[a:b], rstd[a:b], weight[e], bias[e], [True, True, True]
        )
    return dx, dweight, dbias


@_layer_norm_backward.register_fake
def _(dout, x, mean, rstd, weight, bias, expert_offsets):
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(bias)


def _statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _beside_statistics(weight: Tensor) -> Tensor:
    """fp32 for 16-bit weights on the CPU, where PyTorch's kernels keep fp32 statistics only beside fp32 weights."""
    return weight.to(_statistics(weight.dtype)) if weight.device.type == "cpu" else weight


def _layer_norm_setup(ctx, inputs, output):
    x, weight, bias, offsets, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.offsets = offsets


def _layer_norm_grad(ctx, dout, dmean, drstd):
    dx, dweight, dbias = _layer_norm_backward(dout, *ctx.saved_tensors, ctx.offsets)
    return dx, dweight, dbias, None, None


_layer_norm.register_autograd(_layer_norm_grad, setup_context=_layer_norm_setup)


@register_flop_formula(torch.ops.vlp_fast.multiway_linear_v1)
def _linear_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.vlp_fast.multiway_linear_backward_v1)
def _linear_backward_flops(
    dout_shape, x_shape, weight_shape, offsets, needs_dx, needs_dweight, *args, out_shape=None, **kwargs
) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2] * (int(needs_dx) + int(needs_dweight))
