"""benchmarks/gpu_check.py in the interpreter at tiny sizes: that it passes, and that it would fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gpu_check():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu_check

        yield gpu_check
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_gpu_check_runs_and_writes_a_report(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu_check.py", "--tiny", "--device", "cpu", "--repeats", "2", "--out", tmp_path]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    only = ["--only", "attention_pool,linear_cross_entropy,decode_attention"]
    process = subprocess.run([*command, *only], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    (path,) = tmp_path.glob("gpu-check-*.json")
    report = json.loads(path.read_text())
    assert report["kind"] == "gpu_check"
    assert report["tiny"]
    assert set(report["families"]) == {"attention_pool", "linear_cross_entropy", "decode_attention"}
    assert all(found["status"] == "passed" and found["source"] for found in report["families"].values())
    assert all(row["status"] == "passed" for row in report["cases"])


def test_gpu_check_says_what_cannot_be():
    command = [sys.executable, BENCHMARKS / "gpu_check.py", "--device", "cpu", "--tiny"]
    unset = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(command, env=unset, capture_output=True, text=True)
    assert process.returncode == 2
    assert "the kernels cannot run here" in process.stderr
    process = subprocess.run(
        [*command, "--only", "conv"], env={**unset, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert process.returncode == 2
    assert "--only must name families" in process.stderr


def problem(gpu_check, ours):
    return gpu_check.Problem([torch.randn(5, 4)], ours, lambda x: x * 2, ("out", "dx"))


def test_gpu_check_lets_a_right_kernel_pass(gpu_check):
    gpu_check.check(problem(gpu_check, lambda x: x + x), 2)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda x: x * 2.001, "out is off"),
        (lambda x: (x * 2).detach() + (x - x.detach()), "dx is off"),
        (lambda x: x * 2 + torch.where(torch.arange(4) == 1, torch.nan, 0.0), "out has NaN"),
        (lambda x: x * 2 + 1e-8 * torch.rand(()), "out differs between two calls"),
    ],
)
def test_gpu_check_catches_a_wrong_kernel(gpu_check, wrong, words):
    with pytest.raises(AssertionError, match=words):
        gpu_check.check(problem(gpu_check, wrong), 9)


def test_gpu_check_counts_what_was_not_run_as_incomplete(gpu_check):
    rows = [{"family": "attention", "status": s} for s in ("passed", "not run")]
    assert gpu_check.families_of(rows)["attention"]["status"] == "incomplete"
    assert gpu_check.families_of([*rows, {"family": "attention", "status": "failed"}])["attention"]["status"] == "failed"
