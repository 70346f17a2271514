"""Every kernel against float64 at the shapes of BLIP, CoCa and BEiT-3, on the GPU at hand; one command, no network.

    python benchmarks/gpu_check.py [--only attention,multiway] [--seconds 420] [--out benchmarks/results]
    TRITON_INTERPRET=1 python benchmarks/gpu_check.py --tiny --device cpu --out somewhere    the same code at tiny sizes, without a GPU

A case (gpu_cases.py) passes where every output and gradient is as accurate as plain torch at the same dtype (the rule of
`vlp_fast.testing`), inputs lie between NaN and what the allocator returns is NaN, and repeated calls give the same bits. It writes one
JSON report, which `vlp-fast evidence` reads: device, versions, commit, each family's source hash, each case's result. Exit 1 where a
case failed. It times nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_cases import DTYPES, Case, Maker, Problem, cases
from rich.table import Table
from torch import Tensor

from vlp_fast.cli._output import output_console
from vlp_fast.environment import stamp
from vlp_fast.evidence import SCHEMA, source_hash
from vlp_fast.ops import backend_status
from vlp_fast.testing import assert_as_accurate_as, outputs_and_gradients

REPEATS = 50


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


def main() -> int:
    parser = argparse.ArgumentParser(description="Check every kernel against float64 on the GPU at hand.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a few rows of everything, for the interpreter")
    parser.add_argument("--only", metavar="FAMILY,...", help="these families only")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"calls that must give the same bits (default: {REPEATS})")
    parser.add_argument("--seconds", type=float, default=420.0, help="begin no case after so long (default: 420)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the report")
    arguments = parser.parse_args()
    status = backend_status("triton", arguments.device)
    if not status.available or (arguments.device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"the kernels cannot run here: {status.reason if not status.available else 'torch finds no CUDA device'}.")
    chosen = list(cases())
    if arguments.only:
        unknown = set(arguments.only.split(",")) - {case.family for case in chosen}
        if unknown:
            parser.error(f"--only must name families of {sorted({c.family for c in chosen})}; received {sorted(unknown)}.")
        chosen = [case for case in chosen if case.family in arguments.only.split(",")]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    deadline, rows = time.monotonic() + arguments.seconds, []
    for case in chosen:
        for dtype in case.tiny_dtypes if arguments.tiny else case.dtypes:
            if time.monotonic() > deadline:
                row = {"family": case.family, "case": case.name, "dtype": dtype, "status": "not run", "reason": "out of time"}
            else:
                row = run(case, dtype, arguments)
            rows.append(row)
            print(f"{row['status']:8} {row['family']:22} {row['dtype']:5} {row['case']} {row.get('reason', '')}", flush=True)
    about = stamp(arguments.device)
    families = families_of(rows)
    report = {
        "schema": SCHEMA,
        "kind": "gpu_check",
        "tiny": arguments.tiny,
        "stamp": about,
        "families": families,
        "cases": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in f"{about['device_name']} {about['date']}").lower()
    path = arguments.out / f"gpu-check-{name}.json"
    path.write_text(json.dumps({**report, "timings": []}, indent=1) + "\n", encoding="utf-8")
    table = Table(title=f"{about['device_name']}, torch {about['torch']}", title_justify="left")
    for column in ("kernels", "result", "passed", "failed", "not run"):
        table.add_column(column)
    for family, found in families.items():
        table.add_row(family, found["status"], *(str(found[key]) for key in ("passed", "failed", "not_run")))
    output_console().print(table)
    print(f"written to {path}")
    return 1 if any(row["status"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
