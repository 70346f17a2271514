"""``vlp-fast profile``: which loss costs which forward passes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table

from vlp_fast.cli._output import fail, output_console
from vlp_fast.profile_page import profile_page
from vlp_fast.profile_peers import PEERS, profile_peer
from vlp_fast.profiling import (
    COLUMNS,
    SUMMARY_COLUMNS,
    TEXT,
    StepProfile,
    chrome_trace,
    profile_model,
    row_cells,
    shown_columns,
    summary_cells,
    total_cells,
)
from vlp_fast.training import MODELS, SCHEDULES, SIZES

__all__ = ["profile", "profile_table", "summary_table"]

_WIDTH = 120  # of what goes to a pipe or a file: with times, the columns need more than other commands' 100


def profile(
    models: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(MODELS)}; several are shown side by side.")] = None,
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "base",
    schedule: Annotated[
        list[str] | None,
        typer.Option(help=f"How passes are grouped: {', '.join(SCHEDULES)}; may be given twice. Default: both."),
    ] = None,
    losses: Annotated[
        str | None,
        typer.Option(help="Losses of the models' steps, such as itc,itm; default: all. The others' passes do not run."),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help=f"A published implementation beside them, where it is installed: {', '.join(PEERS)}."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the images in pixels; default: the preset's (224, ALBEF 256; tiny: 64).")
    ] = None,
    batch: Annotated[int, typer.Option(help="Image-text pairs.")] = 8,
    device: Annotated[
        str | None,
        typer.Option(
            help="meta (shapes and FLOPs, no memory), cpu or cuda. Default: meta, or cpu where there are peers or a trace."
        ),
    ] = None,
    backward: Annotated[bool, typer.Option("--backward", help="Profile the backward as well.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the profile as JSON.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write the profile as one HTML page.")] = None,
    trace_file: Annotated[
        Path | None, typer.Option("--trace", help="Write the calls as a Chrome trace, for chrome://tracing or Perfetto.")
    ] = None,
) -> None:
    """Count what one pretraining step runs: passes, tokens, padding, GFLOPs, and on a real device time, for each loss and module."""
    torch.set_flush_denormal(True)
    chosen = device or ("cpu" if peer or trace_file is not None else "meta")
    try:
        if not models and not peer:
            raise ValueError(f"name a model ({', '.join(MODELS)}) or a peer (--peer {', '.join(PEERS)}); received neither.")
        if losses is not None and peer:
            raise ValueError(f"losses must not be given with a peer, which makes all of its own; received --losses {losses}.")
        profiles = [
            profile_model(
                model,
                size,
                schedule=name,
                losses=None if losses is None else losses.split(","),
                image_size=image_size,
                batch=batch,
                device=chosen,
                backward=backward,
            )
            for model in models or ()
            for name in dict.fromkeys(schedule or ["published", "packed"])
        ]
        profiles += [
            profile_peer(name, size, image_size=image_size, batch=batch, device=chosen, backward=backward)
            for name in peer or ()
        ]
        if json_file is not None:
            reports = [result.to_json() for result in profiles]
            whole = reports[0] if len(reports) == 1 else {"profiles": reports}
            json_file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        if html_file is not None:
            html_file.write_text(profile_page(profiles), encoding="utf-8")
        if trace_file is not None:
            trace_file.write_text(json.dumps(chrome_trace(profiles)) + "\n", encoding="utf-8")
    except (ValueError, RuntimeError, OSError) as error:
        fail("profile", error, 2)
    console = output_console()
    if not sys.stdout.isatty():
        console.width = _WIDTH
    if len(profiles) > 1:
        console.print(summary_table(profiles))
        console.print()
    for i, result in enumerate(profiles):
        if i:
            console.print()
        console.print(profile_table(result))


def summary_table(profiles: Sequence[StepProfile]) -> Table:
    """One line per profile: what a step of each runs in all."""
    table = _table(f"Side by side, {profiles[0].batch} pairs, device {profiles[0].device}")
    cells = [summary_cells(result) for result in profiles]
    keep = [any(line[i] for line in cells) for i in range(len(SUMMARY_COLUMNS))]
    for name, kept in zip(SUMMARY_COLUMNS, keep, strict=True):
        if kept:
            table.add_column(name, justify="left" if name in ("model", "schedule") else "right", no_wrap=True)
    for line in cells:
        table.add_row(*(cell for cell, kept in zip(line, keep, strict=True) if kept))
    return table


def profile_table(result: StepProfile) -> Table:
    """The rows and totals of one profile."""
    words = [f"{result.model} {result.size}".strip(), *([f"schedule {result.schedule}"] if result.schedule else [])]
    table = _table(", ".join([*words, f"{result.batch} pairs", f"device {result.device}"]))
    shown = shown_columns([result])
    for name, kept in zip(COLUMNS, shown, strict=True):
        if kept:
            folds = name == "also serves"
            table.add_column(name, justify="left" if name in TEXT else "right", no_wrap=not folds, overflow="fold")

    def add(cells: list[str], style: str | None = None) -> None:
        table.add_row(*(cell for cell, keep in zip(cells, shown, strict=True) if keep), style=style)

    last = result.rows[0].loss if result.rows else ""
    for row in result.rows:
        if row.loss != last:
            table.add_section()
        last = row.loss
        add(row_cells(row))
    table.add_section()
    add(total_cells(result), "bold")
    return table


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
