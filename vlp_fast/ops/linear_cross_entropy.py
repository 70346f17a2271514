"""Cross-entropy of a linear layer over a vocabulary, without its logits in memory: a chunk of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vlp_fast.ops._autocast import autocast_to_compute
from vlp_fast.ops._backends import choose_own_backend
from vlp_fast.ops._direct import runs_directly
from vlp_fast.ops._products import mm

__all__ = ["linear_cross_entropy"]

REDUCTIONS = ("mean", "sum", "none")
CHUNK_BYTES = 128 * 2**20  # of logits in memory at once
CUDA_ROWS = 2048  # but on CUDA, in 16 bits, at least so many rows: fewer read the weight too often


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """The loss of predicting a word from each row.

    Equivalent to: ``F.cross_entropy(F.linear(hidden[rows], weight, bias), targets, ignore_index=..., label_smoothing=...,
    reduction=...)`` in fp32, but for one case: where no row has a target, "mean" is 0 with gradients of 0, not NaN.

    Args:
        hidden: ``[n, dim]``. weight: ``[vocab_size, dim]``, which may be an embedding too. bias: ``[vocab_size]`` or None.
        targets: int64, a word for each row that enters, or `ignore_index`. rows: int64, the rows of hidden that enter, as many as
            targets; None: all. Rows without a word to predict should not enter: they cost as much as the others.
        label_smoothing: in [0, 1], the share of the target spread over all words.
        reduction: "mean" over the rows that have a target, "sum" or "none".
        backend: "triton", "torch" or None for the device's default. Both leave the products to the vendor's library.

    Returns:
        A scalar, or ``[len(targets)]``; fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes, dtypes or settings that break a rule above, or a target outside the vocabulary (on CUDA: a device
            assertion), named in the message.

    Memory: a chunk of logits, 128 MiB (on CUDA in 16 bits 2048 rows, if that is more). Of a scalar the gradients are formed with
    the loss, where an input needs them, and the backward multiplies them by that of the loss: they are held from the forward on,
    and the weight's twice while the backward runs. Of "none" the backward forms the logits again. The weight's gradient is summed
    over chunks in fp32. The same inputs give the same bits.
    Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models (2025), for the idea.
    """
    if rows is not None:
        _check_rows(rows, hidden)
        hidden = hidden.index_select(0, rows)
    name = choose_own_backend(backend, hidden.device.type, "linear_cross_entropy")
    hidden, weight, bias = autocast_to_compute(hidden, weight, bias)  # type: ignore[assignment]
    _check(hidden, weight, targets, bias, label_smoothing, reduction, name)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    return _forward(hidden, weight, bias, targets, ignore_index, float(label_smoothing), reduction, *needs, name)[0]


def _check_rows(rows: Tensor, hidden: Tensor) -> None:
    if rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"rows must be a flat tensor of whole numbers; received {rows.dtype} of shape {list(rows.shape)}.")
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be packed as [rows, dim]; received shape {list(hidden.shape)}.")


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    reduction: str,
    backend: str,
) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be packed as [rows, dim]; received shape {list(hidden.shape)}.")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must be [vocab_size, {hidden.shape[1]}]; received shape {list(weight.shape)}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], one per word; received shape {list(bias.shape)}.")
    if targets.dtype != torch.int64 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets must be int64 [{hidden.shape[0]}], one per row that enters; received {targets.dtype} of shape "
            f"{list(targets.shape)}."
        )
    devices = {t.device for t in (hidden, weight, targets, bias) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"hidden, weight, bias and targets must share one device; received {sorted(map(str, devices))}.")
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        raise ValueError(f"hidden, weight and bias must share one dtype; hidden is {hidden.dtype}, weight {weight.dtype}.")
    if backend == "triton" and hidden.dtype == torch.float64:
        raise ValueError("backend 'triton' computes in float32, float16 or bfloat16; received torch.float64.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1]; received {label_smoothing}.")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; received {reduction!r}.")


def _statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_targets(targets: Tensor, ignore_index: int, vocab_size: int) -> None:
    outside = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
    if targets.device.type == "cuda":
        torch._assert_async(~outside.any(), "targets name a word outside the vocabulary")
    elif outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"targets must be words 0 to {vocab_size - 1} or ignore_index {ignore_index}; targets[{row}] is {int(targets[row])}."
        )


def _chunk_rows(hidden: Tensor, vocab_size: int) -> int:
    """Rows whose logits are in memory at once: as many equal chunks as the budget asks for."""
    if hidden.shape[0] == 0:
        return 1
    most = CHUNK_BYTES // (4 * vocab_size)
    if hidden.device.type == "cuda" and hidden.element_size() == 2:
        most = max(CHUNK_BYTES // (2 * vocab_size), CUDA_ROWS)
    chunks = -(-hidden.shape[0] // max(most, 1))
    return -(-hidden.shape[0] // chunks)


# ------------------------------------------------------------------------------------------------------------- rows of logits


def _torch_rows(
    logits: Tensor, targets: Tensor, scale: Tensor | None, label_smoothing: float, lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each row of fp32 or fp64 logits; with `scale`, the loss's gradient times it takes their place.

    Args:
        scale: ``[rows]`` or None. lse: ``[rows]`` where it is known already; then the loss is not formed, and is lse.
    """
    loss = lse
    if lse is None:
        largest = logits.amax(1)
        picked = logits.gather(1, targets[:, None])[:, 0]
        mean = logits.mean(1) if label_smoothing else picked
        logits.sub_(largest[:, None]).exp_()
        total = logits.sum(1)
        lse = largest + total.log()
        loss = lse - (1.0 - label_smoothing) * picked - label_smoothing * mean
        factor = total.reciprocal_()
    elif scale is not None:
        logits.sub_(lse[:, None]).exp_()
        factor = torch.ones_like(lse)
    if scale is not None:
        logits.mul_((factor * scale)[:, None])
        if label_smoothing:
            logits.sub_((scale * (label_smoothing / logits.shape[1]))[:, None])
        logits.scatter_add_(1, targets[:, None], (scale * (label_smoothing - 1.0))[:, None])
    assert loss is not None
    return loss, lse


class _Chunks:
    """Runs over the rows in chunks: logits, what `backend` makes of them, and the products of their gradient."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, backend: str) -> None:
        self.hidden, self.weight, self.bias, self.targets, self.backend = hidden, weight, bias, targets, backend
        self.rows = _chunk_rows(hidden, weight.shape[0])
        # fp32 (fp64) where torch works on the logits, their own dtype where a kernel does
        self.dtype = _statistics(hidden.dtype) if backend == "torch" else hidden.dtype

    def run(
        self, scale: Tensor | None, label_smoothing: float, lse: Tensor | None, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Losses and log-sum-exps of all rows, and the gradients asked for (empty tensors for the others)."""
        hidden, weight, bias = self.hidden, self.weight, self.bias
        n, statistics = hidden.shape[0], _statistics(hidden.dtype)
        losses, all_lse = hidden.new_empty(n, dtype=statistics), hidden.new_empty(n, dtype=statistics)
        chunks = range(0, n, self.rows)
        dhidden = hidden.new_empty(hidden.shape if needs[0] else (0,))
        direct = len(chunks) == 1 or weight.dtype == statistics  # no sum of 16-bit numbers over chunks
        # written by the first chunk; without rows nothing is
        dweight = (weight.new_empty if n else weight.new_zeros)(
            weight.shape if needs[1] else (0,), dtype=weight.dtype if direct else statistics
        )
        dbias = weight.new_zeros(weight.shape[:1] if needs[2] else (0,), dtype=statistics)
        for first in chunks:
            part = slice(first, min(first + self.rows, n))
            logits = mm(hidden[part], weight.T, bias)
            work = logits.to(self.dtype)
            given = None if lse is None else lse[part]
            losses[part], all_lse[part] = self._row_step(
                work, self.targets[part], None if scale is None else scale[part], label_smoothing, given
            )
            if needs[2]:
                dbias += work.sum(0, dtype=statistics)
            if work is not logits and any(needs):
                logits.copy_(work)  # now their gradient
            if needs[0]:
                mm(logits, weight, out=dhidden[part])
            if needs[1] and direct:
                mm(logits.T, hidden[part], residual=dweight if first else None, out=dweight)
            elif needs[1]:
                product = mm(logits.T, hidden[part])
                dweight = dweight.add_(product) if first else dweight.copy_(product)
            del logits, work  # before the next chunk takes its memory
        return losses, all_lse, [dhidden, dweight.to(weight.dtype), dbias.to(weight.dtype)]

    def _row_step(self, *arguments) -> tuple[Tensor, Tensor]:
        if self.backend == "torch":
            return _torch_rows(*arguments)
        from vlp_fast.kernels.linear_cross_entropy import cross_entropy_rows

        return cross_entropy_rows(*arguments)


# ------------------------------------------------------------------------------------------------------------------------ op


@torch.library.custom_op("vlp_fast::linear_cross_entropy_forward_v1", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    needs_dhidden: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_targets(targets, ignore_index, weight.shape[0])
    valid = targets != ignore_index
    words = targets.where(valid, 0)
    scale = valid.to(_statistics(hidden.dtype))
    if reduction == "mean":
        scale = scale / scale.sum().clamp_(min=1.0)
    scalar = reduction != "none"
    needs = (needs_dhidden and scalar, needs_dweight and scalar, needs_dbias and scalar)
    chunks = _Chunks(hidden, weight, bias, words, backend)
    losses, lse, (dhidden, dweight, dbias) = chunks.run(scale if any(needs) else None, label_smoothing, None, needs)
    losses = losses.where(valid, 0.0)
    loss = (losses * scale).sum() if scalar else losses
    return loss, hidden.new_empty(0) if scalar else lse, dhidden, dweight, dbias


@_forward.register_fake
def _(
    hidden, weight, bias, targets, ignore_index, label_smoothing, reduction, needs_dhidden, needs_dweight, needs_dbias, backend
):
    statistics, scalar = _statistics(hidden.dtype), reduction != "none"
    return (
        hidden.new_empty(() if scalar else targets.shape, dtype=statistics),
        hidden.new_empty(0) if scalar else hidden.new_empty(targets.shape, dtype=statistics),
        hidden.new_empty(hidden.shape if needs_dhidden and scalar else (0,)),
        weight.new_empty(weight.shape if needs_dweight and scalar else (0,)),
        weight.new_empty(weight.shape[:1] if needs_dbias and scalar else (0,)),
    )


@torch.library.custom_op("vlp_fast::linear_cross_entropy_backward_v1", mutates_args=())
def _backward(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    needs_dhidden: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of reduction "none": the logits once more, and the products of their gradient."""
    valid = targets != ignore_index
    scale = dloss.where(valid, 0.0)
    needs = (needs_dhidden, needs_dweight, needs_dbias)
    _, _, grads = _Chunks(hidden, weight, bias, targets.where(valid, 0), backend).run(scale, label_smoothing, lse, needs)
    return grads[0], grads[1], grads[2]


@_backward.register_fake
def _(
    dloss, hidden, weight, bias, targets, lse, ignore_index, label_smoothing, needs_dhidden, needs_dweight, needs_dbias, backend
):
    return (
        hidden.new_empty(hidden.shape if needs_dhidden else (0,)),
        weight.new_empty(weight.shape if needs_dweight else (0,)),
        weight.new_empty(weight.shape[:1] if needs_dbias else (0,)),
    )


@torch.library.custom_op("vlp_fast::linear_cross_entropy_scale_v1", mutates_args=())
def _scale(dloss: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor, products: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a scalar: its gradient times what the forward has formed. `products` are the FLOPs that took, counted here."""
    return dhidden * dloss.to(dhidden.dtype), dweight * dloss.to(dweight.dtype), dbias * dloss.to(dbias.dtype)


@_scale.register_fake
def _(dloss, dhidden, dweight, dbias, products):
    return dhidden.new_empty(dhidden.shape), dweight.new_empty(dweight.shape), dbias.new_empty(dbias.shape)


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, targets, ignore_index, label_smoothing, reduction, *needs, backend = inputs
    _, lse, *grads = output
    ctx.mark_non_differentiable(lse, *grads)
    ctx.set_materialize_grads(False)  # or zeros for each of them
    ctx.needs, ctx.scalar = needs, reduction != "none"
    if ctx.scalar:
        ctx.save_for_backward(*grads)
        ctx.products = 2 * hidden.shape[0] * hidden.shape[1] * weight.shape[0] * (int(needs[0]) + int(needs[1]))
    else:
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.settings = (ignore_index, label_smoothing, *needs, backend)


def _grad(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 11
    if not ctx.scalar:
        grads = _backward(dloss, *ctx.saved_tensors, *ctx.settings)
    elif runs_directly("torch", dloss, *ctx.saved_tensors) and float(dloss) == 1.0:
        grads = ctx.saved_tensors  # a loss of weight 1, of which the forward has formed the gradients themselves
    else:
        grads = _scale(dloss, *ctx.saved_tensors, ctx.products)
    return (*(g if need else None for g, need in zip(grads, ctx.needs, strict=True)), *(None,) * 8)


_forward.register_autograd(_grad, setup_context=_setup_context)


@register_flop_formula(torch.ops.vlp_fast.linear_cross_entropy_forward_v1)
def _forward_flops(hidden_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """The logits. The products that gradients took are counted where a backward uses them."""
    return 2 * hidden_shape[0] * hidden_shape[1] * weight_shape[0]


@register_flop_formula(torch.ops.vlp_fast.linear_cross_entropy_backward_v1)
def _backward_flops(
    dloss_shape,
    hidden_shape,
    weight_shape,
    bias,
    targets,
    lse,
    ignore,
    smoothing,
    needs_dhidden,
    needs_dweight,
    *args,
    **kwargs,
) -> int:
    """The logits again, and a product for each of two gradients."""
    return 2 * hidden_shape[0] * hidden_shape[1] * weight_shape[0] * (1 + int(needs_dhidden) + int(needs_dweight))


@register_flop_formula(torch.ops.vlp_fast.linear_cross_entropy_scale_v1)
def _scale_flops(dloss_shape, dhidden_shape, dweight_shape, dbias_shape, products, *args, **kwargs) -> int:
    return products
