"""``vlp-fast evidence``: which kernels were verified on a GPU, when, and whether today's source is the one verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vlp_fast import evidence as facts
from vlp_fast.cli._output import fail, output_console

__all__ = ["evidence"]


def evidence(
    results: Annotated[
        Path | None,
        typer.Option(help="Folder of reports of benchmarks/gpu_check.py (default: benchmarks/results of this checkout)."),
    ] = None,
    readme: Annotated[
        Path | None, typer.Option(help="Rewrite the table between the two markers of this file, and print nothing.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to stdout instead of a table.")] = False,
) -> None:
    """Show for every kernel family the device, date and commit of its last GPU check, and whether its source changed since.

    \b
    JSON (schema 1):
      results    the folder that was read
      reports    files in it that are reports of a GPU
      families   [{family, source, state, device, date, commit, verified_source, is_todays_source, cases, speed, report}]
      state      verified | changed | failed | not run yet | no kernel
      speed      {shapes, mean, least, most}: time of the fastest rival over ours, or null where not timed
    """
    if results is not None and not results.is_dir():
        fail("evidence", f"--results must name a folder; there is none at {results}.", code=2)
    folder = facts.default_results() if results is None else results
    try:
        reports = facts.read_reports(folder)
        rows = facts.evidence(reports)
        if readme is not None:
            old = readme.read_text(encoding="utf-8")
            readme.write_text(facts.rewrite_readme(old, rows), encoding="utf-8")
            return
    except (OSError, ValueError) as error:
        fail("evidence", error)
    if as_json:
        typer.echo(json.dumps(_report(folder, reports, rows), indent=1))
        return
    _print(rows, output_console())


def _report(folder: Path, reports: list[dict[str, Any]], rows: list[facts.Evidence]) -> dict[str, Any]:
    return {
        "schema": 1,
        "results": str(folder),
        "reports": [report["file"] for report in reports],
        "families": [row.to_json() for row in rows],
    }


def _print(rows: list[facts.Evidence], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), title="Checked on a GPU", title_justify="left", title_style="bold")
    for name in ("kernels", "state", "device", "date", "commit", "cases", "fastest rival"):
        table.add_column(name, no_wrap=name in ("kernels", "state", "date"))
    for row in rows:
        if row.device is None:
            table.add_row(row.family, row.state, *["-"] * 5)
        else:
            date, speed = str(row.date)[:10], facts.speed_text(row.speed)
            table.add_row(row.family, row.state, row.device, date, row.commit, str(row.cases), speed)
    console.print(table)
    states = {row.state for row in rows}
    if "changed" in states:
        console.print("changed: the check passed with another source; run benchmarks/gpu_check.py again.")
    if facts.NOT_RUN in states:
        console.print("not run yet: benchmarks/gpu_check.py runs the check on a machine with a GPU.")
