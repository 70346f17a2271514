"""Losses that are left out: the others keep their values and gradients, and what serves only the left out does not run."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlp_fast.training import SCHEDULES, build_pretraining, synthetic_batch

NAMES = {
    "blip": ("itc", "itm", "lm"),
    "coca": ("contrastive", "caption"),
    "beit3": ("mim", "mlm", "mvlm"),
    "albef": ("itc", "itm", "mlm"),
    "vlmo": ("mlm", "itm", "itc", "itc_vl"),
}
# of each tower the packed forwards, of each forward the passes, of each pass the losses that it serves
PASSES = {
    "blip": {
        "image_encoder": [["itc itm lm"]],
        "text_tower": [["itc"], ["itm", "itm", "lm"]],
        "momentum_image_encoder": [["itc"]],
        "momentum_text_tower": [["itc"]],
    },
    "coca": {
        "image_encoder": [["contrastive caption"]],
        "text_encoder": [["contrastive caption"]],
        "text_decoder": [["caption"]],
    },
    "beit3": {"encoder": [["mim", "mlm", "mvlm"]]},
    "albef": {
        "image_encoder": [["itc itm mlm"]],
        "text_encoder": [["itc itm", "mlm"]],
        "fusion_encoder": [["itm", "itm", "mlm"]],
        "momentum_image_encoder": [["itc mlm"]],
        "momentum_text_encoder": [["itc", "mlm"]],
        "momentum_fusion_encoder": [["mlm"]],
    },
    "vlmo": {"encoder": [["mlm", "itc itc_vl", "itc itc_vl"], ["itm", "itm", "itm"]]},
}
VARIANTS = {
    **{model: {} for model in NAMES},
    "beit3 of the paper": {"share_attention": True, "vl_experts_from_layer": 1},
    "vlmo absolute": {"relative": False},
    "vlmo without top layers": {"vl_start": 3},
}
NEGATIVES = (torch.tensor([1, 0, 0]), torch.tensor([2, 2, 1]))


def build(model, **options):
    torch.manual_seed(0)
    step = build_pretraining(model, "tiny", image_size=32, vocab_size=100, **options)
    with torch.no_grad():
        for parameter in step.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return step.double()


def inputs_of(step):
    batch = synthetic_batch(step.model.config, [5, 8, 4], torch.Generator().manual_seed(1))
    return step.prepare(replace(batch, images=batch.images.double()), torch.Generator().manual_seed(2))


def given(model):
    return {"negatives": NEGATIVES} if "itm" in NAMES[model] else {}


def count_calls(step):
    calls = dict.fromkeys(step.towers(), 0)
    for name, tower in step.towers().items():
        tower.register_forward_pre_hook(lambda *args, name=name: calls.update({name: calls[name] + 1}))
    return calls


def expected_calls(model, schedule, losses):
    calls = {}
    for tower, forwards in PASSES[model].items():
        needed = [sum(bool(set(losses) & set(served.split())) for served in passes) for passes in forwards]
        calls[tower] = sum(needed) if schedule == "published" else sum(map(bool, needed))
    return calls


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loss_is_the_same_whichever_others_are_left_out(variant, schedule):
    model, options = variant.split()[0], {"schedule": schedule, **VARIANTS[variant]}
    step = build(model, **options)
    whole = step(inputs_of(step), **given(model))
    assert set(whole) == set(NAMES[model]) == set(step.losses)
    for count in range(1, len(NAMES[model])):
        for losses in itertools.combinations(NAMES[model], count):
            step = build(model, losses=losses, **options)
            inputs, calls = inputs_of(step), count_calls(step)
            made = step(inputs, **given(model))
            assert step.losses == losses
            assert set(made) == set(losses)
            for name, loss in made.items():
                torch.testing.assert_close(loss, whole[name], rtol=1e-10, atol=1e-10)
            assert calls == expected_calls(model, schedule, losses), losses


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("model", NAMES)
def test_a_loss_alone_has_the_gradients_that_it_has_beside_others_for_less_work(model, schedule):
    with FlopCounterMode(display=False) as of_all:
        step = build(model, schedule=schedule)
        whole = step(inputs_of(step), **given(model))
    parameters = dict(step.model.named_parameters())
    for name in NAMES[model]:
        wanted = torch.autograd.grad(whole[name], list(parameters.values()), retain_graph=True, allow_unused=True)
        with FlopCounterMode(display=False) as of_one:
            alone = build(model, schedule=schedule, losses=[name])
            made = alone(inputs_of(alone), **given(model))
        # CoCa's caption needs all that runs but the product of features
        assert of_one.get_total_flops() < of_all.get_total_flops()
        alone.total(made).backward()
        for (parameter, own), gradient in zip(alone.model.named_parameters(), wanted, strict=True):
            if own.grad is None:
                assert gradient is None or not gradient.any(), parameter
            else:
                expected = torch.zeros_like(own) if gradient is None else gradient * step.loss_weights[name]
                torch.testing.assert_close(own.grad, expected, rtol=1e-8, atol=1e-10, msg=parameter)


@pytest.mark.parametrize("model", NAMES)
def test_inputs_prepared_for_all_losses_serve_some(model):
    step = build(model)
    inputs = inputs_of(step)
    whole = step(inputs, **given(model))
    for name in NAMES[model]:
        alone = build(model, losses=[name])
        torch.testing.assert_close(alone(inputs, **given(model))[name], whole[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("model", "losses"), [("blip", ["itm"]), ("blip", ["lm"]), ("albef", ["itm"]), ("albef", ["mlm"])])
def test_momentum_and_queue_move_for_the_losses_they_serve(model, losses):
    step = build(model, losses=losses)
    with torch.no_grad():
        step.model.image_projection.weight.add_(1.0)  # the copy was equal to the model
    before = {name: tensor.clone() for name, tensor in step.momentum.state_dict().items()}
    step(inputs_of(step), **given(model))
    moved = {name for name, tensor in step.momentum.state_dict().items() if not torch.equal(tensor, before[name])}
    assert ("image_projection.weight" in moved) == (losses == ["mlm"])
    assert not moved & {"image_queue", "text_queue", "queue_position"}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("loss", "experts"), [("itc", [True, True, False]), ("itc_vl", [False, False, True])])
def test_vlmo_runs_the_top_layers_of_the_contrast_that_is_made(schedule, loss, experts):
    """Of text, images, and both."""
    step = build("vlmo", schedule=schedule, losses=[loss])
    rows = torch.zeros(3, dtype=torch.int64)

    def count(module, args):
        rows.add_(torch.tensor(args[1].offsets).diff())

    step.model.encoder.layers[-1].register_forward_pre_hook(count)
    step(inputs_of(step))
    assert (rows > 0).tolist() == experts


def test_beit3_does_not_tokenize_images_for_words():
    step = build("beit3", losses=["mlm"])
    step.__dict__["visual_tokenizer"] = None
    assert set(step(inputs_of(step))) == {"mlm"}


@pytest.mark.parametrize("model", NAMES)
def test_losses_must_be_those_of_the_objective(model):
    for wrong in (["lm", "words"], []):
        with pytest.raises(ValueError, match=f"losses must name some of {', '.join(NAMES[model])}; received ") as raised:
            build(model, losses=wrong)
        assert str(raised.value).endswith(f"received {wrong}.")


@pytest.mark.parametrize("model", ["blip", "albef", "vlmo"])
def test_matching_without_contrast_needs_negatives(model):
    step = build(model, losses=["itm"])
    with pytest.raises(ValueError, match="negatives must be given for itm without itc, which draws them; received None"):
        step(inputs_of(step))
