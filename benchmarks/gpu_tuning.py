"""Candidate launch numbers, for `gpu_check.py --tune`: those around the committed ones, each timed in turns with them.

Launchers ask a function of kernels/_configs.py for their numbers. A run of a case shows which function is asked for what, and what it
answers; a candidate is another answer to one such question, given by a function put in its place for the call and its backward. No
file changes. A candidate that does not compile, spills more registers than the committed one or computes something else is a row with
its reason.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import combinations
from types import ModuleType
from typing import Any

import torch

from vlp_fast.benchmarks.gpu_cases import DTYPES, Maker
from vlp_fast.benchmarks.gpu_providers import Checker, TimedCase
from vlp_fast.benchmarks.gpu_timing import Effort, Prepared, Timings, effort_on, in_turns, prepare, release, require_alive
from vlp_fast.evidence import kernel_files

__all__ = ["Lookup", "lookups", "neighbours", "replaced", "tune_case"]

FIELDS = ("block", "block_m", "block_n", "block_k", "columns", "num_warps", "num_stages")
LEAST = {"num_warps": 1, "num_stages": 1}  # elsewhere 16, the smallest side of a matrix instruction
MOST = {"num_warps": 16, "num_stages": 5}


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A function of _configs.py, the modules of launchers that have it under its name, and the first argument that asks for a kind."""

    name: str
    modules: tuple[ModuleType, ...]
    kind: str | None = None

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(self.modules[0], self.name)


def lookups(family: str) -> list[Lookup]:
    """The functions that launchers of a family ask for launch numbers."""
    modules = [importlib.import_module(f"vlp_fast.kernels.{path.stem}") for path in kernel_files(family)]
    found: dict[str, list[ModuleType]] = {}
    for module in modules:
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "") == "vlp_fast.kernels._configs" and module.__name__ != value.__module__
            if own and name.endswith("_config") and callable(value):
                found.setdefault(name, []).append(module)
    return [Lookup(name, tuple(where)) for name, where in found.items()]


@contextmanager
def replaced(lookup: Lookup, answer: Callable[[Any, tuple[Any, ...]], Any]) -> Iterator[None]:
    """`answer` gets what the committed function gives and the arguments, where the lookup's kind is asked for (any, without one)."""
    committed = lookup.function

    def function(*arguments: Any, **named: Any) -> Any:
        config = committed(*arguments, **named)
        return answer(config, arguments) if lookup.kind in (None, _kind(arguments)) else config

    for module in lookup.modules:
        setattr(module, lookup.name, function)
    try:
        yield
    finally:
        for module in lookup.modules:
            setattr(module, lookup.name, committed)


def _kind(arguments: tuple[Any, ...]) -> str | None:
    return arguments[0] if arguments and isinstance(arguments[0], str) else None


def neighbours(config: Any, changes: int) -> list[Any]:
    """Configurations with so many numbers changed, 1 or 2: halved, doubled or (stages) one up or down."""
    single = []
    for name in FIELDS:
        value = getattr(config, name, None)
        if value is not None:
            others = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
            single += [(name, other) for other in others if LEAST.get(name, 16) <= other <= MOST.get(name, other)]
    chosen = [dict(pairs) for pairs in combinations(single, changes)]
    return [dataclasses.replace(config, **change) for change in chosen if len(change) == changes]


def tune_case(
    case: TimedCase, dtype: str, device: str, tiny: bool, changes: int, deadline: float, timings: Timings
) -> list[dict[str, Any]]:
    """Rows of "tuning" for a case. changes: as in `neighbours`. deadline: value of `time.monotonic` after which no candidate is begun.

    Raises:
        DeviceLost: nothing can be timed any more.
    """
    where = {"family": case.family, "case": case.name, "dtype": dtype}
    if device == "cuda" and torch.cuda.get_device_properties(0).total_memory < case.gigabytes * 1e9:
        timings.leave_out_case(where, f"needs {case.gigabytes} GB of device memory")
        return []
    make = Maker(device, DTYPES[dtype], tiny, torch.Generator(device).manual_seed(0))
    checker, rows, seen = Checker(case.build(make)), [], set()
    for direction in checker.problem.directions():
        tuner = _Tuner(checker, direction, device, {**where, "direction": direction})
        for lookup, config in tuner.asked(lookups(case.family)):
            if (lookup.name, lookup.kind) not in seen:  # a forward's numbers are tuned by the forward alone
                seen.add((lookup.name, lookup.kind))
                rows += tuner.rows(lookup, config, changes, deadline, 3 if tiny else None)
        release(device)
    return rows


class _Tuner:
    """Candidates of one case and direction."""

    def __init__(self, checker: Checker, direction: str, device: str, place: dict[str, str]) -> None:
        self.checker, self.direction, self.device, self.place = checker, direction, device, place
        self.provider = checker.problem.providers["triton"]()
        self.effort: Effort = dataclasses.replace(effort_on(device), seconds=0.3, samples=9)

    def asked(self, all_lookups: list[Lookup]) -> list[tuple[Lookup, Any]]:
        """Each question that the case asks, and the committed answer. Answers of None have nothing to vary."""
        answers: dict[tuple[int, str | None], Any] = {}

        def note(i: int) -> Callable[..., Any]:
            def answer(config: Any, arguments: tuple[Any, ...]) -> Any:
                answers.setdefault((i, _kind(arguments)), config)
                return config

            return answer

        @contextmanager
        def around() -> Iterator[None]:
            with ExitStack() as stack:
                for i, lookup in enumerate(all_lookups):
                    stack.enter_context(replaced(lookup, note(i)))
                yield

        self._prepared(around)
        return [
            (dataclasses.replace(all_lookups[i], kind=kind), config)
            for (i, kind), config in answers.items()
            if dataclasses.is_dataclass(config)
        ]

    def _prepared(self, around: Callable[[], Any]) -> Prepared:
        provider = dataclasses.replace(self.provider, around=around)
        return prepare(provider, self.checker, self.direction, self.device, self.effort)

    def rows(self, lookup: Lookup, committed: Any, changes: int, deadline: float, most: int | None) -> list[dict[str, Any]]:
        """A row per candidate; `most` of them, or all."""
        candidates = neighbours(committed, changes)
        if lookup.name == "small_config" and changes == 1:  # None: the kernels that walk edges take the segments
            candidates.insert(0, None)
        base, base_spills = self._counted(lookup, lambda: committed)
        found = []
        for candidate in candidates[:most]:
            row = {**self.place, "lookup": lookup.name, "kind": lookup.kind}
            row |= {"candidate": _plain(candidate), "committed": _plain(committed)}
            if time.monotonic() > deadline:
                found.append({**row, "status": "not run", "reason": "out of time"})
                break
            try:
                one, spills = self._counted(lookup, lambda c=candidate: c)
                if spills is not None and spills > (base_spills or 0):
                    row |= {"status": "spills", "reason": f"spills {spills} registers; {base_spills or 0} are allowed"}
                else:
                    row |= self._timed(base, one, spills)
                del one
            except Exception as error:
                row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
                if self.device == "cuda":
                    require_alive(f"{lookup.name} {candidate}")
            found.append(row)
            release(self.device)
        return found

    def _counted(self, lookup: Lookup, answer: Callable[[], Any]) -> tuple[Prepared, int | None]:
        """The provider with the answer given, and the spills of what was compiled for it; None where nothing was."""
        before = {id(kernel) for kernel in _compiled(lookup)}
        one = self._prepared(lambda: replaced(lookup, lambda config, arguments: answer()))
        spills = [kernel.n_spills or 0 for kernel in _compiled(lookup) if id(kernel) not in before]
        return one, max(spills, default=None)

    def _timed(self, base: Prepared, one: Prepared, spills: int | None) -> dict[str, Any]:
        times, failed = in_turns({"committed": base, "candidate": one}, self.device, self.effort)
        if failed:
            return {"status": "failed", "reason": " / ".join(failed.values())}
        mine, other = (times[name].median * 1e3 for name in ("candidate", "committed"))
        spread = {
            "us_q1": times["candidate"].q1 * 1e3,
            "us_q3": times["candidate"].q3 * 1e3,
            "samples": times["candidate"].count,
        }
        numbers = {"us_median": mine, **spread, "committed_us_median": other, "ratio": other / mine}
        return {"status": "timed", **numbers, "graph": one.reason is None, "spills": spills}


def _plain(config: Any) -> dict[str, Any] | None:
    return None if config is None else dataclasses.asdict(config)


def _compiled(lookup: Lookup) -> list[Any]:
    """What Triton has compiled of the modules' kernels and keeps; empty in the interpreter."""
    kernels = []
    for module in lookup.modules:
        for value in list(vars(module).values()):
            for caches in getattr(value, "device_caches", {}).values():
                kernels += [kernel for kernel in caches[0].values() if hasattr(kernel, "n_spills")]
    return kernels
