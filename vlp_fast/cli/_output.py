"""How commands speak: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer
from rich.console import Console

__all__ = ["fail", "output_console"]

WIDTH = 100  # of what goes to a file or a pipe, which has no width of its own


def output_console() -> Console:
    """stdout: as wide as the terminal, or 100 columns where there is none. NO_COLOR is honoured by rich; a pipe gets no colour."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False, emoji=False)


def fail(command: str, sentence: object, code: int = 1) -> NoReturn:
    """Ends the command with one sentence on stderr. Codes: 1, it could not be done; 2, it was asked for wrongly."""
    typer.echo(f"vlp-fast {command}: {sentence}", err=True)
    raise typer.Exit(code)
