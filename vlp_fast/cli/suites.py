"""``vlp-fast bench --suite``: the suites of benchmarks/ as tables and reports."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlp_fast.cli._output import fail, output_console

__all__ = ["print_report", "run_suites"]


def run_suites(
    suites: list[str], options: dict[str, Any], json_file: Path | None, png_file: Path | None, compare: Path | None
) -> None:
    """Runs each suite, prints its tables and writes its report; exit code 1 where a provider is wrong or nothing ran.

    Of several suites, the name of each is put before the ending of the files. Raises: ValueError, OSError for options that do not fit.
    """
    from vlp_fast.benchmarks.registry import SUITES, Options
    from vlp_fast.benchmarks.runner import moved, run_suite

    suites = list(dict.fromkeys(suites))
    unknown = [name for name in suites if name not in SUITES]
    if unknown:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}; received {', '.join(unknown)}.")
    if png_file is not None and suites != ["scaling"]:
        raise ValueError(f"--png is for the suite scaling alone; received {', '.join(suites)}.")
    if png_file is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a plot needs matplotlib, which is not installed (pip install 'vlp_fast[report]').")
    for path in (json_file, png_file):
        if path is not None and not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} in.")
    old = None if compare is None else json.loads(compare.read_text(encoding="utf-8"))
    chosen = Options(**options)
    console, bad = output_console(), False
    for suite in suites:
        with _status() as progress:
            report = run_suite(suite, chosen, progress)
        print_report(report, console)
        bad |= bool(report["wrong"]) or not report["rows"]
        if json_file is not None:
            path = json_file if len(suites) == 1 else json_file.with_name(f"{json_file.stem}-{suite}{json_file.suffix}")
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if png_file is not None:
            from vlp_fast.benchmarks.scaling_plot import plot_scaling
            from vlp_fast.cli.plots import save

            save(plot_scaling(report), png_file)
        if old is not None:
            _print_moved(moved(report, old), console)
    if bad:
        fail("bench", "a provider is wrong, or nothing ran; see above.")


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """What is being done, on stderr where that is a terminal."""
    console = Console(file=sys.stderr)
    with console.status("starting") as status:
        yield (lambda text: status.update(text)) if console.is_terminal else (lambda text: None)


def print_report(report: dict[str, Any], console: Console) -> None:
    """The rows as a table, then who was wrong and what was absent, with the reason."""
    stamp, limits = report["stamp"], report["ceilings"]
    about = [stamp["device_name"], f"{stamp['threads']} threads", f"torch {stamp['torch']}", stamp["dtype"]]
    about += [f"size {stamp['size']}"] if stamp["size"] else []
    console.print(
        f"{', '.join(about)}, batch {stamp['batch']}; this machine's products reach {limits['gflops_per_second']:,.0f} GFLOP/s, its "
        f"copies {limits['copy_gb_per_second']:.0f} GB/s; medians and quartiles of n calls"
    )
    rows = report["rows"]
    shown = {name: any(row[name] is not None for row in rows) for name in ("per_second", "copy_share", "peak_mb")}
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("provider")
    columns = ["median ms", "quartiles", "n", "speed", "GFLOPs", "of peak"]
    columns += [
        name
        for name, key in (
            ("of copy", "copy_share"),
            ("per s", "per_second"),
            ("MB", "peak_mb"),
            ("memory", "peak_mb"),
            ("rise", "peak_mb"),
        )
        if shown[key]
    ]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        if previous != row["case"]:
            table.add_section()
            rate = f" ({row['unit']})" if row["unit"] else ""
            table.add_row(Text(f"{row['case']}{rate}", style="bold"))
        cells = [_short(row["ms_median"]), f"{_short(row['ms_q1'])}-{_short(row['ms_q3'])}", str(row["steps"])]
        cells += [_ratio(row["speedup"]), _short(row["gflops"] or None), _percent(row["ceiling_share"] or None)]
        cells += [_percent(row["copy_share"])] if shown["copy_share"] else []
        cells += ["-" if row["per_second"] is None else _short(row["per_second"])] if shown["per_second"] else []
        if shown["peak_mb"]:
            cells += [
                "-" if row["peak_mb"] is None else f"{row['peak_mb']:,.0f}",
                _ratio(row["memory_ratio"]),
                _ratio(row["rise_ratio"]),
            ]
        table.add_row(f"  {row['provider']}", *cells)
        previous = row["case"]
    console.print(table)
    for line in report["wrong"]:
        console.print(f"wrong, and not timed: {line['provider']} at {line['case']}: {line['reason']}", style="bold")
    for reason, names in _by_reason(report["absent"]).items():
        console.print(f"not here: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}")
    for note in dict.fromkeys(line["note"] for line in report["notes"]):
        console.print(note)
    for line in report.get("fits", []):
        console.print(f"{line['model']}, {line['provider']}, {line['words']}")


def _by_reason(absent: list[dict[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in absent:
        name = line["case"] if line["provider"] is None else f"{line['provider']} at {line['case']}"
        found.setdefault(line["reason"], []).append(name)
    return found


def _print_moved(found: list[dict[str, Any]], console: Console) -> None:
    """Rows whose quartiles no longer overlap."""
    if not found:
        console.print("nothing moved beyond the spread")
    for row in found:
        word = "faster" if row["ratio"] > 1.0 else "slower"
        ratio = max(row["ratio"], 1.0 / row["ratio"])
        console.print(
            f"{row['case']}, {row['provider']}: {ratio:.2f} times {word}, {_short(row['before'])} -> {_short(row['after'])} ms"
        )


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"x{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"
