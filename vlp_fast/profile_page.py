"""A profile as one self-contained HTML page: no script, no font, nothing fetched."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from vlp_fast.profiling import ProfileRow, StepProfile

__all__ = ["profile_page", "row_cells", "total_cells"]

_COLOURS = ("#3b6fb6", "#d9822b", "#3f9a6c", "#8a5fb0", "#b5485d", "#5d7480")
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2530;background:#fff;max-width:76rem;margin:2.5rem auto;padding:0 1.5rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}p{margin:.3rem 0 1rem;color:#4a5563}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid #e3e7ec;white-space:nowrap}
th{font-weight:600;color:#4a5563}td.t,th.t{text-align:left}tr.total td{font-weight:600;border-top:2px solid #1d2530}
.key{display:inline-block;width:.75rem;height:.75rem;border-radius:2px;margin-right:.4rem;vertical-align:-1px}
svg{width:100%;height:auto;display:block}svg text{font:13px system-ui,sans-serif;fill:#1d2530}
"""


def profile_page(profile: StepProfile) -> str:
    """HTML with the passes of each loss, where the FLOPs (and, on a real device, the time) go, and the whole table."""
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(dict.fromkeys(row.loss for row in profile.rows))}
    title = f"{profile.model} {profile.size}: one pretraining step"
    facts = f"schedule {profile.schedule}, {profile.batch} pairs, device {profile.device}"
    flops = "GFLOPs, forward" if profile.totals["gflops_backward"] is None else "GFLOPs, forward and backward"
    charts: list[tuple[str, Callable[[ProfileRow], float]]] = [(flops, _gflops)]
    if profile.totals["ms"] is not None:
        charts.append(("Milliseconds, forward and backward", lambda row: row.ms or 0.0))
    charts.append(("Memory kept for the backward, MB", lambda row: row.mb))
    keys = " &nbsp; ".join(f'<span class="key" style="background:{c}"></span>{escape(n)}' for n, c in colours.items())
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style></head><body>',
        f"<h1>{escape(title)}</h1><p>{escape(facts)}</p><p>{_sentence(profile)}</p><p>{keys}</p>",
    ]
    for heading, value in charts:
        parts.append(f"<h2>{escape(heading)}</h2>{_bars(profile.rows, value, colours)}")
    parts.append(f"<h2>Every row</h2>{_table(profile)}</body></html>")
    return "\n".join(parts)


def _gflops(row: ProfileRow) -> float:
    return row.gflops_forward + (row.gflops_backward or 0.0)


def _sentence(profile: StepProfile) -> str:
    totals = profile.totals
    kinds = [(totals["image_passes"], "image"), (totals["text_passes"], "text"), (totals["pair_passes"], "pair")]
    counted = ", ".join(f"{count} {kind} {'pass' if count == 1 else 'passes'}" for count, kind in kinds if count)
    return f"{counted}; {totals['text_sequences']} text sequences for {profile.batch} pairs."


def _bars(rows: list[ProfileRow], value: Callable[[ProfileRow], float], colours: dict[str, str]) -> str:
    shown = [row for row in rows if value(row) > 0]
    most = max((value(row) for row in shown), default=1.0)
    lines = [f'<svg viewBox="0 0 1000 {26 * len(shown) + 6}" role="img">']
    for i, row in enumerate(shown):
        y, width = 26 * i + 4, 560 * value(row) / most
        label = escape(f"{row.loss} · {row.module}" + ("" if row.grad else " (no gradient)"))
        serves = f" → {', '.join(row.serves)}" if len(row.serves) > 1 else ""
        opacity = 1 if row.grad else 0.45
        lines.append(
            f'<text x="0" y="{y + 14}">{label}</text><rect x="270" y="{y}" width="{max(width, 1):.1f}" height="18" rx="2" '
            f'fill="{colours[row.loss]}" opacity="{opacity}"/>'
            f'<text x="{276 + width:.1f}" y="{y + 14}">{value(row):,.1f}{escape(serves)}</text>'
        )
    return "".join(lines) + "</svg>"


def _table(profile: StepProfile) -> str:
    heads = [
        "loss",
        "module",
        "passes",
        "grad",
        "sequences",
        "tokens",
        "padding",
        "GFLOPs fwd",
        "GFLOPs bwd",
        "ms",
        "MB",
        "serves",
    ]
    text = {"loss", "module", "serves"}
    cells = [*(row_cells(row) for row in profile.rows), total_cells(profile)]

    def line(tag: str, values: list[str], css: str = "") -> str:
        body = "".join(
            f'<{tag} class="{"t" if name in text else ""}">{escape(v)}</{tag}>' for name, v in zip(heads, values, strict=True)
        )
        return f'<tr class="{css}">{body}</tr>'

    body = "".join(line("td", values, "total" if i == len(cells) - 1 else "") for i, values in enumerate(cells))
    return f"<table>{line('th', heads)}{body}</table>"


def row_cells(row: ProfileRow) -> list[str]:
    """A row as text, in the order of the table's columns; what does not apply is empty."""
    tower = row.passes > 0
    return [
        row.loss,
        row.module,
        str(row.passes) if tower else "",
        ("yes" if row.grad else "no") if tower else "",
        str(row.sequences) if tower else "",
        str(row.tokens) if tower else "",
        f"{row.padding:.0%}" if tower else "",
        *_numbers(row.gflops_forward, row.gflops_backward, row.ms, row.mb),
        " ".join(row.serves),
    ]


def total_cells(profile: StepProfile) -> list[str]:
    """The totals as text, in the order of the table's columns."""
    totals = profile.totals
    sequences = str(sum(row.sequences for row in profile.rows))
    numbers = _numbers(totals["gflops_forward"], totals["gflops_backward"], totals["ms"], totals["mb"])
    return ["total", "", str(totals["passes"]), "", sequences, "", "", *numbers, ""]


def _numbers(*values: float | None) -> list[str]:
    return ["" if value is None else f"{value:,.1f}" for value in values]
