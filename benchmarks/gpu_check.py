"""Every kernel against float64 and against the clock, at the shapes of BLIP, CoCa and BEiT-3; one command, no network.

    python benchmarks/gpu_check.py [--only attention,multiway] [--seconds 450] [--out benchmarks/results] [--check-only]
    python benchmarks/gpu_check.py --tune --only attention    candidate launch numbers beside the committed ones; changes no file
    TRITON_INTERPRET=1 python benchmarks/gpu_check.py --tiny --device cpu --out somewhere    the same code at tiny sizes, without a GPU

A case (gpu_cases.py, gpu_cases_losses.py) passes where every output and gradient is as accurate as plain torch at the same dtype (the
rule of `vlp_fast.testing`), inputs lie between NaN and what the allocator returns is NaN, and repeated calls give the same bits. Then
families without a failed case are timed beside every rival that is there (gpu_timing.py, gpu_timing_cases.py): no speed claim on a red
gate. It writes one JSON report, which `vlp-fast evidence` reads: device, versions, commit, each family's source hash, each case's
result; "timings" of ours and rivals, "bounds" of what is no rival, "not_timed" with reasons, "ceilings" measured for the floors. Exit
1 where a case failed, or a kernel of ours failed or was wrong while it was timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from vlp_fast.benchmarks.gpu_cases import DTYPES, Case, Maker, Problem, cases
from vlp_fast.benchmarks.gpu_cases_losses import loss_cases
from vlp_fast.benchmarks.gpu_providers import TimedCase
from vlp_fast.benchmarks.gpu_timing import DeviceLost, Timings, measure_ceilings, time_case
from vlp_fast.benchmarks.gpu_timing_cases import timed_cases
from vlp_fast.benchmarks.gpu_timing_cases_losses import timed_loss_cases
from vlp_fast.benchmarks.gpu_tuning import tune_case
from vlp_fast.cli._output import output_console
from vlp_fast.environment import stamp
from vlp_fast.evidence import SCHEMA, source_hash
from vlp_fast.ops import backend_status
from vlp_fast.testing import assert_as_accurate_as, outputs_and_gradients

REPEATS = 50
SECONDS = 450.0
CHECK_SHARE = 0.6  # of the time, at most, for correctness where something is timed too


def check(problem: Problem, repeats: int) -> None:
    """Raises AssertionError where a result is not as accurate as plain torch, or differs from one call to the next."""
    with torch.no_grad():
        shapes = _listed(problem.ours(*problem.inputs))
    if problem.exact:
        for actual, expected in zip(shapes, _listed(problem.reference(*problem.inputs)), strict=True):
            assert torch.equal(actual, expected), "the whole numbers differ from the specification's"
        return
    generator = torch.Generator(shapes[0].device).manual_seed(1)
    douts = [torch.randn(t.shape, generator=generator, device=t.device, dtype=torch.float32).to(t.dtype) for t in shapes]
    count, inputs = len(shapes), problem.inputs
    tail = problem.tail or (None,) * (2 * len(inputs) + count)
    actual = outputs_and_gradients(problem.ours, inputs, douts)
    compared = tail[len(inputs) :]
    cut = [_last(t, n) for t, n in zip(inputs, tail, strict=False)]
    cut_douts = [_last(t, n) for t, n in zip(douts, compared, strict=False)]
    low = _reference(problem, cut, cut_douts)
    exact = _reference(problem, [t.double() for t in cut], cut_douts)
    scale = max(
        (e.abs().max().item() for e, n in zip(exact[count:], compared[count:], strict=True) if e.numel() and n != 0),
        default=0.0,
    )
    for i, (name, n) in enumerate(zip(problem.names, compared, strict=True)):
        if n != 0:
            wide = None if i < count else scale
            assert_as_accurate_as(_last(actual[i], n), low[i], exact[i], factor=problem.factor, scale=wide, what=name)
    for _ in range(repeats - 1):
        again = outputs_and_gradients(problem.ours, inputs, douts)
        for name, first, second in zip(problem.names, actual, again, strict=True):
            assert torch.equal(first, second), f"{name} differs between two calls on the same inputs"


def _reference(problem: Problem, inputs: Sequence[Tensor], douts: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        dtypes = [t.dtype for t in _listed(problem.reference(*inputs))]
    return outputs_and_gradients(problem.reference, inputs, [d.to(dtype) for d, dtype in zip(douts, dtypes, strict=True)])


def _listed(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _last(x: Tensor, rows: int | None) -> Tensor:
    return x if rows is None else x[len(x) - rows :] if rows else x


def run(case: Case, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The result of one case in one dtype."""
    row = {"family": case.family, "case": case.name, "dtype": dtype}
    if arguments.device == "cuda" and torch.cuda.get_device_properties(0).total_memory < case.gigabytes * 1e9:
        return {**row, "status": "not run", "reason": f"needs {case.gigabytes} GB of device memory"}
    generator = torch.Generator(arguments.device).manual_seed(0)
    begin = time.monotonic()
    try:
        repeats = arguments.repeats if case.gigabytes <= 8 else 2
        check(case.build(Maker(arguments.device, DTYPES[dtype], arguments.tiny, generator)), repeats)
        row = {**row, "status": "passed"}
    except Exception as error:  # a kernel that does not compile or crashes is a result too
        row = {**row, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:600]}
    gc.collect()
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    return {**row, "seconds": round(time.monotonic() - begin, 2)}


def families_of(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per family its source hash, counts, and "passed", "failed" or "incomplete"."""
    found: dict[str, dict[str, Any]] = {}
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row["status"] for row in rows if row["family"] == family]
        passed, failed, not_run = (own.count(status) for status in ("passed", "failed", "not run"))
        status = "failed" if failed else "incomplete" if not_run else "passed"
        counts = {"passed": passed, "failed": failed, "not_run": not_run}
        found[family] = {"source": source_hash(family), "status": status, **counts}
    return found


def check_all(chosen: Sequence[Case], arguments: argparse.Namespace, deadline: float) -> list[dict[str, Any]]:
    """The results of all cases; those not begun by the deadline (of `time.monotonic`) are "not run"."""
    rows = []
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for case in chosen:
            for dtype in case.tiny_dtypes if arguments.tiny else case.dtypes:
                if time.monotonic() > deadline:
                    row = {"family": case.family, "case": case.name, "dtype": dtype}
                    row |= {"status": "not run", "reason": "out of time"}
                else:
                    row = run(case, dtype, arguments)
                rows.append(row)
                what = f"{row['status']:8} {row['family']:22} {row['dtype']:5} {row['case']}"
                print(f"{what} {row.get('reason', '')}".rstrip(), flush=True)
    finally:  # deterministic algorithms would slow what is timed
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
    return rows


@dataclass
class Clocked:
    """Times or tunes the cases of families without a failed case, and keeps the report's rows of it."""

    families: dict[str, dict[str, Any]]
    arguments: argparse.Namespace
    deadline: float

    def __post_init__(self) -> None:
        self.timings, self.tuning, self.ceilings = Timings(), [], {}

    def report(self) -> dict[str, Any]:
        timings = {"timings": self.timings.timed, "bounds": self.timings.bounds, "not_timed": self.timings.not_timed}
        return {"ceilings": self.ceilings, **timings, **({"tuning": self.tuning} if self.arguments.tune else {})}

    def run(self, chosen: Sequence[TimedCase], save: Callable[[], None]) -> None:
        """All cases, the first of every family first; `save` is called after each."""
        gc.collect()
        gc.freeze()  # or every release of memory looks through all of torch
        lost = None
        for changes in (1, 2) if self.arguments.tune else (0,):
            for case, dtype in _in_rounds(chosen, self.arguments.tiny):
                where = {"family": case.family, "case": case.name, "dtype": dtype}
                failed = self.families.get(case.family, {}).get("failed", 0)
                gate = f"no speed claim on a red gate: {failed} correctness cases failed" if failed else None
                reason = gate or lost or ("out of time" if time.monotonic() > self.deadline else None)
                if reason is None:
                    lost = self._one(case, dtype, where, changes)
                elif changes < 2:
                    self.timings.leave_out_case(where, reason)
                save()
        gc.unfreeze()

    def _one(self, case: TimedCase, dtype: str, where: dict[str, str], changes: int) -> str | None:
        """Times or tunes a case and prints what came of it; why nothing more can be timed, or None."""
        device, tiny = self.arguments.device, self.arguments.tiny
        try:
            self.ceilings = self.ceilings or measure_ceilings(device)
            if changes:
                self.tuning += tune_case(case, dtype, device, tiny, changes, self.deadline, self.timings)
            else:
                time_case(case, dtype, device, tiny, self.ceilings, self.deadline, self.timings)
        except DeviceLost as error:
            self.timings.leave_out_case(where, str(error))
            return str(error)
        except Exception as error:  # whatever it is, the other cases are still worth their time
            self.timings.leave_out(where, "triton", "failed", f"{type(error).__name__}: {error}"[:300], ours=True)
        for line in _lines(_of(self.timings.timed, where)) + _tuned_lines(_of(self.tuning, where)):
            print(line, flush=True)
        return None


def _of(rows: Sequence[dict[str, Any]], where: dict[str, str]) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[name] == value for name, value in where.items())]


def _in_rounds(chosen: Sequence[TimedCase], tiny: bool) -> Iterator[tuple[TimedCase, str]]:
    """The first case of every family, then the second: where time runs out, no family is left without one."""
    families: dict[str, list[tuple[TimedCase, str]]] = {}
    for case in chosen:
        families.setdefault(case.family, []).extend((case, dtype) for dtype in (("fp32",) if tiny else case.dtypes))
    for turn in zip_longest(*families.values()):
        yield from (pair for pair in turn if pair is not None)


def _lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each direction our time, its share of the floor, and the fastest rival."""
    lines = []
    for row in rows:
        if row["ours"]:
            rivals = [r for r in rows if not r["ours"] and r["direction"] == row["direction"]]
            best = min(rivals, key=lambda r: r["us_median"], default=None)
            beside = f"x{best['us_median'] / row['us_median']:.2f} against {best['provider']}" if best else "no rival here"
            lines.append(
                f"timed    {row['family']:22} {row['dtype']:5} {row['case']}, {row['direction']}: {row['us_median']:.1f} us, "
                f"floor {row['floor_us']:.1f} us ({row['share_of_floor']:.0%}), {beside}"
            )
    return lines


def _tuned_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each launch of a case the best candidate beside the committed one."""
    best: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(str(row[name]) for name in ("case", "dtype", "lookup", "kind"))
        if row["status"] == "timed" and (key not in best or row["ratio"] > best[key]["ratio"]):
            best[key] = row
    return [
        f"tuned    {row['family']:22} {row['dtype']:5} {row['case']}, {row['direction']}: {row['lookup']} {row['kind'] or ''} committed "
        f"{row['committed']} {row['committed_us_median']:.1f} us; best other {row['candidate']} {row['us_median']:.1f} us, "
        f"x{row['ratio']:.2f}"
        for row in best.values()
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check every kernel against float64 on the GPU at hand, and time it.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a few rows of everything, for the interpreter")
    parser.add_argument("--only", metavar="FAMILY,...", help="these families only")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"calls that must give the same bits (default: {REPEATS})")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"begin no case after so long (default: {SECONDS:.0f})")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the report")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check-only", action="store_true", help="time nothing")
    what.add_argument("--tune", action="store_true", help="time candidate launch numbers in place of rivals")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu needs --tiny: in the interpreter the sizes of models take hours.")
    status = backend_status("triton", arguments.device)
    if not status.available or (arguments.device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"the kernels cannot run here: {status.reason if not status.available else 'torch finds no CUDA device'}.")
    known = {case.family for case in chain(cases(), loss_cases())}
    arguments.only = set(arguments.only.split(",")) if arguments.only else known
    if arguments.only - known:
        parser.error(f"--only must name families of {sorted(known)}; received {sorted(arguments.only - known)}.")
    return arguments


def main() -> int:
    arguments = _options()
    begin = time.monotonic()
    share = 1.0 if arguments.check_only else CHECK_SHARE
    chosen = [case for case in chain(cases(), loss_cases()) if case.family in arguments.only]
    rows = check_all(chosen, arguments, begin + share * arguments.seconds)
    families, about = families_of(rows), stamp(arguments.device)
    clocked = Clocked(families, arguments, begin + arguments.seconds)
    # a run that tunes has no timings of rivals, and says nothing that evidence should read
    kind = "gpu_tune" if arguments.tune else "gpu_check"
    report = {"schema": SCHEMA, "kind": kind, "tiny": arguments.tiny, "stamp": about, "families": families, "cases": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in f"{kind} {about['device_name']} {about['date']}").lower()
    path = arguments.out / f"{name}.json"

    def save() -> None:
        path.write_text(json.dumps({**report, **clocked.report()}, indent=1) + "\n", encoding="utf-8")

    save()
    if not arguments.check_only:
        timed = [case for case in chain(timed_cases(), timed_loss_cases()) if case.family in arguments.only]
        clocked.run(timed, save)
    _print(about, families, clocked.timings)
    print(f"written to {path}")
    ours = [row for row in clocked.timings.not_timed if row["ours"] and row["status"] in ("wrong", "failed")]
    return 1 if ours or any(row["status"] == "failed" for row in rows) else 0


def _print(about: dict[str, Any], families: dict[str, dict[str, Any]], timings: Timings) -> None:
    table = Table(title=f"{about['device_name']}, torch {about['torch']}", title_justify="left")
    for column in ("kernels", "result", "passed", "failed", "not run", "cases timed"):
        table.add_column(column)
    for family, found in families.items():
        count = len({(row["case"], row["dtype"]) for row in timings.timed if row["family"] == family and row["ours"]})
        table.add_row(family, found["status"], *(str(found[key]) for key in ("passed", "failed", "not_run")), str(count))
    output_console().print(table)
    for row in timings.not_timed:
        if row["ours"] or row["provider"] == "all":
            print(f"not timed: {row['family']}, {row['case']}, {row['dtype']}: {row['status']}, {row['reason']}")
    rivals = [row for row in timings.not_timed if not row["ours"] and row["provider"] != "all"]
    for provider, status, reason in dict.fromkeys((row["provider"], row["status"], row["reason"]) for row in rivals):
        print(f"rival {status}: {provider}: {reason}")


if __name__ == "__main__":
    sys.exit(main())
