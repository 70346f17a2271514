"""BEiT-3 from pixels and captions to retrieval: the tokenizer is trained, the three losses fall, held-out pairs are found."""

import json
import sys

import pytest


@pytest.fixture(scope="module")
def script(benchmark_module):
    pytest.importorskip("easy_vqa", reason="needs the real images of pip install 'vlp_fast[demo]'")
    return benchmark_module("train_beit3_easy_vqa")


@pytest.mark.heavy
def test_beit3_pretraining_lowers_its_losses_and_finds_held_out_pairs(script):
    found = script.run(script.Options(tokenizer_steps=400, steps=500, max_words=6), lambda line: None)
    tokenizer, first, last = found["tokenizer"], found["first"], found["last"]
    assert tokenizer["last_error"] < 0.2 * tokenizer["first_error"]
    assert tokenizer["codes_used"] > script.NUM_CODES / 2
    assert last["mim"] < 0.9 * first["mim"]
    assert last["mlm"] < 0.3 * first["mlm"]
    assert last["mvlm"] < 0.6 * first["mvlm"]
    chance, before, after = found["chance"], found["recall_before"], found["recall"]
    assert chance == pytest.approx(1 / 24)
    assert max(before.values()) < 2 * chance
    assert min(after.values()) > 2 * chance
    assert sum(after.values()) / 2 > 2.5 * chance


def test_script_writes_what_it_found(script, tmp_path, monkeypatch, capsys):
    path = tmp_path / "found.json"
    options = ["--tokenizer-steps", "2", "--steps", "2", "--batch", "4", "--alone", "4", "--max-words", "4", "--galleries", "1"]
    monkeypatch.setattr(sys, "argv", ["train_beit3_easy_vqa.py", *options, "--json", str(path)])
    assert script.main() == 0
    found = json.loads(path.read_text())
    assert found["options"]["max_words"] == 4
    assert found["stamp"]["commit"]
    assert set(found["last"]) == {"mim", "mlm", "mvlm"}
    assert all(0 <= value <= 1 for value in found["recall"].values())
    assert "recall@1 among" in capsys.readouterr().out
