"""The accuracy rule of the tests, for ours and for yours: a fast path may err as much as plain torch errs, and no more."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["assert_as_accurate_as", "assert_matches_reference", "outputs_and_gradients"]

# in units of the dtype's spacing at the largest exact value: what reordering a short sum may change even where the baseline is lucky
_FLOOR = {torch.float64: 16.0, torch.float32: 16.0, torch.float16: 1.0, torch.bfloat16: 1.0}

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def assert_as_accurate_as(
    actual: Tensor, baseline: Tensor, exact: Tensor, *, factor: float = 2.0, scale: float | None = None, what: str = ""
) -> None:
    """`actual` is as close to `exact` as plain torch at the same precision is, up to `factor` and a rounding floor.

    Equivalent to: ``error(actual) <= factor * error(baseline) + floor`` with ``error(x) = max |x - exact|``, and the same again with
    the root mean square in place of the maximum, so that one lucky or unlucky element decides nothing. The floor is 16 spacings of
    float64 and float32, and 1 of float16 and bfloat16, at `scale`.

    Args:
        actual: what is tested. baseline: plain torch at actual's dtype. exact: float64, from the same (rounded) inputs.
        factor: how much larger than the baseline's the error may be.
        scale: size of the numbers that rounding acts on; default: the largest exact value (for the second bound, their root mean
            square). Larger where the exact values are differences of larger ones, such as dq of a row that reads one key: 0.
        what: names the tensor in the message.

    Raises:
        AssertionError: the errors are larger; or shapes differ; or NaN and infinities are not where rounding `exact` to actual's dtype
            has them.
        ValueError: `exact` is not float64, actual's dtype has no floor, or the baseline is not finite where it should be, and so
            allows anything.

    Source: the tolerance rule of FlashAttention's tests.
    """
    if exact.dtype != torch.float64:
        raise ValueError(f"exact must be float64; received {exact.dtype}.")
    if actual.dtype not in _FLOOR:
        raise ValueError(f"actual must be float64, float32, float16 or bfloat16; received {actual.dtype}.")
    name = what or "the result"
    assert actual.shape == exact.shape == baseline.shape, (
        f"{name} has shape {list(actual.shape)}; the baseline has {list(baseline.shape)}, the exact value {list(exact.shape)}"
    )
    actual, baseline, exact = actual.detach().cpu(), baseline.detach().cpu(), exact.detach().cpu()
    rounded = exact.to(actual.dtype)
    _assert_same_places(actual.isnan(), rounded.isnan(), name, "NaN")
    _assert_same_places(actual == math.inf, rounded == math.inf, name, "inf")
    _assert_same_places(actual == -math.inf, rounded == -math.inf, name, "-inf")

    finite = rounded.isfinite()
    truth = exact[finite]
    if truth.numel() == 0:
        return
    error, allowed = actual[finite].double() - truth, baseline[finite].double() - truth
    if not allowed.isfinite().all():
        raise ValueError(f"the baseline of {name} must be finite where the exact value is; choose smaller inputs.")
    spacing = _FLOOR[actual.dtype] * torch.finfo(actual.dtype).eps
    worst, most = _largest(error), factor * _largest(allowed) + spacing * (_largest(truth) if scale is None else scale)
    assert worst <= most, (
        f"{name} is off by {worst:.3g} at {_place(finite, error)} where {most:.3g} is allowed: {factor} times the baseline's "
        f"{_largest(allowed):.3g} plus the floor"
    )
    mean, most = _rms(error), factor * _rms(allowed) + spacing * (_rms(truth) if scale is None else scale)
    assert mean <= most, (
        f"{name} is off by {mean:.3g} in the root mean square where {most:.3g} is allowed: {factor} times the baseline's "
        f"{_rms(allowed):.3g} plus the floor"
    )


def outputs_and_gradients(function: Function, inputs: Sequence[Tensor], douts: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The outputs of ``function(*inputs)``, then the gradient of every input, zeros where none arrives.

    Args:
        inputs: floating tensors, taken as leaves in their dtype and with their strides.
        douts: gradient of each output; default: fixed random numbers.

    Returns: detached tensors.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    if douts is None:
        douts = [_fixed_random(x, seed) for seed, x in enumerate(outputs)]
    reached = [(out, dout) for out, dout in zip(outputs, douts, strict=True) if out.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    if reached:
        grads = torch.autograd.grad([out for out, _ in reached], leaves, [dout for _, dout in reached], allow_unused=True)
    return [out.detach() for out in outputs] + [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
    ]


def assert_matches_reference(
    function: Function,
    reference: Function,
    inputs: Sequence[Tensor],
    *,
    names: Sequence[str] = (),
    factor: float = 2.0,
) -> None:
    """Every output and every gradient of `function` obeys `assert_as_accurate_as` against its plain-torch twin `reference`.

    The reference runs twice: at the dtype of the inputs (the baseline) and in float64 on the same, rounded inputs (exact). The
    `scale` of every gradient is the largest of them all.

    Args:
        function, reference: take `inputs` and return a tensor or a tuple of them. inputs: floating tensors of one dtype.
        names: of the outputs, then of the inputs whose gradients are compared. factor: as in `assert_as_accurate_as`.

    Raises: AssertionError, naming the tensor.
    """
    actual = outputs_and_gradients(function, inputs)
    count = len(actual) - len(inputs)
    douts = [_fixed_random(x, seed) for seed, x in enumerate(actual[:count])]
    low = outputs_and_gradients(reference, inputs, [d.to(inputs[0].dtype) for d in douts])
    exact = outputs_and_gradients(reference, [x.double() for x in inputs], [d.double() for d in douts])
    labels = list(names) or [*(f"output {i}" for i in range(count)), *(f"gradient {i}" for i in range(len(inputs)))]
    scale = max((_largest(e) for e in exact[count:] if e.numel()), default=0.0)
    for i, (label, a, b, e) in enumerate(zip(labels, actual, low, exact, strict=True)):
        assert_as_accurate_as(a, b, e, factor=factor, scale=None if i < count else scale, what=label)


def _fixed_random(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(device=like.device, dtype=like.dtype)


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _assert_same_places(actual: Tensor, exact: Tensor, name: str, value: str) -> None:
    wrong = actual != exact
    assert not wrong.any(), (
        f"{name} has {value} in {int(actual.sum())} places and should have it in {int(exact.sum())}; "
        f"{int(wrong.sum())} places differ, the first is {wrong.nonzero()[0].tolist()}"
    )


def _place(finite: Tensor, error: Tensor) -> list[int]:
    return finite.nonzero()[error.abs().argmax()].tolist()
