"""benchmarks/gpu_check.py in the interpreter at tiny sizes: that it passes and times, and that it would fail."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def gpu_check(benchmark_module):
    return benchmark_module("gpu_check")


def run(gpu_check, monkeypatch, *options):
    """main() as if called with these options, for one timed case of each family."""
    for name in ("timed_cases", "timed_loss_cases"):
        first = {case.family: case for case in reversed(list(getattr(gpu_check, name)()))}
        monkeypatch.setattr(gpu_check, name, lambda first=first: list(first.values()))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--tiny", "--device", "cpu", "--repeats", "2", *map(str, options)])
    return gpu_check.main()


def read(folder, kind):
    (path,) = folder.glob(f"{kind}-*.json")
    return json.loads(path.read_text())


def test_gpu_check_checks_then_times_and_writes_a_report(gpu_check, monkeypatch, tmp_path, capsys):
    families = {"linear_cross_entropy"}
    assert run(gpu_check, monkeypatch, "--out", tmp_path, "--only", "linear_cross_entropy") == 0, capsys.readouterr().out
    report = read(tmp_path, "gpu-check")
    assert report["kind"] == "gpu_check"
    assert report["tiny"]
    assert set(report["families"]) == families
    assert all(found["status"] == "passed" and found["source"] for found in report["families"].values())
    assert all(row["status"] == "passed" for row in report["cases"])
    ours = [row for row in report["timings"] if row["ours"]]
    assert {row["provider"] for row in ours} == {"triton"}
    assert {row["family"] for row in ours} == families
    assert report["ceilings"]["gb_per_s"] > 0
    liger = [row for row in report["not_timed"] if row["provider"].startswith("Liger")]
    assert {row["status"] for row in liger} <= {"absent", "failed"}
    assert not any(row["ours"] for row in report["not_timed"])
    assert not torch.are_deterministic_algorithms_enabled()


def test_gpu_check_can_only_check(gpu_check, monkeypatch, tmp_path):
    assert run(gpu_check, monkeypatch, "--out", tmp_path, "--only", "linear_cross_entropy", "--check-only") == 0
    report = read(tmp_path, "gpu-check")
    assert report["cases"]
    assert report["timings"] == report["not_timed"] == []


def test_gpu_check_tunes_apart_from_what_evidence_reads(gpu_check, monkeypatch, tmp_path, capsys):
    options = ("--out", tmp_path, "--only", "linear_cross_entropy", "--tune")
    assert run(gpu_check, monkeypatch, *options) == 0
    report = read(tmp_path, "gpu-tune")
    assert report["kind"] == "gpu_tune"
    assert {row["lookup"] for row in report["tuning"]} == {"cross_entropy_config"}
    assert "committed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--only", "conv"), "--only must name families"),
        (("--check-only", "--tune"), "not allowed with argument"),
    ],
)
def test_gpu_check_says_what_cannot_be(gpu_check, monkeypatch, capsys, options, words):
    with pytest.raises(SystemExit):
        run(gpu_check, monkeypatch, *options)
    assert words in capsys.readouterr().err


def test_gpu_check_needs_tiny_sizes_on_the_cpu(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "--device cpu needs --tiny" in capsys.readouterr().err


def test_gpu_check_needs_a_gpu_or_the_interpreter(gpu_check):
    unset = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, gpu_check.__file__, "--device", "cpu", "--tiny"]
    process = subprocess.run(command, env=unset, capture_output=True, text=True)
    assert process.returncode == 2
    assert "the kernels cannot run here" in process.stderr


def test_gpu_check_checks_norms_that_round_to_another_dtype(gpu_check, device):
    (case,) = [case for case in gpu_check.cases() if case.name == "LayerNorm 768, fp32 in"]
    for name in case.tiny_dtypes:
        dtype = gpu_check.DTYPES[name]
        rounding = case.build(gpu_check.Maker(device, dtype, True, torch.Generator(device).manual_seed(0)))
        assert {x.dtype for x in rounding.inputs} == {torch.float32}
        assert rounding.ours(*rounding.inputs).dtype == dtype
        gpu_check.check(rounding, 2)


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
