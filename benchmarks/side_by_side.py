"""Operations as cases of the registry: inputs, providers as functions of them, directions, and who is right.

The first provider is the baseline. A provider whose result or gradients differ from the baseline's in float64 by more than TOLERANCE of the
largest value is wrong. Where an operation names a plain provider, results (not gradients) must instead be as accurate as that one's, by the
rule of `vlp_fast.testing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlp_fast.benchmarks.gpu_providers import Absent, Provider
from vlp_fast.benchmarks.registry import Case, Entry, NotHere, Options
from vlp_fast.benchmarks.runner import tensor_bytes
from vlp_fast.testing import assert_as_accurate_as

__all__ = ["BOTH", "FORWARD", "TOLERANCE", "Operation", "entries", "needs_cuda", "smaller"]

FORWARD, BOTH = "fwd", "fwd+bwd"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
FAILURES = (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass
class Operation:
    """What providers compute.

    Attributes:
        inputs: floating tensors; those that require a gradient get one.
        providers: name -> function of the inputs, or a `Provider` with layouts of its own; the first is the baseline.
        optional: name -> what makes one, and says by Absent, NotHere or ImportError why it is not here; or it fails at these inputs.
        absent: name -> why it is not here.
        exact: function of the inputs in float64 that is right; None: the baseline.
        plain: the provider as accurate as which results must be; None: TOLERANCE.
        parameters: provider -> weights that it holds, whose gradients are formed and not compared.
        reads: what every provider must read beside the inputs. facts, note: as in `Case`.
    """

    inputs: Sequence[Tensor]
    providers: Mapping[str, Callable[..., Tensor] | Provider]
    optional: Mapping[str, Callable[[], Callable[..., Tensor] | Provider]] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    exact: Callable[..., Tensor] | None = None
    plain: str | None = None
    parameters: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    reads: Sequence[Tensor] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def case(self, direction: str) -> Case:
        """The operation in one direction."""
        absent = dict(self.absent)
        providers = {name: _provider(name, made) for name, made in self.providers.items()}
        for name, make in self.optional.items():
            try:
                providers[name] = _provider(name, make())
                self._output(providers[name])
            except ImportError as error:
                absent[name] = f"{error.name or error} is not installed"
            except (Absent, NotHere, *FAILURES) as error:
                absent[name] = _first_line(error)
                providers.pop(name, None)
        backward = direction == BOTH
        calls = {
            name: self._training(provider) if backward else self._forward(provider) for name, provider in providers.items()
        }
        return Case(
            calls,
            partial(self._wrong, providers, backward),
            absent,
            least_bytes=self._least_bytes(next(iter(providers.values())), backward),
            facts=dict(self.facts),
            note=self.note,
            release=lambda name: None,  # tensors of the others go with their calls
        )

    @property
    def needs(self) -> tuple[bool, ...]:
        return tuple(x.requires_grad for x in self.inputs)

    def _least_bytes(self, first: Provider, backward: bool) -> int:
        """Inputs read and results written once; with the backward also the inputs again, dout, and gradients written once."""
        read, out = tensor_bytes(*self.inputs, *self.reads), tensor_bytes(self._output(first))
        if not backward:
            return read + out
        learned = [x for x in self.inputs if x.requires_grad]
        return 2 * (read + out) + tensor_bytes(*learned, *self.parameters.get(first.name, ()))

    @torch.no_grad()
    def _output(self, provider: Provider) -> Tensor:
        return provider.back([provider.call(*provider.own(self.inputs))], self.needs)[0]

    def _forward(self, provider: Provider) -> Callable[[], object]:
        own = [x.detach() for x in provider.own(self.inputs)]

        def run() -> object:
            with torch.no_grad():
                return provider.call(*own)

        return run

    def _training(self, provider: Provider) -> Callable[[], object]:
        leaves = _leaves(provider.own(self.inputs), self.needs)
        wanted = [*(x for x in leaves if x.requires_grad), *self.parameters.get(provider.name, ())]
        ones: list[Tensor] = []

        def run() -> object:
            out = provider.call(*(x.view_as(x) for x in leaves))  # the counter of FLOPs wants no leaf to enter a module
            if not ones:
                ones.append(torch.ones_like(out))
            return torch.autograd.grad(out, wanted, ones[0])

        return run

    def _results(self, provider: Provider, dtype: torch.dtype | None, backward: bool) -> list[Tensor]:
        """The result and, with the backward, the inputs' gradients, as the operation holds them."""
        leaves = _leaves(provider.own([x if dtype is None else x.to(dtype) for x in self.inputs]), self.needs)
        wanted = [x for x in leaves if x.requires_grad]
        with torch.set_grad_enabled(backward):
            out = provider.call(*leaves)
        results = [out.detach()]
        if backward and wanted:
            mine = provider.back(results, self.needs)[0]
            dout = torch.randn(mine.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            dout = dout.to(mine.device, mine.dtype)
            dout = dout if provider.out_layout is None else provider.out_layout.into(dout)
            results += torch.autograd.grad(out, wanted, dout)
        return provider.back(results, self.needs)

    def _wrong(self, providers: Mapping[str, Provider], backward: bool) -> dict[str, str]:
        first = next(iter(providers.values()))
        right = first if self.exact is None else Provider("exact", self.exact)
        exact = self._results(right, torch.float64, backward)
        plain = None if self.plain is None else self._results(providers[self.plain], None, False)[0]
        wrong = {}
        for name, provider in providers.items():
            try:
                found = self._results(provider, None, backward)
                if plain is not None:
                    assert_as_accurate_as(found[0], plain, exact[0])
                for actual, expected in list(zip(found, exact, strict=True))[int(plain is not None) :]:
                    _assert_near(actual, expected, TOLERANCE[self.inputs[0].dtype])
            except FAILURES as error:
                wrong[name] = _first_line(error)
        return wrong


def entries(
    operation: str,
    name: str,
    build: Callable[[], Operation],
    options: Options,
    directions: Sequence[str] = (FORWARD, BOTH),
) -> Iterator[Entry]:
    """An entry for each direction, such as "attention: ViT-B/16 224 self, fwd+bwd"; `build` is called when its turn comes."""

    def case(direction: str) -> Case:
        torch.manual_seed(options.seed)
        return build().case(direction)

    for direction in directions:
        yield Entry(f"{operation}: {name}, {direction}", partial(case, direction))


def smaller(number: int, options: Options) -> int:
    """`number`, or at size tiny, which is for tests, a sixteenth of it."""
    return number // 16 if options.size == "tiny" else number


def needs_cuda(options: Options) -> None:
    """Raises: NotHere on a CPU."""
    if options.device != "cuda":
        raise NotHere("needs CUDA")


def _provider(name: str, made: Callable[..., Tensor] | Provider) -> Provider:
    return made if isinstance(made, Provider) else Provider(name, made)


def _leaves(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    return [x.detach().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]


def _assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape, f"its shape is {list(actual.shape)} where {list(expected.shape)} is right"
    error = ((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    assert error <= tolerance, f"off by {error:.2g} of the largest value; {tolerance} is allowed"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
