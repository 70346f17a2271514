"""The feed-forward of a transformer as one operation, whose backward makes again what is cheap to make: GELU, and a norm behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vlp_fast.ops import _multiway_torch
from vlp_fast.ops._autocast import autocast_to_compute
from vlp_fast.ops.multiway import _backend, _check, _out_dtype, multiway_layer_norm, multiway_linear

__all__ = ["mlp", "multiway_mlp"]


def multiway_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    expert_offsets: Sequence[int],
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Two linear layers of each run's expert with GELU between them, and a LayerNorm before the second where there is one.

    Equivalent to: `multiway_linear` with GELU, `multiway_layer_norm` in its dtype, `multiway_linear` with the residual
    (`vlp_fast.reference.multiway_mlp`). What differs is what is kept for the backward: x and the values before the GELU, not those after
    it nor those after the norm, which the backward makes again.

    Args:
        x: ``[rows, in]``, rows laid out expert after expert. weight1: ``[num_experts, hidden, in]``. bias1: ``[num_experts, hidden]``.
        weight2: ``[num_experts, out, hidden]``. bias2: ``[num_experts, out]``; either bias may be None.
        expert_offsets: as in `multiway_linear`. norm: weight and bias of the norm, ``[num_experts, hidden]`` both. eps: of the norm.
        residual: ``[rows, out]`` or None. backend: "triton", "torch", or None for the device's default.

    Returns: ``[rows, out]`` in the wider of the dtypes of x (under autocast: of autocast's) and residual.

    Raises:
        ValueError: shapes, dtypes or devices that disagree, or what `multiway_linear` and `multiway_layer_norm` do not take.
        RuntimeError: a backend that cannot run here.

    Memory: the output, and with a gradient ``[rows, hidden]`` in x's dtype; while it runs, twice that more. No second derivative. No
    atomics: the same inputs give the same bits.
    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost (2016), for making again what costs little.
    """
    _check(x, weight1, bias1, expert_offsets, 3, ("weight1", "bias1"))
    if weight2.dim() != 3 or weight2.shape[0] != weight1.shape[0] or weight2.shape[2] != weight1.shape[1]:
        raise ValueError(
            f"weight2 must be [{weight1.shape[0]}, out, {weight1.shape[1]}], with weight1's experts and reading its outputs; received "
            f"{list(weight2.shape)}."
        )
    if norm is not None and any(t.shape != weight1.shape[:2] for t in norm):
        shapes = [list(t.shape) for t in norm]
        raise ValueError(f"norm must be weight and bias, {list(weight1.shape[:2])} both; received {shapes[0]} and {shapes[1]}.")
    x, weight1, bias1, weight2, bias2 = autocast_to_compute(x, weight1, bias1, weight2, bias2)  # type: ignore[assignment]
    for name, tensor in (("weight1", weight1), ("bias1", bias1), ("weight2", weight2), ("bias2", bias2)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(
                f"{name} must have x's dtype and device, {x.dtype} on {x.device}; received {tensor.dtype} on {tensor.device}."
            )
    if bias2 is not None and bias2.shape != weight2.shape[:2]:
        raise ValueError(f"bias2 must be {list(weight2.shape[:2])}, a row per expert; received {list(bias2.shape)}.")
    if x.shape[1] != weight1.shape[2]:
        raise ValueError(f"x must have weight1's input width {weight1.shape[2]}; received {x.shape[1]}.")
    if residual is not None and (residual.shape != (x.shape[0], weight2.shape[1]) or residual.device != x.device):
        raise ValueError(
            f"residual must be {[x.shape[0], weight2.shape[1]]} on {x.device}, as the output; received {list(residual.shape)} on "
            f"{residual.device}."
        )
    tensors = (x, weight1, bias1, weight2, bias2, residual, *(norm or ()))
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        hidden = multiway_linear(x, weight1, bias1, expert_offsets, activation="gelu", backend=backend)
        if norm is not None:
            hidden = multiway_layer_norm(hidden, *norm, expert_offsets, eps, out_dtype=hidden.dtype, backend=backend)
        return multiway_linear(hidden, weight2, bias2, expert_offsets, residual=residual, backend=backend)
    name = _backend(backend, x, "multiway_mlp", residual)
    norm_weight, norm_bias = norm or (None, None)
    return _mlp(x, weight1, bias1, weight2, bias2, norm_weight, norm_bias, residual, list(expert_offsets), eps, name)[0]


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    """`multiway_mlp` for one expert, by PyTorch's products: x ``[rows, in]``, weights and biases without the dimension of experts."""
    # cast as parameters, which a step casts once
    x, weight1, bias1, weight2, bias2 = autocast_to_compute(x, weight1, bias1, weight2, bias2)  # type: ignore[assignment]
    bias1, bias2 = (None if bias is None else bias[None] for bias in (bias1, bias2))
    return multiway_mlp(x, weight1[None], bias1, weight2[None], bias2, (0, len(x)), backend="torch")


@torch.library.custom_op("vlp_fast::multiway_mlp_v1", mutates_args=())
def _mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    expert_offsets: list[int],
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The output, and the values before the GELU."""
    linear, _, layer_norm, _ = _functions(backend)
    hidden, pre = linear(x, weight1, bias1, None, expert_offsets, "gelu", True, x.dtype)
    if norm_weight is not None:
        hidden = layer_norm(hidden, norm_weight, norm_bias, expert_offsets, eps, x.dtype)[0]
    out, _ = linear(hidden, weight2, bias2, residual, expert_offsets, "", False, _out_dtype(x, residual))
    return out, pre


@_mlp.register_fake
def _(x, weight1, bias1, weight2, bias2, norm_weight, norm_bias, residual, expert_offsets, eps, backend):
    rows = x.shape[0]
    return x.new_empty((rows, weight2.shape[1]), dtype=_out_dtype(x, residual)), x.new_empty((rows, weight1.shape[1]))


@torch.library.custom_op("vlp_fast::multiway_mlp_backward_v1", mutates_args=())
def _mlp_backward(
    dout: Tensor,
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    pre: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    expert_offsets: list[int],
    eps: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight1, bias1, weight2, bias2, norm_weight, norm_bias; of those, but the last two, not needed: empty."""
    _, linear_backward, layer_norm, layer_norm_backward = _functions(backend)
    hidden = torch.nn.functional.gelu(pre)
    normal, statistics = hidden, ()
    if norm_weight is not None:
        normal, *statistics = layer_norm(hidden, norm_weight, norm_bias, expert_offsets, eps, x.dtype)
    # what was made again is needed no longer when its gradient is there, and gives it its memory
    again = {"dx_into": normal} if backend == "torch" else {}
    dhidden, dweight2, dbias2 = linear_backward(
        dout, normal, weight2, pre.new_empty(0), expert_offsets, "", True, needs[3], needs[4], **again
    )
    dnorm_weight, dnorm_bias = pre.new_empty(0), pre.new_empty(0)
    if norm_weight is not None:
        dhidden, dnorm_weight, dnorm_bias = layer_norm_backward(
            dhidden, hidden, *statistics, norm_weight, norm_bias, expert_offsets
        )
    again = {"dpre_into": dhidden} if backend == "torch" else {}
    first = linear_backward(dhidden, x, weight1, pre, expert_offsets, "gelu", *needs[:3], **again)
    return *first, dweight2, dbias2, dnorm_weight, dnorm_bias


@_mlp_backward.register_fake
def _(dout, x, weight1, weight2, pre, norm_weight, norm_bias, expert_offsets, eps, needs, backend):
    weights = (x, weight1, weight1[:, :, 0], weight2, weight2[:, :, 0])
    of_norm = (pre.new_empty(0) if t is None else t.new_empty(t.shape) for t in (norm_weight, norm_bias))
    return *(t.new_empty(t.shape if need else (0,)) for t, need in zip(weights, needs, strict=True)), *of_norm


def _functions(backend: str):
    """linear, linear_backward, layer_norm, layer_norm_backward."""
    if backend == "torch":
        ours = _multiway_torch
        return ours.linear, ours.linear_backward, ours.layer_norm, ours.layer_norm_backward
    from vlp_fast.kernels import multiway_layer_norm as norm
    from vlp_fast.kernels import multiway_linear as linear

    def layer_norm_backward(dout, x, mean, rstd, weight, bias, offsets):
        return norm.multiway_layer_norm_backward(dout, x, mean, rstd, weight, offsets)

    return linear.multiway_linear, linear.multiway_linear_backward, norm.multiway_layer_norm, layer_norm_backward


def _mlp_setup(ctx, inputs, output):
    x, weight1, bias1, weight2, bias2, norm_weight, norm_bias, residual, offsets, eps, backend = inputs
    ctx.save_for_backward(x, weight1, weight2, output[1], norm_weight, norm_bias)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or zeros for it
    ctx.biases = bias1 is not None, bias2 is not None
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.facts = offsets, eps, backend


def _mlp_grad(ctx, dout, dpre):
    if dout is None:
        return (None,) * 11
    x, *rest = ctx.saved_tensors
    offsets, eps, backend = ctx.facts
    wanted = ctx.needs_input_grad[:7]
    needs = [wanted[0], wanted[1], wanted[2] and ctx.biases[0], wanted[3], wanted[4] and ctx.biases[1]]
    grads: tuple[Tensor | None, ...] = (None,) * 7
    if any(wanted):
        found = _mlp_backward(dout.to(x.dtype), x, *rest, offsets, eps, needs, backend)
        grads = tuple(grad if need else None for grad, need in zip(found, [*needs, *wanted[5:]], strict=True))
    dresidual = dout.to(ctx.residual_dtype) if ctx.needs_input_grad[7] else None
    return *grads, dresidual, None, None, None


_mlp.register_autograd(_mlp_grad, setup_context=_mlp_setup)


@register_flop_formula(torch.ops.vlp_fast.multiway_mlp_v1)
def _mlp_flops(x_shape, weight1_shape, bias1_shape, weight2_shape, *args, out_shape=None, **kwargs) -> int:
    rows, (_, hidden, width) = x_shape[0], weight1_shape
    return 2 * rows * hidden * (width + weight2_shape[1])


@register_flop_formula(torch.ops.vlp_fast.multiway_mlp_backward_v1)
def _mlp_backward_flops(
    dout_shape, x_shape, weight1_shape, weight2_shape, pre_shape, norm_weight, norm_bias, offsets, eps, needs, *args, **kwargs
) -> int:  # fmt: skip
    rows, (_, hidden, width) = x_shape[0], weight1_shape
    return 2 * rows * hidden * (width * (int(needs[0]) + int(needs[1])) + weight2_shape[1] * (1 + int(needs[3])))
