"""Plots of benchmark reports and profiles, for ``--png`` and for ``make bench``. Needs matplotlib (extra ``vlp_fast[report]``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["plot_report", "plot_throughput", "save"]

# colours that stay apart for colour-blind eyes (Paul Tol's bright and muted sets)
TASK_COLORS = {"embed_image": "#4477AA", "embed_text": "#228833", "pretrain_step": "#EE6677"}
TASK_NAMES = {"embed_image": "embed images", "embed_text": "embed texts", "pretrain_step": "pretraining step"}
MODULE_COLORS = {
    "image_encoder": "#4477AA",
    "momentum_image_encoder": "#A6C8E4",
    "text_encoder": "#228833",
    "momentum_text_encoder": "#A5D3A9",
    "text_decoder": "#AA3377",
    "pair_encoder": "#CCBB44",
    "momentum_pair_encoder": "#EBE4B4",
    "heads and loss": "#BBBBBB",
}
LIGHT = ("momentum_image_encoder", "momentum_text_encoder", "momentum_pair_encoder", "pair_encoder")
OTHER_COLOR = "#888888"
HATCHES = ("", "//", "..", "xx")  # one per backend
MODEL_NAMES = {"blip": "BLIP", "coca": "CoCa", "beit3": "BEiT-3", "albef": "ALBEF"}

Rows = Sequence[Mapping[str, Any]]


def plot_throughput(report: Mapping[str, Any]) -> Figure:
    """Images and tokens a second of every model and task, a row of panels per size."""
    return plot_report([report], [])


def plot_report(reports: Sequence[Mapping[str, Any]], profiles: Sequence[Mapping[str, Any]]) -> Figure:
    """Throughput of the reports' models, a row of panels per size, above what each loss of the profiles costs.

    Args:
        reports: JSON of ``vlp-fast bench``, made on one machine. profiles: JSON of ``vlp-fast profile``; may be empty.
    """
    rows = [(row, report["stamp"]) for report in reports for row in report["rows"] if row["ms_median"] is not None]
    sizes = list(dict.fromkeys(row["size"] for row, _ in rows))
    bars = sum(len(_losses(profile)) for profile in profiles)
    heights = [2.7] * len(sizes) + ([0.36 * bars + 0.9] if profiles else [])
    figure = Figure(figsize=(11, sum(heights) + 1.2), layout="constrained")
    grid = figure.add_gridspec(len(heights), 3, height_ratios=heights)
    for line, size in enumerate(sizes):
        of_size = [row for row, _ in rows if row["size"] == size]
        stamp = next(stamp for row, stamp in rows if row["size"] == size)
        about = f"{size}, {of_size[0]['image_size']} px, batch {stamp['batch']}, {stamp['dtype']}"
        for column, task in enumerate(TASK_COLORS):
            unit = "tokens" if task == "embed_text" else "images"
            axes = figure.add_subplot(grid[line, column])
            _throughput(axes, [row for row in of_size if row["task"] == task], unit, TASK_COLORS[task])
            axes.set_title(f"{TASK_NAMES[task]} ({about})" if column == 0 else TASK_NAMES[task], loc="left", fontsize=9)
            axes.set_ylabel(f"{unit} / s", fontsize=8)
    if profiles:
        _passes(figure.add_subplot(grid[len(sizes), :]), profiles)
    stamp = reports[0]["stamp"]
    figure.suptitle(
        f"vlp_fast {stamp['vlp_fast']}{' @ ' + stamp['commit'] if stamp['commit'] else ''} on {stamp['device_name']}, "
        f"{stamp['threads']} threads, torch {stamp['torch']}: {stamp['data']}, median and quartiles",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    return figure


def _throughput(axes: Axes, rows: Rows, unit: str, color: str) -> None:
    """One bar per model and backend; whiskers span the quartiles."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    width = 0.7 / max(len(backends), 1)
    for row in rows:
        place = models.index(row["model"]) + (backends.index(row["backend"]) - (len(backends) - 1) / 2) * width
        rate = row[f"{unit}_per_second"]
        low, high = (rate * row["ms_median"] / row[quartile] for quartile in ("ms_q3", "ms_q1"))
        hatch = HATCHES[backends.index(row["backend"]) % len(HATCHES)]
        axes.bar(place, rate, width * 0.9, color=color, hatch=hatch, edgecolor="white", label=row["backend"])
        axes.errorbar(place, rate, [[rate - low], [high - rate]], color="#333333", capsize=3, linewidth=1)
        label = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"
        axes.annotate(label, (place, high), xytext=(0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(models)), [MODEL_NAMES.get(model, model) for model in models], fontsize=9)
    axes.set_xlim(-0.6, max(len(models), 3) - 0.4)
    axes.margins(y=0.18)
    _plain(axes)
    if len(backends) > 1:
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(handles.values(), handles.keys(), fontsize=7, frameon=False)


def _losses(profile: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["loss"] for row in profile["rows"] if row["gflops_forward"]))


def _passes(axes: Axes, profiles: Sequence[Mapping[str, Any]]) -> None:
    """A bar per model and loss: GFLOPs of the forward by module, each labelled with its passes."""
    labels: list[str] = []
    used: dict[str, Any] = {}
    longest = max(
        sum(row["gflops_forward"] for row in profile["rows"] if row["loss"] == loss)
        for profile in profiles
        for loss in _losses(profile)
    )
    for profile in profiles:
        for loss in _losses(profile):
            left, passes, place = 0.0, 0, len(labels)
            labels.append(f"{MODEL_NAMES.get(profile['model'], profile['model'])} {loss}")
            for row in profile["rows"]:
                if row["loss"] != loss or not row["gflops_forward"]:
                    continue
                color = MODULE_COLORS.get(row["module"], OTHER_COLOR)
                used[row["module"]] = axes.barh(place, row["gflops_forward"], 0.72, left, color=color, edgecolor="white")
                if row["passes"] and row["gflops_forward"] > 0.035 * longest:
                    middle = left + row["gflops_forward"] / 2
                    ink = "#333333" if row["module"] in LIGHT else "white"
                    axes.text(middle, place, f"{row['passes']}x", ha="center", va="center", fontsize=7, color=ink)
                left += row["gflops_forward"]
                passes += row["passes"]
            text = f"{left:,.0f} in {passes} pass{'es' * (passes > 1)}"
            axes.annotate(text, (left, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.invert_yaxis()
    first = profiles[0]
    axes.set_title(
        f"what each loss costs: GFLOPs of the forward and passes (x) by module, {first['size']}, batch {first['batch']}, "
        f"schedule {first['schedule']}",
        loc="left",
        fontsize=9,
    )
    axes.set_xlabel("GFLOPs", fontsize=8)
    axes.margins(x=0.12)
    modules = sorted(used, key=[*MODULE_COLORS, *used].index)
    axes.legend(
        [used[m] for m in modules], [m.replace("_", " ") for m in modules], fontsize=8, frameon=False, loc="lower right"
    )
    _plain(axes)


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="both", labelsize=8, length=2)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whatever the file is called."""
    figure.savefig(path, format="png", dpi=140)
