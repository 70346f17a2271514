"""Contrastive losses and hard negatives from features, without the matrix of similarities: a block of its rows at a time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vlp_fast.ops import _contrastive_torch
from vlp_fast.ops._backends import choose_own_backend

__all__ = ["contrastive_loss", "distilled_contrastive_loss", "hard_negatives", "sigmoid_contrastive_loss"]


def contrastive_loss(a: Tensor, b: Tensor, logit_scale: Tensor, *, backend: str | None = None) -> Tensor:
    """InfoNCE in both directions, averaged: pair i is (row i of a, row i of b), all others of the batch are negatives.

    Equivalent to: ``(F.cross_entropy(s, i) + F.cross_entropy(s.T, i)) / 2`` with ``s = logit_scale * a @ b.T`` and ``i = arange(batch)``.

    Args:
        a, b: ``[batch, dim]``, usually L2-normalised. logit_scale: scalar tensor that multiplies the similarities.
        backend: "triton", "torch", or None for the device's default.

    Returns: a scalar, fp32 (fp64 for fp64), with gradients for all three. Similarities are fp32, also of 16-bit features and under
        autocast.
    Raises: ValueError for shapes or devices that differ, an empty batch, or fp64 on the triton backend; RuntimeError for a backend
        that cannot run here.
    Memory: torch 64 MiB of similarities; triton 64 MiB of parts, a 64th of a similarity each (a 32nd in fp32), and in the backward
        64 MiB of the similarities' gradient. The similarities are formed once, for both directions, and once more in the backward.
        The same inputs give the same bits.
    Source: Radford et al., CLIP (2021), figure 3; CoCa, equation 4.
    """
    _check_pairs(a, b, logit_scale)
    name = _choose(backend, a, "contrastive_loss")
    return _contrastive(*_features(name, a, b), _wide(logit_scale), name)[0]


def distilled_contrastive_loss(
    features: Tensor, teacher: Tensor, keys: Tensor, logit_scale: Tensor, alpha: float, *, backend: str | None = None
) -> Tensor:
    """Contrast of each row with all keys, with soft targets from a teacher's features; the mean over rows.

    Equivalent to: ``-(t * log_softmax(logit_scale * features @ keys.T)).sum(1).mean()`` with
    ``t = alpha * softmax(logit_scale * teacher @ keys.T) + (1 - alpha) * eye``.

    Args:
        features, teacher: ``[batch, dim]``. keys: ``[batch + queue, dim]``; key i is that of row i. teacher and keys are constants.
        logit_scale: scalar tensor, for BLIP ``1 / temperature``; the teacher's use of it is a constant. alpha: share of the soft
            targets, in [0, 1]; 0 is the loss with hard labels. backend: as in `contrastive_loss`.

    Returns: a scalar, fp32 (fp64 for fp64), with gradients for features and logit_scale.
    Raises: ValueError for shapes that break the rules above, fewer keys than rows, or alpha outside [0, 1]; and as `contrastive_loss`.
    Memory: 64 MiB of similarities. The gradients are formed with the loss, where they are needed, and the backward scales them.
    Source: Li et al., ALBEF (2021), section 3.2 and equation 6; BLIP uses the same.
    """
    _check_features(features=features, teacher=teacher, keys=keys)
    if teacher.shape != features.shape or keys.shape[0] < features.shape[0] or features.shape[0] == 0:
        raise ValueError(
            f"features and teacher must have one shape, at least one row, and keys at least as many rows; received "
            f"{list(features.shape)}, {list(teacher.shape)} and {list(keys.shape)}."
        )
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1]; received {alpha}.")
    _check_scalar(logit_scale, "logit_scale")
    name = _choose(backend, features, "distilled_contrastive_loss")
    needs = torch.is_grad_enabled() and (features.requires_grad or logit_scale.requires_grad)
    with torch.no_grad():
        teacher, keys = _wide(teacher), _wide(keys)
    return _distilled(_wide(features), teacher, keys, _wide(logit_scale), float(alpha), needs, name)[0]


def sigmoid_contrastive_loss(
    a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor, *, first: int = 0, backend: str | None = None
) -> Tensor:
    """Every pair of rows as a question of its own: does row i of a belong to row j of b? Summed over pairs, averaged over rows of a.

    Equivalent to: ``-F.logsigmoid(z * (logit_scale * a @ b.T + logit_bias)).sum() / batch`` with z 1 at (i, first + i), else -1.

    Args:
        a: ``[batch, dim]``. b: ``[at least first + batch, dim]``, usually as many rows; more where it holds the rows of several
            processes, of which this one's begin at `first`. logit_scale, logit_bias: scalar tensors. backend: as in `contrastive_loss`.

    Returns: a scalar, fp32 (fp64 for fp64), with gradients for all four.
    Raises: ValueError for shapes or devices that break a rule above, or an empty batch; and as `contrastive_loss`.
    Memory: 64 MiB of similarities (torch) or their gradient (triton). The gradients are formed with the loss, where they are needed.
    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training (2023), equation 1.
    """
    _check_features(a=a, b=b)
    _check_own("b", a, b, first)
    _check_scalar(logit_scale, "logit_scale")
    _check_scalar(logit_bias, "logit_bias")
    name = _choose(backend, a, "sigmoid_contrastive_loss")
    needs = torch.is_grad_enabled() and any(t.requires_grad for t in (a, b, logit_scale, logit_bias))
    return _sigmoid(*_features(name, a, b), _wide(logit_scale), _wide(logit_bias), first, needs, name)[0]


@torch.no_grad()
def hard_negatives(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    *,
    floor: float = 1e-4,
    first: int = 0,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """For each row one key other than its own, drawn with weights softmax(similarities) + floor; no wait for the device.

    Equivalent to: a draw from ``(logit_scale * queries @ keys.T).softmax(1) + floor`` with 0 at (i, first + i).

    Args:
        queries: ``[batch, dim]``. keys: ``[at least first + batch, dim]``; key ``first + i`` belongs to row i. There are usually as many
            keys as rows; more where they are those of several processes. logit_scale: multiplies the similarities.
        floor: added to every weight (BLIP 1e-4, ALBEF 0). generator: of one uniform number per row, on the device of queries.
        backend: as in `contrastive_loss`.

    Returns: int64 ``[batch]`` on the device of queries; never ``first + i`` for row i.
    Raises: ValueError for shapes that break the rules above, a single key, or a negative floor; and as `contrastive_loss`.
    Memory: torch 64 MiB of similarities; triton a number per row and 128 keys (64 in fp32).
    Source: Li et al., ALBEF (2021), section 3.2; Li et al., BLIP (2022), section 3.2.
    """
    _check_features(queries=queries, keys=keys)
    _check_own("keys", queries, keys, first)
    if keys.shape[0] < 2:
        raise ValueError(f"hard negatives need at least 2 pairs in the batch; received {keys.shape[0]}.")
    if floor < 0.0:
        raise ValueError(f"floor must be at least 0; received {floor}.")
    name = _choose(backend, queries, "hard_negatives")
    q, k = _features(name, queries, keys)
    statistics = _statistics(q.dtype)
    scale = torch.as_tensor(logit_scale, device=q.device).to(statistics)
    uniform = torch.rand(len(q), dtype=statistics, device=q.device, generator=generator)
    return _draw(q, k, scale, uniform, float(floor), first, name)


# ----------------------------------------------------------------------------------------------------------------- arguments


def _statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(_statistics(x.dtype))


def _features(backend: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """As the backend multiplies them: kernels sum products of 16-bit features in fp32 as they are, PyTorch would round the sums."""
    return (a, b) if backend == "triton" and a.dtype == b.dtype else (_wide(a), _wide(b))


def _choose(backend: str | None, x: Tensor, operation: str) -> str:
    name = choose_own_backend(backend, x.device.type, operation)
    if name == "triton" and x.dtype == torch.float64:
        raise ValueError(f"{operation} on backend 'triton' takes float32, float16 or bfloat16; received torch.float64.")
    return name


def _no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Autocast reaches into the bodies of operations, and would make these products 16-bit."""
    return torch.autocast(x.device.type, enabled=False) if torch.amp.is_autocast_available(x.device.type) else nullcontext()


def _check_features(**tensors: Tensor) -> None:
    (first_name, first), *_ = tensors.items()
    for name, tensor in tensors.items():
        if tensor.dim() != 2:
            raise ValueError(f"{name} must be [rows, dim]; received shape {list(tensor.shape)}.")
        if tensor.shape[1] != first.shape[1] or tensor.device != first.device:
            raise ValueError(
                f"{name} must have the width and device of {first_name}, {first.shape[1]} on {first.device}; received "
                f"{tensor.shape[1]} on {tensor.device}."
            )


def _check_pairs(a: Tensor, b: Tensor, logit_scale: Tensor) -> None:
    _check_features(a=a, b=b)
    if a.shape != b.shape or a.shape[0] == 0:
        raise ValueError(f"a and b must have one shape and at least one row; received {list(a.shape)} and {list(b.shape)}.")
    _check_scalar(logit_scale, "logit_scale")


def _check_own(name: str, rows: Tensor, others: Tensor, first: int) -> None:
    """Every row has its own among the others."""
    if rows.shape[0] == 0 or first < 0 or others.shape[0] < first + rows.shape[0]:
        raise ValueError(
            f"{name} must have at least first + batch rows, of a batch of at least one and first not below 0; received "
            f"{others.shape[0]} rows, a batch of {rows.shape[0]} and first {first}."
        )


def _check_scalar(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor) or x.numel() != 1:
        raise ValueError(f"{name} must be a tensor of one number; received {list(x.shape) if isinstance(x, Tensor) else x!r}.")


# ------------------------------------------------------------------------------------------------------------ both directions


def _bodies(backend: str) -> Any:
    if backend == "torch":
        return _contrastive_torch
    from vlp_fast.kernels import contrastive

    return contrastive


@torch.library.custom_op("vlp_fast::contrastive_forward_v2", mutates_args=())
def _contrastive(a: Tensor, b: Tensor, scale: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    with _no_autocast(a):
        return _bodies(backend).contrastive_forward(a, b, scale)


@_contrastive.register_fake
def _(a, b, scale, backend):
    return scale.new_empty(()), scale.new_empty(a.shape[0]), scale.new_empty(a.shape[0])


@torch.library.custom_op("vlp_fast::contrastive_backward_v2", mutates_args=())
def _contrastive_backward(
    dloss: Tensor, a: Tensor, b: Tensor, scale: Tensor, row_lse: Tensor, column_lse: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    with _no_autocast(a):
        return _bodies(backend).contrastive_backward(dloss, a, b, scale, row_lse, column_lse)


@_contrastive_backward.register_fake
def _(dloss, a, b, scale, row_lse, column_lse, backend):
    return a.new_empty(a.shape), b.new_empty(b.shape), scale.new_empty(scale.shape)


def _contrastive_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.backend = inputs[3]


def _contrastive_grad(ctx, dloss, *_):
    return (*_contrastive_backward(dloss, *ctx.saved_tensors, ctx.backend), None)


_contrastive.register_autograd(_contrastive_grad, setup_context=_contrastive_setup)


# --------------------------------------------------------------------------------- losses whose gradients come with them


@torch.library.custom_op("vlp_fast::distilled_contrastive_forward_v2", mutates_args=())
def _distilled(
    features: Tensor, teacher: Tensor, keys: Tensor, scale: Tensor, alpha: float, needs_grad: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    with _no_autocast(features):
        return _bodies(backend).distilled_contrastive_forward(features, teacher, keys, scale, alpha, needs_grad)


@_distilled.register_fake
def _(features, teacher, keys, scale, alpha, needs_grad, backend):
    return features.new_empty(()), features.new_empty(features.shape if needs_grad else (0,)), scale.new_empty(scale.shape)


@torch.library.custom_op("vlp_fast::sigmoid_contrastive_forward_v2", mutates_args=())
def _sigmoid(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, first: int, needs_grad: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with _no_autocast(a):
        return _bodies(backend).sigmoid_contrastive_forward(a, b, scale, bias, first, needs_grad)


@_sigmoid.register_fake
def _(a, b, scale, bias, first, needs_grad, backend):
    grads = (scale.new_empty(x.shape if needs_grad else (0,)) for x in (a, b))
    return scale.new_empty(()), *grads, scale.new_empty(scale.shape), bias.new_empty(bias.shape)


@torch.library.custom_op("vlp_fast::contrastive_scale_v2", mutates_args=())
def _scaled(dloss: Tensor, grads: list[Tensor], products: int) -> list[Tensor]:
    """What the forward has formed times the loss's gradient. `products` are the FLOPs that took, counted here."""
    return [grad * dloss for grad in grads]


@_scaled.register_fake
def _(dloss, grads, products):
    return [grad.new_empty(grad.shape) for grad in grads]


def _distilled_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.products = 2 * inputs[0].numel() * inputs[2].shape[0]


def _distilled_grad(ctx, dloss, *_):
    dfeatures, dscale = _scaled(dloss, list(ctx.saved_tensors), ctx.products)
    return dfeatures, None, None, dscale, None, None, None


def _sigmoid_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.products = 4 * inputs[0].numel() * inputs[1].shape[0]
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _sigmoid_grad(ctx, dloss, *_):
    da, db, *others = _scaled(dloss, list(ctx.saved_tensors), ctx.products)
    return da.to(ctx.dtypes[0]), db.to(ctx.dtypes[1]), *others, None, None, None


_distilled.register_autograd(_distilled_grad, setup_context=_distilled_setup)
_sigmoid.register_autograd(_sigmoid_grad, setup_context=_sigmoid_setup)


# ------------------------------------------------------------------------------------------------------------- hard negatives


@torch.library.custom_op("vlp_fast::hard_negatives_v2", mutates_args=())
def _draw(queries: Tensor, keys: Tensor, scale: Tensor, uniform: Tensor, floor: float, first: int, backend: str) -> Tensor:
    with _no_autocast(queries):
        if backend == "torch":
            return _contrastive_torch.hard_negatives(queries, keys, scale, uniform, floor, first)
        from vlp_fast.kernels.hard_negatives import hard_negatives as launch

        return launch(queries, keys, scale, uniform, floor, first)


@_draw.register_fake
def _(queries, keys, scale, uniform, floor, first, backend):
    return torch.empty(queries.shape[0], dtype=torch.int64, device=queries.device)


# ------------------------------------------------------------------------------------------------------------------- formulas


@register_flop_formula(torch.ops.vlp_fast.contrastive_forward_v2)
def _contrastive_flops(a_shape, b_shape, *args, **kwargs) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[0]


@register_flop_formula(torch.ops.vlp_fast.contrastive_backward_v2)
def _contrastive_backward_flops(dloss_shape, a_shape, b_shape, *args, **kwargs) -> int:
    """The similarities again, and a product for each side."""
    return 6 * a_shape[0] * a_shape[1] * b_shape[0]


@register_flop_formula(torch.ops.vlp_fast.distilled_contrastive_forward_v2)
def _distilled_flops(features_shape, teacher_shape, keys_shape, scale_shape, alpha, *args, **kwargs) -> int:
    """The similarities, and the teacher's where they have a share. The gradient's product is counted where it is used."""
    return 2 * features_shape[0] * features_shape[1] * keys_shape[0] * (2 if alpha > 0.0 else 1)


@register_flop_formula(torch.ops.vlp_fast.sigmoid_contrastive_forward_v2)
def _sigmoid_flops(a_shape, b_shape, *args, **kwargs) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[0]


@register_flop_formula(torch.ops.vlp_fast.contrastive_scale_v2)
def _scaled_flops(dloss_shape, grad_shapes, products, *args, **kwargs) -> int:
    return products


@register_flop_formula(torch.ops.vlp_fast.hard_negatives_v2)
def _draw_flops(queries_shape, keys_shape, *args, **kwargs) -> int:
    return 2 * queries_shape[0] * queries_shape[1] * keys_shape[0]
