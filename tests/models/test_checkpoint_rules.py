"""Tables between two checkpoints: both ways, strict, with every problem named; files; positions at another image size."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlp_fast.models.checkpoints import CheckpointError, Format, read_metadata, read_state, write_state
from vlp_fast.models.checkpoints._positions import resize_positions
from vlp_fast.models.checkpoints._rules import (
    cut_rows,
    from_ours,
    joined,
    reshaped,
    same,
    stacked,
    to_ours,
    transposed,
    unused,
)

RULES = [
    same("word", "embed.weight", tied=["head.weight"]),
    reshaped("patch", "conv.weight", (4, 12), (4, 3, 2, 2)),
    transposed("projection", "proj"),
    joined("qkv", ["q", "k", "v"]),
    stacked("experts", ["A", "B"]),
    cut_rows("position", "positions", 2),
    same("head.bias", "bias", optional=True),
    unused("position_ids"),
]


def theirs():
    embed = torch.randn(7, 4)
    return {
        "embed.weight": embed, "head.weight": embed.clone(), "conv.weight": torch.randn(4, 3, 2, 2), "proj": torch.randn(4, 5),
        "q": torch.randn(4, 4), "k": torch.randn(4, 4), "v": torch.randn(4, 4), "A": torch.randn(3), "B": torch.randn(3),
        "positions": torch.cat([torch.zeros(2, 4), torch.randn(6, 4)]), "bias": torch.randn(7), "position_ids": torch.arange(6),
    }  # fmt: skip


def test_rules_go_both_ways():
    state = theirs()
    ours = to_ours(state, RULES)
    assert {name: tuple(t.shape) for name, t in ours.items()} == {
        "word": (7, 4), "patch": (4, 12), "projection": (5, 4), "qkv": (12, 4), "experts": (2, 3), "position": (6, 4), "head.bias": (7,),
    }  # fmt: skip
    assert torch.equal(ours["qkv"][4:8], state["k"])
    assert torch.equal(ours["patch"], state["conv.weight"].flatten(1))
    back = from_ours(ours, RULES)
    assert set(back) == set(state) - {"position_ids"}
    assert all(torch.equal(back[name], state[name]) for name in back)


def test_rules_share_no_memory_with_what_they_were_given():
    ours = to_ours(theirs(), RULES)
    back = from_ours(ours, RULES)
    assert back["embed.weight"].data_ptr() != back["head.weight"].data_ptr()
    back["A"].zero_()
    assert ours["experts"].abs().sum() > 0


def test_optional_tensors_may_be_absent():
    state = theirs()
    del state["bias"], state["position_ids"]
    ours = to_ours(state, RULES)
    assert "head.bias" not in ours
    assert "bias" not in from_ours(ours, RULES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("q"), "q is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is not part of this model"),
        (lambda s: s["head.weight"].add_(1), "head.weight should be the same tensor as embed.weight and differs from it"),
        (lambda s: s.update(A=torch.zeros(4)), r"A \[4\], B \[3\] cannot become experts"),
        (lambda s: s.update({"conv.weight": torch.zeros(5, 3, 2, 2)}), r"conv.weight \[5, 3, 2, 2\] cannot become patch"),
    ],
)
def test_rules_name_what_does_not_fit(change, words):
    state = theirs()
    change(state)
    with pytest.raises(CheckpointError, match=words):
        to_ours(state, RULES)


def test_all_problems_are_listed_at_once_with_a_likely_cause():
    state = theirs()
    del state["q"], state["v"]
    state |= {"visual_encoder_m.norm": torch.zeros(2), "image_queue": torch.zeros(3)}
    with pytest.raises(CheckpointError) as caught:
        to_ours(state, RULES, what="the file")
    message = str(caught.value)
    assert message.startswith("the file does not fit, and nothing was loaded:")
    assert all(words in message for words in ("q is missing", "v is missing", "image_queue is not part", "momentum copies"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda o: o.pop("qkv"), "qkv is missing"),
        (lambda o: o.update(more=torch.zeros(1)), "more has no counterpart there"),
    ],
)
def test_saving_names_what_does_not_fit(change, words):
    ours = to_ours(theirs(), RULES)
    change(ours)
    with pytest.raises(CheckpointError, match=words):
        from_ours(ours, RULES)


# ------------------------------------------------------------------------------------------------------------------- formats


class Tiny(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config, 3)


FORMAT = Format(
    name="tiny", title="tiny", model=Tiny, config=lambda state, width=None: width or state["w"].shape[1],
    rules=lambda config: [same("fc.weight", "w"), same("fc.bias", "b")],
)  # fmt: skip


def test_format_loads_and_saves():
    state = {"w": torch.randn(3, 5), "b": torch.randn(3)}
    model = FORMAT.load(state)
    assert model.config == 5
    back = FORMAT.save(model)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_format_refuses_another_size_and_leaves_nothing_half_loaded():
    with pytest.raises(CheckpointError, match=r"fc.weight would have shape \[3, 5\]; this model needs \[3, 4\]") as caught:
        FORMAT.load({"w": torch.randn(3, 5), "b": torch.randn(3)}, width=4)
    assert "Likely cause: another size of the model" in str(caught.value)


# --------------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.bin"])
def test_files_keep_tensors(tmp_path, name):
    state = {"x": torch.randn(3, 4).T, "y": torch.arange(3), "z": torch.randn(2).bfloat16()}
    write_state(tmp_path / name, state, {"model": "Tiny"})
    found = read_state(tmp_path / name)
    assert set(found) == set(state)
    assert all(torch.equal(found[key], state[key]) and found[key].dtype == state[key].dtype for key in state)
    assert read_metadata(tmp_path / name) == ({"model": "Tiny"} if name.endswith("safetensors") else None)


@pytest.mark.parametrize("wrap", ["model", "module", "state_dict", None])
def test_files_are_unwrapped(tmp_path, wrap):
    state = {"module.a": torch.ones(2), "module.b": torch.zeros(1)}
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "a.pth")
    assert set(read_state(tmp_path / "a.pth")) == {"a", "b"}


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def test_files_are_never_executed(tmp_path, capsys):
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"model": Evil()}))
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_state(tmp_path / "a.pth")
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("write", "error", "words"),
    [
        (lambda path: None, FileNotFoundError, "there is no checkpoint"),
        (lambda path: path.write_bytes(b"nothing"), CheckpointError, "cannot be read as a checkpoint"),
        (lambda path: torch.save({"epoch": 3}, path), CheckpointError, "must hold a dictionary of tensors"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, write, error, words):
    write(tmp_path / "a.pth")
    with pytest.raises(error, match=words):
        read_state(tmp_path / "a.pth")


def test_files_need_a_known_ending(tmp_path):
    with pytest.raises(ValueError, match="must end in .safetensors, .pth, .pt or .bin; received a.npz"):
        write_state(tmp_path / "a.npz", {})


# ----------------------------------------------------------------------------------------------------------------- positions


def test_positions_are_interpolated_as_an_image():
    positions = torch.randn(1 + 16, 5)
    larger = resize_positions(positions, 6)
    image = positions[1:].T.reshape(1, 5, 4, 4)
    expected = F.interpolate(image, (6, 6), mode="bicubic", align_corners=False)[0].flatten(1).T
    torch.testing.assert_close(larger, torch.cat([positions[:1], expected]))
    assert resize_positions(positions, 4) is positions
    assert resize_positions(positions[1:], 2, first=0).shape == (4, 5)


def test_positions_must_be_a_square():
    with pytest.raises(ValueError, match="a square grid of patches after 1 rows; received 12 rows"):
        resize_positions(torch.zeros(12, 3), 4)
