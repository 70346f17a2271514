"""The runner of all suites: right before fast, then in turns, then what it cost. Returns a report; prints nothing.

Of each case, every provider is checked, and one that is wrong is named and not timed. Those that are right are called in turns (A B A B)
after a call that counts their FLOPs and one that warms up. A row has the median with its quartiles, the FLOPs of a call, their rate as a
share of the rate of this machine's own dense products, the least traffic as a share of its own copies, and peak memory where asked for.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vlp_fast.benchmarks.registry import DTYPES, OURS, SUITES, Case, NotHere, Options, cases_of, module_of
from vlp_fast.environment import stamp
from vlp_fast.measuring import measure, peak_memory, prepare_process
from vlp_fast.ops import linear
from vlp_fast.ops._products import widens

__all__ = ["SCHEMA", "ceilings", "count_flops", "moved", "run_suite"]

SCHEMA = 2  # of a report
STEPS = 1000  # rounds at most; time ends a measurement before
Progress = Callable[[str], None]


def run_suite(
    suite: str, options: Options, progress: Progress = lambda text: None, until: float | None = None
) -> dict[str, Any]:
    """Runs the cases of a suite.

    Args:
        suite: one of `SUITES`. progress: told what is being done. until: value of `time.monotonic` after which no further round begins.

    Returns: the report, of plain values:
        {schema, suite, stamp, ceilings: {gflops_per_second, copy_gb_per_second},
         rows: [{case, provider, ours, speedup, ms_median, ms_q1, ms_q3, ms_min, ms_max, steps, gflops, gflops_per_second, ceiling_share,
                 gb_per_second, copy_share, per_second, unit, peak_mb, memory_ratio, rise_mb, rise_ratio, and the case's facts}],
         wrong: [{case, provider, reason}], absent: [{case, provider, reason}], notes: [{case, note}]}
        Numbers that are not known are None. A suite's own `finish(report) -> dict` adds to it.
    Raises: ValueError for options that no case fits.
    """
    options = SUITES[suite].settled(options)
    entries = list(cases_of(suite, options))
    progress("ceilings of this machine")
    limits = ceilings(options.device, options.dtype)
    report: dict[str, Any] = {"schema": SCHEMA, "suite": suite, "stamp": _stamp(suite, options), "ceilings": limits}
    report |= {"rows": [], "wrong": [], "absent": [], "notes": []}
    for number, entry in enumerate(entries, 1):
        where = f"{number}/{len(entries)} {entry.name}"
        progress(where)
        try:
            case = entry.build()
        except (NotHere, ImportError) as error:
            report["absent"].append({"case": entry.name, "provider": None, "reason": str(error)})
            continue
        _run_case(
            suite, entry.name, case, options, limits, report, lambda text, where=where: progress(f"{where}: {text}"), until
        )
        del case
        gc.collect()
    finish = getattr(module_of(suite), "finish", None)
    return report if finish is None else report | finish(report)


def _stamp(suite: str, options: Options) -> dict[str, Any]:
    shown = {name: value for name, value in options.to_json().items() if name not in ("device", "only", "blip_source")}
    return stamp(options.device, suite=suite, **shown)


def _run_case(
    suite: str,
    name: str,
    case: Case,
    options: Options,
    limits: Mapping[str, float],
    report: dict[str, Any],
    progress: Progress,
    until: float | None,
) -> None:
    progress("checks")
    wrong = case.wrong()
    report["wrong"] += [{"case": name, "provider": provider, "reason": reason} for provider, reason in wrong.items()]
    report["absent"] += [{"case": name, "provider": provider, "reason": reason} for provider, reason in case.absent.items()]
    report["notes"] += [{"case": name, "note": case.note}] if case.note else []
    calls = {provider: call for provider, call in case.calls.items() if provider not in wrong}
    if not calls:
        return
    first = case.first(calls)
    flops = {}
    for provider, call in calls.items():
        progress(f"{provider} counts")
        flops[provider] = count_flops(call)
    until = 0.0 if SUITES[suite].memory else until  # where memory is what is asked for, one round
    timings = measure(
        calls, steps=STEPS, seconds=options.seconds, until=until, warmup=1, device=options.device,
        tick=lambda text: progress(f"round {text.partition('/')[0]}"),
    )  # fmt: skip
    memory: dict[str, _Memory] = dict.fromkeys(timings, _Memory(None, None))
    if options.memory:
        calls.clear()
        case.calls.clear()
        for provider in timings:
            progress(f"memory of {provider}")
            memory[provider], reason = _memory_apart(suite, name, provider, options)
            report["notes"] += [{"case": name, "note": f"memory of {provider}: {reason}"}] if reason else []
    for provider, timing in timings.items():
        rate = flops[provider] / timing.median / 1e6
        traffic = None if case.least_bytes is None else case.least_bytes / timing.median / 1e6
        report["rows"].append(
            {
                "case": name,
                "provider": provider,
                "ours": provider.startswith(OURS),
                "speedup": None if first is None else timings[first].median / timing.median,
                "ms_median": timing.median,
                "ms_q1": timing.q1,
                "ms_q3": timing.q3,
                "ms_min": timing.minimum,
                "ms_max": timing.maximum,
                "steps": timing.count,
                "gflops": flops[provider] / 1e9,
                "gflops_per_second": rate,
                "ceiling_share": rate / limits["gflops_per_second"],
                "gb_per_second": traffic,
                "copy_share": None if traffic is None else traffic / limits["copy_gb_per_second"],
                "per_second": None if case.work is None else case.work / timing.median * 1e3,
                "unit": case.unit or None,
                "peak_mb": memory[provider].peak_mb,
                "memory_ratio": _ratio(memory[provider].peak_mb, memory[first].peak_mb if first else None),
                "rise_mb": memory[provider].rise_mb,
                "rise_ratio": _ratio(memory[provider].rise_mb, memory[first].rise_mb if first else None),
                **case.facts,
            }
        )


def _ratio(value: float | None, first: float | None) -> float | None:
    return None if value is None or first is None else value / first


def count_flops(call: Callable[[], object]) -> int:
    """FLOPs of one call, 2 for a multiply-add; of the products and attention that it calls, on whatever device."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused layers that the counter does not know; same work
    try:
        with FlopCounterMode(display=False) as counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def ceilings(device: str, dtype: str) -> dict[str, float]:
    """What this machine reaches by itself: the rate of a dense product, by the faster library, and of a copy (read plus written)."""
    side, numbers = (8192, 2**28) if device == "cuda" else (2048, 2**26)
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    with torch.no_grad():
        calls: dict[str, Callable[[], object]] = {"linear": lambda: linear(a, b), "copy": lambda: target.copy_(source)}
        if not widens(a):  # there PyTorch's product would take minutes
            calls["mm"] = lambda: torch.mm(a, b)
        found = measure(calls, steps=20, seconds=2.0, warmup=2, device=device)
    fastest = min(found[name].minimum for name in calls if name != "copy")
    copied = 2 * source.numel() * source.element_size()
    return {"gflops_per_second": 2 * side**3 / fastest / 1e6, "copy_gb_per_second": copied / found["copy"].minimum / 1e6}


def tensor_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors' elements."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


# ------------------------------------------------------------------------------------------------------------------- memory


class _Memory(NamedTuple):
    """In MB. peak_mb: the most during a call. rise_mb: of that, what was not there before it."""

    peak_mb: float | None
    rise_mb: float | None


def _memory_apart(suite: str, case: str, provider: str, options: Options) -> tuple[_Memory, str]:
    """Memory of a provider's second call in a process with nothing else; None where that process failed, and why."""
    given = json.dumps({"options": options.to_json(), "threads": torch.get_num_threads()})
    command = [sys.executable, "-m", "vlp_fast.benchmarks.runner", suite, case, provider, given]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return _Memory(None, None), (done.stderr.strip() or f"its process ended with {done.returncode}").splitlines()[-1]
    return _Memory(*json.loads(done.stdout.splitlines()[-1])), ""


def _memory(suite: str, name: str, provider: str, given: str) -> _Memory:
    values = json.loads(given)
    prepare_process(values["threads"])
    options = Options.from_json(values["options"])
    (entry,) = (e for e in cases_of(suite, options) if e.name == name)
    case = entry.build()
    call = case.calls[provider]
    if case.release is not None:
        case.calls.clear()
        case.release(provider)
    gc.collect()
    call()
    peak, held, _ = peak_memory(call, options.device)
    return _Memory(peak, None if peak is None or held is None else peak - held)


# ------------------------------------------------------------------------------------------------------------------ compare


def moved(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of both reports whose quartiles do not overlap: {case, provider, before, after, ratio}, ratio above 1 for faster.

    Raises: ValueError where `old` is no report of the same suite, device and dtype.
    """
    for key in ("suite", "device_name", "dtype", "size", "batch"):
        here, there = ({**r.get("stamp", {}), "suite": r.get("suite")}.get(key) for r in (new, old))
        if here != there:
            raise ValueError(f"the reports differ in {key}: {here} now, {there} before; nothing can be compared.")
    before = {(row["case"], row["provider"]): row for row in old["rows"]}
    found = []
    for row in new["rows"]:
        past = before.get((row["case"], row["provider"]))
        if past is not None and (row["ms_q1"] > past["ms_q3"] or row["ms_q3"] < past["ms_q1"]):
            found.append(
                {
                    "case": row["case"],
                    "provider": row["provider"],
                    "before": past["ms_median"],
                    "after": row["ms_median"],
                    "ratio": past["ms_median"] / row["ms_median"],
                }
            )
    return found


if __name__ == "__main__":
    print(json.dumps(_memory(*sys.argv[1:])))
