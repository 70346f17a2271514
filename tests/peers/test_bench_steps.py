"""Suite "steps" runs from end to end in small, and shows a provider that disagrees as wrong, not as slow."""

import importlib
import json

import pytest
import torch
from typer.testing import CliRunner

from vlp_fast.cli import app

OWN = ["vlp_fast packed", "vlp_fast published"]
NO_GRAPH = {"vlp_fast packed, CUDA graph": "needs a CUDA device"}


@pytest.fixture
def run(tmp_path, torchvision_ops):
    def call(*options):
        path = tmp_path / "steps.json"
        arguments = ["bench", "--suite", "steps", "--size", "tiny", "--seconds", "0.1", "--batch", "2", "--json", str(path)]
        result = CliRunner().invoke(app, [*arguments, *options])
        return result.exit_code, json.loads(path.read_text()) if path.exists() else None, result.output

    return call


@pytest.fixture
def bench_steps():
    return importlib.import_module("vlp_fast.benchmarks.bench_steps")


@pytest.fixture
def compared_steps():
    return importlib.import_module("vlp_fast.benchmarks.compared_steps")


def test_steps_equal_the_rivals_and_are_timed(run):
    pytest.importorskip("open_clip", reason="open_clip is not installed", exc_type=ImportError)
    pytest.importorskip("torchscale.model.BEiT3", reason="torchscale or fairscale is not installed", exc_type=ImportError)
    code, report, out = run("coca", "beit-3")
    assert code == 0, out
    rows = {(row["case"], row["provider"]): row for row in report["rows"]}
    coca, beit3 = "CoCa: contrastive, caption", "BEiT-3: images, texts, pairs"
    expected = [(coca, p) for p in ("open_clip", *OWN, "vlp_fast packed, 2 captions an image")]
    assert list(rows) == [*expected, *((beit3, p) for p in ("torchscale", *OWN))]
    for row in rows.values():
        assert row["ms_median"] > 0
        assert row["steps"] >= 3
        assert 0 < row["ceiling_share"] < 1
        assert row["ours"] == row["provider"].startswith("vlp_fast")
    # the rival computes its padding
    assert rows[coca, "open_clip"]["gflops"] > 1.5 * rows[coca, OWN[0]]["gflops"]
    assert rows[beit3, OWN[0]]["speedup"] == pytest.approx(
        rows[beit3, "torchscale"]["ms_median"] / rows[beit3, OWN[0]]["ms_median"]
    )
    assert not report["wrong"]
    assert [(line["case"], {line["provider"]: line["reason"]}) for line in report["absent"]] == [
        (coca, NO_GRAPH),
        (beit3, NO_GRAPH),
    ]


def test_a_step_that_disagrees_is_not_timed(run, compared_steps, monkeypatch):
    pytest.importorskip("open_clip", reason="open_clip is not installed", exc_type=ImportError)
    step = compared_steps.Steps.own_step

    def wrong(self, provider):
        return {name: loss * (1.01 if provider == "published" else 1.0) for name, loss in step(self, provider).items()}

    monkeypatch.setattr(compared_steps.Steps, "own_step", wrong)
    code, report, out = run("coca")
    assert code == 1
    assert [row["provider"] for row in report["rows"]] == ["open_clip", OWN[0], "vlp_fast packed, 2 captions an image"]
    (line,) = report["wrong"]
    assert line["provider"] == OWN[1]
    assert "where the rival's is" in line["reason"]
    assert "wrong, and not timed: vlp_fast published at CoCa" in out.replace("\n", " ")


def test_without_the_rival_the_schedules_are_compared(run):
    code, report, out = run("blip")
    assert code == 0, out
    assert [row["provider"] for row in report["rows"]] == [*OWN, "vlp_fast packed, 2 captions an image"]
    assert report["rows"][1]["speedup"] == 1.0
    absent = {line["provider"]: line["reason"] for line in report["absent"]}
    assert "--blip-source" in absent.pop("salesforce BLIP")
    assert absent == NO_GRAPH
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("model", ["coca", "beit3"])
def test_models_without_a_rival_that_cannot_be_imported(bench_steps, compared_steps, monkeypatch, model):
    from vlp_fast.benchmarks.registry import Options

    def missing(*args, **options):
        raise ImportError("not installed")

    monkeypatch.setattr(compared_steps.step_rivals, "open_clip_coca", missing)
    monkeypatch.setattr(compared_steps.step_rivals, "Torchscale", missing)
    case = bench_steps._case(Options(size="tiny", batch=2), model)
    assert list(case.calls)[:2] == OWN
    assert case.absent == {bench_steps.RIVALS[model]: "not installed", **NO_GRAPH}
    assert case.baseline == OWN[1]
    assert case.wrong() == {}


def test_memory_of_a_provider_in_a_process_of_its_own(run):
    code, report, out = run("blip", "--memory")
    assert code == 0, out
    assert all(200 < row["peak_mb"] < 4000 for row in report["rows"]), report["rows"]
    first, second = report["rows"][:2]
    assert first["memory_ratio"] == first["peak_mb"] / second["peak_mb"]
    assert first["rise_ratio"] == first["rise_mb"] / second["rise_mb"]
    assert all(0 < row["rise_mb"] < row["peak_mb"] - 100 for row in report["rows"]), report["rows"]


@pytest.fixture
def without_graph(compared_steps, monkeypatch):
    """A step without a CUDA graph, its losses times `factor`, where suite "steps" captures one; returns what was asked to be captured."""
    asked = []

    class Step:
        factor = 1.0

        def __init__(self, objective, inputs, *, autocast, **options):
            asked.append((objective.schedule, objective.training, autocast, list(options)))
            self.objective, self.options = objective, options

        def __call__(self, inputs):
            losses = self.objective(inputs, **self.options)
            self.objective.total(losses).backward()
            return {name: self.factor * loss.detach() for name, loss in losses.items()}

    monkeypatch.setattr(compared_steps, "GraphedStep", Step)
    return Step, asked


@pytest.mark.parametrize("model", ["blip", "coca", "beit3"])
def test_a_cuda_graph_is_held_against_the_step_and_captured_before_it_is_timed(
    bench_steps, compared_steps, without_graph, model
):
    from vlp_fast.benchmarks.registry import Options

    options = Options(size="tiny", batch=2, dtype="bf16")
    steps = compared_steps.build(options, model)
    step, asked = without_graph
    call = bench_steps._graphed(steps, options)
    assert bench_steps._wrong_graph(steps, call) == {}
    call()
    negatives = ["negatives"] if model == "blip" else []
    assert asked == [("packed", False, None, negatives), ("packed", True, torch.bfloat16, negatives)]
    assert any(p.grad is not None for p in steps.own.parameters())

    step.factor = 1.01
    (reason,) = bench_steps._wrong_graph(steps, call).values()
    assert " is " in reason
    assert "where " in reason


def test_a_cuda_graph_that_cannot_be_captured_is_wrong(bench_steps, compared_steps, monkeypatch):
    from vlp_fast.benchmarks.registry import Options

    def fail(*args, **options):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(compared_steps, "GraphedStep", fail)
    options = Options(size="tiny", batch=2)
    steps = compared_steps.build(options, "coca")
    assert bench_steps._wrong_graph(steps, bench_steps._graphed(steps, options)) == {
        "packed, CUDA graph": "it cannot be captured: operation not permitted when stream is capturing"
    }
