"""What the compiler makes of every configuration, for GPUs that need not be here: held against limits and committed budgets."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from vlp_fast.kernels import _compile
from vlp_fast.kernels._compile import CompileReport, violations
from vlp_fast.kernels._compile_cases import compile_cases
from vlp_fast.kernels._configs import SMALL_ROWS, attention_config, attention_configs

GOOD = CompileReport(registers=100, stack=0, spills=0, shared_bytes=1024, wgmma=4, tcgen05=4, mma=4, cp_async=0)


def test_compile_gate_holds(tmp_path):
    """One process compiles everything, without the interpreter in which other tests run."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "triton")
    command = [sys.executable, "-m", "vlp_fast.kernels._compile", "--check"]
    process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    print(process.stdout)
    assert process.returncode == 0, process.stdout + process.stderr[-4000:]


def test_compile_cases_are_told_apart_by_name():
    names = [case.name for case in compile_cases()]
    assert len(set(names)) == len(names)


def test_compile_cases_cover_every_attention_config():
    compiled = {(case.kernel, case.config, case.dtype) for case in compile_cases() if case.family == "attention"}
    expected = {
        (kind, f"{c.block_m}x{c.block_n} w{c.num_warps} s{c.num_stages}", dtype) for kind, c, _, dtype in attention_configs()
    }
    for (kind, itemsize, _), configs in SMALL_ROWS.items():
        dtype = {2: "bf16", 4: "fp32"}[itemsize]
        expected |= {(f"small_{kind}", f"{c.block}x{c.block} w{c.num_warps} s1", dtype) for c in configs}
    assert compiled == expected


def test_compile_budgets_list_exactly_the_cases():
    names = [case.name for case in compile_cases()]
    for version, budgets in _compile.read_budgets().items():
        assert list(budgets) == names, f"python -m vlp_fast.kernels._compile --write, with Triton {version}"
        for case in compile_cases():
            assert set(budgets[case.name]) == set(case.targets or _compile.TARGETS)


def test_compile_table_is_that_of_the_budgets():
    budgets = _compile.read_budgets()
    newest = max(budgets, key=lambda version: [int(part) for part in version.split(".")])
    assert _compile.TABLE.read_text(encoding="utf-8") == _compile.table(newest, budgets[newest])


def _broken(report, budget=None, **changes):
    case = replace(next(compile_cases()), **changes)
    budgets = None if budget is None else {case.name: {"sm_90": budget}}
    return list(violations([case], {case.name: {"sm_90": report}}, budgets))


def test_compile_gate_lets_a_good_report_pass():
    assert _broken(GOOD) == []
    assert _broken(GOOD, [100, 0, 1024, 12]) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stack": 8, "spills": 8}, "spills 8 bytes"),
        ({"stack": 64}, "64 bytes of stack"),
        ({"shared_bytes": 300 * 1024}, "bytes of shared memory"),
        ({"wgmma": 0, "tcgen05": 0, "mma": 0}, "no matrix instruction"),
        ({"wgmma": 0}, "does not use wgmma"),
    ],
)
def test_compile_gate_names_a_broken_limit(change, words):
    assert any(words in line for line in _broken(replace(GOOD, **change), matrix=True, wide=True))


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ([99, 0, 1024, 12], "uses 100 registers; its budget is 99"),
        ([100, 0, 1000, 12], "its budget is 1000"),
        ([100, 0, 1024, 13], "12 matrix instructions; it had 13"),
    ],
)
def test_compile_gate_names_a_broken_budget(budget, words):
    assert any(words in line for line in _broken(GOOD, budget))


def test_compile_gate_asks_for_a_missing_budget():
    case = next(compile_cases())
    assert "has no budget" in "".join(violations([case], {case.name: {"sm_90": GOOD}}, {}))


def test_compile_budgets_are_one_line_per_case():
    text = _compile.BUDGETS.read_text(encoding="utf-8")
    assert text == _compile._dump(json.loads(text))


@pytest.mark.parametrize(("head_dim", "itemsize"), [(8, 2), (136, 2), (68, 2), (64, 8)])
def test_attention_config_refuses_what_no_kernel_takes(head_dim, itemsize):
    with pytest.raises(ValueError, match="head_dim from 16 to 128"):
        attention_config("forward", head_dim, itemsize, 64)
