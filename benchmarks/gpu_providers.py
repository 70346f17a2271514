"""What gpu_check.py times: problems, the providers that solve them, and the rule by which a provider is right.

A provider holds the tensors of its problem in layouts of its own, such as padded rectangles; making them is not timed, as a model that
uses it has its tensors so. What it returns is brought back and compared with plain torch in float64 on the same inputs: it may err by
TOLERANCE of the exact values, or by LENIENT times what plain torch errs at the same dtype. This is wider than the rule for our kernels
(`vlp_fast.testing`), so that no rival is left out for its rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vlp_fast.benchmarks.gpu_cases import Maker

__all__ = ["Absent", "Checker", "Layout", "Provider", "RowLayout", "TimedCase", "TimedProblem", "Work", "disagreement"]

# of the largest exact value, and of their root mean square
TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.float16: (2e-2, 5e-3), torch.bfloat16: (6e-2, 2e-2)}
LENIENT = 3.0


class Absent(Exception):
    """A rival that does not exist here; the message says why."""


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes that one phase of a case cannot avoid, by the formulas of kernels/README.md."""

    flops: float
    bytes: float


class Layout(Protocol):
    """How a provider holds a tensor of the problem."""

    def into(self, x: Tensor) -> Tensor: ...

    def back(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class RowLayout:
    """Row i of the problem lies at `place[i]` of the rows of leading shape `shape`; zeros lie between them."""

    place: Tensor
    shape: tuple[int, ...]

    def into(self, x: Tensor) -> Tensor:
        own = x.new_zeros(math.prod(self.shape), *x.shape[1:])
        return own.index_copy_(0, self.place, x).view(*self.shape, *x.shape[1:])

    def back(self, x: Tensor) -> Tensor:
        return x.flatten(0, len(self.shape) - 1)[self.place]


@dataclass(frozen=True)
class Provider:
    """One way to solve a problem.

    call: of the inputs in `layouts` (None: as the problem holds them); its result lies in `out_layout`. is_bound: it computes something
    else, whose time is a limit and no rival, and is not checked. around: entered for every call and its backward.
    """

    name: str
    call: Callable[..., Tensor]
    layouts: tuple[Layout | None, ...] = ()
    out_layout: Layout | None = None
    ours: bool = False
    is_bound: bool = False
    around: Callable[[], AbstractContextManager[object]] = nullcontext

    def own(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The inputs in the provider's layouts."""
        layouts = self.layouts or (None,) * len(inputs)
        return [x if layout is None else layout.into(x) for x, layout in zip(inputs, layouts, strict=True)]

    def back(self, results: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
        """The output, and the gradients where there are any, as the problem holds them."""
        layouts = [layout for layout, need in zip(self.layouts or (None,) * len(needs), needs, strict=True) if need]
        pairs = zip(results, [self.out_layout, *layouts][: len(results)], strict=True)
        return [x if layout is None else layout.back(x) for x, layout in pairs]


@dataclass(frozen=True)
class TimedProblem:
    """What is computed, by whom, and what is right.

    Attributes:
        inputs: tensors; needs: which of them get a gradient.
        providers: name -> what makes the provider or raises.
        forward: the work of that direction, or None where only both together are timed. backward: of the second phase, or None where
            there is none. Both directions together are timed where there is a backward.
        reference: plain torch, run in float64 and at the dtype of the inputs. rows: where it is for a part of the problem only, the
            rows of each input, then of the output, that the part consists of; None for all. compared: which gradients the part
            decides; default: all in `needs`.
        accepts: in place of a reference, why a result is wrong, or None.
    """

    inputs: list[Tensor]
    needs: tuple[bool, ...]
    providers: Mapping[str, Callable[[], Provider]]
    forward: Work | None
    backward: Work | None = None
    reference: Callable[..., Tensor] | None = None
    rows: tuple[Tensor | None, ...] = ()
    compared: tuple[bool, ...] = ()
    accepts: Callable[[Tensor], str | None] | None = None

    def directions(self) -> dict[str, list[Work]]:
        """Direction -> the work of its phases."""
        found = {} if self.forward is None else {"forward": [self.forward]}
        if self.backward is not None:
            found["forward+backward"] = [work for work in (self.forward, self.backward) if work is not None]
        return found


@dataclass(frozen=True)
class TimedCase:
    """family and name, how to build it, in which dtypes, and the device memory it needs in GB."""

    family: str
    name: str
    build: Callable[[Maker], TimedProblem]
    dtypes: tuple[str, ...] = ("bf16",)
    gigabytes: float = 24.0


class Checker:
    """The exact results of a problem, and whether a provider's are right."""

    def __init__(self, problem: TimedProblem) -> None:
        self.problem = problem
        self.compared = problem.compared or problem.needs
        self.rows = problem.rows or (None,) * (len(problem.inputs) + 1)
        self.exact, self.plain, self.part = [], [], None
        if problem.reference is not None:
            self.plain = self._results(None)
            self.exact = self._results(torch.float64)

    def _results(self, dtype: torch.dtype | None) -> list[Tensor]:
        leaves = []
        for x, rows, compared in zip(self.problem.inputs, self.rows, self.compared, strict=False):
            cut = _taken(x, rows)
            wide = cut.to(dtype) if dtype is not None and cut.is_floating_point() else cut
            leaves.append(wide.detach().requires_grad_(compared))
        with torch.enable_grad():
            out = self.problem.reference(*leaves)
        if self.part is None:
            self.part = _random_like(out, 1)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        grads = torch.autograd.grad(out, wanted, self.part.to(out.dtype)) if wanted and self.problem.backward else ()
        return [x.detach().double() for x in (out, *grads)]

    def dout(self, out: Tensor) -> Tensor:
        """The gradient of an output as the problem holds it: the reference's in its rows, ordinary numbers elsewhere."""
        if self.part is None or self.rows[-1] is None:
            return (_random_like(out, 2) if self.part is None else self.part).to(out.dtype)
        whole = _random_like(out, 2)
        whole[self.rows[-1]] = self.part.to(out.dtype)
        return whole

    def wrong(self, provider: Provider, results: Sequence[Tensor]) -> str | None:
        """Why the output or a gradient is wrong, None where all are right. results: of the provider, output first."""
        problem = self.problem
        if problem.accepts is not None:
            return problem.accepts(results[0])
        rows = [self.rows[-1], *(r for r, need in zip(self.rows, problem.needs, strict=False) if need)]
        used = [True, *(c for c, need in zip(self.compared, problem.needs, strict=True) if need)]
        whole = provider.back(results, problem.needs)
        actual = [_taken(x, r) for x, r, use in zip(whole, rows, used, strict=False) if use]
        for i, (x, exact, plain) in enumerate(zip(actual, self.exact, self.plain, strict=False)):
            reason = disagreement(x, exact, plain, problem.inputs[0].dtype)
            if reason is not None:
                return f"{'the output' if i == 0 else f'gradient {i}'} {reason}"
        return None


def disagreement(actual: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype) -> str | None:
    """Why `actual` is wrong, None where it is right. plain: what plain torch makes of it at `dtype`."""
    if actual.shape != exact.shape:
        return f"has shape {list(actual.shape)} where {list(exact.shape)} is right"
    error, other = actual.double() - exact, plain - exact
    for name, size, share in zip(("largest", "root mean square"), (_largest, _rms), TOLERANCE[dtype], strict=True):
        off, allowed = size(error), max(share * size(exact), LENIENT * size(other))
        if not off <= allowed:
            return f"is off by {off:.3g} where {allowed:.3g} is allowed ({name})"
    return None


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def _taken(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


def _random_like(out: Tensor, seed: int) -> Tensor:
    """Of a scalar 1; otherwise random numbers that bf16 holds exactly, so that every dtype gets the same."""
    if out.dim() == 0:
        return torch.ones_like(out)
    generator = torch.Generator(out.device).manual_seed(seed)
    return torch.randn(out.shape, generator=generator, device=out.device).bfloat16().to(out.dtype)
