"""``vlp-fast capfilt`` on easy-VQA: a killed run goes on, and every refusal is one sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vlp_fast.cli import app
from vlp_fast.data import WordPieceTokenizer, open_pairs
from vlp_fast.models import Blip, Coca, blip_preset, coca_preset
from vlp_fast.models.checkpoints.registry import save_model

pytest.importorskip("easy_vqa")
LIMIT = 240
SIZES = ["--limit", str(LIMIT), "--batch", "8", "--shard-size", "16"]
HALF = ["--cosine-threshold", "-0.176"]  # the median of these weights


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A vocabulary, a whole BLIP of random weights, its two halves, and a CoCa."""
    place, pairs = tmp_path_factory.mktemp("weights"), open_pairs("easy-vqa")
    tokenizer = WordPieceTokenizer.train((pairs[i].caption for i in range(100)), 120)
    tokenizer.save_vocab(place / "vocab.txt")
    torch.manual_seed(0)
    ids = {"vocab_size": tokenizer.vocab_size, "dec_id": tokenizer.dec_id, "enc_id": tokenizer.enc_id}
    blip = Blip(blip_preset("tiny", image_size=32, vision_depth=1, depth=1, **ids))
    with torch.no_grad():
        for parameter in blip.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    save_model(blip, place / "blip.safetensors")
    save_model(blip.captioner(), place / "captioner.safetensors")
    save_model(blip.retriever(), place / "retriever.safetensors")
    save_model(Coca(coca_preset("tiny")), place / "coca.safetensors")
    return place


def _arguments(files: Path, out: Path, *more: str, captioner: str = "blip") -> list[str]:
    weights = ["--captioner", str(files / f"{captioner}.safetensors"), "--vocab", str(files / "vocab.txt")]
    return ["capfilt", "easy-vqa", *weights, "--out", str(out), *HALF, *SIZES, *more]


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def _written(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.name != "capfilt.json"}


def test_a_killed_run_goes_on_and_leaves_the_same_bytes(files, tmp_path):
    whole, out, report = tmp_path / "whole", tmp_path / "out", tmp_path / "report.json"
    first = run(*_arguments(files, whole, "--json", str(report)))
    assert first.exit_code == 0, first.output
    counts = json.loads(report.read_text())
    assert counts["pairs"] == counts["images"] == counts["original"] == LIMIT
    assert counts["chunks"] == 15
    assert counts["run"]["pairs"] == LIMIT
    assert LIMIT / 2 < counts["original_kept"] + counts["synthetic_kept"] < LIMIT * 3 / 2

    command = [sys.executable, "-c", "from vlp_fast.cli import app; app()", *_arguments(files, out)]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        patience = time.monotonic() + 120
        while not (out / "000001.json").exists() and time.monotonic() < patience:
            time.sleep(0.005)
    finally:
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
    done = len(list(out.glob("0*.json")))
    assert killed.returncode == -signal.SIGKILL
    assert 2 <= done < 15

    second = run(*_arguments(files, out, "--json", str(report)))
    assert second.exit_code == 0, second.output
    assert _written(out) == _written(whole)
    again = json.loads(report.read_text())
    # a kill between a chunk and its record costs the chunk
    assert LIMIT - 16 * (done + 1) <= again["run"]["pairs"] <= LIMIT - 16 * done
    assert {**again, "out": 0, "provenance": 0, "run": 0} == {**counts, "out": 0, "provenance": 0, "run": 0}
    third = run(*_arguments(files, out))
    assert third.exit_code == 0
    assert "all was done before" in third.stdout
    assert _written(out) == _written(whole)


def test_two_files_do_what_the_whole_model_does(files, tmp_path):
    whole = run(*_arguments(files, tmp_path / "a.jsonl"))
    halves = ["--filter", str(files / "retriever.safetensors")]
    parts = run(*_arguments(files, tmp_path / "b.jsonl", *halves, captioner="captioner"))
    assert whole.exit_code == parts.exit_code == 0, whole.output + parts.output
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    settings = json.loads((tmp_path / "b.capfilt.json").read_text())["settings"]
    assert settings["captioner_model"] == "BlipCaptioner"
    assert settings["filter_sha256"] != settings["captioner_sha256"]
    assert settings["data"] == "easy-vqa"
    assert f"{LIMIT} pairs, {LIMIT} images read" in parts.stdout
    assert "original" in parts.stdout
    assert "Traceback" not in parts.output
    other = run(*_arguments(files, tmp_path / "b.jsonl", *halves, "--seed", "1", captioner="captioner"))
    assert other.exit_code == 2
    assert "seed was 0 and is 1" in other.stderr


def test_weights_of_transformers_come_with_their_config(tmp_path):
    """Beside a vocabulary of BERT's size, as the published weights have."""
    pieces = [f"[unused{i}]" for i in range(30522)]
    pieces[0], pieces[100:104] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    blip = Blip(blip_preset("tiny", image_size=32, vision_depth=1, depth=1))
    save_model(blip.captioner(), tmp_path / "captioner.bin", "hf-blip")
    save_model(blip.retriever(), tmp_path / "retriever.bin", "hf-blip")
    save_model(blip, tmp_path / "blip.safetensors")
    vision = {"image_size": 32, "num_attention_heads": 4, "layer_norm_eps": 1e-6}
    config = {"vision_config": vision, "text_config": {"num_attention_heads": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    known, configs = ["--captioner-format", "hf-blip"], []
    for model in ("captioner", "filter"):
        configs += [f"--{model}-config", str(tmp_path / "config.json")]
    common = ["--vocab", str(tmp_path / "vocab.txt"), "--limit", "8", "--threshold", "0", "--prompt", "a"]
    theirs = ["--captioner", str(tmp_path / "captioner.bin"), "--filter", str(tmp_path / "retriever.bin")]
    out = [str(tmp_path / f"{name}.jsonl") for name in ("theirs", "ours")]
    result = run("capfilt", "easy-vqa", *theirs, *known, *common, "--out", out[0])
    assert result.exit_code == 1
    assert "config.json" in result.stderr
    result = run("capfilt", "easy-vqa", *theirs, *known, *configs, *common, "--out", out[0])
    assert result.exit_code == 0, result.output
    result = run("capfilt", "easy-vqa", "--captioner", str(tmp_path / "blip.safetensors"), *common, "--out", out[1])
    assert result.exit_code == 0, result.output
    assert Path(out[0]).read_bytes() == Path(out[1]).read_bytes() != b""


def test_bad_images_are_counted_and_named(files, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.png").write_bytes(b"no image")
        (folder / f"{name}.txt").write_text("a red circle")
    arguments = _arguments(files, tmp_path / "out")
    arguments[1] = str(folder)
    result = run(*arguments)
    assert result.exit_code == 1
    assert "skipped: 2 broken image (one.png, two.png)" in result.stdout
    assert "none of the 2 images could be read" in result.stderr


@pytest.mark.parametrize(
    ("more", "captioner", "sentence", "code"),
    [
        (["--top-p", "1.5"], "blip", "top_p must be above 0 and at most 1; received 1.5.", 2),
        (["--batch", "0"], "blip", "batch must be at least 1; received 0.", 2),
        (["--dtype", "int8"], "blip", "dtype must be one of fp32, bf16, fp16; received 'int8'.", 2),
        (["--device", "tpu"], "blip", "device must be cpu or cuda; received 'tpu'.", 2),
        (["--workers", "0"], "blip", "workers must be at least 1; received 0.", 2),
        (["--json", "no/such/folder/report.json"], "blip", "--json must name a file in a folder that exists", 2),
        (["--out", "kept.csv"], "blip", "out must be a folder, for shards, or a .jsonl file; received kept.csv.", 2),
        ([], "coca", "captioner must be a Blip or a BlipCaptioner; received a Coca.", 1),
        ([], "captioner", "filter must be a Blip or a BlipRetriever; received a BlipCaptioner.", 1),
        ([], "none", "there is no checkpoint", 1),
        (["--captioner-format", "flamingo"], "blip", "received 'flamingo'", 1),
        (["--vocab", "none.txt"], "blip", "there is no vocabulary file none.txt.", 1),
        (["--max-length", "5", "--prompt", "a photo of a"], "blip", "max_length must leave room for a word", 1),
    ],
)
def test_failures_are_one_sentence_and_write_nothing(files, tmp_path, more, captioner, sentence, code):
    result = run(*_arguments(files, tmp_path / "out", *more, captioner=captioner))
    assert result.exit_code == code
    assert sentence in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_that_the_command_goes_on(files, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    # the package's attribute of this name is the command
    monkeypatch.setattr(sys.modules["vlp_fast.cli.capfilt"], "run_capfilt", interrupted)
    result = run(*_arguments(files, tmp_path / "out"))
    assert result.exit_code == 130
    assert "interrupted; the same command goes on" in result.stderr
