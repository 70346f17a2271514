"""``vlp-fast profile`` from the outside."""

import json

import pytest
from typer.testing import CliRunner

from vlp_fast.cli import app

runner = CliRunner()


def test_profile_prints_a_row_per_loss_and_module_and_writes_json_and_html(tmp_path):
    json_file, html_file = tmp_path / "p.json", tmp_path / "p.html"
    command = ["profile", "blip", "--size", "tiny", "--schedule", "published", "--backward", "--batch", "4"]
    result = runner.invoke(app, [*command, "--json", str(json_file), "--html", str(html_file)])
    assert result.exit_code == 0, result.output
    for word in ("image_encoder", "momentum_text_encoder", "text_decoder", "itm", "total"):
        assert word in result.output
    data = json.loads(json_file.read_text())
    assert data["totals"]["image_passes"] == 2
    assert data["totals"]["text_sequences"] == 24
    assert html_file.read_text().startswith("<!doctype html>")


def test_profile_on_the_cpu_has_times():
    result = runner.invoke(app, ["profile", "coca", "--size", "tiny", "--device", "cpu", "--batch", "2"])
    assert result.exit_code == 0, result.output


def test_models_and_schedules_stand_side_by_side(tmp_path):
    json_file, html_file = tmp_path / "p.json", tmp_path / "p.html"
    command = ["profile", "blip", "coca", "albef", "--size", "tiny", "--batch", "3"]
    files = ["--json", str(json_file), "--html", str(html_file)]
    result = runner.invoke(app, [*command, *files])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert [line[:4] for line in lines[3:9]] == [
        ["blip", "published", "1+1", "4+1"],
        ["blip", "packed", "1+1", "2+1"],
        ["coca", "published", "1", "2"],
        ["coca", "packed", "1", "2"],
        ["albef", "published", "1+1", "2+2"],
        ["albef", "packed", "1+1", "1+1"],
    ]
    profiles = json.loads(json_file.read_text())["profiles"]
    assert [(profile["model"], profile["schedule"]) for profile in profiles] == [
        (model, schedule) for model in ("blip", "coca", "albef") for schedule in ("published", "packed")
    ]
    assert html_file.read_text().count("<svg") == 4 * 6


@pytest.mark.parametrize("schedule", ["published", "packed"])
def test_a_schedule_that_is_named_is_the_only_one(schedule, tmp_path):
    json_file = tmp_path / "p.json"
    command = ["profile", "blip", "--size", "tiny", "--schedule", schedule, "--json", str(json_file)]
    assert runner.invoke(app, command).exit_code == 0
    assert json.loads(json_file.read_text())["schedule"] == schedule


def test_losses_that_are_left_out_have_no_row(tmp_path):
    json_file = tmp_path / "p.json"
    command = ["profile", "blip", "--size", "tiny", "--schedule", "packed", "--losses", "itm,itc", "--json", str(json_file)]
    assert runner.invoke(app, command).exit_code == 0
    profile = json.loads(json_file.read_text())
    assert {row["loss"] for row in profile["rows"]} == {"itc", "itm"}
    assert profile["totals"]["text_passes"] == 3  # contrast, its momentum twin, matching


def test_trace_is_of_the_cpu_and_holds_every_call(tmp_path):
    trace_file = tmp_path / "trace.json"
    command = ["profile", "coca", "--size", "tiny", "--schedule", "packed", "--batch", "2", "--backward"]
    result = runner.invoke(app, [*command, "--trace", str(trace_file)])
    assert result.exit_code == 0, result.output
    assert "device cpu" in result.output
    events = [event for event in json.loads(trace_file.read_text())["traceEvents"] if event["ph"] == "X"]
    assert len(events) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flamingo"], "model must be one of"),
        (["blip", "--size", "huge"], "size must be one of"),
        (["blip", "--batch", "0"], "batch must be at least 1"),
        (["blip", "--schedule", "fast"], "schedule must be one of packed, published"),
        (["blip", "--losses", "itc,mlm"], "losses must name some of itc, itm, lm; received ['itc', 'mlm']"),
        (["blip", "--losses", ""], "losses must name some of itc, itm, lm; received ['']"),
        (["blip", "--losses", "itc", "--peer", "hf-blip"], "losses must not be given with a peer, which makes all of its own"),
        ([], "name a model (blip, coca"),
        (["--peer", "hf-clip"], "peer must be one of hf-blip, open-clip-coca"),
        (["--peer", "hf-blip", "--device", "meta"], "device must be cpu or cuda for a peer"),
        (["coca", "--size", "tiny", "--device", "meta", "--trace", "x.json"], "a trace needs times"),
        (["coca", "--size", "tiny", "--json", "/nonexistent/x.json"], "No such file"),
    ],
)
def test_profile_ends_with_a_sentence(arguments, message):
    result = runner.invoke(app, ["profile", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
