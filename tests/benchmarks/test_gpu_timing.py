"""The timing of benchmarks/gpu_check.py with providers of a line each: rows, statistics, reasons, floors, and what evidence makes of it."""

import argparse
import contextlib
import gc
import json
import time
from types import SimpleNamespace

import pytest
import torch

from vlp_fast import evidence

pytest.importorskip("triton")
CEILINGS = {"tflop_per_s": {"fp32": 2.0}, "gb_per_s": 100.0}


@pytest.fixture(scope="module")
def timing(benchmark_module):
    return benchmark_module("gpu_timing")


@pytest.fixture(scope="module")
def providers(benchmark_module):
    return benchmark_module("gpu_providers")


@pytest.fixture(scope="module")
def gpu_check(benchmark_module):
    return benchmark_module("gpu_check")


def case(providers, extra=(), name="double", family="attention"):
    """x * 2 by "triton" and by whom `extra` names: name -> call."""

    def build(make):
        calls = {"triton": lambda x: x + x, **dict(extra)}
        return providers.TimedProblem(
            [make.randn(6, 4)],
            (True,),
            {n: lambda n=n, c=c: providers.Provider(n, c, ours=n == "triton") for n, c in calls.items()},
            providers.Work(1e6, 1e5),
            providers.Work(4e6, 1e6),
            lambda x: x * 2,
        )

    return providers.TimedCase(family, name, build)


def timed(timing, one, deadline=None):
    timings = timing.Timings()
    deadline = time.monotonic() + 60 if deadline is None else deadline
    timing.time_case(one, "fp32", "cpu", True, CEILINGS, deadline, timings)
    return timings


def test_time_case_gives_a_row_per_provider_and_direction(timing, providers):
    timings = timed(timing, case(providers, {"rival": lambda x: 2 * x}))
    assert [(r["direction"], r["provider"], r["ours"]) for r in timings.timed] == [
        ("forward", "triton", True),
        ("forward", "rival", False),
        ("forward+backward", "triton", True),
        ("forward+backward", "rival", False),
    ]
    assert not timings.not_timed
    assert not timings.bounds
    row = timings.timed[3]
    assert 0 < row["us_q1"] <= row["us_median"] <= row["us_q3"]
    assert row["samples"] == 3
    assert row["copies"] == 2
    assert (row["graph"], row["reason"]) == (False, "the CPU has no CUDA graphs")
    # forward 1 MFLOP in 0.5 us, 0.1 MB in 1 us; backward 4 MFLOP in 2 us, 1 MB in 10 us
    assert row["floor_us"] == pytest.approx(1.0 + 10.0)
    assert row["share_of_floor"] == pytest.approx(11.0 / row["us_median"])
    assert row["gb_per_s"] == pytest.approx(1.1e6 / row["us_median"] / 1e3)
    assert row["tflop_per_s"] == pytest.approx(5e6 / row["us_median"] / 1e6)


def test_time_case_says_why_a_provider_was_not_timed(timing, providers):
    def missing(x):
        from no_such_library import attention

        return attention(x)

    def wrong_gradient(x):
        return (2 * x).detach() + 3 * (x - x.detach())

    def broken(x):
        raise RuntimeError("no kernel\nfor this")

    rivals = {"missing": missing, "wrong": lambda x: 2.001 * x, "wrong gradient": wrong_gradient, "broken": broken}
    timings = timed(timing, case(providers, {**rivals, "nan": lambda x: 2 * x + torch.nan}))
    reasons = {(r["direction"], r["provider"]): (r["status"], r["reason"]) for r in timings.not_timed}
    assert reasons["forward", "missing"] == ("absent", "No module named 'no_such_library'")
    assert reasons["forward", "wrong"][0] == "wrong"
    assert "the output is off by" in reasons["forward", "wrong"][1]
    assert "gradient 1 is off by" in reasons["forward+backward", "wrong gradient"][1]
    assert ("forward", "wrong gradient") not in reasons
    assert reasons["forward", "broken"] == ("failed", "RuntimeError: no kernel")
    assert reasons["forward", "nan"][0] == "wrong"
    assert {r["provider"] for r in timings.timed if r["direction"] == "forward"} == {"triton", "wrong gradient"}
    assert not any(r["ours"] for r in timings.not_timed)


def test_time_case_begins_no_provider_after_the_deadline(timing, providers):
    timings = timed(timing, case(providers), deadline=time.monotonic() - 1)
    assert {(r["provider"], r["status"], r["reason"]) for r in timings.not_timed} == {("triton", "not run", "out of time")}
    assert not timings.timed


def test_time_case_lists_a_case_that_cannot_be_built(timing, providers):
    def build(make):
        raise torch.OutOfMemoryError("too much")

    (row,) = timed(timing, providers.TimedCase("attention", "huge", build)).not_timed
    assert (row["provider"], row["status"], row["reason"]) == ("all", "not run", "not built: OutOfMemoryError: too much")


def test_bounds_are_no_rivals_and_not_checked(timing, providers):
    def build(make):
        problem = case(providers).build(make)
        bound = providers.Provider("one dense product", lambda x: x @ x.T, is_bound=True)
        return providers.TimedProblem(
            problem.inputs,
            problem.needs,
            {**problem.providers, bound.name: lambda: bound},
            problem.forward,
            problem.backward,
            problem.reference,
        )

    timings = timed(timing, providers.TimedCase("attention", "double", build))
    assert [r["provider"] for r in timings.bounds] == ["one dense product"] * 2
    assert {r["provider"] for r in timings.timed} == {"triton"}


def test_in_turns_samples_one_of_each_after_another(timing):
    order = []
    provider = SimpleNamespace(name="p")

    def broken():
        if order.count("a") > 1:
            raise RuntimeError("later")
        order.append("broken")

    plays = {"a": lambda: order.append("a"), "broken": broken, "b": lambda: order.append("b")}
    prepared = {name: timing.Prepared(provider, play, 1, 1) for name, play in plays.items()}
    times, failed = timing.in_turns(prepared, "cpu", timing.Effort(samples=3))
    assert order == ["a", "broken", "b", "a", "b", "a", "b"]
    assert {name: t.count for name, t in times.items()} == {"a": 3, "b": 3}
    assert failed == {"broken": "RuntimeError: later"}
    short, _ = timing.in_turns({"a": prepared["a"]}, "cpu", timing.Effort(samples=9, seconds=0.0, least=2))
    assert short["a"].count == 2


def test_samples_are_seconds_of_one_call(timing):
    one = timing.Prepared(SimpleNamespace(name="p"), lambda: time.sleep(0.02), calls=4, copies=2, plays=2)
    assert one.sample("cpu") == pytest.approx(0.005, rel=0.5)


def test_copies_exceed_twice_the_cache_within_the_budget(timing):
    effort = timing.Effort(copy_bytes=1000, most_copies=30)
    assert timing.copies_for(7, 50, effort) == 15
    assert timing.copies_for(101, 50, effort) == 1
    assert timing.copies_for(400, 5000, effort) == 2
    assert timing.copies_for(1, 5000, effort) == 30


def test_measure_ceilings_gives_a_rate_per_dtype(timing):
    found = timing.measure_ceilings("cpu", {"fp32": torch.float32})
    assert found["tflop_per_s"]["fp32"] > 0
    assert found["gb_per_s"] > 0


# -------------------------------------------------------------------------- the path of a GPU, with stand-ins for torch.cuda


class Clock:
    """An event that knows when it was recorded."""

    def __init__(self, **_):
        self.time = 0.0

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return (other.time - self.time) * 1e3


@pytest.fixture
def fake_cuda(timing, monkeypatch):
    """What a graph's capture calls: `mode` is that of synchronisation, `captured` the calls, `broken` an error of the capture's end."""
    state = SimpleNamespace(mode="default", captured=0, replays=0, broken=None)

    @contextlib.contextmanager
    def capturing(graph, stream):
        state.captured += 1
        try:
            yield
        finally:
            if state.broken is not None:
                raise state.broken

    def replay():
        state.replays += 1
        time.sleep(1e-4)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "Event": Clock,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "CUDAGraph": lambda: SimpleNamespace(replay=replay),
        "graph": capturing,
        "set_sync_debug_mode": lambda mode: setattr(state, "mode", mode),
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    timing._capture_stream.cache_clear()
    yield state
    timing._capture_stream.cache_clear()


def test_a_graph_holds_every_copy_and_is_replayed_several_times(timing, fake_cuda):
    made = []
    calls = [lambda i=i: made.append(i) for i in range(3)]
    one = timing._captured(SimpleNamespace(name="p"), calls, timing.Effort(sample_us=2000.0))
    assert one.reason is None
    assert one.copies == 3
    assert one.calls == 15  # the most that short calls are repeated within 16
    assert made[-15:] == [0, 1, 2] * 5
    assert 2 <= one.plays <= 20
    before = fake_cuda.replays
    assert one.sample("cuda") > 0
    assert fake_cuda.replays - before == one.plays + 1  # one that is not counted
    assert fake_cuda.mode == "default"


def test_a_call_that_waits_for_the_device_is_not_captured(timing, fake_cuda):
    def call():
        if fake_cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    one = timing._captured(SimpleNamespace(name="p"), [call], timing.Effort())
    assert one.reason == "not captured, it waits for the device: RuntimeError: called a synchronizing CUDA operation"
    assert (fake_cuda.captured, fake_cuda.mode) == (0, "default")
    assert one.sample("cuda") > 0


def test_a_broken_capture_is_timed_eagerly_with_the_first_reason(timing, fake_cuda):
    fake_cuda.broken = RuntimeError("the capture was invalidated")
    count = []

    def call():
        count.append(1)
        if fake_cuda.captured and len(count) < 200 and not gc.isenabled():
            raise ValueError("cannot allocate here")

    one = timing._captured(SimpleNamespace(name="p"), [call], timing.Effort())
    assert one.reason == "not captured: ValueError: cannot allocate here"
    assert gc.isenabled()
    assert fake_cuda.replays == 0


def test_a_device_that_stays_broken_is_lost(timing, fake_cuda, monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    one = timing.Prepared(SimpleNamespace(name="p"), lambda: 1 / 0, 1, 1)
    with pytest.raises(timing.DeviceLost, match="after a replay of p: RuntimeError: CUDA error"):
        timing.in_turns({"p": one}, "cuda", timing.Effort())


# ---------------------------------------------------------------------------------------------------------------- gpu_check


def clocked(gpu_check, families=None, seconds=60.0, tune=False):
    arguments = argparse.Namespace(device="cpu", tiny=True, tune=tune)
    return gpu_check.Clocked(families or {}, arguments, time.monotonic() + seconds)


def test_nothing_is_timed_on_a_red_gate(gpu_check, providers):
    one = clocked(gpu_check, {"attention": {"failed": 2}, "multiway": {"failed": 0}})
    saved = []
    one.run([case(providers), case(providers, family="multiway")], lambda: saved.append(1))
    assert {r["family"] for r in one.report()["timings"]} == {"multiway"}
    (row,) = one.report()["not_timed"]
    assert (row["family"], row["status"]) == ("attention", "not run")
    assert row["reason"] == "no speed claim on a red gate: 2 correctness cases failed"
    assert len(saved) == 2


def test_cases_not_begun_are_listed(gpu_check, providers):
    one = clocked(gpu_check, seconds=-1.0)
    one.run([case(providers), case(providers, name="other")], lambda: None)
    assert [(r["case"], r["reason"]) for r in one.report()["not_timed"]] == [
        ("double", "out of time"),
        ("other", "out of time"),
    ]


def test_a_lost_device_ends_the_timing_and_not_the_report(gpu_check, providers, timing, monkeypatch):
    def lose(*_):
        raise timing.DeviceLost("the device does not answer any more after flash_attn: CUDA error")

    monkeypatch.setattr(gpu_check, "time_case", lose)
    one = clocked(gpu_check)
    one.run([case(providers), case(providers, name="other")], lambda: None)
    assert [r["case"] for r in one.report()["not_timed"]] == ["double", "other"]
    assert all("after flash_attn" in r["reason"] for r in one.report()["not_timed"])


def test_the_first_case_of_every_family_comes_first(gpu_check, providers):
    chosen = [case(providers, name=n, family=f) for f, n in (("a", "1"), ("a", "2"), ("a", "3"), ("b", "1"), ("b", "2"))]
    order = [(c.family, c.name) for c, _ in gpu_check._in_rounds(chosen, True)]
    assert order == [("a", "1"), ("b", "1"), ("a", "2"), ("b", "2"), ("a", "3")]


def test_evidence_reads_speed_from_the_report(gpu_check, providers, tmp_path):
    one = clocked(gpu_check)
    one.run([case(providers, {"slow": lambda x: (x * 2 for _ in [time.sleep(0.01)]).__next__()})], lambda: None)
    families = {"attention": {"source": evidence.source_hash("attention"), "status": "passed", "passed": 3, "failed": 0}}
    about = {"device": "cuda", "device_name": "some GPU", "date": "2026-01-01T00:00:00+00:00", "commit": "abc"}
    report = {"schema": evidence.SCHEMA, "kind": "gpu_check", "tiny": False, "stamp": about, "families": families}
    (tmp_path / "report.json").write_text(json.dumps({**report, **one.report()}))
    (found,) = [e for e in evidence.evidence(evidence.read_reports(tmp_path)) if e.family == "attention"]
    assert found.state == "verified"
    assert found.speed["shapes"] == 2
    assert found.speed["least"] > 2
