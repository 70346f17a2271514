"""A profile's rows as text: the same cells on a terminal, in a page and from `Profile.table`."""

from __future__ import annotations

from collections.abc import Sequence

from vlp_fast.profiling.rows import ProfileRow, StepProfile

__all__ = [
    "COLUMNS",
    "SUMMARY_COLUMNS",
    "TEXT",
    "number",
    "row_cells",
    "shown_columns",
    "summary_cells",
    "text_table",
    "total_cells",
]

# GF: GFLOPs; waste: GFLOPs repeated and of padding
COLUMNS = (
    "loss",
    "module",
    "passes",
    "grad",
    "seqs",
    "tokens",
    "pad",
    "unread",
    "GF fwd",
    "GF bwd",
    "waste",
    "ms",
    "MB",
    "also serves",
)
TEXT = {"loss", "module", "also serves"}
# a line per profile; counts of passes are with + without gradient
SUMMARY_COLUMNS = (
    "model",
    "schedule",
    "image",
    "text",
    "pair",
    "other",
    "seqs",
    "tokens",
    "pad",
    "GF fwd",
    "GF bwd",
    "waste",
    "ms",
    "MB",
)


def row_cells(row: ProfileRow) -> list[str]:
    """A row as text, in the order of `COLUMNS`; what does not apply is empty, a packed pass is in parentheses."""
    tower = row.passes > 0
    passes = f"({row.passes})" if row.shared else str(row.passes)
    return [
        row.loss,
        row.module,
        passes if tower else "",
        ("yes" if row.grad else "no") if tower else "",
        str(row.sequences) if tower else "",
        str(row.tokens) if tower else "",
        ("?" if row.padding is None else f"{row.padding:.0%}") if tower else "",
        "" if row.unread is None else f"{row.unread:.0%}",
        *_numbers(row.gflops_forward, row.gflops_backward, row.waste, row.ms, row.mb),
        " ".join(row.also_serves),
    ]


def total_cells(profile: StepProfile) -> list[str]:
    """The totals as text, in the order of `COLUMNS`."""
    totals = profile.totals
    numbers = _numbers(*(totals[name] for name in ("gflops_forward", "gflops_backward", "waste", "ms", "mb")))
    padding = "?" if totals["padding"] is None else f"{totals['padding']:.0%}"
    return ["total", "", str(totals["passes"]), "", str(totals["sequences"]), str(totals["tokens"]), padding, "", *numbers, ""]


def summary_cells(profile: StepProfile) -> list[str]:
    """A whole profile as one line, in the order of `SUMMARY_COLUMNS`; kinds of passes that no call had are empty."""
    totals = profile.totals
    counts = []
    for kind in ("image", "text", "pair", "other"):
        whole, without = totals[f"{kind}_passes"], totals["without_gradient"][kind]
        counts.append("" if not whole else f"{whole - without}+{without}" if without else str(whole))
    return [profile.model, profile.schedule, *counts, *total_cells(profile)[4:7], *total_cells(profile)[8:-1]]


def shown_columns(profiles: Sequence[StepProfile]) -> list[bool]:
    """Which of `COLUMNS` have anything to show for these profiles."""
    cells = [row_cells(row) for profile in profiles for row in profile.rows]
    return [any(row[i] for row in cells) for i in range(len(COLUMNS))]


def text_table(profile: StepProfile) -> str:
    """The rows and the totals, one line each, under the names of the columns."""
    keep = shown_columns([profile])
    lines = [list(COLUMNS), *(row_cells(row) for row in profile.rows), total_cells(profile)]
    shown = [[cell for cell, kept in zip(line, keep, strict=True) if kept] for line in lines]
    widths = [max(len(line[i]) for line in shown) for i in range(len(shown[0]))]
    text = [name in TEXT for name, kept in zip(COLUMNS, keep, strict=True) if kept]
    written = [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width) for cell, width, left in zip(line, widths, text, strict=True)
        )
        for line in shown
    ]
    return "\n".join(line.rstrip() for line in written)


def _numbers(*values: float | None) -> list[str]:
    return ["" if value is None else number(value) for value in values]


def number(value: float) -> str:
    """Three digits or so, fewer for what is next to nothing."""
    if value < 0.0005:
        return "0"
    return (
        f"{value:,.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 0.1
        else f"{value:.3f}"
    )
