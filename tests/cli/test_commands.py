"""``vlp-fast info`` and ``vlp-fast bench`` from the outside: what they print, write and refuse."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from vlp_fast.cli import app

runner = CliRunner()
FAST = ["--size", "tiny", "--steps", "2"]


@pytest.fixture
def folder(tmp_path):
    """Five pairs, one of them broken."""
    for i in range(5):
        Image.new("RGB", (40, 30), (40 * i, 90, 200 - 30 * i)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"a picture of colour number {i}")
    (tmp_path / "4.png").write_bytes(b"no image")
    return tmp_path


def test_info_names_every_backend_and_the_choice():
    data = json.loads(runner.invoke(app, ["info", "--json"]).output)
    text = json.dumps(data)
    for name in ("triton", "torch", "xformers", "flash_attn", "cpu", "meta"):
        assert name in text
    assert runner.invoke(app, ["info"]).exit_code == 0


def test_bench_measures_real_files_and_counts_the_broken_one(folder, tmp_path):
    report = tmp_path / "report.json"
    result = runner.invoke(app, ["bench", "coca", *FAST, "--data", str(folder), "--batch", "2", "--json", str(report)])
    assert result.exit_code == 0, result.output
    rows = json.loads(report.read_text())["rows"]
    assert {row["task"] for row in rows} == {"embed_image", "embed_text", "pretrain_step"}
    for row in rows:
        assert row["ms_median"] > 0
        assert row["ms_q1"] <= row["ms_median"] <= row["ms_q3"]
    assert "4.png" in result.output


def test_bench_of_one_pair_measures_embedding_and_says_why_blip_cannot_step(folder, tmp_path):
    report = tmp_path / "report.json"
    result = runner.invoke(app, ["bench", "blip", *FAST, "--data", str(folder), "--batch", "1", "--json", str(report)])
    assert result.exit_code == 0, result.output
    rows = {row["task"]: row for row in json.loads(report.read_text())["rows"]}
    assert rows["embed_image"]["ms_median"] > 0
    assert rows["pretrain_step"]["ms_median"] is None
    assert "at least 2 pairs" in rows["pretrain_step"]["note"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flamingo"], "flamingo"),
        (["blip", "--size", "giant"], "giant"),
        (["blip", "--dtype", "int8"], "int8"),
        (["blip", "--dtype", "fp16"], "fp16"),
        (["blip", "--backend", "xformers"], "xformers"),
        (["blip", "--backend", "magic"], "magic"),
        (["blip", "--batch", "0"], "batch"),
        (["blip", "--size", "tiny", "--data", "no-such-folder"], "no-such-folder"),
    ],
)
def test_bench_ends_with_a_sentence_where_nothing_can_be_measured(arguments, message):
    result = runner.invoke(app, ["bench", *arguments])
    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output


def test_bench_of_an_empty_folder_ends_with_a_sentence(tmp_path):
    result = runner.invoke(app, ["bench", "blip", *FAST, "--data", str(tmp_path)])
    assert result.exit_code != 0
    assert "Traceback" not in result.output
    assert "pairs" in result.output
