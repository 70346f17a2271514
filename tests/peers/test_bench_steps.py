"""bench_steps.py runs from end to end in small, and shows a rival that disagrees as wrong, not as slow."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks/bench_steps.py"


@pytest.fixture(scope="module")
def bench_steps(torchvision_ops):
    pytest.importorskip("open_clip", reason="open_clip is not installed", exc_type=ImportError)
    spec = importlib.util.spec_from_file_location("bench_steps", FILE)
    module = sys.modules["bench_steps"] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_steps"]


@pytest.fixture
def run(bench_steps, monkeypatch, tmp_path, capsys):
    def call(*options):
        path = tmp_path / "steps.json"
        arguments = ["bench_steps.py", "--size", "tiny", "--seconds", "0.1", "--no-memory", "--batch", "2", "--json", str(path)]
        monkeypatch.setattr("sys.argv", [*arguments, *options])
        monkeypatch.setattr(bench_steps, "prepare_process", lambda threads: None)  # denormals stay as other tests have them
        code = bench_steps.main()
        return code, json.loads(path.read_text()), capsys.readouterr().out

    return call


def test_steps_equal_the_rivals_and_are_timed(run):
    pytest.importorskip("torchscale.model.BEiT3", reason="torchscale or fairscale is not installed", exc_type=ImportError)
    code, report, _ = run("--models", "coca", "beit3")
    assert code == 0
    rows = {(row["case"], row["provider"]): row for row in report["rows"]}
    own = ["vlp_fast packed", "vlp_fast published"]
    expected = [("coca", p) for p in ("open_clip", *own, "vlp_fast packed, 2 captions an image")]
    assert list(rows) == [*expected, *(("beit3", p) for p in ("torchscale", *own))]
    assert all(row["ms_median"] > 0 and row["steps"] >= 3 for row in rows.values())
    assert report["stamp"]["omp_wait_policy"] in ("PASSIVE", "ACTIVE")
    assert not report["notes"]


def test_a_step_that_disagrees_is_not_timed(run, bench_steps, monkeypatch):
    step = bench_steps.Steps.own_step

    def wrong(self, provider):
        return {name: loss * (1.01 if provider == "published" else 1.0) for name, loss in step(self, provider).items()}

    monkeypatch.setattr(bench_steps.Steps, "own_step", wrong)
    code, report, out = run("--models", "coca")
    assert code == 1
    assert not report["rows"]
    assert "coca is wrong and was not timed: contrastive is" in out.replace("\n", " ")


def test_a_rival_that_is_not_there_is_named(run):
    code, report, _ = run("--models", "blip")
    assert code == 0
    assert report["notes"] == ["blip: not run, salesforce BLIP cannot be imported (give its clone as --blip-source)"]
    assert not torch.is_autocast_enabled("cpu")
