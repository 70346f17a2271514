"""Profiles as one self-contained HTML page: no script, no font, nothing fetched; light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from vlp_fast.profiling import (
    COLUMNS,
    SUMMARY_COLUMNS,
    TEXT,
    Call,
    ProfileRow,
    StepProfile,
    number,
    row_cells,
    shown_columns,
    summary_cells,
    total_cells,
)

__all__ = ["profile_page"]

_COLOURS = ("#3b78c4", "#dd8426", "#35a06c", "#9465bd", "#c9506a", "#4fa3ad", "#8a7440", "#d06cb4", "#7f9a2e", "#5b62c9")
_GREY = "#8a94a0"
_WIDTH, _LABEL = 560, 200  # of a figure, and of the words at its left, in its own units
_HEADINGS = {
    "loss": "loss",
    "module": "module",
    "passes": "passes",
    "grad": "gradient",
    "seqs": "sequences",
    "tokens": "tokens",
    "pad": "padding",
    "unread": "rows not read",
    "GF fwd": "GFLOPs forward",
    "GF bwd": "GFLOPs backward",
    "waste": "GFLOPs wasted",
    "ms": "ms",
    "MB": "MB kept",
    "also serves": "also serves",
}
_STYLE = """
:root{color-scheme:light dark;--ink:#1b2430;--soft:#55616f;--line:#dfe4ea;--paper:#fff;--panel:#f6f8fa}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9daab8;--line:#313a45;--paper:#12161b;--panel:#1a2027}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:80rem;margin:2.5rem auto;padding:0 1.5rem}
h1{font-size:1.6rem;margin:0}h2{font-size:1.15rem;margin:2.4rem 0 .2rem}h3{font-size:.95rem;margin:0 0 .5rem}
p{margin:.2rem 0 .9rem;color:var(--soft);max-width:62rem}.wide{overflow-x:auto}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:1rem}
.panel{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem}
table{border-collapse:collapse;width:100%;font-size:.87rem;font-variant-numeric:tabular-nums;margin-bottom:1rem}
th,td{padding:.3rem .55rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--soft);white-space:normal;vertical-align:bottom}td.t,th.t{text-align:left}
tr.total td{font-weight:600;border-top:2px solid var(--ink);border-bottom:0}
.key{display:inline-block;width:.75rem;height:.75rem;border-radius:3px;margin:0 .35rem 0 0;vertical-align:-1px}
.keys span.item{margin-right:1.1rem;white-space:nowrap}
svg{width:100%;height:auto;display:block}svg text{font:12.5px system-ui,sans-serif;fill:var(--ink)}svg text.soft{fill:var(--soft)}
svg .track{fill:var(--line)}
"""


def profile_page(profiles: StepProfile | Sequence[StepProfile]) -> str:
    """HTML of one profile, or of several side by side: passes and FLOPs of each loss, padding, a timeline, and every row."""
    some = [profiles] if isinstance(profiles, StepProfile) else list(profiles)
    if not some:
        raise ValueError("profiles must have at least one profile; received none.")
    colours: dict[str, str] = {}
    for profile in some:
        for loss in dict.fromkeys(row.loss for row in profile.rows):
            if loss not in ("step", "all"):
                colours.setdefault(loss, _COLOURS[len(colours) % len(_COLOURS)])
    names = " · ".join(dict.fromkeys(f"{profile.model} {profile.size}".strip() for profile in some))
    title = f"{names}: one pretraining step"
    keys = "".join(
        f'<span class="item"><span class="key" style="background:{colour}"></span>{escape(loss)}</span>'
        for loss, colour in colours.items()
    )
    most = max((sum(row.gflops for row in rows) for profile in some for rows in _by_loss(profile).values()), default=1.0) or 1.0
    timed = all(profile.totals["ms"] is not None for profile in some)
    longest = max((call.end for profile in some for call in profile.calls), default=1.0) or 1.0
    backward = any(profile.totals["gflops_backward"] is not None for profile in some)
    figures: list[tuple[str, str, Callable[[StepProfile], str]]] = [
        (
            "Passes per loss",
            "A square is a pass of a tower: I images, T texts, P pairs. Hollow: without gradient. Dashed: packed with another loss's.",
            lambda profile: _passes(profile, colours),
        ),
        (
            "GFLOPs per loss",
            "What runs first for a loss is booked on it, also where others use it."
            + (" Solid: forward; pale: backward." if backward else " Forward only."),
            lambda profile: _flops(profile, colours, most),
        ),
        (
            "Padding",
            "The part of each tower's rows that is a token (coloured) and that is padding (grey).",
            lambda profile: _padding(profile, colours),
        ),
        (
            "Timeline",
            "The calls in the order they ran; forward above, backward below; pale without gradient. "
            + ("Milliseconds in operations." if timed else "Without times on this device: the axis counts GFLOPs."),
            lambda profile: _timeline(profile, colours, longest, "ms" if timed else "GFLOPs"),
        ),
    ]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f'<h1>{escape(title)}</h1><p>{escape(_facts(some[0]))}</p><p class="keys">{keys}</p>',
    ]
    if len(some) > 1:
        rows = [summary_cells(profile) for profile in some]
        keep = [any(row[i] for row in rows) for i in range(len(SUMMARY_COLUMNS))]
        heads = [
            f"{name} passes" if name in ("image", "text", "pair", "other") else _HEADINGS.get(name, name)
            for name in SUMMARY_COLUMNS
        ]
        parts.append(
            f"<h2>Side by side</h2><p>Passes: with gradient + without.</p>{_table(heads, rows, keep, {'model', 'schedule'})}"
        )
    else:
        parts.append(f"<p>{_sentence(some[0])}</p>")
    for heading, words, draw in figures:
        panels = "".join(f'<div class="panel"><h3>{escape(profile.title)}</h3>{draw(profile)}</div>' for profile in some)
        parts.append(f'<h2>{escape(heading)}</h2><p>{escape(words)}</p><div class="panels">{panels}</div>')
    keep = shown_columns(some)
    parts.append(
        "<h2>Every row</h2><p>Passes in parentheses are packed with those of other losses and count once in the total. Wasted: products "
        "done again on the same values, and padding. Rows not read: gradient zero, so that the last layer need not have made them.</p>"
    )
    for profile in some:
        cells = [*(row_cells(row) for row in profile.rows), total_cells(profile)]
        parts.append(
            f"<h3>{escape(profile.title)}</h3>{_table([_HEADINGS[c] for c in COLUMNS], cells, keep, TEXT, total=True)}"
        )
        repeated = list(profile.totals["repeated"].items())
        if repeated:
            worst = ", ".join(f"{name or 'attention and others'} ({number(flops)})" for name, flops in repeated[:4])
            more = f" and {len(repeated) - 4} more" if len(repeated) > 4 else ""
            parts.append(f"<p>Done again, in GFLOPs: {escape(worst)}{more}.</p>")
        if profile.towers_not_called:
            parts.append(f"<p>Never called: {escape(', '.join(profile.towers_not_called))}.</p>")
    return "\n".join([*parts, "</body></html>\n"])


def _facts(profile: StepProfile) -> str:
    return f"{profile.batch} image-text pairs, random weights, device {profile.device}"


def _sentence(profile: StepProfile) -> str:
    totals = profile.totals
    kinds = [(totals[f"{kind}_passes"], kind) for kind in ("image", "text", "pair", "other")]
    counted = ", ".join(f"{count} {kind} {'pass' if count == 1 else 'passes'}" for count, kind in kinds if count)
    return f"{counted}; {totals['text_sequences']} text sequences for {profile.batch} pairs."


def _by_loss(profile: StepProfile) -> dict[str, list[ProfileRow]]:
    """Rows by loss; what belongs to none, only where it cost something."""
    found: dict[str, list[ProfileRow]] = {}
    for row in profile.rows:
        found.setdefault(row.loss, []).append(row)
    return {loss: rows for loss, rows in found.items() if loss not in ("step", "all") or sum(row.gflops for row in rows) > 0}


def _svg(height: float, body: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(body)}</svg>'


def _text(x: float, y: float, words: str, css: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(words)}</text>'


def _rect(x: float, y: float, width: float, height: float, fill: str, extra: str = "", tip: str = "") -> str:
    inner = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.6):.1f}" height="{height}" rx="2" fill="{fill}" {extra}>{inner}</rect>'


def _tip(row: ProfileRow) -> str:
    gradient = "" if row.grad else ", no gradient"
    serves = f", also serves {', '.join(row.also_serves)}" if row.also_serves else ""
    return f"{row.loss}: {row.module}, {row.sequences} sequences, {row.tokens} tokens{gradient}{serves}"


def _passes(profile: StepProfile, colours: dict[str, str]) -> str:
    body, y = [], 2.0
    for loss, rows in _by_loss(profile).items():
        towers = [row for row in rows if row.passes]
        if not towers:
            continue
        x, colour = 110.0, colours.get(loss, _GREY)
        body.append(_text(0, y + 19, loss))
        for row in towers:
            for _ in range(row.passes):
                line = f'stroke="{colour}" stroke-width="2"' + (' stroke-dasharray="4 3"' if row.shared else "")
                pale = ' fill-opacity="0.45"' if row.shared else ""
                body.append(_rect(x, y + 2, 24, 24, colour if row.grad else "none", line + pale, _tip(row)))
                letter = row.kind[:1].upper() if row.kind in ("image", "text", "pair") else "·"
                ink = ' style="fill:#fff"' if row.grad and not row.shared else ""
                body.append(
                    f'<text x="{x + 12:.1f}" y="{y + 18.5:.1f}" text-anchor="middle" pointer-events="none"{ink}>{letter}</text>'
                )
                x += 31
        body.append(_text(_WIDTH, y + 19, f"{sum(row.sequences for row in towers)} sequences", "soft", "end"))
        y += 34
    return _svg(y, body, "passes per loss")


def _flops(profile: StepProfile, colours: dict[str, str], most: float) -> str:
    body, y, room = [], 2.0, _WIDTH - 110 - 80
    for loss, rows in _by_loss(profile).items():
        colour, x = colours.get(loss, _GREY), 110.0
        body.append(_text(0, y + 15, loss))
        for pale, value in ((False, sum(r.gflops_forward for r in rows)), (True, sum(r.gflops_backward or 0.0 for r in rows))):
            if value:
                width = room * value / most
                words = f"{loss}, {'backward' if pale else 'forward'}: {number(value)} GFLOPs"
                body.append(_rect(x, y, width, 22, colour, 'fill-opacity="0.45"' if pale else "", words))
                x += width
        body.append(_text(x + 6, y + 15, number(sum(row.gflops for row in rows)), "soft"))
        y += 30
    return _svg(y, body, "GFLOPs per loss")


def _padding(profile: StepProfile, colours: dict[str, str]) -> str:
    body, y, room = [], 2.0, _WIDTH - _LABEL - 50
    for row in profile.rows:
        if not row.passes:
            continue
        share = 0.0 if row.padding is None else row.padding
        body.append(
            _text(
                0,
                y + 13,
                f"{row.loss} · {row.module}".replace("momentum_", "mom. ").replace(
                    "text_decoder+text_encoder", "both text towers"
                ),
            )
        )
        body.append(f'<rect x="{_LABEL}" y="{y}" width="{room}" height="17" rx="2" class="track"/>')
        tip = "padding cannot be seen" if row.padding is None else f"{_tip(row)}, {share:.0%} padding"
        body.append(
            _rect(
                _LABEL, y, room * (1 - share), 17, colours.get(row.loss, _GREY), "" if row.grad else 'fill-opacity="0.45"', tip
            )
        )
        body.append(_text(_WIDTH, y + 13, "unknown" if row.padding is None else f"{share:.0%}", "soft", "end"))
        y += 23
    return _svg(y, body, "padding of each tower's rows")


def _short(row: ProfileRow) -> str:
    module = row.module.replace("momentum_", "mom. ").replace("text_decoder+text_encoder", "both text towers")
    return f"{row.loss} · {module}"


def _timeline(profile: StepProfile, colours: dict[str, str], longest: float, unit: str) -> str:
    body, y = [], 2.0
    for phase in ("forward", "backward"):
        calls = [call for call in profile.calls if call.phase == phase]
        if not calls:
            continue
        body.append(_text(0, y + 11, phase, "soft"))
        y += 16
        lanes: list[float] = []
        for call in calls:
            lane = next((i for i, end in enumerate(lanes) if end <= call.start + 1e-9), len(lanes))
            lanes[lane : lane + 1] = [call.end]
            x, width = _WIDTH * call.start / longest, _WIDTH * (call.end - call.start) / longest
            extra = ('stroke="var(--panel)" stroke-width="1"') + ("" if call.grad else ' fill-opacity="0.45"')
            body.append(_rect(x, y + 24 * lane, width, 21, colours.get(call.loss, _GREY), extra, _call_tip(call, unit)))
            if width > 7.0 * len(call.module) + 8:
                style = 'style="fill:#fff" pointer-events="none"'
                body.append(f'<text x="{x + 4:.1f}" y="{y + 24 * lane + 15:.1f}" {style}>{escape(call.module)}</text>')
        y += 24 * len(lanes) + 6
    body.append(f'<rect x="0" y="{y}" width="{_WIDTH}" height="1" class="track"/>')
    body.append(_text(0, y + 15, "0", "soft"))
    body.append(_text(_WIDTH, y + 15, f"{number(longest)} {unit}", "soft", "end"))
    return _svg(y + 20, body, "timeline of calls")


def _call_tip(call: Call, unit: str) -> str:
    took = f"{number(call.end - call.start)} {unit}"
    counts = f"{call.sequences} sequences, {call.tokens} tokens, {number(call.gflops)} GFLOPs"
    return f"{call.module} for {call.loss}, {call.phase}: {counts}, {took}"


def _table(
    heads: Sequence[str], cells: Sequence[Sequence[str]], keep: Sequence[bool], text: set[str], *, total: bool = False
) -> str:
    def line(tag: str, values: Sequence[str], css: str = "") -> str:
        shown = ((head, value) for head, value, kept in zip(heads, values, keep, strict=True) if kept)
        return (
            f'<tr class="{css}">'
            + "".join(f'<{tag} class="{"t" if h in text else ""}">{escape(v)}</{tag}>' for h, v in shown)
            + "</tr>"
        )

    body = "".join(line("td", row, "total" if total and i == len(cells) - 1 else "") for i, row in enumerate(cells))
    return f'<div class="wide"><table>{line("th", heads)}{body}</table></div>'
