"""How long calls take and how much memory they need. Measures; prints nothing."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

__all__ = ["MIN_STEPS", "PeakMemory", "Timing", "measure", "peak_memory", "prepare_process"]

MIN_STEPS = 3  # calls measured however long they take
MB = 2**20


def prepare_process(threads: int | None = None) -> None:
    """Makes timings of this process comparable; call it before any other work with torch.

    Flushes denormals: random weights make gradients below 1e-38 on which CPUs are ten times slower, which says nothing about
    trained ones. Worker threads inherit the mode when they start. `threads`: of torch; default: torch's choice.
    """
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1; received {threads}.")
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of `count` calls."""

    median: float
    q1: float
    q3: float
    minimum: float
    maximum: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Statistics of measured seconds; quartiles are interpolated."""
        minimum, q1, median, q3, maximum = (np.percentile(seconds, [0, 25, 50, 75, 100]) * 1e3).tolist()
        return cls(median, q1, q3, minimum, maximum, len(seconds))


def measure(
    calls: Mapping[str, Callable[[], object]],
    *,
    steps: int = 10,
    seconds: float | None = None,
    until: float | None = None,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    tick: Callable[[str], None] | None = None,
) -> dict[str, Timing]:
    """Times calls in turns, so that whatever slows the machine for a while slows all of them.

    Args:
        calls: name -> what to time; a call's own work should be the same every time.
        steps: rounds measured, at most. seconds: begin no further round once this much time has passed, but measure 3 at least.
        until: value of `time.monotonic` from which no further round is begun, but measure one.
        warmup: rounds before that. device: waited for before and after every call. tick: told the progress of each round.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else _nothing
    for _ in range(warmup):
        for call in calls.values():
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for step in range(steps):
        if seconds is not None and step >= MIN_STEPS and time.perf_counter() - begin >= seconds:
            break
        if until is not None and step >= 1 and time.monotonic() >= until:
            break
        if tick is not None:
            tick(f"{step + 1}/{steps}")
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            samples[name].append(time.perf_counter() - start)
    return {name: Timing.of(values) for name, values in samples.items()}


def _nothing() -> None:
    pass


class PeakMemory(NamedTuple):
    """Memory of a call in MB of 2**20 bytes; None where the system does not tell.

    Attributes:
        peak: CUDA: most memory that tensors took, weights included. CPU: most resident memory of the process, interpreter and weights
            included. held: the same before the call: what stays between calls. own: whether the peak is this call's own; False
            where the system cannot reset that number, and it is the peak since the process began.
    """

    peak: float | None
    held: float | None
    own: bool


def peak_memory(call: Callable[[], object], device: torch.device | str = "cpu") -> PeakMemory:
    """Runs `call` once, and says what memory it took."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / MB
        call()
        torch.cuda.synchronize()
        return PeakMemory(torch.cuda.max_memory_allocated() / MB, before, True)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # give back what earlier calls have freed; glibc only
    own = True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except OSError:
        own = False
    held = _resident("VmRSS")
    call()
    peak = _resident("VmHWM")
    return PeakMemory(_process_peak(), held, False) if peak is None else PeakMemory(peak, held, own)


def _resident(name: str) -> float | None:
    """VmRSS, memory of the process that is resident now, or VmHWM, the most since that number was reset, in MB; None where not Linux."""
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) / 1024


def _process_peak() -> float | None:
    try:
        import resource
    except ImportError:  # no Unix
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MB if platform.system() == "Darwin" else peak / 1024
