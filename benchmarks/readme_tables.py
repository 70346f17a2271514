"""``make readme-tables``: writes the measured tables of README.md and docs/PERFORMANCE.md from the reports in benchmarks/results/.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; what a command prints, between
``<!-- printed by: vlp-fast ... -->`` and ``<!-- end of print -->``, in a fence. Nothing else of a file is touched. `unsourced` finds
claims of a measurement outside of these: each must be followed by a comment that names the number it is of,
``<!-- source: cpu-kernels-fp32.json, CASE, PROVIDER, speedup -->``, and agree with it to the digits written.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlp_fast.evidence import MARKERS

__all__ = ["FILES", "RESULTS", "TABLES", "rewritten", "unsourced"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
FILES = (ROOT / "README.md", ROOT / "docs/PERFORMANCE.md")
TABLE = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
PRINT = re.compile(r"(<!-- printed by: vlp-fast ([^>]+?)(?:, first (\d+) lines)? -->\n).*?(<!-- end of print -->)", re.DOTALL)
WIDTH = 100  # of what a command prints


def read(name: str) -> dict[str, Any]:
    """A report. Raises: FileNotFoundError that names it."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"benchmarks/results/{path.name} is not there, and a table is made of it.")
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------------- tables


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"x{value:.2f}"


def _gflops(value: float) -> str:
    """A call whose operations the counter does not know has none counted."""
    return "-" if value == 0.0 else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"


def _spread(row: dict[str, Any]) -> str:
    return f"{_ms(row['ms_median'])} ({_ms(row['ms_q1'])}-{_ms(row['ms_q3'])})"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _place(*stamps: dict[str, Any]) -> str:
    """The machine of some reports; raises where there are several."""
    places = {
        f"{s['device_name']} ({s['instructions']}), {s['threads']} threads, torch {s['torch']}, batch {s['batch']}"
        for s in stamps
    }
    if len(places) != 1:
        raise ValueError(f"one table is made of reports from different machines or versions: {sorted(places)}.")
    return places.pop()


def _made(command: str, *stamps: dict[str, Any]) -> str:
    """Of which commits, on which days, by what."""
    commits, dates = (", ".join(dict.fromkeys(s[key][:10] for s in stamps)) for key in ("commit", "date"))
    return f"Commit {commits}, {dates}; `{command}`."


def _measured_on(suite: str, *reports: dict[str, Any]) -> str:
    """The line under a suite's table."""
    stamps = [report["stamp"] for report in reports]
    products = ", ".join(f"{r['ceilings']['gflops_per_second']:,.0f} GFLOP/s in {r['stamp']['dtype']}" for r in reports)
    return f"{_place(*stamps)}; products of this machine: {products}. {_made(f'vlp-fast bench --suite {suite}', *stamps)}"


def _cases(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Case -> its rows by provider."""
    for case in dict.fromkeys(row["case"] for row in report["rows"]):
        yield case, {row["provider"]: row for row in report["rows"] if row["case"] == case}


def _side_by_side(suite: str, names: list[str], ours: dict[str, str], rivals: str) -> str:
    """A row for each case, dtype and rival, with the time of each of ours and the ratio to that rival. ours: provider -> heading."""
    reports, rows = [read(name) for name in names], []
    for report in reports:
        wrong = {(line["case"], line["provider"]) for line in report["wrong"]}
        for case, found in _cases(report):
            others = [row for row in found.values() if not row["ours"]] or [None]
            for number, rival in enumerate(others):
                cells = [case if number == 0 else "", report["stamp"]["dtype"]]
                cells.append("not here" if rival is None else f"{rival['provider']}: {_spread(rival)}")
                for provider in ours:
                    row = found.get(provider)
                    if row is None:
                        cells.append("wrong" if (case, provider) in wrong else "-")
                        continue
                    ratio = "" if rival is None else f" ({_ratio(rival['ms_median'] / row['ms_median'])})"
                    cells.append(f"{_ms(row['ms_median'])}{ratio}")
                rows.append(cells)
    table = _markdown(["median ms", "dtype", rivals, *ours.values()], rows)
    return f"{table}\n\n{_measured_on(suite, *reports)}"


def _full(suite: str, names: list[str]) -> str:
    """A row for each provider."""
    reports, rows = [read(name) for name in names], []
    for report in reports:
        for case, found in _cases(report):
            for number, row in enumerate(found.values()):
                cells = [
                    case if number == 0 else "",
                    report["stamp"]["dtype"],
                    row["provider"],
                    _spread(row),
                    str(row["steps"]),
                ]
                cells += [
                    _ratio(row["speedup"]),
                    _gflops(row["gflops"]),
                    f"{100 * row['ceiling_share']:.0f} %" if row["gflops"] else "-",
                ]
                rows.append(cells)
    head = ["case", "dtype", "provider", "median ms (quartiles)", "n", "speed", "GFLOPs", "of peak"]
    table = _markdown(head, rows)
    return f"{table}\n\n{_measured_on(suite, *reports)}"


def _memory(names: list[str]) -> str:
    """A row for each provider: the peak, and how far it rises above what is there between calls."""
    reports, rows = [read(name) for name in names], []
    for report in reports:
        for case, found in _cases(report):
            for number, row in enumerate(found.values()):
                peak = f"{row['peak_mb']:,.0f} ({_ratio(row['memory_ratio'])})"
                rise = f"{row['rise_mb']:,.0f} ({_ratio(row['rise_ratio'])})"
                rows.append([case if number == 0 else "", report["stamp"]["dtype"], row["provider"], peak, rise])
    table = _markdown(["case", "dtype", "provider", "peak MB (of the rival's)", "of that, not there between steps"], rows)
    stamps = [report["stamp"] for report in reports]
    return f"{table}\n\n{_place(*stamps)}. {_made('vlp-fast bench --suite memory', *stamps)}"


STEPS = ["cpu-steps-fp32", "cpu-steps-bf16"]
MEMORY = ["cpu-memory-bf16"]
GENERATION = ["cpu-generation-fp32", "cpu-generation-bf16"]
EMBED = ["cpu-embed-bf16"]
KERNELS = ["cpu-kernels-fp32"]
CHANGES = ["cpu-changes-bf16"]
# of an older processor, without AVX-512 and bf16
AVX2_STEPS, AVX2_MEMORY, AVX2_GENERATION = ["cpu-avx2-steps-fp32"], ["cpu-avx2-memory-fp32"], ["cpu-avx2-generation-fp32"]
AVX2_EMBED, AVX2_CHANGES = ["cpu-avx2-embed-fp32"], ["cpu-avx2-changes-fp32"]


def _steps() -> str:
    ours = {"vlp_fast published": "vlp_fast published", "vlp_fast packed": "packed"}
    return _side_by_side("steps", STEPS, ours, "published code (quartiles)")


def _generation() -> str:
    ours = {"vlp_fast": "vlp_fast", "vlp_fast, packed": "within `packed_weights`"}
    return _side_by_side("generate", GENERATION, ours, "rival (quartiles)")


def _extra_caption() -> str:
    """What a second caption of each image adds to a packed step."""
    reports, rows = [read(name) for name in STEPS], []
    for report in reports:
        for case, found in _cases(report):
            two = found.get("vlp_fast packed, 2 captions an image")
            if two is not None:
                one = found["vlp_fast packed"]["ms_median"]
                cells = [case, report["stamp"]["dtype"], _ms(one), _ms(two["ms_median"])]
                rows.append([*cells, f"{two['ms_median'] / one - 1:.2f} of a step"])
    table = _markdown(["step", "dtype", "1 caption an image, ms", "2 captions, ms", "a caption more"], rows)
    return f"{table}\n\n{_measured_on('steps', *reports)}"


def _embed(names: list[str]) -> str:
    """Ours over the peer, at every size and batch."""
    reports, by_case = [read(name) for name in names], {}
    for report in reports:
        column = f"{report['stamp']['size']} {report['stamp']['dtype']}"
        for case, found in _cases(report):
            ratios = [_ratio(row["speedup"]) for row in found.values() if row["ours"]]
            peer = next((row["provider"] for row in found.values() if not row["ours"]), "-")
            by_case.setdefault((case, peer), {})[column] = ", ".join(ratios)
    columns = [f"{r['stamp']['size']} {r['stamp']['dtype']}" for r in reports]
    rows = [[case, peer, *(found.get(column, "-") for column in columns)] for (case, peer), found in by_case.items()]
    table = _markdown(["case", "peer", *columns], rows)
    return f"{table}\n\nSpeed over the peer, then the same within `packed_weights`. {_measured_on('embed', *reports)}"


def _changes(names: list[str]) -> str:
    reports, rows = [read(name) for name in names], []
    for report in reports:
        notes = {line["case"]: line["note"].removeprefix("predicted: ") for line in report["notes"]}
        for case, found in _cases(report):
            tried = case.startswith("left out")
            with_it, without = (found["tried"], found["vlp_fast"]) if tried else (found["vlp_fast"], _other(found))
            gain = without["ms_median"] / with_it["ms_median"]
            cells = [case, report["stamp"]["dtype"], f"{_ratio(with_it['predicted'])}: {notes.get(case, '-')}"]
            rows.append([*cells, _spread(without), _spread(with_it), _ratio(gain)])
    head = ["change", "dtype", "predicted", "without, ms (quartiles)", "with it", "gain"]
    return f"{_markdown(head, rows)}\n\n{_measured_on('changes', *reports)}"


def _other(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return next(row for provider, row in found.items() if provider != "vlp_fast")


def _profile(name: str) -> str:
    """Kinds of operations down, cases across."""
    report = read(name)
    rows, stamp = report["rows"], report["stamp"]
    head = [f"ms, {stamp['dtype']}", *(f"{row['case'].partition(':')[0]}: {row['provider']}" for row in rows)]
    kinds = [key for key in rows[0] if key not in ("case", "provider")]
    table = _markdown(head, [[kind, *(_ms(row[kind]) for row in rows)] for kind in kinds])
    return f"{table}\n\n{_place(stamp)}. {_made('benchmarks/profile_steps.py', stamp)}"


def _scaling() -> str:
    report = read("cpu-scaling-fp32")
    lines = [f"* {line['model']}, {line['provider']}, {line['words']}" for line in report["fits"]]
    return "\n".join([*lines, "", _measured_on("scaling", report)])


TABLES: dict[str, Callable[[], str]] = {
    "steps": _steps,
    "generation": _generation,
    "extra-caption": _extra_caption,
    "embed": lambda: _embed(EMBED),
    "changes": lambda: _changes(CHANGES),
    "scaling": _scaling,
    "all-steps": lambda: _full("steps", STEPS),
    "memory": lambda: _memory(MEMORY),
    "avx-two-steps": lambda: _full("steps", AVX2_STEPS),
    "avx-two-memory": lambda: _memory(AVX2_MEMORY),
    "avx-two-generation": lambda: _full("generate", AVX2_GENERATION),
    "profile": lambda: _profile("cpu-profile-bf16"),
    "avx-two-embed": lambda: _embed(AVX2_EMBED),
    "avx-two-changes": lambda: _changes(AVX2_CHANGES),
    "avx-two-profile": lambda: _profile("cpu-avx2-profile-generation-fp32"),
    "all-generation": lambda: _full("generate", GENERATION),
    "kernels": lambda: _full("kernels", KERNELS),
}


# ------------------------------------------------------------------------------------------------------------------ rewriting


def rewritten(text: str) -> str:
    """The text with every table and print written anew. Raises: ValueError for a table that is not one of `TABLES`."""

    def table(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"a table must be one of {', '.join(TABLES)}; received {match[2]}.")
        return f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}"

    def printed(match: re.Match[str]) -> str:
        lines = _print(match[2].split())
        lines = lines[: int(match[3])] if match[3] else lines
        return "\n".join([match[1].rstrip("\n"), "```", *(line.rstrip() for line in lines), "```", match[4]])

    return PRINT.sub(printed, TABLE.sub(table, text))


def _print(arguments: list[str]) -> list[str]:
    """The lines that the command prints."""
    import os

    from typer.testing import CliRunner

    from vlp_fast.cli import app

    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH)
    try:
        result = CliRunner().invoke(app, arguments)
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    if result.exit_code:
        raise ValueError(f"vlp-fast {' '.join(arguments)} ends with {result.exit_code}: {result.output}")
    return result.output.rstrip().split("\n")


# -------------------------------------------------------------------------------------------------------------------- sources

# a ratio, a number with a unit of time, memory, rate or share, or a word that says as much
CLAIM = re.compile(
    r"\bx(?P<x>\d+(?:\.\d+)?)\b|(?<![\w.])(?P<times>\d+(?:\.\d+)?)x\b|"
    r"(?<![\w.,-])(?P<number>\d[\d,]*(?:\.\d+)?)\s?(?:ms|us|µs|s|seconds?|minutes?|[MGT]i?B(?:/s)?|[GT]?FLOPs?(?:/s)?|%|percent|"
    r"(?:images|texts|pairs|captions|tokens|words)(?:/s| a second))(?!\w)|"
    r"\b(?P<word>halv(?:es?|ed|ing)|doubl(?:es?|ed|ing)|times (?:faster|slower|as \w+|the (?:time|memory|speed|cost))|"
    r"(?:half|twice|thrice|third|quarter|fifth|eighth|tenth|factor of \w+)\b"
    r"(?=[^|.]*\b(?:time|memory|speed|fast|slow|faster|slower|cost)\b))",
    re.IGNORECASE,
)
SOURCE = re.compile(r"<!-- source: ([^,>]+), ([^>]+), ([^,>]+), (\w+) -->")
WORDS = {"half": 0.5, "twice": 2.0, "thrice": 3.0, "third": 1 / 3, "quarter": 0.25, "fifth": 0.2, "eighth": 0.125, "tenth": 0.1}
ROUGH = 0.2  # by which what a word says may differ from what was measured


def unsourced(text: str) -> list[str]:
    """Every claim outside tables, prints, fences and what ``vlp-fast evidence`` writes without a source that agrees, as "line: claim".

    A comment speaks for the claim right before it on its line. Raises: ValueError for a comment that names no one row.
    """
    begin, end = (re.escape(marker) for marker in MARKERS)
    kept = text
    for pattern in (TABLE, PRINT, re.compile(f"{begin}.*?{end}", re.DOTALL), re.compile("```.*?```", re.DOTALL)):
        kept = pattern.sub(lambda match: "\n" * match[0].count("\n"), kept)
    found = []
    for number, line in enumerate(kept.split("\n"), 1):
        prose = re.sub(r"`[^`]*`|<!--.*?-->", lambda match: " " * len(match[0]), line)
        claims = list(CLAIM.finditer(prose))
        ends = [*(following.start() for following in claims[1:]), len(line)]
        for claim, end_of_claim in zip(claims, ends, strict=False):
            source = SOURCE.search(line, claim.end(), end_of_claim)
            if source is None or not _agrees(claim, _value(source)):
                found.append(f"{number}: {claim[0].strip()}")
    return found


def _agrees(claim: re.Match[str], value: float) -> bool:
    kind = next(name for name, said in claim.groupdict().items() if said is not None)
    said = claim[kind].lower()
    if kind == "word":
        expected = WORDS.get(said)
        return expected is not None and abs(value / expected - 1) <= ROUGH
    if claim[0].endswith(("%", "percent")):
        value *= 100
    return round(value, len(said.partition(".")[2])) == float(said.replace(",", ""))


def _value(source: re.Match[str]) -> float:
    report = read(source[1].strip().removesuffix(".json"))
    rows = [row for row in report["rows"] if (row["case"], row["provider"]) == (source[2].strip(), source[3].strip())]
    if len(rows) != 1:
        raise ValueError(f"{source[1]} has {len(rows)} rows of {source[3]} at {source[2]}; a source needs one.")
    return float(rows[0][source[4]])


def main() -> int:
    """Rewrites the files; 1 where a claim has no source."""
    missing = []
    for path in FILES:
        text = rewritten(path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")
        missing += [f"{path.relative_to(ROOT)}:{claim} has no source in benchmarks/results/" for claim in unsourced(text)]
    for line in missing:
        print(line, file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
