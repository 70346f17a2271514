"""What was verified on a GPU, and whether today's kernels are those that were: read from the reports of ``benchmarks/gpu_check.py``.

A kernel family's source is hashed with every file of ``kernels/`` that it imports, so that a change of a shared helper or of a launch
number counts as a change. Nothing here imports triton or a kernel.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "FAMILIES",
    "MARKERS",
    "NOT_RUN",
    "Evidence",
    "default_results",
    "evidence",
    "kernel_files",
    "kernels_folder",
    "markdown_table",
    "read_reports",
    "rewrite_readme",
    "source_hash",
]

# family -> names of the files in kernels/ where it begins; shared helpers follow from their imports
FAMILIES: dict[str, tuple[str, ...]] = {
    "attention": ("attention_forward.py", "attention_backward.py", "attention_small.py"),
    "attention_pool": ("attention_pool*.py",),
    "multiway": ("multiway_*.py",),
    "linear_cross_entropy": ("linear_cross_entropy*.py",),
    "contrastive": ("contrastive*.py",),
    "hard_negatives": ("hard_negatives*.py",),
    "decode_attention": ("decode_attention*.py",),
}
SCHEMA = 1  # of a report of gpu_check.py; others are not read
NOT_RUN = "not run yet"
MARKERS = ("<!-- written by: vlp-fast evidence --readme README.md -->", "<!-- end of what vlp-fast evidence wrote -->")


@dataclass(frozen=True)
class Evidence:
    """What the reports say of one kernel family. Everything but `family`, `source` and `state` is None where it was not run.

    state: "verified", the newest complete check passed with today's source; "changed", it passed with another source; "failed", the
    newest check failed; "not run yet"; "no kernel", the family has no file.
    """

    family: str
    source: str | None
    state: str
    device: str | None = None
    date: str | None = None
    commit: str | None = None
    verified_source: str | None = None
    cases: int | None = None
    speed: dict[str, Any] | None = None
    report: str | None = None

    @property
    def is_todays_source(self) -> bool | None:
        """Whether today's source is the one that passed; None where none passed."""
        return None if self.verified_source is None else self.verified_source == self.source

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return {**asdict(self), "is_todays_source": self.is_todays_source}


def kernels_folder() -> Path:
    """Where vlp_fast.kernels lies. It is found, not imported, so triton need not be installed.

    Raises:
        FileNotFoundError: the installation has no kernels.
    """
    spec = importlib.util.find_spec("vlp_fast.kernels")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("this installation of vlp_fast has no vlp_fast.kernels.")
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def kernel_files(family: str, folder: Path | None = None) -> list[Path]:
    """The family's files, and every file of the folder that they import, directly or not; sorted by name.

    Raises:
        ValueError: an unknown family.
        FileNotFoundError: a relative import of a file that does not exist.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; received {family!r}.")
    folder = kernels_folder() if folder is None else folder
    todo = [path for pattern in FAMILIES[family] for path in sorted(folder.glob(pattern))]
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += _imported_files(path, folder)
    return sorted(found)


def _imported_files(path: Path, folder: Path) -> list[Path]:
    """Files named by the relative imports of a file: ``from ._configs import x``, ``from . import _configs``."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names += [node.module] if node.module else [alias.name for alias in node.names]
    files = [folder / f"{name.split('.')[0]}.py" for name in names]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{path.name} imports {file.name}, which is not in {folder}.")
    return files


def source_hash(family: str, folder: Path | None = None) -> str | None:
    """16 hexadecimal digits that change with any byte of `kernel_files` (line ends aside); None where the family has no kernel."""
    files = kernel_files(family, folder)
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        text = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{path.name} {len(text)}\n".encode() + text)
    return digest.hexdigest()[:16]


def default_results() -> Path:
    """``benchmarks/results`` of the checkout that the package is run from; it need not exist."""
    return Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """The reports of GPU checks in a folder, oldest first, each with its file's name under "file".

    Other JSON files are left out, and so are runs at tiny sizes or in the interpreter: they say nothing about a GPU.

    Raises:
        ValueError: a file that is not JSON, or a report of another schema.
    """
    reports = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}.") from None
        if not isinstance(report, dict) or report.get("kind") != "gpu_check":
            continue
        if report.get("schema") != SCHEMA:
            raise ValueError(f"{path} has schema {report.get('schema')!r}; this version reads schema {SCHEMA}.")
        if report["stamp"]["device"] == "cuda" and not report["tiny"]:
            reports.append({**report, "file": path.name})
    return sorted(reports, key=lambda report: report["stamp"]["date"])


def evidence(reports: Iterable[dict[str, Any]], folder: Path | None = None) -> list[Evidence]:
    """One `Evidence` per family, from reports as `read_reports` gives them. folder: of the kernels; default: those installed."""
    newest_first = list(reports)[::-1]
    return [_evidence(family, source_hash(family, folder), newest_first) for family in FAMILIES]


def _evidence(family: str, source: str | None, newest_first: list[dict[str, Any]]) -> Evidence:
    runs = [(report, report["families"][family]) for report in newest_first if family in report["families"]]
    # a run that was cut short and found nothing wrong proves nothing and contradicts nothing
    decisive = [(report, run) for report, run in runs if run["status"] in ("passed", "failed")]
    passed = next(((report, run) for report, run in decisive if run["status"] == "passed"), None)
    if source is None:
        state = "no kernel"
    elif not decisive:
        state = NOT_RUN
    elif decisive[0][1]["status"] == "failed":
        state = "failed"
    else:
        state = "verified" if decisive[0][1]["source"] == source else "changed"
    if passed is None:
        return Evidence(family, source, state)
    report, run = passed
    stamp = report["stamp"]
    # a newer check of the same source may have timed nothing
    timings = (
        [row for row in other["timings"] if row["family"] == family]
        for other, found in decisive
        if found["status"] == "passed" and found["source"] == run["source"]
    )
    return Evidence(
        family,
        source,
        state,
        device=stamp["device_name"],
        date=stamp["date"],
        commit=stamp["commit"],
        verified_source=run["source"],
        cases=run["passed"],
        speed=next(filter(None, map(_speed, timings)), None),
        report=report["file"],
    )


def _speed(timings: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How often our time fits into that of the fastest rival, over the shapes where there was one."""
    ratios = []
    for row in timings:
        rivals = [other["us_median"] for other in timings if _same_case(row, other) and not other["ours"]]
        if row["ours"] and rivals:
            ratios.append(min(rivals) / row["us_median"])
    if not ratios:
        return None
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return {"shapes": len(ratios), "mean": mean, "least": min(ratios), "most": max(ratios)}


def _same_case(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[name] == b[name] for name in ("case", "direction", "dtype"))


def markdown_table(rows: Iterable[Evidence]) -> str:
    """README's table: a row per family."""
    lines = [
        "| kernels | verified on | date | commit | today's source | against the fastest rival |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.device is None:
            cells = [NOT_RUN if row.state == "no kernel" else row.state, "", "", "", ""]
        else:
            cells = [row.device, str(row.date)[:10], f"`{row.commit}`", TODAY[row.state], speed_text(row.speed)]
        lines.append(f"| {row.family} | " + " | ".join(cell or "-" for cell in cells) + " |")
    return "\n".join(lines)


TODAY = {"verified": "the one verified", "changed": "changed since", "failed": "failed since", "no kernel": "no kernel"}


def speed_text(speed: dict[str, Any] | None) -> str:
    """``x1.31 (x0.98 to x1.70, shapes: 9)``, or ``not timed``."""
    if speed is None:
        return "not timed"
    return f"x{speed['mean']:.2f} (x{speed['least']:.2f} to x{speed['most']:.2f}, shapes: {speed['shapes']})"


def rewrite_readme(text: str, rows: Iterable[Evidence]) -> str:
    """The text of a README with `markdown_table` between the two markers.

    Raises:
        ValueError: the markers are not there once each and in order.
    """
    begin, end = MARKERS
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the file must hold {begin!r} and, after it, {end!r}, once each.")
    before, after = text.index(begin) + len(begin), text.index(end)
    return f"{text[:before]}\n\n{markdown_table(rows)}\n\n{text[after:]}"
