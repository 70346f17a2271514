"""Compile kernels for GPUs that are not here, and read what the compiler made of them: registers, spills, shared memory, instructions.

    python -m vlp_fast.kernels._compile --check          compile what changed and a sample; exit 1 where a limit or a budget is broken
    python -m vlp_fast.kernels._compile --check --all    compile every case of _compile_cases.py
    python -m vlp_fast.kernels._compile --write          the same, and write compile_budgets.json and COMPILE.md
    ... --only attention,decode_attention                some families

Limits hold with every Triton: no spills, shared memory that fits, matrix instructions where there are products of tiles. Budgets are what
was measured with one version and committed; a case may get better, not worse. It runs without TRITON_INTERPRET, under which there is
nothing to compile.

What a compilation gives depends on Triton, on the kernel's file with those it imports and on its case, so a case whose budget was written
from the same three, and broke nothing then, breaks nothing now. What no hash sees, such as an edit of this file, of a budget or of the
compiler's installation, is left to the sample: one in ten of the unchanged cases, others as soon as the file of budgets changes.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._compile_case import CompileCase
from ._compile_cases import compile_cases

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
STACK_LIMIT = 32  # bytes that ptxas may give up for one more block per multiprocessor; with every register allowed: none
SAMPLE = 10  # of unchanged cases, one in so many is compiled
WIDE_INSTRUCTION = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mma"}
BUDGETS = Path(__file__).with_name("compile_budgets.json")
TABLE = Path(__file__).with_name("COMPILE.md")


# ---------------------------------------------------------------------------------------------------------- one compilation


@dataclass(frozen=True)
class CompileReport:
    """What one compilation uses. Instructions are counted in the text; how often each runs is not known."""

    registers: int  # per thread
    stack: int  # bytes per thread in memory beside the registers
    spills: int  # what is left of `stack` if every register may be used: the rest was given up for one more block per multiprocessor
    shared_bytes: int
    wgmma: int
    tcgen05: int
    mma: int  # mma.sync; on gfx942 mfma
    cp_async: int

    @property
    def products(self) -> int:
        """Matrix instructions of any kind."""
        return self.wgmma + self.tcgen05 + self.mma


def compile_report(case: CompileCase, target: GPUTarget) -> CompileReport:
    """Compile a kernel as a launch would, for an entry of `TARGETS` or like it."""
    signature, attributes = {}, {}
    for index, name in enumerate(case.jit.arg_names):
        kind, _, divisor = ("constexpr", "", "") if name in case.constexprs else case.types[name].partition(":")
        signature[name] = kind
        if divisor or kind.startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.jit, signature, constexprs=dict(case.constexprs), attrs=attributes)
    compiled = triton.compile(source, target=target, options=dict(case.options))
    if target.backend == "hip":
        return _amd_report(compiled.asm["amdgcn"], compiled.metadata.shared)
    registers, stack = _nvidia_usage(compiled.asm["cubin"])
    spills = stack
    most = min(255, 65536 // (32 * compiled.metadata.num_warps))  # registers a thread can have
    if stack and registers < most:
        spills = _nvidia_usage(triton.compile(source, target=target, options={**case.options, "maxnreg": most}).asm["cubin"])[1]
    patterns = (r"wgmma\.mma_async", r"tcgen05\.mma\.", r"\bmma\.sync", r"cp\.async\.c[ag]")
    counts = (len(re.findall(pattern, compiled.asm["ptx"])) for pattern in patterns)
    return CompileReport(registers, stack, spills, compiled.metadata.shared, *counts)


def _amd_report(text: str, shared_bytes: int) -> CompileReport:
    registers, stack = (int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in ("vgpr_count", "private_segment_fixed_size"))
    return CompileReport(registers, stack, stack, shared_bytes, 0, 0, text.count("v_mfma"), 0)


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


# ---------------------------------------------------------------------------------------------------------------- all of them

Reports = dict[str, dict[str, CompileReport]]  # name of the case -> target -> report
Budgets = Mapping[
    str, Mapping[str, Any]
]  # case -> target -> registers, stack, bytes of shared memory, matrix instructions; "sources" -> hash


def _report_of(name: str, target: str) -> CompileReport:
    # a kernel does not travel between processes; its name does
    case = next(case for case in compile_cases() if case.name == name)
    return compile_report(case, TARGETS[target])


def compile_all(cases: Iterable[CompileCase], workers: int) -> Reports:
    """Every case for each of its targets."""
    jobs = [(case.name, target) for case in cases for target in case.targets or TARGETS]
    reports: Reports = {}
    with ProcessPoolExecutor(workers) as pool:
        for (name, target), report in zip(jobs, pool.map(_report_of, *zip(*jobs, strict=True)), strict=True):
            reports.setdefault(name, {})[target] = report
    return reports


def violations(cases: Iterable[CompileCase], reports: Reports, budgets: Budgets | None) -> Iterator[str]:
    """A sentence for every limit and, where this Triton has `budgets`, every budget that a report breaks."""
    for case in cases:
        for target, report in reports[case.name].items():
            where = f"{case.name} on {target}"
            if report.spills:
                yield f"{where} spills {report.spills} bytes per thread; none may be spilled."
            elif report.stack > STACK_LIMIT:
                yield f"{where} keeps {report.stack} bytes of stack per thread; {STACK_LIMIT} are allowed."
            if report.shared_bytes > SHARED_LIMIT[target]:
                yield f"{where} needs {report.shared_bytes} bytes of shared memory; there are {SHARED_LIMIT[target]}."
            if case.matrix and not report.products:
                yield f"{where} uses no matrix instruction."
            if case.wide and not getattr(report, WIDE_INSTRUCTION[target]):
                yield f"{where} does not use {WIDE_INSTRUCTION[target]}."
            if budgets is not None:
                yield from _over_budget(where, report, budgets.get(case.name, {}).get(target))


def _over_budget(where: str, report: CompileReport, budget: list[int] | None) -> Iterator[str]:
    if budget is None:
        yield f"{where} has no budget in {BUDGETS.name}; write it with --write."
        return
    names = ("registers", "stack", "shared_bytes")
    for name, allowed in zip(names, budget[:3], strict=True):
        if getattr(report, name) > allowed:
            yield f"{where} uses {getattr(report, name)} {name}; its budget is {allowed}."
    if report.products < budget[3]:
        yield f"{where} has {report.products} matrix instructions; it had {budget[3]}."


def budgets_of(reports: Reports) -> dict[str, dict[str, Any]]:
    """What `violations` takes, without hashes."""
    return {
        name: {target: [r.registers, r.stack, r.shared_bytes, r.products] for target, r in by_target.items()}
        for name, by_target in reports.items()
    }


def read_budgets() -> dict[str, dict[str, dict[str, Any]]]:
    """The committed budgets by version of Triton."""
    return json.loads(BUDGETS.read_text(encoding="utf-8")) if BUDGETS.exists() else {}


# ------------------------------------------------------------------------------------------------ what need not be compiled


def source_hash(case: CompileCase) -> str:
    """Of the case, and of the kernel's file with every file that it imports, directly or not.

    _configs.py is left out: its values reach a kernel as those of the case, and no other way (tests/kernels/test_compile_gate.py).
    """
    arguments = [(name, case.constexprs.get(name, case.types.get(name))) for name in case.jit.arg_names]
    parts = [repr((case.name, arguments, sorted(case.options.items()), case.matrix, case.wide, case.targets))]
    found: set[Path] = set()
    left = [Path(inspect.getfile(case.jit.fn))]
    while left:
        file = left.pop()
        if file not in found and file.name != "_configs.py":
            found.add(file)
            left += [file.with_name(f"{name}.py") for name in _imported(file.read_text(encoding="utf-8"))]
    parts += [f"{file.name}\n{file.read_text(encoding='utf-8')}" for file in sorted(found)]
    return _hash("\0".join(parts))


@lru_cache
def _imported(text: str) -> list[str]:
    """Files of the same folder that a file imports; laws of imports forbid it others of the library."""
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return [name for node in imports for name in ([node.module] if node.module else [alias.name for alias in node.names])]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cases_to_compile(
    cases: Iterable[CompileCase], hashes: Mapping[str, str], budgets: Budgets, salt: str
) -> tuple[list[CompileCase], list[CompileCase]]:
    """The cases that are not as they were when their budgets were written, and of the others a sample that `salt` chooses."""
    changed, unchanged = [], []
    for case in cases:
        same = budgets.get(case.name, {}).get("sources") == hashes[case.name]
        (unchanged if same else changed).append(case)
    unchanged.sort(key=lambda case: _hash(salt + case.name))
    return changed, unchanged[: -(-len(unchanged) // SAMPLE)]


# -------------------------------------------------------------------------------------------------------------------- table

TABLE_HEAD = """\
# What the compiler makes of every configuration

Written by `python -m vlp_fast.kernels._compile --write` from compile_budgets.json, with Triton {newest}; that file has the same for
{others}. No GPU took part, and no number here is a speed. Each cell: registers per thread · KB of shared memory · matrix instructions in
the text · s, bytes of stack per thread, where there are any: ptxas's trade for one more block per multiprocessor, none of which is left
when every register may be used. config: tile, warps w, stages s. flags: what the kernel was compiled with. `--check`, which
`make compile-gate` runs with every Triton here, fails where a cell gets worse.

| kernel | dtype | shape | config | flags | {targets} |
|---|---|---|---|---|{rule}|
"""


def table(committed: Mapping[str, Budgets]) -> str:
    """COMPILE.md."""
    *others, newest = sorted(committed, key=lambda version: [int(part) for part in version.split(".")])
    targets, rule = " | ".join(TARGETS), "|".join("---" for _ in TARGETS)
    text = TABLE_HEAD.format(newest=newest, others=" and ".join(others) or "no other Triton", targets=targets, rule=rule)
    for name, by_target in committed[newest].items():
        family, kernel, *rest = name.split(" | ")
        cells = [f"{family} {kernel}", *rest, *(_cell(by_target.get(target)) for target in TARGETS)]
        text += "| " + " | ".join(cells) + " |\n"
    return text


def _cell(budget: list[int] | None) -> str:
    if budget is None:
        return "-"
    registers, stack, shared_bytes, products = budget
    return f"{registers} · {shared_bytes / 1024:.1f} · {products}" + (f" · s{stack}" if stack else "")


def main() -> int:
    """The command line of this file."""
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it.")
    parser = argparse.ArgumentParser(
        prog="python -m vlp_fast.kernels._compile", description="compile every kernel for every target"
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help="hold what changed, and a sample, against limits and budgets")
    mode.add_argument("--write", action="store_true", help=f"write {BUDGETS.name} and {TABLE.name} for this Triton")
    parser.add_argument("--all", action="store_true", help="check also what has not changed; --write always compiles it")
    parser.add_argument("--only", metavar="FAMILY,...", help="compile these families only")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every report to FILE")
    arguments = parser.parse_args()
    cases = list(compile_cases())
    if arguments.only:
        families = arguments.only.split(",")
        unknown = set(families) - {case.family for case in cases}
        if unknown:
            parser.error(f"--only must name families of {sorted({case.family for case in cases})}; received {sorted(unknown)}.")
        cases = [case for case in cases if case.family in families]
    hashes = {case.name: source_hash(case) for case in cases}
    known = read_budgets().get(triton.__version__)
    changed, sample = cases, list[CompileCase]()
    if known is not None and not arguments.write and not arguments.all:
        changed, sample = cases_to_compile(cases, hashes, known, BUDGETS.read_text(encoding="utf-8"))
    compiled = changed + sample
    reports = compile_all(compiled, arguments.workers)
    if arguments.json:
        found = {name: {target: asdict(r) for target, r in by_target.items()} for name, by_target in reports.items()}
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    budgets = budgets_of(reports) if arguments.write else known
    broken = {case.name: list(violations([case], reports, budgets)) for case in compiled}
    lines = [line for found in broken.values() for line in found]
    print(
        f"Triton {triton.__version__}: {len(cases)} cases. Compiled: {len(compiled)} ({sum(map(len, reports.values()))} compilations), "
        f"{len(sample)} of them the sample of what is unchanged. Skipped as unchanged: {len(cases) - len(compiled)}. Broken: {len(lines)}."
    )
    if budgets is None:
        print(f"{BUDGETS.name} has no budgets for Triton {triton.__version__}: only the limits were checked.")
    print("\n".join(lines))
    if arguments.write:
        # without a hash, what breaks a limit counts as changed: every check compiles it
        holding = {name: {"sources": hashes[name]} for name, found in broken.items() if not found}
        _write({name: {**holding.get(name, {}), **budget} for name, budget in budgets_of(reports).items()})
    return 1 if lines else 0


def _write(budgets: Budgets) -> None:
    """Put the budgets of this Triton beside those of cases that were not compiled, and make the table anew."""
    committed = read_budgets()
    merged = {**committed.get(triton.__version__, {}), **budgets}
    committed[triton.__version__] = {case.name: merged[case.name] for case in compile_cases() if case.name in merged}
    BUDGETS.write_text(_dump(committed), encoding="utf-8")
    TABLE.write_text(table(committed), encoding="utf-8")


def _dump(committed: Mapping[str, Mapping[str, object]]) -> str:
    """JSON with one line per case."""
    versions = []
    for version in sorted(committed):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in committed[version].items())
        versions.append(f" {json.dumps(version)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(versions) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
