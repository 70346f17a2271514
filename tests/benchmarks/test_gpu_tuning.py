"""gpu_check.py --tune at tiny size: candidates, where they are put, and that nothing stays behind."""

import dataclasses
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def tuning(benchmark_module):
    return benchmark_module("gpu_tuning")


@dataclasses.dataclass(frozen=True)
class Config:
    block_m: int = 16
    num_warps: int = 16
    num_stages: int = 2
    group: int = 8


def test_neighbours_change_one_number_or_two(tuning):
    one = tuning.neighbours(Config(), 1)
    assert one == [Config(32), Config(num_warps=8), Config(num_stages=1), Config(num_stages=3)]
    two = tuning.neighbours(Config(), 2)
    assert Config(32, 8) in two
    assert Config(32, 16, 3) in two
    assert len(two) == 5
    assert not {*one} & {*two}


def test_lookups_are_those_that_launchers_ask(tuning):
    found = {lookup.name: [m.__name__.rpartition(".")[2] for m in lookup.modules] for lookup in tuning.lookups("attention")}
    assert found == {
        "attention_config": ["attention_backward", "attention_forward"],
        "small_config": ["attention_backward", "attention_forward"],
    }
    assert [lookup.name for lookup in tuning.lookups("linear_cross_entropy")] == ["cross_entropy_config"]


def test_replaced_answers_one_kind_and_is_undone(tuning):
    def committed(kind, head_dim):
        return kind, head_dim

    modules = SimpleNamespace(tile_config=committed), SimpleNamespace(tile_config=committed)
    lookup = tuning.Lookup("tile_config", modules, "backward")
    with tuning.replaced(lookup, lambda config, arguments: ("candidate", config, arguments)):
        for module in modules:
            assert module.tile_config("backward", head_dim=64) == ("candidate", ("backward", 64), ("backward",))
            assert module.tile_config("forward", 64) == ("forward", 64)
    assert all(module.tile_config is committed for module in modules)


def test_tune_case_times_candidates_beside_the_committed_numbers(tuning, benchmark_module, monkeypatch):
    cases, timing = benchmark_module("gpu_timing_cases_losses"), benchmark_module("gpu_timing")
    (one, *_) = [case for case in cases.timed_loss_cases() if case.family == "linear_cross_entropy"]
    (lookup,) = tuning.lookups("linear_cross_entropy")
    committed, timings = lookup.function, timing.Timings()
    broken = dataclasses.replace(committed(37), block=24)  # no power of two: Triton refuses it
    neighbours = tuning.neighbours
    monkeypatch.setattr(tuning, "neighbours", lambda config, changes: [*neighbours(config, changes)[:1], broken])
    rows = tuning.tune_case(one, "fp32", "cpu", True, 1, time.monotonic() + 60, timings)
    assert [row["status"] for row in rows] == ["timed", "failed"]
    row = rows[0]
    assert row["committed"] == dataclasses.asdict(committed(37))
    assert row["candidate"]["block"] == row["committed"]["block"] // 2
    assert row["ratio"] == pytest.approx(row["committed_us_median"] / row["us_median"])
    assert lookup.function is committed
    rows = tuning.tune_case(one, "fp32", "cpu", True, 1, time.monotonic() - 1, timings)
    assert [row["reason"] for row in rows] == ["out of time"]


def test_what_a_candidate_spills_is_read_from_what_was_compiled(tuning):
    kernel = SimpleNamespace(n_spills=3)
    module = SimpleNamespace(kernel=SimpleNamespace(device_caches={0: ({"key": kernel}, None)}), number=1)
    assert tuning._compiled(tuning.Lookup("tile_config", (module,))) == [kernel]
