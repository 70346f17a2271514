"""What a suite's file does when it is run: ``vlp-fast bench --suite`` with the same options."""

from __future__ import annotations

import sys

__all__ = ["run_as_script"]


def run_as_script(suite: str) -> int:
    """Runs the command on the arguments of this process; 0, or what it ends with."""
    from vlp_fast.cli import app

    app(["bench", "--suite", suite, *sys.argv[1:]], prog_name="vlp-fast")
    return 0
