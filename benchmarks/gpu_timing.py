"""How gpu_check.py times: providers checked, captured in CUDA graphs, replayed in turns, beside a floor of measured ceilings.

A provider gets copies of its inputs that together exceed twice the L2 cache, and its graph calls it once per copy and more, so that no
call finds its inputs in the cache. A sample is several replays; they begin while the device is still busy with one that is not counted,
so that no launch is waited for; samples are taken in turns (A B A B). A call that cannot be captured is timed eagerly, and its row says
why. On the CPU, which serves to try this code, there are no graphs. A rival that is missing, wrong or broken is a row with its reason.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vlp_fast.benchmarks.gpu_cases import DTYPES, Maker
from vlp_fast.benchmarks.gpu_providers import Absent, Checker, Provider, TimedCase, Work
from vlp_fast.measuring import Timing

__all__ = [
    "Ceilings",
    "DeviceLost",
    "Effort",
    "Timings",
    "copies_for",
    "effort_on",
    "in_turns",
    "measure_ceilings",
    "prepare",
    "time_case",
]


class DeviceLost(Exception):
    """The device answers every call with an error since the one that the message names."""


class Wrong(Exception):
    """A provider whose results are not those of the reference."""


@dataclass(frozen=True)
class Ceilings:
    """What this device reached: TFLOP/s of one dtype in a large product, GB/s of a large copy, reads and writes counted."""

    tflop_per_s: float
    gb_per_s: float

    def floor_us(self, phases: Sequence[Work]) -> float:
        """Microseconds that no kernel can go below: of each phase the slower of its products and its bytes."""
        return sum(max(w.flops / (self.tflop_per_s * 1e6), w.bytes / (self.gb_per_s * 1e3)) for w in phases)


@dataclass(frozen=True)
class Effort:
    """How long to measure: `samples` of a provider, or for `seconds` and `least` of them; how long a graph and a sample last at least,
    in microseconds; copies of the inputs at most, and bytes of them.
    """

    samples: int = 25
    seconds: float = 2.0
    least: int = 7
    graph_us: float = 500.0
    sample_us: float = 1500.0
    most_copies: int = 512
    copy_bytes: int = 2 * 2**30


def effort_on(device: str) -> Effort:
    """On the CPU as little as shows that the code runs."""
    return Effort() if device == "cuda" else Effort(samples=3, seconds=0.5, least=2, graph_us=0.0, sample_us=0.0, most_copies=2)


def l2_bytes(device: str) -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 2**20


def copies_for(size: int, l2: int, effort: Effort) -> int:
    """How many sets of inputs of `size` bytes exceed twice the L2 cache together, within the budget; one where a set does alone."""
    size = max(size, 1)
    return max(1, min(2 * l2 // size + 1, effort.copy_bytes // size, effort.most_copies))


# ------------------------------------------------------------------------------------------------------------------- ceilings


def measure_ceilings(device: str, dtypes: Mapping[str, torch.dtype] = DTYPES) -> dict[str, Any]:
    """The report's "ceilings": the best of several large products of each dtype, and of several large copies."""
    rates = {}
    for name, dtype in dtypes.items():
        n = 64 if device == "cpu" else 8192 if dtype.itemsize == 2 else 4096
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")  # products of zeros need less power
        out = torch.empty_like(a)
        rates[name] = 2 * n**3 / _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device) / 1e12
    size = 2**16 if device == "cpu" else min(2**30, torch.cuda.get_device_properties(0).total_memory // 8)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rate = 2 * size / _best(lambda: target.copy_(source), device) / 1e9
    return {"tflop_per_s": rates, "gb_per_s": rate, "copied_bytes": size, "l2_bytes": l2_bytes(device)}


def _best(call: Callable[[], object], device: str) -> float:
    for _ in range(3):
        call()
    return min(_seconds(call, 5, device) for _ in range(10)) / 5


def _seconds(call: Callable[[], object], count: int, device: str) -> float:
    """Of `count` calls together. On a GPU they follow one that is not counted, so that the device does not wait for the host."""
    if device == "cpu":
        begin = time.perf_counter()
        for _ in range(count):
            call()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


# ------------------------------------------------------------------------------------------------------- providers and samples


@dataclass
class Prepared:
    """A provider ready to be sampled: `play` makes `calls` calls, `plays` times a sample. reason: why it is no graph."""

    provider: Provider
    play: Callable[[], object]
    calls: int
    copies: int
    plays: int = 1
    reason: str | None = None

    def sample(self, device: str) -> float:
        """Seconds of a call."""
        return _seconds(self.play, self.plays, device) / (self.plays * self.calls)


def prepare(provider: Provider, checker: Checker, direction: str, device: str, effort: Effort) -> Prepared:
    """Copies a provider's inputs, runs it, checks it and captures it.

    Raises:
        Wrong: its results are not right. Exception: whatever it raises itself.
    """
    problem = checker.problem
    own = provider.own(problem.inputs)
    copies = copies_for(sum(t.numel() * t.element_size() for t in own), l2_bytes(device), effort)
    backward = direction != "forward"
    sets = [
        [t.detach().clone().requires_grad_(backward and need) for t, need in zip(own, problem.needs, strict=True)]
        for _ in range(copies)
    ]
    calls = [_forward(provider, tensors) for tensors in sets]
    if backward:
        dout = _own_dout(provider, checker, calls[0]()[0])
        calls = [_forward_backward(provider, tensors, dout) for tensors in sets]
    reason = None if provider.is_bound else checker.wrong(provider, calls[0]())
    if reason is not None:
        raise Wrong(reason)
    if device == "cpu":
        return Prepared(provider, _all(calls), copies, copies, reason="the CPU has no CUDA graphs")
    return _captured(provider, calls, effort)


def _own_dout(provider: Provider, checker: Checker, out: Tensor) -> Tensor:
    layout = provider.out_layout
    if layout is None:
        return torch.randn_like(out) if provider.is_bound else checker.dout(out)
    return layout.into(checker.dout(layout.back(out)))


def _forward(provider: Provider, inputs: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        with provider.around(), torch.no_grad():
            return [provider.call(*inputs)]

    return run


def _forward_backward(provider: Provider, inputs: Sequence[Tensor], dout: Tensor) -> Callable[[], list[Tensor]]:
    wanted = [x for x in inputs if x.requires_grad]

    def run() -> list[Tensor]:
        with provider.around(), torch.enable_grad():
            out = provider.call(*inputs)
            return [out.detach(), *torch.autograd.grad(out, wanted, dout)]

    return run


def _all(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _captured(provider: Provider, calls: list[Callable[[], list[Tensor]]], effort: Effort) -> Prepared:
    """A graph of the calls, or the calls themselves where they cannot be captured."""
    copies = len(calls)
    reason = _waits(calls[0])
    seconds = _seconds(_all(calls), 1, "cuda")
    # a graph of one or two short calls would time the gaps between replays
    calls = calls * max(1, min(16 // copies, round(effort.graph_us * 1e-6 / seconds)))
    prepared = Prepared(provider, _all(calls), len(calls), copies, reason=reason)
    if reason is None:
        try:
            prepared.play = _capture(calls)
        except Exception as error:
            prepared.reason = f"not captured: {_said(_first(error))}"
            require_alive(f"the capture of {provider.name}")
    prepared.play()
    seconds = _seconds(prepared.play, 1, "cuda")
    prepared.plays = max(2, min(200, round(effort.sample_us * 1e-6 / seconds)))
    return prepared


def _waits(call: Callable[[], object]) -> str | None:
    """Why a call waits for the device. It is asked before a capture, which such a call would leave half done."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return f"not captured, it waits for the device: {_said(error)}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def _capture(calls: list[Callable[[], list[Tensor]]]) -> Callable[[], object]:
    """The replay of a graph of all calls. Each copy's results stay where they are until all are made, so that they rotate too."""
    stream = _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # caches of what lies on the device are kept per stream
        for call in dict.fromkeys(calls):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph, results = torch.cuda.CUDAGraph(), {}
    gc.disable()  # what it would free may not be freed during a capture
    try:
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                results[call] = call()
    finally:
        gc.enable()

    # the graph reads what the calls hold, so they live as long as it does
    return lambda calls=calls: graph.replay()


@lru_cache
def _capture_stream() -> torch.cuda.Stream:
    """One for all: libraries keep a workspace for every stream."""
    return torch.cuda.Stream()


def in_turns(prepared: Mapping[str, Prepared], device: str, effort: Effort) -> tuple[dict[str, Timing], dict[str, str]]:
    """Samples of all providers, one of each after another; and why some failed meanwhile."""
    samples: dict[str, list[float]] = {name: [] for name in prepared}
    failed: dict[str, str] = {}
    begin = time.monotonic()
    for i in range(effort.samples):
        if i >= effort.least and time.monotonic() - begin > effort.seconds:
            break
        for name, one in prepared.items():
            if name in failed:
                continue
            try:
                samples[name].append(one.sample(device))
            except Exception as error:
                failed[name] = _said(error)
                if device == "cuda":
                    require_alive(f"a replay of {name}")
    return {name: Timing.of(values) for name, values in samples.items() if name not in failed}, failed


# ------------------------------------------------------------------------------------------------------------------------ cases


class Timings:
    """Rows of a report: of ours and its rivals, of bounds, and of what was not timed."""

    def __init__(self) -> None:
        self.timed: list[dict[str, Any]] = []
        self.bounds: list[dict[str, Any]] = []
        self.not_timed: list[dict[str, Any]] = []

    def leave_out(self, where: Mapping[str, str], provider: str, status: str, reason: str, ours: bool = False) -> None:
        """A row of `not_timed`. status: "absent", "wrong", "failed", or "not run" of what was not tried."""
        self.not_timed.append({**where, "provider": provider, "ours": ours, "status": status, "reason": reason})

    def leave_out_case(self, where: Mapping[str, str], reason: str) -> None:
        self.leave_out(where, "all", "not run", reason)


def time_case(
    case: TimedCase, dtype: str, device: str, tiny: bool, ceilings: Mapping[str, Any], deadline: float, timings: Timings
) -> None:
    """Adds the rows of a case to `timings`. deadline: value of `time.monotonic` after which no further provider is begun.

    Raises:
        DeviceLost: nothing can be timed any more.
    """
    where = {"family": case.family, "case": case.name, "dtype": dtype}
    if device == "cuda" and torch.cuda.get_device_properties(0).total_memory < case.gigabytes * 1e9:
        timings.leave_out_case(where, f"needs {case.gigabytes} GB of device memory")
        return
    limits = Ceilings(ceilings["tflop_per_s"][dtype], ceilings["gb_per_s"])
    try:
        make = Maker(device, DTYPES[dtype], tiny, torch.Generator(device).manual_seed(0))
        checker = Checker(case.build(make))
    except Exception as error:
        timings.leave_out_case(where, f"not built: {_said(error)}")
        release(device)
        if device == "cuda":
            require_alive(case.name)
        return
    for direction, phases in checker.problem.directions().items():
        place = {**where, "direction": direction}
        ready = _ready(checker, place, device, deadline, timings)
        times, failed = in_turns(ready, device, effort_on(device))
        for name, reason in failed.items():
            timings.leave_out(place, name, "failed", reason, ready[name].provider.ours)
        for name, timing in times.items():
            rows = timings.bounds if ready[name].provider.is_bound else timings.timed
            rows.append({**place, **_numbers(ready[name], timing, phases, limits)})
        del ready
        release(device)


def _ready(checker: Checker, place: Mapping[str, str], device: str, deadline: float, timings: Timings) -> dict[str, Prepared]:
    """Providers that are right; rows for the others."""
    ready: dict[str, Prepared] = {}
    for name, make in checker.problem.providers.items():
        ours = name == "triton"
        if time.monotonic() > deadline:
            timings.leave_out(place, name, "not run", "out of time", ours)
            continue
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                ready[name] = prepare(make(), checker, place["direction"], device, effort_on(device))
                continue
            except (Absent, ImportError, Wrong) as error:
                status, reason = "wrong" if isinstance(error, Wrong) else "absent", str(error)
            except Exception as error:
                said = [str(warning.message).partition(" (Triggered")[0] for warning in warned]
                status, reason = "failed", " / ".join(dict.fromkeys([_said(error), *said]))[:600]
        timings.leave_out(place, name, status, reason, ours)
        release(device)
        if device == "cuda":
            require_alive(name)
    return ready


def _numbers(one: Prepared, timing: Timing, phases: Sequence[Work], ceilings: Ceilings) -> dict[str, Any]:
    us, floor = timing.median * 1e3, ceilings.floor_us(phases)
    flops, size = sum(w.flops for w in phases), sum(w.bytes for w in phases)
    row = {
        "provider": one.provider.name, "ours": one.provider.ours,
        "us_median": us, "us_q1": timing.q1 * 1e3, "us_q3": timing.q3 * 1e3, "samples": timing.count,
        "graph": one.reason is None, "copies": one.copies,
        "gb_per_s": size / us / 1e3, "tflop_per_s": flops / us / 1e6, "floor_us": floor, "share_of_floor": floor / us,
    }  # fmt: skip
    return row if one.reason is None else {**row, "reason": one.reason}


def release(device: str) -> None:
    """Gives back the memory of what nobody holds any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def require_alive(after: str) -> None:
    """Raises DeviceLost where an error of the device stays."""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise DeviceLost(f"the device does not answer any more after {after}: {_said(error)}") from None


def _first(error: BaseException) -> BaseException:
    """Where an error broke a capture, and the end of the capture raised another."""
    return error if error.__context__ is None else _first(error.__context__)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]
