"""What the compiler makes of every configuration, for GPUs that need not be here: no spills, memory that fits, matrix instructions."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from vlp_fast.kernels._configs import AttentionConfig, attention_configs

COMPILE_MD = Path(__file__).parents[2] / "kernels" / "COMPILE.md"
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
MATRIX_INSTRUCTION = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mma"}
STACK_LIMIT = 32  # bytes that ptxas may give up for one more block per multiprocessor


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """One process compiles everything, without the interpreter in which other tests run."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "vlp_fast.kernels._compile", "--gate"]
    process = subprocess.run(command, env=environment, cwd=tmp_path_factory.mktemp("cwd"), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    found = [json.loads(line) for line in process.stdout.splitlines()]
    for r in found:
        print(
            *(
                r[name]
                for name in ("kind", "dtype", "head_dim", "config", "label", "target", "registers", "stack", "shared_bytes")
            )
        )
    return found


def _tile_rows(report):
    """Rows of the tiles that matrix instructions see: queries, or keys where the kernel's programs are tiles of keys."""
    return report["config"]["block_n" if report["kind"] == "backward_key" else "block_m"]


@pytest.mark.slow
def test_compile_gate_covers_every_config_on_every_target(reports):
    compiled = {(r["kind"], AttentionConfig(**r["config"]), r["dtype"], r["target"]) for r in reports}
    assert compiled == {
        (kind, config, dtype, target) for kind, config, _, dtype in attention_configs() for target in SHARED_LIMIT
    }


@pytest.mark.slow
def test_compile_gate_spills_nothing(reports):
    assert [r for r in reports if r["spills"] > 0 or r["stack"] > STACK_LIMIT] == []


@pytest.mark.slow
def test_compile_gate_shared_memory_fits(reports):
    assert [r for r in reports if r["shared_bytes"] > SHARED_LIMIT[r["target"]]] == []


@pytest.mark.slow
def test_compile_gate_uses_matrix_instructions(reports):
    for r in reports:
        if r["dtype"] == "bf16":
            wide = _tile_rows(r) >= 64 or r["target"] in ("sm_80", "gfx942")
            assert r[MATRIX_INSTRUCTION[r["target"]] if wide else "mma"] > 0, r


def test_compile_table_lists_exactly_the_configs():
    rows = re.findall(
        r"^\| (\w+) \| (\w+) \| (\d+) \| (\d+)x(\d+) \| (\d+) \| (\d+) \| ", COMPILE_MD.read_text(encoding="utf-8"), flags=re.M
    )
    listed = {(kind, AttentionConfig(*map(int, numbers)), int(head_dim), dtype) for kind, dtype, head_dim, *numbers in rows}
    assert listed == set(attention_configs()), "run python -m vlp_fast.kernels._compile --write kernels/COMPILE.md"


@pytest.mark.parametrize(("head_dim", "itemsize"), [(8, 2), (136, 2), (68, 2), (64, 8)])
def test_attention_config_refuses_what_no_kernel_takes(head_dim, itemsize):
    from vlp_fast.kernels._configs import attention_config

    with pytest.raises(ValueError, match="head_dim from 16 to 128"):
        attention_config("forward", head_dim, itemsize, 64)
