"""``vlp-fast profile``: which loss costs which forward passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from vlp_fast.profile_page import profile_page, row_cells, total_cells
from vlp_fast.profiling import StepProfile, profile_model
from vlp_fast.training import MODELS, SCHEDULES, SIZES

__all__ = ["profile", "profile_table"]


def profile(
    model: Annotated[str, typer.Argument(help=f"One of {', '.join(MODELS)}.")],
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "base",
    schedule: Annotated[str, typer.Option(help=f"How passes are grouped: {', '.join(SCHEDULES)}.")] = "published",
    image_size: Annotated[
        int | None, typer.Option(help="Side of the images in pixels; default: the preset's (224; tiny: 64).")
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
        typer.echo(f"vlp-fast profile: {error}", err=True)
        raise typer.Exit(2) from None
    Console().print(profile_table(result))


def profile_table(result: StepProfile) -> Table:
    """The rows and totals as a rich table."""
    title = f"{result.model} {result.size}, schedule {result.schedule}, {result.batch} pairs, device {result.device}"
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in ("loss", "module"):
        table.add_column(name, no_wrap=True)
    for name in ("passes", "grad", "seqs", "tokens", "pad", "GFLOP fwd", "GFLOP bwd", "ms", "MB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("serves")
    last = None
    for row in result.rows:
        if last is not None and row.loss != last:
            table.add_section()
        last = row.loss
        table.add_row(*row_cells(row))
    table.add_section()
    table.add_row(*total_cells(result), style="bold")
    return table
