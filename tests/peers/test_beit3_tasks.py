"""The heads of BEiT-3 against recordings of unilm's code (fixtures/make_beit3.py): outputs, losses, gradients of every parameter.

And the format itself: which file becomes which model, what is refused, and the way back.
"""

import argparse
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vlp_fast import Segments
from vlp_fast.losses import contrastive_loss
from vlp_fast.models import beit3_tasks
from vlp_fast.models.beit3 import Beit3, Beit3Config, Beit3MaskedModel
from vlp_fast.models.checkpoints import CheckpointError, read_state, write_state
from vlp_fast.models.checkpoints._rules import to_ours
from vlp_fast.models.checkpoints.beit3 import FORMATS, format_of
from vlp_fast.training.beit3_tasks import answer_loss, caption_loss

RECORD = load_file(Path(__file__).parent / "fixtures" / "beit3.safetensors")
TOLERANCE = 1e-5  # of the largest value of a tensor
POSITIONS = [f"beit3.encoder.embed_positions.{e}.weight" for e in "AB"]
MODELS = {
    "retrieval": beit3_tasks.Beit3Retrieval,
    "vqa": beit3_tasks.Beit3QuestionAnswering,
    "nlvr2": beit3_tasks.Beit3Reasoning,
    "imagenet": beit3_tasks.Beit3Classifier,
    "captioning": beit3_tasks.Beit3Captioner,
}


def part(prefix):
    return {name[len(prefix) :]: tensor for name, tensor in RECORD.items() if name.startswith(prefix)}


def checkpoint(task):
    """A file as that task's fine-tuning writes it."""
    trunk = part("trunk/")
    if task in ("vqa", "imagenet"):
        trunk = {name: tensor for name, tensor in trunk.items() if ".encoder.layer_norm." not in name}
    return {**trunk, **part(f"{task}/head/")}


def load(state, **fields):
    return format_of(state).load(state, **fields)


def format_for(model):
    return next(form for form in FORMATS if form.model is type(model))


def close(ours, theirs, what):
    largest, worst = theirs.abs().max().item(), (ours - theirs).abs().max().item()
    assert worst <= TOLERANCE * max(largest, 1e-30), f"{what}: differs by {worst:.2e} where the largest value is {largest:.2e}"


def run(model, task, late=False):
    """(outputs as the recording has them, loss)."""
    given = part("inputs/")
    valid = given["valid"]
    segments, ids = Segments(valid.sum(1).tolist()), given["ids"][valid]
    if task == "retrieval":
        out = [model.image_features(given["image"]), model.text_features(ids, segments)]
        return out, contrastive_loss(*out, model.logit_scale.exp())
    if task == "vqa":
        logits = model(given["image"], ids, segments)
        return [logits], answer_loss(logits, given["scores"])
    if task == "nlvr2":
        logits = model(given["image"], given["image2"], ids, segments)
        return [logits], F.cross_entropy(logits, given["label"])
    if task == "imagenet":
        logits = model(given["image"])
        return [logits], F.cross_entropy(logits, given["class"], label_smoothing=0.1)
    rows, hidden = model.caption_rows(given["image"], given["masked_ids"][valid], segments), given["hidden"][valid]
    head = model.word_head
    loss = caption_loss(rows[hidden], head.weight, head.bias, ids[hidden], label_smoothing=0.1, drop_worst=0.2 if late else 0.0)
    return [model.logits(rows[hidden])], loss


@pytest.mark.parametrize("task", [*MODELS, "captioning_late"])
def test_beit3_head_outputs_loss_and_gradients_equal_unilm(task):
    late = task == "captioning_late"
    kind = "captioning" if late else task
    model = load(checkpoint(kind), num_heads=2)
    assert type(model) is MODELS[kind]
    outputs, loss = run(model, kind, late)
    assert len(outputs) == len(part(f"{task}/out/"))
    for i, out in enumerate(outputs):
        close(out, RECORD[f"{task}/out/{i}"], f"output {i}")
    close(loss, RECORD[f"{task}/loss"], "loss")
    loss.backward()
    recorded = part(f"{task}/grad/")
    theirs = {name: recorded.get(name, torch.zeros_like(tensor)) for name, tensor in checkpoint(kind).items()}
    theirs = to_ours(theirs, format_for(model).rules(model.config))
    for name, parameter in model.named_parameters():
        if late and "head" not in name:  # recorded for the head only
            continue
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        close(gradient, theirs[name], f"gradient of {name}")


def test_beit3_at_another_image_size_equals_unilms_loader():
    model = load(part("trunk/"), num_heads=2, image_size=24)
    close(model.image_position, RECORD["larger/positions"][2:], "positions")
    close(model.encode_image(RECORD["larger/image"]).image, RECORD["larger/out"].flatten(0, 1), "rows")


def with_pretraining_heads(**changes):
    trunk = part("trunk/")
    dim = trunk["beit3.text_embed.weight"].shape[1]
    heads = {"mim_head.weight": torch.randn(7, dim), "mim_head.bias": torch.randn(7)}
    return {**trunk, **part("captioning/head/"), **heads, **changes}


@pytest.mark.parametrize("task", [*MODELS, "trunk", "pretraining"])
def test_beit3_saves_what_it_loaded(task, tmp_path):
    state = {"trunk": lambda: part("trunk/"), "pretraining": with_pretraining_heads}.get(task, lambda: checkpoint(task))()
    model = load(state, num_heads=2)
    assert type(model) is {"trunk": Beit3, "pretraining": Beit3MaskedModel, **MODELS}[task]
    write_state(tmp_path / "saved.pth", format_for(model).save(model))
    saved = read_state(tmp_path / "saved.pth")
    assert set(saved) == set(state)
    for name, tensor in state.items():
        first = 2 if name in POSITIONS else 0  # their rows 0 and 1 are never read
        assert saved[name].shape == tensor.shape
        assert torch.equal(saved[name][first:] if first else saved[name], tensor[first:] if first else tensor), name


def test_beit3_reads_what_unilms_training_writes(tmp_path):
    """Its files hold the optimizer and the command line's arguments too."""
    state, arguments = checkpoint("vqa"), argparse.Namespace(lr=1e-4, betas=[0.9, 0.98])
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 3, "args": arguments}, tmp_path / "checkpoint-3.pth")
    read = read_state(tmp_path / "checkpoint-3.pth")
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


def test_beit3_sizes_are_read_from_the_file():
    state = with_pretraining_heads()
    config = format_of(state).config(state, num_heads=2)
    assert config == Beit3Config(
        image_size=16,
        patch_size=8,
        dim=24,
        depth=2,
        num_heads=2,
        hidden_dim=40,
        vocab_size=40,
        visual_vocab_size=7,
        max_positions=10,
    )
    state = checkpoint("vqa")
    vqa = format_of(state).config(state, num_heads=2)
    assert (vqa.num_classes, vqa.normalize_output) == (5, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"other.weight": torch.zeros(1)}, "other.weight is not part of this model"),
        ({"beit3.encoder.layers.1.ffn.B.fc2.bias": None}, "layers.1.ffn.B.fc2.bias is missing"),
        ({"mlm_head.bias": None}, "mlm_head.bias is missing"),
        ({"mlm_head.bias": torch.zeros(3)}, "word_head.bias would have shape"),
        ({"beit3.text_embed.weight": None}, "a BEiT-3 checkpoint has beit3.text_embed.weight"),
    ],
)
def test_beit3_refuses_a_file_that_does_not_fit(change, message):
    state = with_pretraining_heads(**change)
    with pytest.raises(CheckpointError, match=message):
        load({name: tensor for name, tensor in state.items() if tensor is not None}, num_heads=2)


def test_beit3_says_what_no_shape_shows_and_what_was_not_released():
    with pytest.raises(
        CheckpointError, match="num_heads must be given where the width is no multiple of 64; received width 24"
    ):
        load(part("trunk/"))
    with pytest.raises(CheckpointError, match="no shared attention"):
        load(part("trunk/"), num_heads=2, share_attention=True)
    shared = Beit3(Beit3Config(dim=8, depth=1, num_heads=1, hidden_dim=8, image_size=16, vocab_size=5, share_attention=True))
    with pytest.raises(CheckpointError, match="no shared attention"):
        format_for(shared).save(shared)


def test_beit3_fine_tuning_starts_from_the_pretrained_trunk():
    pretrained = load(with_pretraining_heads(), num_heads=2)
    config = beit3_tasks.Beit3ClassifierConfig(**vars(pretrained.config) | {"normalize_output": False}, num_classes=3)
    model = beit3_tasks.Beit3QuestionAnswering(config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.load_trunk(pretrained)
    given = dict(pretrained.named_parameters())
    for name, parameter in model.named_parameters():
        head = name.startswith(("pooler", "head"))
        assert torch.equal(parameter, before[name] if head else given[name]), name
    smaller = Beit3(Beit3Config(**vars(pretrained.config) | {"image_size": 8}))
    with pytest.raises(ValueError, match=r"load_trunk needs image_position of shape \[2, 24\]; the other model has \[5, 24\]"):
        smaller.load_trunk(pretrained)
