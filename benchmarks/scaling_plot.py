"""The figure of the suite scaling: a panel for each axis. Needs matplotlib (extra ``vlp_fast[report]``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from vlp_fast.benchmarks.bench_scaling import AXES
from vlp_fast.benchmarks.registry import OURS

__all__ = ["plot_scaling"]

# colours that stay apart for colour-blind eyes, as in the other plots; ours are full, published code is pale
COLORS = {"BLIP": ("#4477AA", "#8FB4D8"), "CoCa": ("#AA3377", "#DDA0C0")}
STYLES = {f"{OURS} packed": ("-", "o"), f"{OURS} published": ("--", "s")}
OTHER_STYLE = ("-", "^")
LABELS = {
    "batch": "images, each with a caption",
    "caption length": "tokens of the longest caption",
    "captions an image": "captions of each image",
    "losses": "losses, in the order of the step",
    "image size": "side of the image in pixels",
    "width": "width of the model",
    "depth": "layers of each tower",
}
COLUMNS = 4


def plot_scaling(report: Mapping[str, Any]) -> Figure:
    """Milliseconds of a step against each axis that the report has, with quartiles; logarithmic where cost is a power.

    Raises: ValueError for a report that has no row of this suite.
    """
    axes_names = [axis for axis in AXES if any(row.get("axis") == axis for row in report["rows"])]
    if not axes_names:
        raise ValueError(f"report must be of the suite scaling, with rows; received one of {report.get('suite')!r}.")
    lines = -(-(len(axes_names) + 1) // COLUMNS)
    figure = Figure(figsize=(13, 3.1 * lines + 0.5), layout="constrained")
    grid = figure.add_gridspec(lines, COLUMNS)
    handles: dict[str, Any] = {}
    for place, axis in enumerate(axes_names):
        handles |= _panel(figure.add_subplot(grid[place // COLUMNS, place % COLUMNS]), axis, report)
    last = figure.add_subplot(grid[-1, len(axes_names) % COLUMNS])
    last.axis("off")
    last.legend(list(handles.values()), list(handles), fontsize=9, frameon=False, loc="center left", handlelength=3)
    stamp = report["stamp"]
    figure.suptitle(
        f"a pretraining step of vlp_fast {stamp['vlp_fast']}{' @ ' + stamp['commit'] if stamp['commit'] else ''} and of published "
        f"code on {stamp['device_name']}, {stamp['threads']} threads, torch {stamp['torch']}, {stamp['size']}, {stamp['dtype']}: "
        "median and quartiles",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    return figure


def _panel(axes: Axes, axis: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """The lines of one axis; their handles by what they show."""
    handles: dict[str, Any] = {}
    rows = [row for row in report["rows"] if row.get("axis") == axis]
    for model, provider in dict.fromkeys((row["model"], row["provider"]) for row in rows):
        of = sorted((r for r in rows if (r["model"], r["provider"]) == (model, provider)), key=lambda r: r["value"])
        line, marker = STYLES.get(provider, OTHER_STYLE)
        ms = [row["ms_median"] for row in of]
        spread = [[row["ms_median"] - row["ms_q1"] for row in of], [row["ms_q3"] - row["ms_median"] for row in of]]
        handles[f"{model}, {provider}"] = axes.errorbar(
            [row["value"] for row in of], ms, spread, color=COLORS[model][not provider.startswith(OURS)], linestyle=line,
            marker=marker, markersize=4, linewidth=1.5, capsize=2, elinewidth=1,
        )  # fmt: skip
    if AXES[axis][1] is not None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(_one_two_five))
    else:
        axes.set_ylim(bottom=0.0)
    axes.xaxis.set_major_locator(FixedLocator(sorted({row["value"] for row in rows})))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(axis, loc="left", fontsize=9)
    axes.set_xlabel(LABELS[axis], fontsize=8)
    axes.set_ylabel("ms", fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="both", which="both", labelsize=8, length=2)
    return handles


def _one_two_five(value: float, _: object) -> str:
    """Labels of a few of the ticks between powers of ten."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""
