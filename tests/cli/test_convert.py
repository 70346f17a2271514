"""``vlp-fast convert``: every format there and back, by way of files; refusals leave nothing behind."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from vlp_fast.cli import app
from vlp_fast.models import blip, coca
from vlp_fast.models.albef import Albef, albef_preset
from vlp_fast.models.beit3 import Beit3MaskedModel, beit3_preset
from vlp_fast.models.blip import Blip, BlipCaptioner, BlipRetriever, blip_preset
from vlp_fast.models.checkpoints import CheckpointError, read_metadata, read_state
from vlp_fast.models.checkpoints.registry import FORMATS, load_model, save_model
from vlp_fast.models.coca import Coca, coca_preset
from vlp_fast.models.coca_open_clip import OpenClipCoca, open_clip_coca_preset
from vlp_fast.models.coca_palm import CocaPalm, coca_palm_preset
from vlp_fast.models.vlmo import Vlmo, vlmo_preset

TINY = blip_preset("tiny")
HEADS = {"vision_heads": 4, "num_heads": 4}
# format -> a model that it can hold, and the fields that its tensors do not show
CASES = {
    "hf-blip": (lambda: BlipCaptioner(TINY), HEADS),
    "salesforce-blip": (lambda: Blip(TINY), HEADS),
    "open-clip-coca": (
        lambda: OpenClipCoca(open_clip_coca_preset("tiny")), {"vision_heads": 4, "num_heads": 4, "pooler_heads": 4, "decoder_heads": 4},
    ),
    "lucidrains-coca": (lambda: CocaPalm(coca_palm_preset("tiny")), {"vision_heads": 4}),
    "beit3": (lambda: Beit3MaskedModel(beit3_preset("tiny")), {"num_heads": 4}),
    "albef": (lambda: Albef(albef_preset("tiny")), HEADS),
    "vlmo": (
        lambda: Vlmo(vlmo_preset("tiny")), {"num_heads": 4, "relative_text_length": vlmo_preset("tiny").relative_text_length},
    ),
}  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def sets(fields):
    return [word for name, value in fields.items() for word in ("--set", f"{name}={json.dumps(value)}")]


def test_cases_cover_every_format():
    assert set(CASES) == set(FORMATS)


@pytest.mark.parametrize("name", CASES)
def test_convert_there_and_back(name, tmp_path):
    make, fields = CASES[name]
    model = make()
    save_model(model, tmp_path / "own.safetensors")
    there = run(tmp_path / "own.safetensors", tmp_path / "peer.pth", "--to", name)
    assert there.exit_code == 0, there.stderr
    assert f"{type(model).__name__}, " in there.stdout
    back = run(tmp_path / "peer.pth", tmp_path / "back.safetensors", "--from", name, *sets(fields))
    assert back.exit_code == 0, back.stderr
    loaded = load_model(tmp_path / "back.safetensors")
    assert type(loaded) is type(model)
    expected = model.state_dict()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    again = run(tmp_path / "back.safetensors", tmp_path / "again.pth", "--to", name)
    assert again.exit_code == 0, again.stderr
    first, second = read_state(tmp_path / "peer.pth"), read_state(tmp_path / "again.pth")
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_convert_between_two_code_bases(tmp_path):
    save_model(BlipRetriever(TINY), tmp_path / "a.bin", "hf-blip")
    done = run(tmp_path / "a.bin", tmp_path / "b.pth", "--from", "hf-blip", "--to", "salesforce-blip", *sets(HEADS))
    assert done.exit_code == 0, done.stderr
    assert "visual_encoder.cls_token" in read_state(tmp_path / "b.pth")


def test_config_of_transformers_gives_what_tensors_do_not_show(tmp_path):
    save_model(BlipCaptioner(TINY), tmp_path / "a.safetensors", "hf-blip")
    config = {
        "vision_config": {"num_attention_heads": 4, "layer_norm_eps": 1e-4},
        "text_config": {"num_attention_heads": 2, "layer_norm_eps": 1e-12},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--from", "hf-blip", "--config", tmp_path / "config.json"
    )
    assert done.exit_code == 0, done.stderr
    loaded = load_model(tmp_path / "b.safetensors").config
    assert (loaded.vision_heads, loaded.num_heads, loaded.vision_eps) == (4, 2, 1e-4)
    refused = run(
        tmp_path / "a.safetensors", tmp_path / "c.safetensors", "--from", "beit3", "--config", tmp_path / "config.json"
    )
    assert refused.exit_code == 1
    assert "--config is for hf-blip" in refused.stderr


def test_own_files_hold_model_and_config(tmp_path):
    model = Coca(coca_preset("tiny", pooler="parallel"))
    save_model(model, tmp_path / "coca.safetensors")
    assert read_metadata(tmp_path / "coca.safetensors")["model"] == "Coca"
    loaded = load_model(tmp_path / "coca.safetensors", backend="torch")
    assert loaded.config == coca.coca_preset("tiny", pooler="parallel", backend="torch")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded.encode_image(images).features, model.encode_image(images).features)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["none.pth", "out.safetensors", "--from", "beit3"], 1, "there is no checkpoint"),
        (["own.safetensors", "out.safetensors", "--from", "bert"], 1, "source must be one of vlp-fast, hf-blip,"),
        (["own.safetensors", "out.pth"], 1, "must end in .safetensors"),
        (["own.safetensors", "out.pth", "--to", "beit3"], 1, "beit3 has names for Beit3, .*; this model is a Blip"),
        (["own.safetensors", "out.safetensors", "--from", "albef"], 1, "does not fit|is missing"),
        (["peer.safetensors", "out.safetensors"], 1, "does not say which model it holds"),
        (["own.safetensors", "out.safetensors", "--set", "heads"], 1, "--set must be FIELD=VALUE"),
        (["own.safetensors", "out.safetensors", "--set", "heads=3"], 1, "does not take these fields"),
        (["own.safetensors", "own.safetensors"], 2, "exists; --force writes over it"),
    ],
)
def test_refusals_are_sentences_and_write_nothing(arguments, code, words, tmp_path):
    save_model(Blip(TINY), tmp_path / "own.safetensors")
    save_model(Blip(TINY), tmp_path / "peer.safetensors", "salesforce-blip")
    before = (tmp_path / "own.safetensors").read_bytes()
    done = run(*(tmp_path / a if "." in a and a[0] != "-" and "=" not in a else a for a in arguments))
    assert done.exit_code == code
    assert done.stderr.startswith("vlp-fast convert: ")
    assert re.search(words, done.stderr), done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"own.safetensors", "peer.safetensors"}
    assert (tmp_path / "own.safetensors").read_bytes() == before


def test_a_model_of_a_later_version_is_named(tmp_path):
    from vlp_fast.models.checkpoints import write_state

    write_state(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"schema": 1, "model": "Later", "config": {}})
    with pytest.raises(CheckpointError, match="holds a Later; this version knows Albef"):
        load_model(tmp_path / "a.safetensors")


def test_another_image_size_interpolates_positions(tmp_path):
    save_model(Blip(TINY), tmp_path / "a.pth", "salesforce-blip")
    larger = load_model(tmp_path / "a.pth", "salesforce-blip", image_size=96, **HEADS)
    assert larger.encode_image(torch.randn(1, 3, 96, 96)).features.shape == (1, TINY.embed_dim)
    assert blip.blip_preset("tiny").image_size == 64
