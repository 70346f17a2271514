"""Compile kernels for GPUs that are not here, and read what the compiler made of them: registers, spills, shared memory, instructions.

    python -m vlp_fast.kernels._compile                             print the table of every kernel, configuration and target
    python -m vlp_fast.kernels._compile --write kernels/COMPILE.md  write it
    python -m vlp_fast.kernels._compile --gate                      the part of it that the test compiles, as JSON lines

It runs without TRITON_INTERPRET, under which there is nothing to compile.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._configs import AttentionConfig, attention_configs
from .attention_backward import _attention_backward_key_kernel, _attention_backward_query_kernel
from .attention_forward import _attention_forward_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
WORKERS = 2


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


def compile_report(
    kernel: triton.JITFunction,
    types: Mapping[str, str],
    constexprs: Mapping[str, object],
    options: Mapping[str, object],
    target: GPUTarget,
) -> CompileReport:
    """Compile a kernel as a launch would.

    Args:
        kernel: a `triton.jit` function.
        types: Triton's type of every argument that is not a constexpr. Pointers, and sizes marked ``"i32:16"``, are divisible by 16.
        constexprs: the values of the others; None for an absent pointer, 1 for a size that is 1.
        options: num_warps, num_stages, ... as at a launch.
        target: one of `TARGETS`, or like it.
    """
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        kind, _, divisor = ("constexpr", "", "") if name in constexprs else types[name].partition(":")
        signature[name] = kind
        if divisor or kind.startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=dict(constexprs), attrs=attributes)
    compiled = triton.compile(source, target=target, options=dict(options))
    if target.backend == "hip":
        return _amd_report(compiled.asm["amdgcn"], compiled.metadata.shared)
    registers, stack = _nvidia_usage(compiled.asm["cubin"])
    spills = stack
    if stack:
        spills = _nvidia_usage(triton.compile(source, target=target, options={**options, "maxnreg": 255}).asm["cubin"])[1]
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


# ---------------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class AttentionVariant:
    """One compilation of an attention kernel."""

    kind: str
    dtype: str
    head_dim: int
    config: AttentionConfig
    causal: bool
    dropout: bool
    precision: str  # of the products of fp32: ieee or tf32

    @property
    def label(self) -> str:
        flags = [*(["causal"] if self.causal else []), *(["dropout"] if self.dropout else [])]
        return " ".join([*flags, *(["tf32"] if self.precision == "tf32" else [])]) or "plain"


_KERNELS = {
    "forward": _attention_forward_kernel,
    "backward_query": _attention_backward_query_kernel,
    "backward_key": _attention_backward_key_kernel,
}
_TENSORS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
_TYPES = {
    **dict.fromkeys(("lse", "dlse", "delta"), "*fp32"),
    **dict.fromkeys(("query_offsets", "key_offsets", "edge_offsets", "edge_key", "edge_causal"), "*i32"),
    **dict.fromkeys(("key_edge_offsets", "key_edge_query", "key_edge_causal"), "*i32"),
    "seed": "*i64",
    **dict.fromkeys(("num_heads", "num_heads_k", "tiles", "rows_q", "dropout_threshold"), "i32"),
    **dict.fromkeys(("q_row_stride", "q_head_stride", "k_row_stride", "k_head_stride"), "i32:16"),
    "softmax_scale": "fp32",
}


def attention_variants(gate: bool) -> Iterator[AttentionVariant]:
    """What to compile: every configuration with causal edges and dropout, the most a kernel can be asked for; at the widest head it
    serves, and at 64, also with less. The gate leaves out the other heads."""
    chosen = list(attention_configs())
    widest = {(kind, config, dtype): head_dim for kind, config, head_dim, dtype in chosen}
    for kind, config, head_dim, dtype in chosen:
        full = head_dim == widest[kind, config, dtype] or (dtype == "bf16" and head_dim == 64)
        if full or not gate:
            yield AttentionVariant(kind, dtype, head_dim, config, True, True, "ieee")
        if full and dtype == "fp32":
            yield AttentionVariant(kind, dtype, head_dim, config, True, True, "tf32")
        if full and dtype == "bf16":
            yield AttentionVariant(kind, dtype, head_dim, config, False, False, "ieee")
            if not gate:
                yield AttentionVariant(kind, dtype, head_dim, config, True, False, "ieee")
                yield AttentionVariant(kind, dtype, head_dim, config, False, True, "ieee")


def attention_report(variant: AttentionVariant, target: str) -> CompileReport:
    """Compile one variant, with as many key heads as query heads, for an entry of `TARGETS`."""
    kernel, config = _KERNELS[variant.kind], variant.config
    constexprs = {
        "group": 1,
        "HEAD_DIM": variant.head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "HAS_CAUSAL": variant.causal,
        "INPUT_PRECISION": variant.precision,
        **({} if variant.dropout else {"seed": None}),
    }
    types = {**dict.fromkeys(_TENSORS, f"*{variant.dtype}"), **_TYPES}
    return compile_report(kernel, types, constexprs, config.options, TARGETS[target])


def attention_reports(variants: Iterable[AttentionVariant]) -> Iterator[tuple[AttentionVariant, dict[str, CompileReport]]]:
    """Each variant with its report per target; no target that TF32 products do not exist on."""
    jobs = [(v, target) for v in variants for target in TARGETS if v.precision == "ieee" or target != "gfx942"]
    with ProcessPoolExecutor(WORKERS) as pool:
        results = pool.map(attention_report, *zip(*jobs, strict=True))
        reports: dict[AttentionVariant, dict[str, CompileReport]] = {}
        for (variant, target), report in zip(jobs, results, strict=True):
            reports.setdefault(variant, {})[target] = report
    yield from reports.items()


# -------------------------------------------------------------------------------------------------------------------- table

TABLE_HEAD = """\
# What the compiler makes of every configuration

Written by `python -m vlp_fast.kernels._compile --write kernels/COMPILE.md` with Triton {version}; no GPU took part, and no number here is
a speed. Each cell: registers per thread · KB of shared memory · matrix instructions in the text (w wgmma, t tcgen05, m mma.sync or
mfma) · s, bytes of stack per thread, where there are any. tile: query rows x key rows. flags: what the kernel was compiled with.
A few bytes of stack beside 80, 96, 128 or 168 registers are ptxas's trade for one more block per multiprocessor; a **bold** s would be
a spill that remains when every register may be used. The gate (tests/kernels/test_compile_gate.py) allows none.

| kernel | dtype | head_dim | tile | warps | stages | flags | {targets} |
|---|---|---|---|---|---|---|{rule}|
"""


def table(rows: Iterable[tuple[AttentionVariant, dict[str, CompileReport]]]) -> str:
    """COMPILE.md."""
    text = TABLE_HEAD.format(version=triton.__version__, targets=" | ".join(TARGETS), rule="|".join("---" for _ in TARGETS))
    for variant, reports in rows:
        c = variant.config
        cells = [
            variant.kind,
            variant.dtype,
            variant.head_dim,
            f"{c.block_m}x{c.block_n}",
            c.num_warps,
            c.num_stages,
            variant.label,
        ]
        text += "| " + " | ".join(str(cell) for cell in [*cells, *(_cell(reports.get(target)) for target in TARGETS)]) + " |\n"
    return text


def _cell(report: CompileReport | None) -> str:
    if report is None:
        return "-"
    matrix = "".join(f" {letter}{n}" for letter, n in (("w", report.wgmma), ("t", report.tcgen05), ("m", report.mma)) if n)
    stack = f" · **s{report.stack}**" if report.spills else f" · s{report.stack}" if report.stack else ""
    return f"{report.registers} · {report.shared_bytes / 1024:.1f} ·{matrix or ' 0'}{stack}"


def main() -> None:
    """The command line of this file."""
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it.")
    parser = argparse.ArgumentParser(
        prog="python -m vlp_fast.kernels._compile", description="compile every kernel for every target"
    )
    parser.add_argument(
        "--gate", action="store_true", help="only what the test compiles, one JSON object per variant and target"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table to FILE")
    arguments = parser.parse_args()
    reports = attention_reports(attention_variants(arguments.gate))
    if arguments.gate:
        for variant, by_target in reports:
            for target, report in by_target.items():
                print(json.dumps({**asdict(variant), "label": variant.label, "target": target, **asdict(report)}))
    elif arguments.write:
        arguments.write.write_text(table(reports), encoding="utf-8")
    else:
        print(table(reports))


if __name__ == "__main__":
    main()
