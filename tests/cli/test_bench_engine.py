"""The measuring behind ``vlp-fast bench``: statistics, turns, memory, shared weights."""

import itertools
import json
import time

import pytest
import torch

from vlp_fast.bench import TASKS, Benchmark, Settings
from vlp_fast.measuring import Timing, measure, peak_memory, prepare_process
from vlp_fast.training import MODELS

pytest.importorskip("easy_vqa")
TINY = {"sizes": ("tiny",), "batch": 2, "steps": 2, "warmup": 1, "device": "cpu"}


def test_timing_is_median_and_quartiles_in_milliseconds():
    timing = Timing.of([0.005, 0.001, 0.002, 0.004, 0.003])
    assert (timing.minimum, timing.q1, timing.median, timing.q3, timing.maximum) == pytest.approx((1, 2, 3, 4, 5))
    assert timing.count == 5


def test_timing_of_one_call_is_that_call():
    timing = Timing.of([0.25])
    assert timing.minimum == timing.q1 == timing.median == timing.q3 == timing.maximum == pytest.approx(250)


def test_measure_calls_in_turns_after_warming_up():
    order = []
    timings = measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, steps=3, warmup=1)
    assert "".join(order) == "ab" * 4
    assert {name: timing.count for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_measure_stops_when_time_is_over_but_has_measured():
    assert measure({"a": lambda: None}, steps=100, seconds=0.0, warmup=0)["a"].count == 3
    assert measure({"a": lambda: None}, steps=100, until=time.monotonic(), warmup=0)["a"].count == 1
    assert measure({"a": lambda: None}, steps=2, seconds=60.0, warmup=0)["a"].count == 2


def test_peak_memory_sees_what_a_call_takes_and_forgets_it_after():
    small, _, own = peak_memory(lambda: torch.ones(1))
    large, held, _ = peak_memory(lambda: torch.ones(64 * 2**20))  # 256 MB
    assert small is not None
    assert large is not None
    assert large > small + 200
    if held is not None:
        assert 200 < large - held < 400 or not own
    if own:
        after, _, _ = peak_memory(lambda: torch.ones(1))
        assert after is not None
        assert after < large - 200


def test_prepare_process_refuses_no_threads():
    with pytest.raises(ValueError, match="threads must be at least 1"):
        prepare_process(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("flamingo",)}, "model must be one of"),
        ({"dtype": "fp8"}, "dtype must be one of"),
        ({"device": "tpu"}, "device must be one of"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"seconds": -1.0}, "seconds must be more than 0"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_settings_name_the_rule_that_is_broken(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_settings_say_why_there_is_no_cuda():
    with pytest.raises(RuntimeError, match="device 'cuda' is not available: torch"):
        Settings(device="cuda")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_benchmark_measures_every_task_of_every_model(dtype):
    benchmark = Benchmark(Settings(dtype=dtype, **TINY))
    rows = list(benchmark.run())
    assert [(row.model, row.task) for row in rows] == [(m, t) for m in MODELS for t in TASKS]
    assert len(rows) == benchmark.num_rows
    for row in rows:
        assert row.measured, row.note
        assert row.ms_min <= row.ms_q1 <= row.ms_median <= row.ms_q3 <= row.ms_max
        assert row.peak_mb > 0
        if row.task != "embed_text":
            assert row.images_per_second == pytest.approx(2 * 1e3 / row.ms_median)
        assert (row.tokens_per_second is None) == (row.task == "embed_image")
        assert (row.images_per_second is None) == (row.task == "embed_text")


def test_a_size_that_a_model_does_not_have_is_said_in_its_rows():
    benchmark = Benchmark(Settings(models=("albef",), **{**TINY, "sizes": ("large",)}))
    rows = list(benchmark.run())
    assert len(rows) == benchmark.num_rows == len(TASKS)
    assert {row.note for row in rows} == {"unavailable: size must be one of tiny, base; received 'large'."}


def test_a_step_of_some_losses_is_measured_where_the_model_has_them():
    benchmark = Benchmark(Settings(models=("blip", "coca"), losses=("itc",), **TINY))
    blip, coca = (list(rows) for _, rows in itertools.groupby(benchmark.run(), lambda row: row.model))
    assert all(row.measured for row in blip)
    assert {row.note for row in coca} == {"unavailable: losses must name some of contrastive, caption; received ['itc']."}
    assert benchmark.report()["stamp"]["losses"] == ["itc"]
    (step,) = benchmark._objectives("blip", "tiny", benchmark._feed(64, "clip")).values()
    assert step.losses == ("itc",)


def test_backends_share_weights_and_leave_no_gradients(monkeypatch):
    # two names for what runs on every CPU, to see two backends without a second device
    monkeypatch.setattr(Settings, "runnable", ("torch", None))
    benchmark = Benchmark(Settings(models=("blip",), **TINY))
    feed = benchmark._feed(64, "clip")
    first, second = benchmark._objectives("blip", "tiny", feed).values()
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert one is other, name
    calls = [benchmark._call("pretrain_step", objective, feed) for objective in (first, second)]
    for call in calls:
        call()
    assert all(parameter.grad is None for parameter in first.parameters())


def test_time_that_is_over_is_said_not_measured():
    benchmark = Benchmark(Settings(models=("coca",), **TINY))
    rows = list(benchmark.run(until=time.monotonic() - 1))
    assert len(rows) == 3
    assert all(not row.measured and "time allowed was over" in row.note for row in rows)


def test_report_is_json_with_a_stamp():
    benchmark = Benchmark(Settings(models=("coca",), **TINY))
    list(benchmark.run())
    report = json.loads(json.dumps(benchmark.report()))
    assert report["schema"] == 1
    stamp = report["stamp"]
    for name in ("vlp_fast", "torch", "python", "commit", "date", "device_name", "threads", "dtype", "batch", "seed", "data"):
        assert name in stamp, name
    assert stamp["pairs"] == 8
    assert stamp["tokens_per_caption"] > 3
    assert report["skipped"] == []
    assert set(report["rows"][0]) == {
        "model", "size", "backend", "task", "images_per_second", "tokens_per_second", "ms_median", "ms_q1", "ms_q3", "ms_min",
        "ms_max", "steps", "peak_mb", "batch", "dtype", "image_size", "note",
    }  # fmt: skip
