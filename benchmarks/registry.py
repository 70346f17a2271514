"""Suites of named cases: what is compared, on what, and how it is found out who is right.

A suite is a file with a function `cases`: options -> pairs of a case's name and what builds it. Building is put off until the case's turn,
so that one model at a time is in memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from vlp_fast.ops import backend_status

__all__ = [
    "DTYPES",
    "OURS",
    "SIZES",
    "SUITES",
    "Case",
    "Entry",
    "NotHere",
    "Options",
    "Suite",
    "cases_of",
    "module_of",
    "own_backends",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = ("tiny", "small", "base")
OURS = "vlp_fast"  # how the names of our providers begin


class NotHere(Exception):
    """A provider or a case that this machine cannot run; the message says what it needs."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every suite understands.

    Attributes:
        device: "cpu" or "cuda". dtype: "fp32", "bf16" or "fp16". size: of models; None: the suite's. batch: pairs, or images.
        seconds: measured of each case; None: the suite's. quick: smaller models and shorter measurements where neither is given.
        memory: also the peak memory of each provider, in a process of its own. only: parts of names; cases whose name has none of them
        are left out. blip_source: a clone of github.com/salesforce/BLIP. seed: of weights and inputs.
    """

    device: str = "cpu"
    dtype: str = "fp32"
    size: str | None = None
    batch: int = 8
    seconds: float | None = None
    quick: bool = False
    memory: bool = False
    only: tuple[str, ...] = ()
    blip_source: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda; received {self.device!r}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda needs a CUDA device, and torch finds none.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; received {self.dtype!r}.")
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}; received {self.size!r}.")
        if self.batch < 2:
            raise ValueError(f"batch must be at least 2, or there is nothing to contrast with; received {self.batch}.")
        if self.seconds is not None and not self.seconds > 0.0:
            raise ValueError(f"seconds must be above 0; received {self.seconds}.")

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values, from which `from_json` makes it again."""
        return {**asdict(self), "blip_source": None if self.blip_source is None else str(self.blip_source)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Options:
        source = values["blip_source"]
        made = {**values, "only": tuple(values["only"]), "blip_source": None if source is None else Path(source)}
        return cls(**made)


@dataclass
class Case:
    """What is timed side by side.

    Attributes:
        calls: provider -> one call of it, the same work every time. Ours have names that begin with "vlp_fast".
        wrong: provider -> what is wrong with its results; asked once, before anything is timed. Those named are not timed.
        absent: provider -> why it is not here. baseline: the provider that speeds are ratios to; "": the first.
        work: how much of `unit` a call does, for throughput. least_bytes: what any provider must read and write, or None.
        facts: saved with every row. note: for people. release: drops what providers other than the one named need, for memory.
    """

    calls: dict[str, Callable[[], object]]
    wrong: Callable[[], dict[str, str]]
    absent: dict[str, str] = field(default_factory=dict)
    baseline: str = ""
    work: float | None = None
    unit: str = ""
    least_bytes: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    release: Callable[[str], None] | None = None

    def first(self, right: Mapping[str, object]) -> str | None:
        """The provider that speeds are ratios to, of those that are right; None where it is not among them."""
        name = self.baseline or next(iter(self.calls))
        return name if name in right else None


class Entry(NamedTuple):
    """A case and what builds it; that raises `NotHere` or ImportError where it cannot."""

    name: str
    build: Callable[[], Case]


class Suite(NamedTuple):
    """module: the file whose `cases` makes its entries. about: for people. seconds, quick_seconds: measured of each case. size,
    quick_size: of models; None where there are none. memory: whether it measures memory without being asked."""

    module: str
    about: str
    seconds: float
    quick_seconds: float
    size: str | None = None
    quick_size: str | None = None
    memory: bool = False

    def settled(self, options: Options) -> Options:
        """The options with nothing left open."""
        seconds = self.quick_seconds if options.quick else self.seconds
        size = self.quick_size if options.quick else self.size
        memory = options.memory or self.memory
        return replace(options, seconds=options.seconds or seconds, size=options.size or size, memory=memory)


SUITES = {
    "kernels": Suite("bench_kernels", "each operation against what it replaces", 2.0, 0.3),
    "embed": Suite("bench_embed", "image and text towers alone against published code", 8.0, 2.0, "base", "small"),
    "steps": Suite("bench_steps", "pretraining steps against published code", 60.0, 8.0, "base", "small"),
    "generate": Suite("bench_generation", "writing and ranking captions against published code", 30.0, 3.0, "base", "small"),
    "memory": Suite("bench_memory", "peak memory of pretraining steps", 1.0, 1.0, "base", "small", True),
    "changes": Suite("bench_changes", "what single changes of this library gain", 15.0, 2.0, "base", "small"),
    "scaling": Suite("bench_scaling", "cost against batch, lengths, captions, losses and sizes", 3.0, 0.5, "small", "tiny"),
}


def module_of(suite: str) -> ModuleType:
    """The file of a suite: its `cases`, and its `finish` where it adds to a finished report."""
    return importlib.import_module(f"vlp_fast.benchmarks.{SUITES[suite].module}")


def cases_of(suite: str, options: Options) -> Iterator[Entry]:
    """The entries of a suite that `options.only` names.

    Raises: ValueError for a suite that is not one of `SUITES`, or where `only` names no case.
    """
    if suite not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}; received {suite!r}.")
    entries = list(module_of(suite).cases(SUITES[suite].settled(options)))
    wanted = [e for e in entries if not options.only or any(part.lower() in e.name.lower() for part in options.only)]
    if not wanted:
        raise ValueError(
            f"no case of suite {suite} has {' or '.join(options.only)} in its name: {', '.join(e.name for e in entries)}."
        )
    yield from wanted


def own_backends(device: str) -> tuple[list[str], dict[str, str]]:
    """Backends of ours that run on `device`, and why the others do not."""
    status = {name: backend_status(name, device) for name in ("torch", "triton")}
    here = [name for name, s in status.items() if s.available]
    return here, {f"{OURS} {name}": s.reason for name, s in status.items() if not s.available}
