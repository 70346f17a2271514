"""``vlp-fast bench`` as a process: exit codes, sentences, what goes to stdout and what to stderr."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from vlp_fast.cli import app

pytest.importorskip("easy_vqa")
FAST = ["--size", "tiny", "--steps", "2", "--batch", "2"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from vlp_fast.cli import app; app()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})


def test_results_go_to_stdout_in_100_plain_columns():
    done = run("bench", *FAST, "--backend", "torch", "--backend", "xformers", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines()[1:-1])) <= 100
    assert "\x1b" not in done.stdout + done.stderr
    for name in ("blip", "coca", "beit3", "albef", "embed_image", "embed_text", "pretrain_step"):
        assert name in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence", "code"),
    [
        (["blop"], "model must be one of blip, coca, beit3, albef, vlmo; received 'blop'.", 2),
        (["--dtype", "fp16", "--device", "cpu"], "dtype 'fp16' is not available on the CPU", 2),
        (["--data", "/no/such/place"], "there is no file or folder /no/such/place", 1),
        (["--batch", "many"], "Invalid value for '--batch'", 2),
    ],
)
def test_failures_are_one_sentence_on_stderr(arguments, sentence, code):
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(done.exception, SystemExit)
    assert done.exit_code == code
    assert sentence in done.stderr
    assert done.stdout == ""


def test_a_process_that_fails_says_so_in_one_sentence():
    done = run("bench", "--data", "/no/such/place")
    assert done.returncode == 1
    assert "there is no file or folder /no/such/place" in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_an_available_backend_is_measured_and_the_other_is_listed(tmp_path):
    file = tmp_path / "report.json"
    arguments = ["bench", "coca", *FAST, "--device", "cpu", "--backend", "xformers", "--backend", "torch", "--json", str(file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    assert [row["backend"] for row in rows if row["ms_median"] is None] == ["xformers"] * 3
    assert all(row["note"].startswith("unavailable: xformers") for row in rows if row["backend"] == "xformers")
    assert all(row["ms_median"] > 0 for row in rows if row["backend"] == "torch")
    assert "and 2 more: unavailable: xformers" in result.stdout


def test_every_image_broken_is_a_sentence_with_the_count(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
        (tmp_path / f"{i}.txt").write_text("a picture")
    result = CliRunner().invoke(app, ["bench", "coca", *FAST, "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert "3 broken image" in result.stderr


def test_broken_images_are_in_the_json(tmp_path):
    for i in range(9):
        Image.new("RGB", (30, 30), (20 * i, 0, 90)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"a picture of colour number {i}")
    (tmp_path / "3.png").write_bytes(b"no image")
    file = tmp_path / "out" / "report.json"
    file.parent.mkdir()
    result = CliRunner().invoke(app, ["bench", "coca", "beit3", *FAST, "--data", str(tmp_path), "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text())["skipped"] == [{"reason": "broken image", "count": 1, "names": ["3.png"]}]
    assert result.stdout.count("3.png") == 1


def test_an_image_size_no_patch_fits_is_a_sentence():
    result = CliRunner().invoke(app, ["bench", "blip", *FAST, "--image-size", "30"])
    assert result.exit_code == 1
    assert "image_size must be a multiple of patch_size; received 30 and 16." in result.stderr


def test_a_folder_that_is_not_there_is_told_before_measuring(tmp_path):
    result = CliRunner().invoke(app, ["bench", "--json", str(tmp_path / "none" / "report.json")])
    assert result.exit_code == 2
    assert "there is no folder" in result.stderr


def test_png_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot"
    result = CliRunner().invoke(app, ["bench", "coca", *FAST, "--png", str(file)])
    assert result.exit_code == 0, result.output
    assert Path(file).read_bytes().startswith(b"\x89PNG")
