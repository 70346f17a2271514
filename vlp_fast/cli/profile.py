"""``vlp-fast profile``: which loss costs which forward passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table

from vlp_fast.cli._output import fail, output_console
from vlp_fast.profile_page import profile_page, row_cells, total_cells
from vlp_fast.profiling import StepProfile, profile_model
from vlp_fast.training import MODELS, SCHEDULES, SIZES

__all__ = ["profile", "profile_table"]

COLUMNS = ("loss", "module", "passes", "grad", "seqs", "tokens", "pad", "GF fwd", "GF bwd", "ms", "MB", "serves")  # GF: GFLOPs
TEXT = {"loss", "module", "serves"}


def profile(
    model: Annotated[str, typer.Argument(help=f"One of {', '.join(MODELS)}.")],
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "base",
    schedule: Annotated[str, typer.Option(help=f"How passes are grouped: {', '.join(SCHEDULES)}.")] = "published",
    image_size: Annotated[
        int | None, typer.Option(help="Side of the images in pixels; default: the preset's (224, ALBEF 256; tiny: 64).")
    ] = None,
    batch: Annotated[int, typer.Option(help="Image-text pairs.")] = 8,
    device: Annotated[str, typer.Option(help="meta (shapes and FLOPs, no memory), cpu or cuda.")] = "meta",
    backward: Annotated[bool, typer.Option("--backward", help="Profile the backward as well.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the profile as JSON.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write the profile as one HTML page.")] = None,
) -> None:
    """Count what one pretraining step runs: passes, tokens, padding, GFLOPs, and on a real device time, for each loss and module."""
    torch.set_flush_denormal(True)
    try:
        result = profile_model(
            model, size, schedule=schedule, image_size=image_size, batch=batch, device=device, backward=backward
        )
        if json_file is not None:
            json_file.write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="utf-8")
        if html_file is not None:
            html_file.write_text(profile_page(result), encoding="utf-8")
    except (ValueError, RuntimeError, OSError) as error:
        fail("profile", error, 2)
    output_console().print(profile_table(result))


def profile_table(result: StepProfile) -> Table:
    """The rows and totals as a rich table."""
    title = f"{result.model} {result.size}, schedule {result.schedule}, {result.batch} pairs, device {result.device}"
    table = Table(
        title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
    absent = {name for name, total in (("GF bwd", "gflops_backward"), ("ms", "ms")) if result.totals[total] is None}
    shown = [name not in absent for name in COLUMNS]
    for name in COLUMNS:
        if name not in absent:
            table.add_column(name, justify="left" if name in TEXT else "right", no_wrap=name != "serves", overflow="fold")

    def add(cells: list[str], style: str | None = None) -> None:
        table.add_row(*(cell for cell, keep in zip(cells, shown, strict=True) if keep), style=style)

    last = result.rows[0].loss
    for row in result.rows:
        if row.loss != last:
            table.add_section()
        last = row.loss
        add(row_cells(row))
    table.add_section()
    add(total_cells(result), "bold")
    return table
