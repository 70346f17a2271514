"""What salesforce's BLIP code computed from random weights (fixtures/make_salesforce_blip.py) against ours with the same weights."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlp_fast import Segments
from vlp_fast.data import Batch
from vlp_fast.models import Blip
from vlp_fast.models.checkpoints import CheckpointError, read_state, salesforce_blip, write_state
from vlp_fast.models.checkpoints._positions import resize_positions
from vlp_fast.models.checkpoints._rules import to_ours
from vlp_fast.passes import TextPass
from vlp_fast.training import salesforce_blip as salesforce_pretraining
from vlp_fast.training.blip_tasks import captioning_loss, nlvr2_loss, vqa_loss

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}  # the fixture was computed in fp64 and rounded to fp32
PRETRAINING = {"vision_heads": 3, "num_heads": 2, "momentum": 0.9}
TASKS = {"vision_heads": 2, "num_heads": 1}
NLVR2 = {"vision_heads": 1, "num_heads": 2}
ORDERS = pytest.mark.parametrize(
    "order", [(0, 1, 2), *(pytest.param(o, marks=pytest.mark.heavy) for o in [*itertools.permutations(range(3))][1:])], ids=str
)
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])


class Recording:
    """One part of the fixture: `state`, `grad` and `after` by name, the rest as items."""

    def __init__(self, part):
        everything = load_file(Path(__file__).parent / "fixtures" / "salesforce_blip.safetensors")
        own = {name.removeprefix(f"{part}/"): t for name, t in everything.items() if name.startswith(f"{part}/")}
        own = {name: t.long() if t.dtype == torch.int32 else t for name, t in own.items()}
        self.state, self.grad, self.after = (
            {name.removeprefix(f"{kind}/"): t for name, t in own.items() if name.startswith(f"{kind}/")}
            for kind in ("state", "grad", "after")
        )
        self.items = {name: t for name, t in own.items() if "/" not in name}

    def __getitem__(self, name):
        return self.items[name]

    def captions(self, which=""):
        """Packed ids and segments of what was padded."""
        mask = self[f"{which}mask"].bool()
        return self[f"{which}ids"][mask], Segments(mask.sum(1).tolist())

    def reorder(self, order):
        """The same samples in another order: losses that are means over them, and gradients, stay."""
        index = torch.tensor(order)
        for name in {"images", "ids", "mask", "targets", "logits"} & self.items.keys():
            self.items[name] = self[name].unflatten(0, (-1, len(order)))[:, index].flatten(0, 1)
        if "answered" in self.items:
            self.items["answered"] = index.argsort()[self["answered"]]
        return self

    def load(self, fmt, dtype, **given):
        vocab = len(next(t for name, t in self.state.items() if name.endswith("word_embeddings.weight")))
        model = fmt.load(self.state, dec_id=vocab - 2, enc_id=vocab - 1, dropout_p=0.0, **given)
        return model.to(dtype)


def assert_same(actual, expected, what):
    assert actual.shape == expected.shape, what
    allowed = TOLERANCE[actual.dtype] * max(expected.abs().max().item(), 1e-4)
    difference = (actual - expected).abs().max().item()
    assert difference <= allowed, f"{what} differs by {difference:.3g}; {allowed:.3g} is allowed"


def assert_same_gradients(fmt, model, recording):
    rules = [rule for rule in fmt.rules(model.config) if rule.ours and not rule.ours.startswith("momentum.")]
    expected = to_ours(recording.grad, rules)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == expected.keys()
    for name, parameter in trained.items():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_same(grad, expected[name].to(grad.dtype), f"the gradient of {name}")
        assert grad.abs().max() > 0, name


def assert_round_trip(fmt, model, recording, left_out=()):
    saved = fmt.save(model)
    kept = {name: t for name, t in recording.state.items() if not name.endswith("position_ids") and name not in left_out}
    assert saved.keys() == kept.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor, kept[name]), name


def pretraining_batch(recording, dtype):
    ids, segments = recording.captions()
    return Batch(recording["images"].to(dtype), ids, tuple(segments.lengths), ("",) * len(segments))


@DTYPES
@pytest.mark.parametrize("schedule", ["packed", pytest.param("published", marks=pytest.mark.heavy)])
def test_a_pretraining_step_equals_salesforce(dtype, schedule):
    recording = Recording("pretraining")
    step = recording.load(salesforce_pretraining.FORMAT, dtype, **PRETRAINING)
    step.schedule = schedule
    negatives = recording["negative_images"], recording["negative_texts"]
    losses = step(pretraining_batch(recording, dtype), alpha=0.4, negatives=negatives)
    for name, expected in zip(("itc", "itm", "lm"), recording["losses"], strict=True):
        assert_same(losses[name].to(dtype), expected, name)
    step.total(losses).backward()
    assert_same_gradients(salesforce_pretraining.FORMAT, step, recording)
    rules = salesforce_pretraining.FORMAT.rules(step.config)
    after = to_ours(recording.after, [rule for rule in rules if rule.ours is None or rule.ours.startswith("momentum.")])
    now = {name: t for name, t in step.state_dict().items() if name.startswith("momentum.")}
    assert now.keys() == after.keys()
    for name, tensor in now.items():
        if tensor.is_floating_point():
            assert_same(tensor, after[name].to(dtype), f"{name} after the step")
        else:
            assert torch.equal(tensor, after[name]), name


def test_a_pretraining_state_comes_back_as_it_was(tmp_path):
    recording = Recording("pretraining")
    step = recording.load(salesforce_pretraining.FORMAT, torch.float32, **PRETRAINING)
    unread = {name for name in recording.state if name.startswith("text_encoder_m.") and "crossattention" in name}
    assert_round_trip(salesforce_pretraining.FORMAT, step, recording, unread)
    path = tmp_path / "model.pth"
    write_state(path, recording.state)
    again = salesforce_pretraining.FORMAT.load(read_state(path), dec_id=38, enc_id=39, **PRETRAINING)
    assert all(torch.equal(t, step.state_dict()[name]) for name, t in again.state_dict().items())


def test_the_model_of_a_pretraining_file_loads_without_its_momentum():
    recording = Recording("pretraining")
    model = recording.load(salesforce_blip.PRETRAINING, torch.float32, **PRETRAINING)
    step = recording.load(salesforce_pretraining.FORMAT, torch.float32, **PRETRAINING)
    assert isinstance(model, Blip)
    assert all(torch.equal(t, step.model.state_dict()[name]) for name, t in model.state_dict().items())
    momentum = {n for n in recording.state if n.split(".")[0].endswith("_m") or n in salesforce_blip.QUEUES}
    assert_round_trip(salesforce_blip.PRETRAINING, model, recording, momentum)


@DTYPES
@ORDERS
def test_captioning_equals_salesforce(dtype, order):
    recording = Recording("captioning").reorder(order)
    model = recording.load(salesforce_blip.CAPTIONING, dtype, **TASKS)
    ids, segments = recording.captions()
    image = model.encode_image(recording["images"].to(dtype))
    loss = captioning_loss(model, image, ids, segments, range(3), prompt_length=4)
    assert_same(loss, recording["loss"].to(dtype), "the loss")
    loss.backward()
    assert_same_gradients(salesforce_blip.CAPTIONING, model, recording)
    if dtype == torch.float32:
        assert_round_trip(salesforce_blip.CAPTIONING, model, recording)


@DTYPES
def test_retrieval_equals_salesforce(dtype):
    recording = Recording("retrieval")
    model = recording.load(salesforce_blip.RETRIEVAL, dtype, **TASKS)
    ids, segments = recording.captions()
    image, text = model.encode_image(recording["images"].to(dtype)), model.encode_text(ids, segments)
    asked = TextPass(
        "itm", ids, segments, images=range(3), first_row_only=True
    )  # [CLS] stays in front: so does their class for scores
    (rows,) = model.text_tower([asked], image.rows, image.segments)
    logits, cosines = model.matching_logits(rows), image.features @ text.T
    assert_same(logits, recording["logits"].to(dtype), "matching logits")
    assert_same(cosines, recording["cosines"].to(dtype), "cosines")
    (torch.cat([logits, cosines], 1) * recording["weights"].to(dtype)).sum().backward()
    assert_same_gradients(salesforce_blip.RETRIEVAL, model, recording)
    if dtype == torch.float32:
        trained_only = {n for n in recording.state if n.split(".")[0].endswith("_m") or n in ("temp", *salesforce_blip.QUEUES)}
        assert len(trained_only) > 50
        assert_round_trip(salesforce_blip.RETRIEVAL, model, recording, trained_only)


@DTYPES
@ORDERS
def test_question_answering_equals_salesforce(dtype, order):
    recording = Recording("vqa").reorder(order)
    model = recording.load(salesforce_blip.QUESTION_ANSWERING, dtype, **TASKS)
    answers, answered = recording.captions("answer_"), recording["answered"]
    weights, images = recording["weights"].to(dtype), recording["images"].to(dtype)
    loss = vqa_loss(model, images, recording.captions(), answers, answered, weights)
    assert_same(loss, recording["loss"].to(dtype), "the loss")
    loss.backward()
    assert_same_gradients(salesforce_blip.QUESTION_ANSWERING, model, recording)
    if dtype == torch.float32:
        assert_round_trip(salesforce_blip.QUESTION_ANSWERING, model, recording)


@DTYPES
@ORDERS
def test_nlvr2_equals_salesforce(dtype, order):
    recording = Recording("nlvr2").reorder(order)
    model = recording.load(salesforce_blip.NLVR2, dtype, **NLVR2)
    first, second = recording["images"].to(dtype).chunk(2)
    assert_same(model(first, second, *recording.captions()), recording["logits"].to(dtype), "logits")
    loss = nlvr2_loss(model, first, second, *recording.captions(), recording["targets"])
    assert_same(loss, recording["loss"].to(dtype), "the loss")
    loss.backward()
    assert_same_gradients(salesforce_blip.NLVR2, model, recording)
    if dtype == torch.float32:
        assert_round_trip(salesforce_blip.NLVR2, model, recording)


@pytest.mark.parametrize("grid", [2, 6, 7])
def test_positions_of_another_image_size_equal_salesforce(grid):
    recording = Recording("positions")
    ours = resize_positions(recording["old"][0], grid)
    assert_same(ours, recording[f"grid_{grid}"][0], "positions")


def test_another_image_size_interpolates_the_positions_of_model_and_momentum():
    recording = Recording("pretraining")
    step = recording.load(salesforce_pretraining.FORMAT, torch.float32, image_size=24, **PRETRAINING)
    for encoder, name in ((step.model.image_encoder, "visual_encoder"), (step.momentum.image_encoder, "visual_encoder_m")):
        assert encoder.num_tokens == 10
        expected = resize_positions(recording.state[f"{name}.pos_embed"][0], 3)
        assert torch.equal(encoder.position_embedding, expected)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("pretraining", "PRETRAINING"),
        ("captioning", "CAPTIONING"),
        ("retrieval", "RETRIEVAL"),
        ("vqa", "QUESTION_ANSWERING"),
        ("nlvr2", "NLVR2"),
    ],
)
def test_a_file_shows_its_format(part, name):
    assert salesforce_blip.format_of(Recording(part).state) is getattr(salesforce_blip, name)


def test_towers_that_should_be_tied_and_differ_are_refused():
    recording = Recording("pretraining")
    name = "text_decoder.bert.encoder.layer.1.crossattention.self.value.weight"
    recording.state[name] = recording.state[name] + 1
    with pytest.raises(CheckpointError, match=f"{name} should be the same tensor as text_encoder.*self.value.weight"):
        recording.load(salesforce_blip.PRETRAINING, torch.float32, **PRETRAINING)


def test_a_file_of_another_task_is_refused():
    with pytest.raises(CheckpointError, match=r"text_decoder.* is missing"):
        Recording("retrieval").load(salesforce_blip.PRETRAINING, torch.float32, **TASKS)
    recording = Recording("pretraining")
    recording.state = {n: t for n, t in recording.state.items() if "_m." not in n and n not in salesforce_blip.QUEUES}
    with pytest.raises(CheckpointError, match=r"image_queue is missing(.|\n)*load the model alone"):
        recording.load(salesforce_pretraining.FORMAT, torch.float32, **PRETRAINING)
    with pytest.raises(
        CheckpointError, match="vision_heads must be given: no shape shows it, and vision_dim 12 is no multiple"
    ):
        Recording("captioning").load(salesforce_blip.CAPTIONING, torch.float32)
