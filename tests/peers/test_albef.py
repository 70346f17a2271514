"""Salesforce ALBEF's own pretraining step, recorded with random weights by fixtures/make_albef.py: ours gives its numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from vlp_fast import losses
from vlp_fast.data import Batch
from vlp_fast.models.checkpoints import CheckpointError
from vlp_fast.models.checkpoints.albef import FORMAT
from vlp_fast.segments import Segments
from vlp_fast.training.albef import AlbefInputs
from vlp_fast.training.salesforce_albef import FORMAT as PRETRAINING

CASES = ["ragged", "even"]
FILE = Path(__file__).parent / "fixtures" / "albef.safetensors"


class Recorded:
    """One case of the file: `sizes`, and tensors by the first part of their names."""

    def __init__(self, case):
        with safe_open(FILE, "pt") as file:
            self.sizes = json.loads(file.metadata()[case])
            prefix = f"{case}."
            self.tensors = {name[len(prefix) :]: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118

    def __getitem__(self, name):
        return self.tensors[name]

    def part(self, name):
        return {key[len(name) + 1 :]: tensor for key, tensor in self.tensors.items() if key.startswith(name + ".")}

    @property
    def state(self):
        return self.part("state")

    def fields(self):
        """What no shape shows."""
        heads = {name: self.sizes[name] for name in ("vision_heads", "num_heads")}
        return {**heads, "dropout_p": 0.0, "cls_id": 1, "mask_id": 3}

    def inputs(self):
        lengths = tuple(self["lengths"].tolist())
        batch = Batch(self["images"], self["token_ids"], lengths, ("",) * len(lengths))
        return AlbefInputs(batch, self["masked_ids"], self["masked_rows"])


@pytest.fixture(scope="module", params=CASES)
def recorded(request):
    return Recorded(request.param)


def relative_error(ours, theirs):
    """The largest difference as a share of the largest value of theirs."""
    assert ours.shape == theirs.shape
    return float((ours.detach().double() - theirs.double()).abs().max() / theirs.double().abs().max())


def make_step(recorded, dtype):
    """Our pretraining step with the weights, momentum copies and queues of theirs."""
    return PRETRAINING.load(recorded.state, **recorded.fields()).to(dtype)


def run(step, recorded, dtype, **options):
    inputs = recorded.inputs()
    images = inputs.pairs.images.to(dtype)
    pairs = Batch(images, inputs.pairs.token_ids, inputs.pairs.text_lengths, inputs.pairs.captions)
    inputs = AlbefInputs(pairs, inputs.masked_ids, inputs.masked_rows)
    options = {"negatives": (recorded["image_index"], recorded["text_index"]), **options}
    return step(inputs, alpha=float(recorded["alpha"]), **options)


# what was recorded in float32 is rounded there; losses are recorded in float64
@pytest.mark.parametrize(("dtype", "losses_within", "within"), [(torch.float32, 1e-5, 1e-5), (torch.float64, 1e-10, 2e-7)])
def test_step_has_their_losses_gradients_and_queues(recorded, dtype, losses_within, within):
    step = make_step(recorded, dtype)
    made = run(step, recorded, dtype)
    assert set(made) == set(recorded.part("loss"))
    for name, theirs in recorded.part("loss").items():
        assert relative_error(made[name], theirs) <= losses_within, name
    step.total(made).backward()
    # gradients have the names and shapes of weights, so the table converts them too; a tied one is recorded under one name
    rules = PRETRAINING.rules(step.config)
    theirs = recorded.part("grad")
    for rule in rules:
        if rule.ours is None or not rule.ours.startswith("model."):
            continue
        gradient = step.model.get_parameter(rule.ours.removeprefix("model.")).grad
        error = relative_error(gradient, rule.load([theirs.pop(name) for name in rule.theirs]))
        assert error <= within, f"{rule.ours}: {error:.1e}"
    assert not theirs, f"no gradient of ours for {sorted(theirs)}"
    after = recorded.part("after")
    assert relative_error(step.momentum.image_queue, after["image_queue"].T) <= within
    assert relative_error(step.momentum.text_queue, after["text_queue"].T) <= within
    assert step.momentum.queue_position == after["queue_ptr"]


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.float64, 2e-7)])
def test_model_has_their_features_and_logits(recorded, dtype, within):
    model = FORMAT.load(recorded.state, **recorded.fields()).to(dtype).eval()
    made, inputs = recorded.part("made"), recorded.inputs()
    captions, size = inputs.pairs.segments(), inputs.pairs.batch_size
    with torch.no_grad():
        image = model.encode_image(inputs.pairs.images.to(dtype))
        text = model.encode_words(inputs.pairs.token_ids, captions)
        fused = model.fuse(model.encode_words(inputs.masked_ids, captions), captions, image, range(size))
        rows, others = captions.take(recorded["text_index"].tolist())
        three = Segments([*captions.lengths, *captions.lengths, *others.lengths])
        images = [*range(size), *recorded["image_index"].tolist(), *range(size)]
        pairs = model.fuse(torch.cat([text, text, text[rows]]), three, image, images)
        features = model.encode_text(inputs.pairs.token_ids, captions)
    assert relative_error(image.rows, made["image_rows"]) <= within
    assert relative_error(image.features, made["image_features"]) <= within
    assert relative_error(features, made["text_features"]) <= within
    assert relative_error(fused, made["fused_rows"]) <= within
    assert relative_error(model.word_logits(fused[inputs.masked_rows]), made["word_logits"]) <= within
    assert relative_error(model.matching_logits(pairs[three.first_rows()]), made["matching_logits"]) <= within


def test_hard_negatives_are_drawn_with_their_weights(recorded, monkeypatch):
    step, weights = make_step(recorded, torch.float64), []
    given = iter([recorded["image_index"], recorded["text_index"]])

    def draw(queries, keys, logit_scale, *, floor, backend):
        probabilities = (logit_scale * queries @ keys.T).softmax(1) + floor
        weights.append(probabilities.fill_diagonal_(0.0))
        return next(given)

    monkeypatch.setattr(losses, "hard_negatives", torch.no_grad()(draw))
    run(step, recorded, torch.float64, negatives=None)
    # theirs are shares of a softmax over the batch, without the row's own pair
    for ours, name in zip(weights, ("image_weights", "text_weights"), strict=True):
        assert relative_error(ours, recorded[f"made.{name}"]) <= 2e-7, name


def test_saving_gives_back_what_was_loaded(recorded):
    state, fields = recorded.state, recorded.fields()
    buffers = {name for name in state if "position_ids" in name}
    slow = {name for name in state if "_m." in name or "queue" in name}
    for form, left_out in ((FORMAT, slow | buffers), (PRETRAINING, buffers)):
        saved = form.save(form.load(state, **fields))
        assert set(saved) == set(state) - left_out
        for name, tensor in saved.items():
            assert torch.equal(tensor, state[name]), name


def test_sizes_are_read_from_the_tensors(recorded):
    config, sizes = FORMAT.config(recorded.state, **recorded.fields()), recorded.sizes
    for name in ("image_size", "patch_size", "vision_dim", "vision_depth", "dim", "depth", "fusion_layer", "hidden_dim", "vocab_size",
                 "embed_dim", "queue_size"):  # fmt: skip
        assert getattr(config, name) == sizes[name], name
    assert config.max_positions == sizes["positions"]


def test_positions_are_interpolated_as_theirs_at_another_image_size(recorded):
    model = FORMAT.load(recorded.state, image_size=5 * recorded.sizes["patch_size"], **recorded.fields())
    assert relative_error(model.image_encoder.position_embedding, recorded["made.positions_of_5_by_5"]) <= 1e-6


def test_a_file_without_momentum_and_queues_loads_as_a_model(recorded):
    state = {name: tensor for name, tensor in recorded.state.items() if "_m." not in name and "queue" not in name}
    whole, part = (FORMAT.load(s, **recorded.fields()).state_dict() for s in (recorded.state, state))
    for name, tensor in whole.items():
        assert torch.equal(tensor, part[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("itm_head.bias"), "itm_head.bias is missing"),
        (lambda s: s.pop("visual_encoder.pos_embed"), "this is no pretraining checkpoint of ALBEF: visual_encoder.pos_embed is missing"),
        (lambda s: s.update({"cls_head.weight": torch.zeros(2)}), "cls_head.weight is not part of this model"),
        (
            lambda s: s["text_encoder.cls.predictions.decoder.weight"].add_(1),
            "text_encoder.cls.predictions.decoder.weight should be the same tensor as "
            "text_encoder.bert.embeddings.word_embeddings.weight and differs from it",
        ),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_say_why(change, message):
    recorded = Recorded("even")
    state = {name: tensor.clone() for name, tensor in recorded.state.items()}
    change(state)
    with pytest.raises(CheckpointError, match=message):
        FORMAT.load(state, **recorded.fields())
