"""``make bench``: tiny and base models on easy-vqa, what their losses cost, and a plot; under three minutes on two cores.

    python benchmarks/run_all.py --out bench-out

writes bench-tiny.json and bench-base.json (as ``vlp-fast bench --json``), profile-blip.json and its like (as ``vlp-fast profile
--json``) and bench.png. Where time runs short, what is left is listed and not measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Read when torch loads OpenMP. Waiting threads that spin cost a busy machine a factor of ten; the stamp of every report tells.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from rich.console import Console

from vlp_fast.bench import Benchmark, Settings, prepare_process
from vlp_fast.cli._output import output_console
from vlp_fast.cli.bench import print_benchmark, run_with_progress, warn_if_busy
from vlp_fast.cli.profile import profile_table
from vlp_fast.profiling import profile_model
from vlp_fast.training import MODELS

# seconds: of one task; at least 3 calls are measured, and fewer only where the model's part of the budget is over
PLANS: dict[str, dict[str, Any]] = {
    "tiny": {"batch": 8, "steps": 50, "seconds": 2.0, "warmup": 3},
    "base": {"batch": 4, "steps": 5, "seconds": 6.0, "warmup": 1},
}
BUDGET = 150.0  # seconds after which nothing new is begun
PROFILE_SIZE, PROFILE_BATCH = "base", 8


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the models on this machine.")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder to write to (default: bench-out)")
    parser.add_argument("--dtype", default="fp32", help="fp32 or bf16 (default: fp32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    arguments = parser.parse_args()
    for module, extra in (("easy_vqa", "demo"), ("matplotlib", "report")):
        if importlib.util.find_spec(module) is None:
            print(f"make bench needs {module.replace('_', '-')}: pip install 'vlp_fast[{extra}]'.", file=sys.stderr)
            return 1
    try:
        prepare_process()
        settings = {"dtype": arguments.dtype, "device": arguments.device}
        arguments.out.mkdir(parents=True, exist_ok=True)
        return _run(arguments.out, settings, output_console())
    except (ValueError, RuntimeError, OSError) as error:
        print(f"make bench: {error}", file=sys.stderr)
        return 1


def _run(out: Path, settings: dict[str, Any], console: Console) -> int:
    started = time.monotonic()
    profiles = [_profile(model, out, console) for model in MODELS]
    reports = []
    for size, plan in PLANS.items():
        benchmark = Benchmark(Settings(sizes=(size,), **plan, **settings))
        if not reports:
            warn_if_busy(benchmark)
        if not run_with_progress(benchmark, until=started + BUDGET):
            return 130
        reports.append(benchmark.report())
        print_benchmark(reports[-1], benchmark.rows, console)
        (out / f"bench-{size}.json").write_text(json.dumps(reports[-1], indent=1) + "\n", encoding="utf-8")
    from vlp_fast.cli.plots import plot_report, save

    save(plot_report(reports, profiles), out / "bench.png")
    files = ", ".join(sorted(path.name for path in out.iterdir()))
    console.print(f"{time.monotonic() - started:.0f} seconds. In {out}: {files}")
    return 0


def _profile(model: str, out: Path, console: Console) -> dict[str, Any]:
    """Counts a step's passes, forward and backward, on the meta device."""
    profile = profile_model(model, PROFILE_SIZE, schedule="published", batch=PROFILE_BATCH, device="meta", backward=True)
    console.print(profile_table(profile))
    report = profile.to_json()
    (out / f"profile-{model}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    sys.exit(main())
