"""Contrastive losses and hard negatives from features, without the matrix of similarities: a block of its rows at a time.

The products are PyTorch's own on every device. Similarities are fp32 (fp64 for fp64), whatever the features are and under autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["contrastive_loss", "distilled_contrastive_loss", "hard_negatives", "sigmoid_contrastive_loss"]

BLOCK_BYTES = 64 * 2**20  # of similarities in memory at once


def contrastive_loss(a: Tensor, b: Tensor, logit_scale: Tensor) -> Tensor:
    """InfoNCE in both directions, averaged: pair i is (row i of a, row i of b), all others of the batch are negatives.

    Equivalent to: ``(F.cross_entropy(s, i) + F.cross_entropy(s.T, i)) / 2`` with ``s = logit_scale * a @ b.T`` and ``i = arange(batch)``.

    Args:
        a, b: ``[batch, dim]``, usually L2-normalised. logit_scale: scalar tensor that multiplies the similarities.

    Returns: a scalar, fp32 (fp64 for fp64), with gradients for all three.
    Raises: ValueError for shapes or devices that differ, or an empty batch.
    Memory: 64 MiB of similarities; every block of rows gives its rows' log-sum-exp and its share of the columns', and is formed once
        more in the backward. The same inputs give the same bits.
    Source: Radford et al., CLIP (2021), figure 3; CoCa, equation 4.
    """
    _check_pairs(a, b, logit_scale)
    with _no_autocast(a):
        return _contrastive(_wide(a), _wide(b), _wide(logit_scale))[0]


def distilled_contrastive_loss(features: Tensor, teacher: Tensor, keys: Tensor, logit_scale: Tensor, alpha: float) -> Tensor:
    """Contrast of each row with all keys, with soft targets from a teacher's features; the mean over rows.

    Equivalent to: ``-(t * log_softmax(logit_scale * features @ keys.T)).sum(1).mean()`` with
    ``t = alpha * softmax(logit_scale * teacher @ keys.T) + (1 - alpha) * eye``.

    Args:
        features, teacher: ``[batch, dim]``. keys: ``[batch + queue, dim]``; key i is that of row i. teacher and keys are constants.
        logit_scale: scalar tensor, for BLIP ``1 / temperature``; the teacher's use of it is a constant. alpha: share of the soft
            targets, in [0, 1].

    Returns: a scalar, fp32 (fp64 for fp64), with gradients for features and logit_scale.
    Raises: ValueError for shapes that break the rules above, fewer keys than rows, or alpha outside [0, 1].
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
    needs = torch.is_grad_enabled() and (features.requires_grad or logit_scale.requires_grad)
    with torch.no_grad():
        teacher, keys = _wide(teacher), _wide(keys)
    with _no_autocast(features):
        return _distilled(_wide(features), teacher, keys, _wide(logit_scale), float(alpha), needs)[0]


def sigmoid_contrastive_loss(a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Every pair of the batch as a question of its own: does row i of a belong to row j of b? Summed over pairs, averaged over rows.

    Equivalent to: ``-F.logsigmoid(z * (logit_scale * a @ b.T + logit_bias)).sum() / batch`` with z 1 on the diagonal and -1 elsewhere.

    Args:
        a, b: ``[batch, dim]``. logit_scale, logit_bias: scalar tensors.

    Returns: a scalar, fp32 (fp64 for fp64), with gradients for all four.
    Raises: ValueError for shapes or devices that differ, or an empty batch.
    Memory: as `distilled_contrastive_loss`.
    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training (2023), equation 1.
    """
    _check_pairs(a, b, logit_scale)
    _check_scalar(logit_bias, "logit_bias")
    needs = torch.is_grad_enabled() and any(t.requires_grad for t in (a, b, logit_scale, logit_bias))
    with _no_autocast(a):
        return _sigmoid(_wide(a), _wide(b), _wide(logit_scale), _wide(logit_bias), needs)[0]


@torch.no_grad()
def hard_negatives(
    queries: Tensor, keys: Tensor, logit_scale: Tensor | float, *, floor: float = 1e-4, generator: torch.Generator | None = None
) -> Tensor:
    """For each row one key other than its own, drawn with weights softmax(similarities) + floor; no wait for the device.

    Equivalent to: a draw from ``(logit_scale * queries @ keys.T).softmax(1) + floor`` with the diagonal 0.

    Args:
        queries, keys: ``[batch, dim]``; key i belongs to row i. logit_scale: multiplies the similarities.
        floor: added to every weight (BLIP 1e-4, ALBEF 0). generator: of one uniform number per row, on the device of queries.

    Returns: int64 ``[batch]`` on the device of queries; never i for row i.
    Raises: ValueError for shapes that differ or a batch of one pair, which has no negative.
    Memory: 64 MiB of similarities.
    Source: Li et al., ALBEF (2021), section 3.2; Li et al., BLIP (2022), section 3.2.
    """
    _check_features(queries=queries, keys=keys)
    if queries.shape != keys.shape:
        raise ValueError(f"queries and keys must have one shape; received {list(queries.shape)} and {list(keys.shape)}.")
    if queries.shape[0] < 2:
        raise ValueError(f"hard negatives need at least 2 pairs in the batch; received {queries.shape[0]}.")
    if floor < 0.0:
        raise ValueError(f"floor must be at least 0; received {floor}.")
    q, k = _wide(queries), _wide(keys)
    scale = torch.as_tensor(logit_scale, device=q.device).to(q.dtype)
    uniform = torch.rand(len(q), dtype=q.dtype, device=q.device, generator=generator)
    with _no_autocast(q):
        return _draw(q, k, scale, uniform, float(floor))


# ----------------------------------------------------------------------------------------------------------------- arguments


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


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


def _check_scalar(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor) or x.numel() != 1:
        raise ValueError(f"{name} must be a tensor of one number; received {list(x.shape) if isinstance(x, Tensor) else x!r}.")


def _blocks(rows: int, columns: Tensor) -> Iterator[slice]:
    size = max(BLOCK_BYTES // (columns.shape[0] * columns.element_size()), 1)
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


# ------------------------------------------------------------------------------------------------------------ both directions


@torch.library.custom_op("vlp_fast::contrastive_forward_v1", mutates_args=())
def _contrastive(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = a.shape[0]
    row_lse, largest, total = a.new_empty(n), a.new_full((n,), -torch.inf), a.new_zeros(n)
    for rows in _blocks(n, b):
        s = (a[rows] @ b.T).mul_(scale)
        row_lse[rows] = torch.logsumexp(s, 1)
        new = torch.maximum(largest, s.amax(0))
        total = total * torch.exp(largest - new) + s.sub_(new).exp_().sum(0)
        largest = new
    column_lse = largest + total.log()
    matched = (a * b).sum(1).mul_(scale.reshape(()))
    return ((row_lse + column_lse) / 2 - matched).mean(), row_lse, column_lse


@_contrastive.register_fake
def _(a, b, scale):
    return a.new_empty(()), a.new_empty(a.shape[0]), a.new_empty(a.shape[0])


@torch.library.custom_op("vlp_fast::contrastive_backward_v1", mutates_args=())
def _contrastive_backward(
    dloss: Tensor, a: Tensor, b: Tensor, scale: Tensor, row_lse: Tensor, column_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    da, db = (
        torch.empty_like(a, memory_format=torch.contiguous_format),
        torch.zeros_like(b, memory_format=torch.contiguous_format),
    )
    for rows in _blocks(a.shape[0], b):
        s = (a[rows] @ b.T).mul_(scale)
        ds = (s - row_lse[rows, None]).exp_().add_(s.sub_(column_lse).exp_())
        ds.diagonal(rows.start).sub_(2.0)
        torch.mm(ds, b, out=da[rows])
        db.addmm_(ds.T, a[rows])
    share = dloss / (2 * a.shape[0])
    dscale = ((da * a).sum() * share).reshape(scale.shape)
    share = share * scale.reshape(())
    return da.mul_(share), db.mul_(share), dscale


@_contrastive_backward.register_fake
def _(dloss, a, b, scale, row_lse, column_lse):
    return a.new_empty(a.shape), b.new_empty(b.shape), scale.new_empty(scale.shape)


def _contrastive_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


_contrastive.register_autograd(
    lambda ctx, dloss, *_: _contrastive_backward(dloss, *ctx.saved_tensors), setup_context=_contrastive_setup
)


# --------------------------------------------------------------------------------- losses whose gradients come with them


@torch.library.custom_op("vlp_fast::distilled_contrastive_forward_v1", mutates_args=())
def _distilled(
    features: Tensor, teacher: Tensor, keys: Tensor, scale: Tensor, alpha: float, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n = features.shape[0]
    losses = features.new_empty(n)
    dfeatures = features.new_empty(features.shape if needs_grad else (0,))
    for rows in _blocks(n, keys):
        s = (features[rows] @ keys.T).mul_(scale)
        own = s.diagonal(rows.start)
        lse = torch.logsumexp(s, 1)
        losses[rows] = lse - (1.0 - alpha) * own
        soft = None
        if alpha > 0.0:
            soft = torch.softmax((teacher[rows] @ keys.T).mul_(scale), 1)
            losses[rows] -= alpha * torch.linalg.vecdot(soft, s)
        if needs_grad:
            own_gradient = s.sub_(lse[:, None]).exp_().diagonal(rows.start)
            own_gradient.sub_(1.0 - alpha)
            if soft is not None:
                s.sub_(soft, alpha=alpha)
            torch.mm(s, keys, out=dfeatures[rows])
    dscale = ((dfeatures * features).sum() / n if needs_grad else features.new_zeros(())).reshape(scale.shape)
    return losses.mean(), dfeatures.mul_(scale.reshape(()) / n), dscale


@_distilled.register_fake
def _(features, teacher, keys, scale, alpha, needs_grad):
    return features.new_empty(()), features.new_empty(features.shape if needs_grad else (0,)), scale.new_empty(scale.shape)


@torch.library.custom_op("vlp_fast::sigmoid_contrastive_forward_v1", mutates_args=())
def _sigmoid(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = a.shape[0]
    losses, dbias = a.new_empty(n), a.new_zeros(())
    da, db = (x.new_zeros(x.shape if needs_grad else (0,)) for x in (a, b))
    for rows in _blocks(n, b):
        s = (a[rows] @ b.T).mul_(scale).add_(bias)
        own = s.diagonal(rows.start).clone()
        losses[rows] = F.softplus(s).sum(1) - own  # softplus(-x) = softplus(x) - x on the diagonal
        if needs_grad:
            s.sigmoid_().diagonal(rows.start).sub_(1.0)
            dbias = dbias + s.sum()
            torch.mm(s, b, out=da[rows])
            db.addmm_(s.T, a[rows])
    dscale = ((da * a).sum() / n if needs_grad else a.new_zeros(())).reshape(scale.shape)
    share = scale.reshape(()) / n
    return losses.mean(), da.mul_(share), db.mul_(share), dscale, (dbias / n).reshape(bias.shape)


@_sigmoid.register_fake
def _(a, b, scale, bias, needs_grad):
    grads = (x.new_empty(x.shape if needs_grad else (0,)) for x in (a, b))
    return a.new_empty(()), *grads, scale.new_empty(scale.shape), bias.new_empty(bias.shape)


@torch.library.custom_op("vlp_fast::contrastive_scale_v1", mutates_args=())
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
    return dfeatures, None, None, dscale, None, None


def _sigmoid_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.products = 4 * inputs[0].numel() * inputs[1].shape[0]


def _sigmoid_grad(ctx, dloss, *_):
    return (*_scaled(dloss, list(ctx.saved_tensors), ctx.products), None)


_distilled.register_autograd(_distilled_grad, setup_context=_distilled_setup)
_sigmoid.register_autograd(_sigmoid_grad, setup_context=_sigmoid_setup)


# ------------------------------------------------------------------------------------------------------------- hard negatives


@torch.library.custom_op("vlp_fast::hard_negatives_v1", mutates_args=())
def _draw(queries: Tensor, keys: Tensor, scale: Tensor, uniform: Tensor, floor: float) -> Tensor:
    """The first column whose running sum of weights passes ``uniform`` times their total: an inverse distribution function."""
    n = queries.shape[0]
    index = torch.empty(n, dtype=torch.int64, device=queries.device)
    for rows in _blocks(n, keys):
        weights = torch.softmax((queries[rows] @ keys.T).mul_(scale), 1).add_(floor)
        weights.diagonal(rows.start).zero_()
        running = weights.cumsum(1)
        drawn = torch.searchsorted(running, (uniform[rows] * running[:, -1])[:, None], right=True)[:, 0]
        own = torch.arange(rows.start, rows.stop, device=queries.device)
        # rounding may draw past the end, and a row whose other weights are all 0 its own column: then the neighbour
        drawn = drawn.clamp_(max=n - 1)
        index[rows] = torch.where(drawn == own, torch.where(own == n - 1, own - 1, own + 1), drawn)
    return index


@_draw.register_fake
def _(queries, keys, scale, uniform, floor):
    return torch.empty(queries.shape[0], dtype=torch.int64, device=queries.device)


# ------------------------------------------------------------------------------------------------------------------- formulas


@register_flop_formula(torch.ops.vlp_fast.contrastive_forward_v1)
def _contrastive_flops(a_shape, b_shape, *args, **kwargs) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[0]


@register_flop_formula(torch.ops.vlp_fast.contrastive_backward_v1)
def _contrastive_backward_flops(dloss_shape, a_shape, b_shape, *args, **kwargs) -> int:
    """The similarities again, and a product for each side."""
    return 6 * a_shape[0] * a_shape[1] * b_shape[0]


@register_flop_formula(torch.ops.vlp_fast.distilled_contrastive_forward_v1)
def _distilled_flops(features_shape, teacher_shape, keys_shape, scale_shape, alpha, *args, **kwargs) -> int:
    """The similarities, and the teacher's where they have a share. The gradient's product is counted where it is used."""
    return 2 * features_shape[0] * features_shape[1] * keys_shape[0] * (2 if alpha > 0.0 else 1)


@register_flop_formula(torch.ops.vlp_fast.sigmoid_contrastive_forward_v1)
def _sigmoid_flops(a_shape, b_shape, *args, **kwargs) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[0]


@register_flop_formula(torch.ops.vlp_fast.contrastive_scale_v1)
def _scaled_flops(dloss_shape, grad_shapes, products, *args, **kwargs) -> int:
    return products


@register_flop_formula(torch.ops.vlp_fast.hard_negatives_v1)
def _draw_flops(queries_shape, keys_shape, *args, **kwargs) -> int:
    return 2 * queries_shape[0] * queries_shape[1] * keys_shape[0]
