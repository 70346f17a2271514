"""A schedule says how passes are grouped, not what they compute: packed and published steps have the same losses and gradients."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vlp_fast.data.batches import Batch
from vlp_fast.models import blip_preset
from vlp_fast.models.vlmo import vlmo_preset
from vlp_fast.ops import _autocast
from vlp_fast.training import build_pretraining, synthetic_batch
from vlp_fast.training.blip import BlipPretraining
from vlp_fast.training.vlmo import VlmoPretraining

SMALL = {"image_size": 32, "vocab_size": 100}
QUEUE = {"queue_size": 16}
DROPPING = {"patch_size": 8, "patch_drop": 0.5}
CONFIGS = {
    "blip": QUEUE,
    "albef": QUEUE,
    "coca": {},
    "beit3": {},
    "beit3 of the paper": {"share_attention": True, "vl_experts_from_layer": 1},
    "vlmo": {},
    "vlmo absolute": {"relative": False},
    "vlmo without top layers": {"vl_start": 3},
    # where the same random numbers keep the same patches of the same samples
    "blip dropping patches": {**QUEUE, **DROPPING},
    "albef dropping patches": {**QUEUE, **DROPPING},
    "coca dropping patches": DROPPING,
    "beit3 dropping patches": DROPPING,
    "beit3 of the paper dropping patches": {"share_attention": True, "vl_experts_from_layer": 1, **DROPPING},
    "vlmo dropping patches": DROPPING,
    "vlmo absolute dropping patches": {"relative": False, **DROPPING},
}
LENGTHS = {"ragged": (6, 9, 4, 12), "length one": (1, 9, 1, 2), "all alike": (5, 5, 5, 5)}
# several captions of an image, and images that nothing describes
SHARED = (1, 0, 1, 1)


def make_step(name, schedule, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    model, options = name.split()[0], {**SMALL, **CONFIGS[name], **changes}
    if model == "vlmo":
        step = VlmoPretraining(vlmo_preset("tiny", **options), mask_id=3, special_ids=(0, 1, 2), schedule=schedule)
    else:
        step = build_pretraining(model, "tiny", schedule=schedule, **options)
    with torch.no_grad():
        for parameter in step.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return step.to(dtype).train()


def make_batch(lengths, image_index=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    count = len(lengths) if image_index is None else max(image_index) + 1
    images = torch.randn(count, 3, 32, 32, generator=generator).to(dtype)
    ids = torch.randint(5, 95, (sum(lengths),), generator=generator)
    return Batch(images, ids, tuple(lengths), ("",) * len(lengths), image_index)


def run(step, batch, negatives):
    inputs = step.prepare(batch, torch.Generator().manual_seed(2))
    given = {} if negatives is None else {"negatives": tuple(torch.tensor(n) for n in negatives)}
    losses = step(inputs, **given)
    step.total(losses).backward()
    return losses, {name: p.grad for name, p in step.named_parameters()}, dict(step.named_buffers())


def compare(name, batch, negatives, dtype, within):
    """within: of the largest gradient of each parameter, and of each loss."""
    found, expected = (run(make_step(name, schedule, dtype), batch, negatives) for schedule in ("packed", "published"))
    assert found[0].keys() == expected[0].keys()
    for loss in expected[0]:
        torch.testing.assert_close(found[0][loss], expected[0][loss], rtol=within, atol=within)
    compared = 0
    for parameter, gradient in expected[1].items():
        own = found[1][parameter]
        assert (own is None) == (gradient is None), parameter
        if gradient is not None:
            error = float((own - gradient).abs().max())
            # the gradient of a temperature is a sum whose terms cancel
            least = 1.0 if gradient.dim() == 0 else 1e-3
            assert error <= within * max(float(gradient.abs().max()), least), f"{parameter}: {error}"
            compared += 1
    assert compared > 20
    for buffer, value in expected[2].items():
        torch.testing.assert_close(found[2][buffer], value, rtol=within, atol=within)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_schedules_have_equal_losses_and_gradients(name, lengths):
    if lengths == "length one" and name.split()[0] in ("vlmo", "albef"):
        pytest.skip("every caption has a word to hide")
    negatives = ([1, 0, 0, 0], [3, 3, 1, 1]) if name.split()[0] in ("blip", "albef", "vlmo") else None  # some of them repeated
    compare(name, make_batch(LENGTHS[lengths]), negatives, torch.float64, 1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_schedules_are_equal_in_float32(name):
    negatives = ([1, 0, 0, 0], [3, 3, 1, 1]) if name.split()[0] in ("blip", "albef", "vlmo") else None
    compare(name, make_batch(LENGTHS["ragged"], dtype=torch.float32), negatives, torch.float32, 1e-5)


@pytest.mark.parametrize("schedule", ["packed", "published"])
@pytest.mark.parametrize("name", ["blip", "albef", "coca", "vlmo"])
def test_several_captions_of_an_image_are_as_images_repeated(name, schedule):
    """Losses are those of a batch that repeats the image; its gradients too, but it is encoded once."""
    given = None if name == "coca" else ([1, 0, 3, 2], [3, 3, 1, 1])
    batch = make_batch(LENGTHS["ragged"], SHARED)
    repeated = replace(batch, images=batch.images[list(SHARED)], image_index=None)
    (losses, gradients, _), (others, wanted, _) = (run(make_step(name, schedule), b, given) for b in (batch, repeated))
    for loss in others:
        torch.testing.assert_close(losses[loss], others[loss], rtol=1e-10, atol=1e-10)
    for parameter, gradient in wanted.items():
        if gradient is not None:
            torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-8, atol=1e-10)
    if name == "vlmo":  # its images are encoded with captions
        return
    counted = []
    step = make_step(name, schedule)
    step.towers()["image_encoder"].register_forward_pre_hook(lambda module, args: counted.append(len(args[0])))
    run(step, batch, given)
    assert counted == [2]


@pytest.mark.parametrize("name", ["blip", "albef", "beit3", "vlmo"])
def test_schedules_have_the_same_statistics_under_dropout(name):
    """Dropout draws other numbers in another schedule: means over many draws agree, and single draws do not."""
    changes = {"drop_path": 0.3} if name in ("beit3", "vlmo") else {"dropout_p": 0.3}
    means = {}
    for schedule in ("packed", "published"):
        step = make_step(name, schedule, torch.float32, **changes)
        inputs = step.prepare(make_batch(LENGTHS["ragged"], dtype=torch.float32), torch.Generator().manual_seed(2))
        negatives = tuple(torch.tensor(n) for n in ([1, 0, 0, 0], [3, 3, 1, 1]))
        given = {"negatives": negatives} if name != "beit3" else {}
        queues = {n: b.clone() for n, b in step.named_buffers()}
        with torch.no_grad():
            draws = []
            for _ in range(60):
                draws.append(torch.stack(list(step(inputs, **given).values())))
                for n, b in step.named_buffers():
                    b.copy_(queues[n])
        means[schedule] = torch.stack(draws)
    found, expected = means["packed"], means["published"]
    error = (found.var(0) / len(found) + expected.var(0) / len(expected)).sqrt()
    assert ((found.mean(0) - expected.mean(0)).abs() < 4.5 * error + 1e-6).all()
    assert (found.std(0) > 0).all()
    assert ((found.std(0) / expected.std(0)).log().abs() < 0.5).all()


def test_a_parameter_is_cast_once_for_all_forwards_of_a_step():
    """Under autocast; gradients are those of casting in each forward, up to bf16's rounding of their sum."""
    blip = build_pretraining("blip", "tiny")
    batch = synthetic_batch(blip.model.config, [5, 3])
    weight = blip.model.text_tower.blocks[0].attention.qkv.weight
    casts = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0] is weight:
                casts.append(kwargs["dtype"])
            return function(*args, **(kwargs or {}))

    def gradient(call):
        torch.manual_seed(0)
        blip.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses = call(batch, negatives=(torch.tensor([1, 0]), torch.tensor([1, 0])))
        blip.total(losses).backward()
        return weight.grad.clone()

    blip.eval()
    with Counted():
        once = gradient(blip)
    assert casts == [torch.bfloat16]
    casts.clear()
    with Counted():
        often = gradient(blip.forward)
    assert casts == 2 * [torch.bfloat16]  # the contrast's pass and the packed one
    torch.testing.assert_close(once, often, rtol=0.02, atol=0.02 * often.abs().max().item())
    assert _autocast._casts.get() is None


@pytest.mark.parametrize("losses", [None, ("itc",), ("lm",)])
def test_gradients_of_lookups_and_of_the_tied_head_add_up_without_a_table_of_zeros_for_each(losses):
    objective = BlipPretraining(blip_preset("tiny"), losses=losses).double().eval()
    batch = synthetic_batch(objective.model.config, [5, 3])
    batch = replace(batch, images=batch.images.double())
    weight = objective.model.text_tower.embedding.word.weight
    dense, start = [], {name: t.clone() for name, t in objective.state_dict().items()}

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.embedding_dense_backward.default and args[2] == len(weight):
                dense.append(function)
            return function(*args, **(kwargs or {}))

    def gradient(call):
        torch.manual_seed(0)
        objective.zero_grad()
        objective.load_state_dict(start)  # momentum and queue move on
        with Counted():
            found = call(batch, negatives=(torch.tensor([1, 0]), torch.tensor([1, 0])))
            objective.total(found).backward()
        return weight.grad.clone()

    shared = gradient(objective)
    assert not dense
    alone = gradient(objective.forward)
    assert len(dense) == (2 if losses is None else 1)
    assert shared.layout == torch.strided
    torch.testing.assert_close(shared, alone, rtol=1e-12, atol=1e-14)
