"""The registry and the runner on cases made up here: the gate, turns, ratios, memory, comparison, and the command's errors."""

import copy
import time

import pytest
import torch
from typer.testing import CliRunner

from vlp_fast.benchmarks import registry, runner
from vlp_fast.benchmarks.registry import Case, Entry, NotHere, Options, Suite
from vlp_fast.cli import app


@pytest.fixture
def suite(monkeypatch):
    """A suite of the given entries, named "made"."""

    def make(*entries):
        monkeypatch.setitem(registry.SUITES, "made", Suite("bench_steps", "made here", 0.2, 0.1))
        monkeypatch.setattr("vlp_fast.benchmarks.bench_steps.cases", lambda options: iter(entries))
        monkeypatch.setattr(runner, "ceilings", lambda *args: {"gflops_per_second": 100.0, "copy_gb_per_second": 10.0})

    return make


def _case(**rest):
    calls = {"rival": lambda: time.sleep(0.02), "vlp_fast": lambda: time.sleep(0.005)}
    return Case(**{"calls": calls, "wrong": dict, **rest})


def test_ratios_throughput_and_traffic(suite):
    a = torch.randn(64, 64)
    calls = {"rival": lambda: (a @ a, time.sleep(0.02)), "vlp_fast": lambda: time.sleep(0.005)}
    suite(Entry("one", lambda: Case(calls, dict, work=3, unit="pairs", least_bytes=10**6, facts={"axis": "batch"})))
    report = runner.run_suite("made", Options())
    rival, own = report["rows"]
    assert rival["gflops"] == 2 * 64**3 / 1e9
    assert own["gflops"] == 0
    assert rival["speedup"] == 1.0
    assert own["speedup"] == rival["ms_median"] / own["ms_median"] > 1  # 20 ms of sleep over 5, whatever a busy machine adds
    assert rival["ms_q1"] <= rival["ms_median"] <= rival["ms_q3"]
    assert own["per_second"] == pytest.approx(3 / own["ms_median"] * 1e3)
    assert own["gb_per_second"] == pytest.approx(1e6 / own["ms_median"] / 1e6)
    assert own["copy_share"] == pytest.approx(own["gb_per_second"] / 10)
    assert (own["axis"], own["unit"], own["peak_mb"]) == ("batch", "pairs", None)
    assert (report["schema"], report["suite"], report["stamp"]["seconds"]) == (2, "made", 0.2)


def test_who_is_wrong_or_absent_is_named_and_not_timed(suite):
    def not_here():
        raise NotHere("needs a library")

    suite(
        Entry("right", lambda: _case(wrong=lambda: {"rival": "off by 2"}, absent={"other": "is not installed"})),
        Entry("nobody", lambda: _case(wrong=lambda: {"rival": "a", "vlp_fast": "b"})),
        Entry("missing", not_here),
    )
    report = runner.run_suite("made", Options())
    assert [(row["case"], row["provider"], row["speedup"]) for row in report["rows"]] == [("right", "vlp_fast", None)]
    assert {line["reason"] for line in report["wrong"]} == {"off by 2", "a", "b"}
    assert report["absent"] == [
        {"case": "right", "provider": "other", "reason": "is not installed"},
        {"case": "missing", "provider": None, "reason": "needs a library"},
    ]


def test_only_and_unknown_names(suite):
    suite(Entry("BLIP one", _case), Entry("CoCa two", _case))
    assert [e.name for e in registry.cases_of("made", Options(only=("coca",)))] == ["CoCa two"]
    with pytest.raises(ValueError, match=r"no case of suite made has x or y in its name: BLIP one, CoCa two"):
        list(registry.cases_of("made", Options(only=("x", "y"))))
    with pytest.raises(ValueError, match=r"suite must be one of kernels, .*; received 'nope'"):
        list(registry.cases_of("nope", Options()))


def test_quick_fills_in_what_is_not_given():
    steps = registry.SUITES["steps"]
    assert (steps.settled(Options()).size, steps.settled(Options(quick=True)).size) == ("base", "small")
    assert steps.settled(Options(quick=True, size="tiny", seconds=3.0)) == Options(quick=True, size="tiny", seconds=3.0)
    assert registry.SUITES["memory"].settled(Options()).memory


def test_options_survive_json():
    from pathlib import Path

    options = Options(size="tiny", only=("a",), blip_source=Path("clone"), seconds=1.0)
    assert Options.from_json(options.to_json()) == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device must be cpu or cuda; received 'tpu'"),
        ({"dtype": "int8"}, "dtype must be one of fp32, bf16, fp16; received 'int8'"),
        ({"size": "huge"}, "size must be one of tiny, small, base; received 'huge'"),
        ({"batch": 1}, "batch must be at least 2"),
        ({"seconds": 0.0}, "seconds must be above 0; received 0.0"),
    ],
)
def test_errors_name_option_rule_and_value(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


def test_moved_beyond_the_spread():
    stamp = {"device_name": "x", "dtype": "fp32", "size": "base", "batch": 8}
    row = {"case": "a", "provider": "p", "ms_q1": 9.0, "ms_median": 10.0, "ms_q3": 11.0}
    old = {"suite": "steps", "stamp": stamp, "rows": [row, {**row, "provider": "q"}, {**row, "provider": "gone"}]}
    new = copy.deepcopy(old)
    new["rows"] = [{**row, "ms_q1": 4.0, "ms_median": 5.0, "ms_q3": 6.0}, {**row, "provider": "q", "ms_q3": 9.5}]
    assert runner.moved(new, old) == [{"case": "a", "provider": "p", "before": 10.0, "after": 5.0, "ratio": 2.0}]
    with pytest.raises(ValueError, match="the reports differ in dtype: bf16 now, fp32 before"):
        runner.moved({**new, "stamp": {**stamp, "dtype": "bf16"}}, old)


def test_flops_of_fused_attention_layers_are_counted():
    layer = torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)

    def call():
        with torch.no_grad():
            layer(x)

    products, attention = 2 * 10 * (4 * 32 * 32 + 2 * 32 * 64), 4 * 2 * 2 * 5 * 5 * 16
    assert runner.count_flops(call) == products + attention
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "steps", "--steps", "3"], "--steps is not for --suite"),
        (["--suite", "steps", "--data", "photos"], "--data is not for --suite"),
        (["--suite", "steps", "--losses", "itc"], "--losses is not for --suite"),
        (["--suite", "steps", "--size", "tiny", "--size", "base"], "a suite runs at one --size; received tiny, base"),
        (["--suite", "nope"], "suite must be one of"),
        (["--suite", "steps", "--png", "x.png"], "--png is for the suite scaling alone; received steps"),
        (["--suite", "steps", "--json", "no/where.json"], "there is no folder no"),
        (["--suite", "steps", "--compare", "nothing.json"], "nothing.json"),
        (["--suite", "steps", "--dtype", "int8"], "dtype must be one of"),
        (["--quick"], "--quick is for --suite, which is not given"),
        (["--compare", "old.json"], "--compare is for --suite, which is not given"),
    ],
)
def test_the_command_refuses(arguments, message):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert message in result.output
