"""The command ``vlp-fast``: info, bench, profile, evidence, convert, capfilt."""

from __future__ import annotations

from typing import Annotated

import typer

from vlp_fast._version import __version__
from vlp_fast.cli.bench import bench
from vlp_fast.cli.capfilt import capfilt
from vlp_fast.cli.convert import convert
from vlp_fast.cli.evidence import evidence
from vlp_fast.cli.info import info
from vlp_fast.cli.profile import profile

__all__ = ["app"]

app = typer.Typer(
    name="vlp-fast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlp-fast {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Fast vision-language pretraining: what runs here, how fast it is, and which loss costs what."""


app.command()(info)
app.command()(bench)
app.command()(profile)
app.command()(evidence)
app.command()(convert)
app.command()(capfilt)
