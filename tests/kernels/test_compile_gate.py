"""What the compiler makes of every configuration, for GPUs that need not be here: held against limits and committed budgets."""

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from vlp_fast.kernels import _compile
from vlp_fast.kernels._compile import CompileReport, cases_to_compile, source_hash, violations
from vlp_fast.kernels._compile_cases import compile_cases
from vlp_fast.kernels._configs import SMALL_ROWS, attention_config, attention_configs

ROOT = Path(__file__).parents[2]
GOOD = CompileReport(registers=100, stack=0, spills=0, shared_bytes=1024, wgmma=4, tcgen05=4, mma=4, cp_async=0)


@pytest.mark.heavy
def test_compile_gate_holds(tmp_path):
    """`make compile-gate`: another process compiles what changed and a sample, without the interpreter of other tests."""
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
        (kind, f"{c.block_m}x{c.block_n} w{c.num_warps} s{c.num_stages}", dtype) for kind, c, _, dtype, _ in attention_configs()
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
            assert set(budgets[case.name]) == {"sources", *(case.targets or _compile.TARGETS)}


def test_compile_budgets_are_those_of_the_oldest_and_a_newer_triton():
    (oldest,) = re.findall(r'"triton>=([\d.]+)', (ROOT / "setup.py").read_text(encoding="utf-8"))
    versions = [[int(part) for part in version.split(".")] for version in _compile.read_budgets()]
    assert len(versions) > 1
    assert min(versions)[:2] == [int(part) for part in oldest.split(".")]


def test_compile_table_is_that_of_the_budgets():
    assert _compile.TABLE.read_text(encoding="utf-8") == _compile.table(_compile.read_budgets())


# ------------------------------------------------------------------------------------------------ what need not be compiled


def _selected(changed=(), salt="", edit=None):
    """Names of the cases to compile where the budgets' hashes are those of now, but for `changed`."""
    cases = list(compile_cases())
    hashes = {case.name: source_hash(case) for case in cases}
    budgets = {name: {"sources": "other" if name in changed else value} for name, value in hashes.items()}
    return [[case.name for case in part] for part in cases_to_compile(cases, hashes, edit(budgets) if edit else budgets, salt)]


def test_compile_gate_samples_what_is_unchanged():
    names = [case.name for case in compile_cases()]
    changed, sample = _selected()
    assert changed == []
    assert set(sample) < set(names)
    assert len(sample) == -(-len(names) // 10)
    assert _selected() == [changed, sample]


def test_compile_gate_compiles_every_changed_case():
    names = {case.name for case in compile_cases() if case.family == "multiway_linear"}
    changed, sample = _selected(names)
    assert set(changed) == names
    assert not names & set(sample)


def test_compile_gate_compiles_cases_without_budget_or_hash():
    first, second = [case.name for case in compile_cases()][:2]
    changed, _ = _selected(edit=lambda budgets: {n: {} if n == first else b for n, b in budgets.items() if n != second})
    assert changed == [first, second]


def test_compile_gate_samples_other_cases_when_the_budgets_change():
    text = _compile.BUDGETS.read_text(encoding="utf-8")
    samples = [_selected(salt=salt)[1] for salt in (text, text.replace("[", "[1", 1))]
    assert samples[0] != samples[1]


def test_source_hash_covers_a_helper_of_a_helper(tmp_path):
    files = {
        "kernel.py": "from ._helper import _tile\nfrom ._configs import config\n\ndef kernel(x): ...\n",
        "_helper.py": "from . import _deeper\n",
        "_deeper.py": "SIZE = 1\n",
        "_configs.py": "",
        "other.py": "",
    }

    def hashed(**changes):
        for name, text in files.items():
            (tmp_path / name).write_text(text + changes.get(name.removesuffix(".py"), ""), encoding="utf-8")
        namespace = {}
        exec(compile("def kernel(x): ...", tmp_path / "kernel.py", "exec"), namespace)
        return source_hash(replace(next(compile_cases()), jit=SimpleNamespace(fn=namespace["kernel"], arg_names=["x"])))

    same = hashed()
    assert hashed(other="# changed\n") == hashed(_configs="# changed\n") == same
    assert len({same, hashed(kernel="# changed\n"), hashed(_helper="# changed\n"), hashed(_deeper="# changed\n")}) == 4


def test_source_hash_covers_the_case():
    case = next(case for case in compile_cases() if case.family == "attention")
    changes = [
        {"constexprs": {**case.constexprs, "BLOCK_M": 128}},
        {"options": {**case.options, "num_warps": 1}},
        {"types": {**case.types, "q": "*fp64"}},
        {"matrix": not case.matrix},
        {"targets": ("sm_90",)},
    ]
    assert len({source_hash(case), *(source_hash(replace(case, **change)) for change in changes)}) == len(changes) + 1


def test_launch_numbers_reach_kernels_only_through_cases():
    """What a file imports from _configs.py is read in functions that launch, not in kernels nor where a file's constants are made."""
    for path in set((ROOT / "kernels").glob("*.py")) - set((ROOT / "kernels").glob("_compile_cases*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module in ("_configs", None)]
        numbers = {alias.asname or alias.name for node in imports for alias in node.names}
        for node in tree.body:
            jitted = isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(mark) for mark in node.decorator_list)
            if jitted or not isinstance(node, ast.FunctionDef):
                read = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)} & numbers
                assert not read, f"{path.name}:{node.lineno} reads {read} from _configs.py"


# ------------------------------------------------------------------------------------------------------------------ limits


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
        attention_config("forward", head_dim, itemsize, 64, False)


def test_attention_config_takes_fewer_rows_before_sm90():
    newer, older = (attention_config("backward_key", 64, 2, 577, before_sm90) for before_sm90 in (False, True))
    assert (newer.block_m, older.block_m) == (32, 16)
    assert (newer.block_n, newer.num_warps) == (older.block_n, older.num_warps)
