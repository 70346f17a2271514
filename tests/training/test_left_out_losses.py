"""Losses that are left out: the others keep their values, and what serves only the left out does not run."""

import itertools

import pytest
import torch

from vlp_fast.models import blip_preset, coca_preset
from vlp_fast.training import BlipPretraining, CocaPretraining, synthetic_batch

MAKERS = {
    "blip": lambda **given: BlipPretraining(blip_preset("tiny", image_size=32, vocab_size=100, dec_id=98, enc_id=99), **given),
    "coca": lambda **given: CocaPretraining(coca_preset("tiny", image_size=32, vocab_size=100), **given),
}
NAMES = {"blip": ("itc", "itm", "lm"), "coca": ("contrastive", "caption")}
# calls of each tower for each loss, and whether the schedule packs them
CALLS = {
    "image_encoder": {"itc", "itm", "lm", "contrastive", "caption"},
    "momentum_image_encoder": {"itc"},
    "momentum_text_tower": {"itc"},
    "text_encoder": {"contrastive", "caption"},
    "text_decoder": {"caption"},
}


def run(model, schedule, losses):
    torch.manual_seed(0)
    step = MAKERS[model](schedule=schedule, losses=losses)
    batch = synthetic_batch(step.model.config, [5, 8, 4], torch.Generator().manual_seed(1))
    given = {"negatives": (torch.tensor([1, 0, 0]), torch.tensor([2, 2, 1]))} if model == "blip" else {}
    calls = dict.fromkeys(step.towers(), 0)
    for name, tower in step.towers().items():
        tower.register_forward_pre_hook(lambda *args, name=name: calls.update({name: calls[name] + 1}))
    return step(batch, **given), calls, step


@pytest.mark.parametrize("schedule", ["packed", "published"])
@pytest.mark.parametrize("model", NAMES)
def test_a_loss_is_the_same_whichever_others_are_left_out(model, schedule):
    whole, _, _ = run(model, schedule, None)
    assert tuple(whole) == NAMES[model]
    for count in range(1, len(NAMES[model])):
        for losses in itertools.combinations(NAMES[model], count):
            made, calls, step = run(model, schedule, losses)
            assert tuple(made) == losses
            for name, loss in made.items():
                torch.testing.assert_close(loss, whole[name], rtol=1e-5, atol=1e-6)
            step.total(made).backward()
            for tower, called in calls.items():
                if tower == "text_tower":
                    fused = {"itm": 2, "lm": 1} if schedule == "published" else {}
                    shared = 1 if schedule == "packed" and {"itm", "lm"} & set(losses) else 0
                    assert called == ("itc" in losses) + shared + sum(fused.get(name, 0) for name in losses)
                else:
                    assert called == bool(CALLS[tower] & set(losses)), tower


def test_losses_must_be_those_of_the_objective():
    for wrong in (["mlm"], []):
        with pytest.raises(ValueError, match="losses must name some of itc, itm, lm"):
            MAKERS["blip"](losses=wrong)


def test_matching_without_contrast_needs_negatives():
    step = MAKERS["blip"](losses=["itm"])
    with pytest.raises(ValueError, match="negatives must be given for itm without itc"):
        step(synthetic_batch(step.config, [4, 4]))
