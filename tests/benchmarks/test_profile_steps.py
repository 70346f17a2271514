"""A step's time by kind of operation: the kinds are those that ran, and add up to the step."""

import json
import sys

import pytest
import torch

from vlp_fast.benchmarks import profile_steps


def test_kinds_of_a_call_add_up_to_it():
    a = torch.randn(300, 300)
    found = profile_steps.by_kind(lambda: torch.softmax(a @ a, -1).to(torch.float64))
    whole = found.pop("call")
    assert sum(found.values()) == pytest.approx(whole)
    for kind in ("products", "softmax, masks, random numbers", "copies and casts"):
        assert found[kind] > 0.0
    assert found["norms and GELU"] == found["attention's products"] == 0.0


def test_no_operation_is_of_two_kinds():
    names = [name for names in profile_steps.KINDS.values() for name in names]
    assert len(names) == len(set(names))


def test_the_command_profiles_writing_beside_the_rival(monkeypatch, tmp_path):
    pytest.importorskip("transformers", reason="the rival")
    path = tmp_path / "profile.json"
    monkeypatch.setattr(profile_steps, "CALLS", 1)
    options = [
        "--suite",
        "generate",
        "--dtype",
        "fp32",
        "--size",
        "tiny",
        "--batch",
        "2",
        "--only",
        "greedy",
        "--json",
        str(path),
    ]
    monkeypatch.setattr(sys, "argv", ["profile_steps.py", *options])
    assert profile_steps.main() == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["provider"] for row in rows] == ["vlp_fast, packed", "transformers"]
    assert all(row["case"] == "BLIP greedy" and row["products"] > 0.0 for row in rows)


def test_the_command_profiles_a_model_and_says_who_is_absent(monkeypatch, tmp_path, capsys):
    path = tmp_path / "profile.json"
    monkeypatch.setattr(profile_steps, "CALLS", 1)
    monkeypatch.setattr(
        sys, "argv", ["profile_steps.py", *["--size", "tiny", "--batch", "2", "--only", "blip", "--json"], str(path)]
    )
    assert profile_steps.main() == 0
    report = json.loads(path.read_text())
    assert report["stamp"]["dtype"] == "bf16"
    (row,) = report["rows"]
    assert row["provider"] == "vlp_fast packed"
    assert row["products"] > 0.0
    assert "salesforce BLIP: needs a clone" in capsys.readouterr().out
