"""``vlp-fast profile`` from the outside."""

import json

import pytest
from typer.testing import CliRunner

from vlp_fast.cli import app

runner = CliRunner()


def test_profile_prints_a_row_per_loss_and_module_and_writes_json_and_html(tmp_path):
    json_file, html_file = tmp_path / "p.json", tmp_path / "p.html"
    result = runner.invoke(
        app,
        ["profile", "blip", "--size", "tiny", "--backward", "--batch", "4", "--json", str(json_file), "--html", str(html_file)],
    )
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flamingo"], "model must be one of"),
        (["blip", "--size", "huge"], "size must be one of"),
        (["blip", "--batch", "0"], "batch must be at least 1"),
        (["blip", "--schedule", "packed"], "schedule must be one of"),
        (["coca", "--size", "tiny", "--json", "/nonexistent/x.json"], "No such file"),
    ],
)
def test_profile_ends_with_a_sentence(arguments, message):
    result = runner.invoke(app, ["profile", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
