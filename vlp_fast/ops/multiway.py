"""Expert runs: linear and LayerNorm whose weights depend on the run of rows, rows ``expert_offsets[e]:expert_offsets[e+1]``.

BEiT-3's Multiway, VLMo's modality experts and BLIP's two sets of self-attention weights are this one operation. No row moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vlp_fast.ops import _multiway_torch
from vlp_fast.ops._autocast import autocast_to_compute
from vlp_fast.ops._backends import choose_own_backend
from vlp_fast.ops._direct import runs_directly

__all__ = ["multiway_layer_norm", "multiway_linear"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_NORM_WIDTH = 8192  # a row of the triton backend's norm lies in one block


def multiway_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_offsets: Sequence[int],
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Each run of rows times the transpose of its expert's weight, plus its bias; then the activation; then plus the residual.

    Equivalent to: ``act(cat([F.linear(x[a:b], weight[e], bias[e]) ...])) + residual``, written into one output without the copy
    (`vlp_fast.reference.multiway_linear`).

    Args:
        x: ``[rows, in]``, rows laid out expert after expert. weight: ``[num_experts, out, in]``. bias: ``[num_experts, out]`` or None.
        expert_offsets: ``num_experts + 1`` host numbers, from 0 to rows, not decreasing; an expert may be empty.
        activation: None, or "gelu": x times the normal distribution function, with erf, in fp32 where x is 16-bit.
        residual: ``[rows, out]`` or None, of x's dtype or another: a stream kept in fp32 beside products in 16 bits stays fp32.
        backend: "triton", "torch", or None for the device's default.

    Returns:
        ``[rows, out]`` in the wider of the dtypes of x (under autocast: of autocast's) and residual. An expert without rows gets
        gradients of zero.

    Raises:
        ValueError: shapes, dtypes or devices that disagree, offsets that are not a partition of the rows, an unknown activation, or
            a dtype that the backend does not compute in.
        RuntimeError: a backend that cannot run here.

    Memory: nothing but the output; with an activation and a gradient also the values before it. No atomics: the same inputs give the
    same bits.
    Source: Wang et al., BEiT-3 (2022), section 2.1, where the sums of a run are those of a Multiway block.
    """
    _check(x, weight, bias, expert_offsets, 3)
    if x.shape[1] != weight.shape[2]:
        raise ValueError(f"x must have weight's input width {weight.shape[2]}; received {x.shape[1]}.")
    if activation not in (None, "gelu"):
        raise ValueError(f"activation must be None or 'gelu'; received {activation!r}.")
    if residual is not None and (residual.shape != (x.shape[0], weight.shape[1]) or residual.device != x.device):
        raise ValueError(
            f"residual must be {[x.shape[0], weight.shape[1]]} on {x.device}, as the output; received "
            f"{list(residual.shape)} on {residual.device}."
        )
    x, weight, bias = autocast_to_compute(x, weight, bias)  # type: ignore[assignment]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(
                f"{name} must have x's dtype and device, {x.dtype} on {x.device}; received {tensor.dtype} on {tensor.device}."
            )
    name = _backend(backend, x, "multiway_linear", residual)
    if runs_directly(name, x, weight, bias, residual):
        out_dtype = _out_dtype(x, residual)
        return _multiway_torch.linear(x, weight, bias, residual, expert_offsets, activation or "", False, out_dtype)[0]
    wants_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return _linear(
        x, weight, bias, residual, list(expert_offsets), activation or "", bool(activation) and wants_gradient, name
    )[0]


def multiway_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expert_offsets: Sequence[int],
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm with fp32 statistics and the scale and shift of each run's expert.

    Equivalent to: ``cat([F.layer_norm(x[a:b], [dim], weight[e], bias[e], eps) ...])``.

    Args:
        x: ``[rows, dim]``. weight, bias: ``[num_experts, dim]``. expert_offsets: as in `multiway_linear`. eps: added to the variance.
        out_dtype: None: the wider of the dtypes of x and weight, as autocast's layer_norm does; or a floating dtype to round to.
        backend: "triton" (dim up to 8192), "torch", or None for the device's default.

    Returns: ``[rows, dim]`` in out_dtype. An expert without rows gets gradients of zero.

    Raises:
        ValueError: shapes or devices that disagree, offsets that are not a partition of the rows, or a dtype or dim that the backend
            does not take.
        RuntimeError: a backend that cannot run here.

    Memory: the output, and two fp32 numbers a row for the backward. No atomics: the same inputs give the same bits.
    """
    _check(x, weight, bias, expert_offsets, 2)
    if x.shape[1] != weight.shape[1] or bias.shape != weight.shape:
        raise ValueError(
            f"weight and bias must both be [num_experts, {x.shape[1]}]; received {list(weight.shape)} and {list(bias.shape)}."
        )
    if weight.device != x.device or bias.device != x.device or weight.dtype != bias.dtype:
        raise ValueError(
            f"weight and bias must be on x's device {x.device} and share one dtype; received {weight.dtype} on {weight.device} "
            f"and {bias.dtype} on {bias.device}."
        )
    name = _backend(backend, x, "multiway_layer_norm", weight)
    if name == "triton" and x.shape[1] > MAX_NORM_WIDTH:
        raise ValueError(f"backend 'triton' normalises up to {MAX_NORM_WIDTH} columns; received {x.shape[1]}.")
    x = x.to(weight.dtype) if weight.dtype == torch.float64 else x
    dtype = torch.promote_types(x.dtype, weight.dtype) if out_dtype is None else out_dtype
    if not dtype.is_floating_point:
        raise ValueError(f"out_dtype must be a floating dtype or None; received {out_dtype}.")
    if runs_directly(name, x, weight, bias):
        return _multiway_torch.layer_norm(x, weight, bias, expert_offsets, eps, dtype)[0]
    return _layer_norm(x, weight, bias, list(expert_offsets), eps, dtype, name)[0]


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Sequence[int],
    weight_dim: int,
    names: tuple[str, str] = ("weight", "bias"),
) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be packed as [rows, width]; received shape {list(x.shape)}.")
    if weight.dim() != weight_dim:
        raise ValueError(f"{names[0]} must have {weight_dim} dimensions, experts first; received shape {list(weight.shape)}.")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"{names[1]} must be {list(weight.shape[:2])}, a row per expert; received {list(bias.shape)}.")
    if len(offsets) != weight.shape[0] + 1:
        raise ValueError(
            f"expert_offsets must have one entry more than the {weight.shape[0]} experts; received {len(offsets)}."
        )
    if offsets[0] != 0 or offsets[-1] != x.shape[0] or any(a > b for a, b in zip(offsets, offsets[1:])):  # noqa: B905
        raise ValueError(f"expert_offsets must rise from 0 to the {x.shape[0]} rows; received {list(offsets)}.")


def _backend(backend: str | None, x: Tensor, operation: str, beside: Tensor | None) -> str:
    name = choose_own_backend(backend, x.device.type, operation)
    if name == "triton":
        for tensor in (x, beside):
            if tensor is not None and tensor.dtype not in TRITON_DTYPES:
                raise ValueError(f"backend 'triton' computes in float32, float16 or bfloat16; received {tensor.dtype}.")
    return name


# ------------------------------------------------------------------------------------------------------------------ linear


@torch.library.custom_op("vlp_fast::multiway_linear_v2", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    expert_offsets: list[int],
    activation: str,
    save_pre: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    arguments = (x, weight, bias, residual, expert_offsets, activation, save_pre, _out_dtype(x, residual))
    if backend == "torch":
        return _multiway_torch.linear(*arguments)
    from vlp_fast.kernels.multiway_linear import multiway_linear

    return multiway_linear(*arguments)


def _out_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


@_linear.register_fake
def _(x, weight, bias, residual, expert_offsets, activation, save_pre, backend):
    shape = (x.shape[0], weight.shape[1])
    return x.new_empty(shape, dtype=_out_dtype(x, residual)), x.new_empty(shape if activation and save_pre else (0,))


@torch.library.custom_op("vlp_fast::multiway_linear_backward_v2", mutates_args=())
def _linear_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    pre: Tensor,
    expert_offsets: list[int],
    activation: str,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (dout, x, weight, pre, expert_offsets, activation, needs_dx, needs_dweight, needs_dbias)
    if backend == "torch":
        return _multiway_torch.linear_backward(*arguments)
    from vlp_fast.kernels.multiway_linear import multiway_linear_backward

    return multiway_linear_backward(*arguments)


@_linear_backward.register_fake
def _(dout, x, weight, pre, expert_offsets, activation, needs_dx, needs_dweight, needs_dbias, backend):
    return (
        x.new_empty(x.shape if needs_dx else (0,)),
        weight.new_empty(weight.shape if needs_dweight else (0,)),
        weight.new_empty(weight.shape[:2] if needs_dbias else (0,)),
    )


def _linear_setup(ctx, inputs, output):
    x, weight, bias, residual, offsets, activation, _, backend = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or zeros for it
    ctx.has_bias = bias is not None
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.facts = offsets, activation, backend


def _linear_grad(ctx, dout, dpre):
    if dout is None:
        return (None,) * 8
    x, weight, pre = ctx.saved_tensors
    offsets, activation, backend = ctx.facts
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    grads = (None, None, None)
    if any(needs):
        grads = _linear_backward(dout.to(x.dtype), x, weight, pre, offsets, activation, *needs, backend)
    dresidual = dout.to(ctx.residual_dtype) if ctx.needs_input_grad[3] else None
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), dresidual, None, None, None, None)


_linear.register_autograd(_linear_grad, setup_context=_linear_setup)


@register_flop_formula(torch.ops.vlp_fast.multiway_linear_v2)
def _linear_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.vlp_fast.multiway_linear_backward_v2)
def _linear_backward_flops(
    dout_shape, x_shape, weight_shape, pre_shape, offsets, activation, needs_dx, needs_dweight, *args, out_shape=None, **kwargs
) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2] * (int(needs_dx) + int(needs_dweight))


# -------------------------------------------------------------------------------------------------------------- layer norm


@torch.library.custom_op("vlp_fast::multiway_layer_norm_v3", mutates_args=())
def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, expert_offsets: list[int], eps: float, out_dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "torch":
        return _multiway_torch.layer_norm(x, weight, bias, expert_offsets, eps, out_dtype)
    from vlp_fast.kernels.multiway_layer_norm import multiway_layer_norm

    return multiway_layer_norm(x, weight, bias, expert_offsets, eps, out_dtype)


@_layer_norm.register_fake
def _(x, weight, bias, expert_offsets, eps, out_dtype, backend):
    statistic = x.new_empty((x.shape[0], 1), dtype=_multiway_torch.statistics_dtype(x.dtype))
    return x.new_empty(x.shape, dtype=out_dtype), statistic, torch.empty_like(statistic)


@torch.library.custom_op("vlp_fast::multiway_layer_norm_backward_v3", mutates_args=())
def _layer_norm_backward(
    dout: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    expert_offsets: list[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "torch":
        return _multiway_torch.layer_norm_backward(dout, x, mean, rstd, weight, bias, expert_offsets)
    from vlp_fast.kernels.multiway_layer_norm import multiway_layer_norm_backward

    return multiway_layer_norm_backward(dout, x, mean, rstd, weight, expert_offsets)


@_layer_norm_backward.register_fake
def _(dout, x, mean, rstd, weight, bias, expert_offsets, backend):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _layer_norm_setup(ctx, inputs, output):
    x, weight, bias, offsets, _, _, backend = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.facts = offsets, backend


def _layer_norm_grad(ctx, dout, dmean, drstd):
    if dout is None:
        return (None,) * 7
    return *_layer_norm_backward(dout, *ctx.saved_tensors, *ctx.facts), None, None, None, None


_layer_norm.register_autograd(_layer_norm_grad, setup_context=_layer_norm_setup)
