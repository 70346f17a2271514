"""``vlp-fast info``: what is installed, what can run here, what ``backend=None`` chooses."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vlp_fast.cli._output import output_console
from vlp_fast.environment import system_report

__all__ = ["info"]

_INSTALL = {"xformers": "pip install 'vlp_fast[xformers]'", "flash_attn": "pip install 'vlp_fast[flash-attn]'"}


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON to stdout instead of tables.")] = False) -> None:
    """Show versions, devices, which backends can run on each and why not, and what backend=None chooses.

    \b
    JSON (schema 1):
      versions   {library: version, or null where it is not installed}
      system, machine   the platform
      cpu        {name, cores, threads, instructions, fp32_products and bf16_products: {library, reason}}
      cuda       {available, reason, devices: [{index, name, capability, memory_mb}]}
      devices    {cpu | cuda | meta: {default, backends: {backend: {available, reason}}}}
    """
    report = system_report()
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    _print(report, output_console())


def _print(report: dict[str, Any], console: Console) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, version in report["versions"].items():
        missing = f"not installed ({_INSTALL[name]})" if name in _INSTALL else "not installed"
        table.add_row(name, version or missing)
    cpu, cuda = report["cpu"], report["cuda"]
    table.add_row("system", report["system"])
    table.add_row("cpu", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['instructions']}")
    for dtype in ("fp32", "bf16"):
        found = cpu[f"{dtype}_products"]
        table.add_row(f"{dtype} products", f"on the CPU by {found['library']}: {found['reason']}")
    for device in cuda["devices"]:
        table.add_row(
            f"cuda:{device['index']}",
            f"{device['name']}, compute capability {device['capability']}, {device['memory_mb']:,} MB",
        )
    if not cuda["devices"]:
        table.add_row("cuda", f"none: {cuda['reason']}")
    console.print(table)
    for device, here in report["devices"].items():
        backends = Table(
            title=f"Backends on {device}: backend=None chooses {here['default']}",
            title_justify="left",
            title_style="bold",
            box=None,
            show_header=False,
            padding=(0, 2, 0, 0),
        )
        backends.add_column(no_wrap=True)
        backends.add_column(no_wrap=True)
        backends.add_column()
        for name, status in here["backends"].items():
            backends.add_row(name, "yes" if status["available"] else "no", status["reason"])
        console.print()
        console.print(backends)
