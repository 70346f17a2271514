"""The suite scaling: its cases, its gate, its fits and its figure."""

import pytest

from vlp_fast.benchmarks import bench_scaling
from vlp_fast.benchmarks.bench_scaling import AXES, cases, fits
from vlp_fast.benchmarks.registry import SUITES, Options
from vlp_fast.benchmarks.runner import count_flops, run_suite

TINY = Options(size="tiny", batch=4, seconds=0.01)


def entry(name):
    return next(e for e in cases(TINY) if e.name == name)


def made_report(ms):
    """Rows of every axis, model and two providers, whose medians `ms` says from axis, provider and value."""
    rows = [
        {"axis": axis, "model": model, "provider": provider, "value": value, "ms_median": (m := ms(axis, provider, value))}
        | {"ms_q1": m, "ms_q3": m}
        for axis in AXES
        for model in ("BLIP", "CoCa")
        for provider in ("vlp_fast packed", "somebody")
        for value in (1, 2, 4)
    ]
    stamp = {
        "vlp_fast": "0",
        "commit": None,
        "device_name": "a CPU",
        "threads": 1,
        "torch": "2",
        "size": "tiny",
        "dtype": "fp32",
    }
    return {"suite": "scaling", "rows": rows, "stamp": stamp}


def test_every_axis_has_cases_of_both_models_with_names_of_their_own():
    names = [e.name for e in cases(TINY)]
    assert len(set(names)) == len(names)
    for axis in AXES:
        for model in ("BLIP", "CoCa"):
            assert sum(name.startswith(f"{model} {axis} ") for name in names) >= 2, (model, axis)


@pytest.mark.parametrize(
    "name", ["BLIP captions an image 2", "BLIP losses itc", "BLIP losses itc+itm", "CoCa losses contrastive"]
)
def test_a_case_builds_passes_its_gate_and_trains(name):
    case = entry(name).build()
    assert case.wrong() == {}
    for call in case.calls.values():
        call()


def test_the_gate_names_schedules_that_disagree_and_peers_of_another_size(monkeypatch):
    case = entry("CoCa batch 4").build()
    if case.absent:
        pytest.skip(str(case.absent))
    sizes = iter((1000, 900))
    monkeypatch.setattr(bench_scaling, "_trained", lambda module: next(sizes))
    assert "more than 1 % apart" in case.wrong()["open_clip"]
    forward = bench_scaling.CocaPretraining.forward

    def other(self, batch):
        return {name: loss * (1.01 if self.packed else 1.0) for name, loss in forward(self, batch).items()}

    monkeypatch.undo()
    monkeypatch.setattr(bench_scaling.CocaPretraining, "forward", other)
    assert "packed" in case.wrong()["vlp_fast packed"]


@pytest.mark.parametrize("model", ["BLIP", "CoCa"])
def test_more_captions_of_an_image_add_fewer_flops_than_images_repeated(model):
    one, four = (entry(f"{model} captions an image {n}").build() for n in (1, 4))
    if one.absent:
        pytest.skip(str(one.absent))
    (peer,) = (name for name in one.calls if not name.startswith("vlp_fast"))
    grown = {name: count_flops(four.calls[name]) / count_flops(one.calls[name]) for name in ("vlp_fast packed", peer)}
    assert grown["vlp_fast packed"] < 0.85 * grown[peer]
    assert grown[peer] == pytest.approx(4.0, rel=0.1)


def test_fits_recover_what_the_numbers_were_made_of():
    found = fits(made_report(lambda axis, provider, v: 3.0 * v**1.9 if axis == "image size" else 31.0 + 42.0 * v))
    assert len(found) == len(AXES) * 4
    for fit in found:
        if fit["axis"] == "image size":
            assert fit["exponent"] == pytest.approx(1.9)
            assert fit["words"] == "image size: ms ~ side^1.9 (R^2 1.000)"
        else:
            assert (fit["a_ms"], fit["b_ms"], fit["r2"]) == pytest.approx((31.0, 42.0, 1.0))
    assert found[0]["words"] == "batch: 31 ms + 42 ms a pair (R^2 1.000)"


def test_fits_of_two_points_claim_no_quality_and_one_point_has_none():
    report = made_report(lambda axis, provider, v: float(v))
    two = {**report, "rows": [row for row in report["rows"] if row["value"] < 4]}
    assert all(fit["r2"] is None and fit["r2_power"] is None for fit in fits(two))
    assert fits({**report, "rows": [row for row in report["rows"] if row["value"] == 1]}) == []


def test_the_runner_adds_fits_to_the_report(monkeypatch):
    monkeypatch.setattr("vlp_fast.benchmarks.runner.ceilings", lambda *_: {"gflops_per_second": 1.0, "copy_gb_per_second": 1.0})
    options = Options(size="tiny", batch=4, seconds=0.01, only=("CoCa losses",))
    report = run_suite("scaling", options)
    assert report["wrong"] == []
    assert {fit["axis"] for fit in report["fits"]} == {"losses"}
    assert SUITES["scaling"].module == "bench_scaling"


def test_the_figure_has_a_panel_for_every_axis():
    pytest.importorskip("matplotlib")
    from vlp_fast.benchmarks.scaling_plot import plot_scaling

    figure = plot_scaling(made_report(lambda axis, provider, v: 10.0 + v))
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.axison}
    assert set(panels) == set(AXES)
    assert all(len(axes.containers) == 4 for axes in panels.values())
    assert panels["width"].get_yscale() == "log"
    with pytest.raises(ValueError, match="suite scaling"):
        plot_scaling({"suite": "steps", "rows": []})
