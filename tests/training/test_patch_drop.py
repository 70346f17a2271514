"""Patch dropping where images and texts share an encoder: what a step computes, what it saves, that it trains, and evaluation."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vlp_fast.data import Batch
from vlp_fast.models.coca_palm import coca_palm_preset
from vlp_fast.training import build_pretraining
from vlp_fast.training.coca_palm import CocaPalmPretraining

LENGTHS = (6, 3, 9, 4)
WORDS, PATCHES, MASKED = sum(LENGTHS), 64, 26  # of 64 patches BEiT-3 masks 40 %
NEGATIVES = (torch.tensor([1, 0, 3, 2]), torch.tensor([3, 2, 1, 0]))  # other captions are as long together
FORMS = {
    "vlmo": {},
    "vlmo absolute": {"relative": False, "layer_scale": None},
    "beit3": {},
    "beit3 of the paper": {"share_attention": True, "vl_experts_from_layer": 1},
    "palm": {},
}


def make_step(name, schedule="packed", **changes):
    torch.manual_seed(0)
    model, options = name.split()[0], {"patch_size": 8, "vocab_size": 200, **FORMS[name], **changes}
    if model == "palm":
        return CocaPalmPretraining(coca_palm_preset("tiny", **options))
    return build_pretraining(model, "tiny", schedule=schedule, **options)


def make_inputs(step, image_index=None):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4 if image_index is None else max(image_index) + 1, 3, 64, 64, generator=generator)
    ids = torch.randint(3, 190, (WORDS,), generator=generator)
    return step.prepare(Batch(images, ids, LENGTHS, ("",) * 4, image_index), generator)


def run(step, inputs, name):
    return step(inputs, negatives=NEGATIVES) if name.startswith("vlmo") else step(inputs)


def trained(step):
    return {name for name, p in step.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize("schedule", ["packed", "published"])
@pytest.mark.parametrize("name", FORMS)
def test_patch_drop_trains_every_parameter(name, schedule):
    full, dropping = make_step(name, schedule), make_step(name, schedule, patch_drop=0.5)
    for step in (full, dropping):
        losses = run(step, make_inputs(step), name)
        assert all(loss.isfinite() for loss in losses.values())
        step.total(losses).backward()
    assert trained(dropping) == trained(full)
    assert len(trained(full)) >= len(list(full.parameters())) - 4


VLMO, BEIT3 = 1 + PATCHES // 2, 1 + MASKED + (PATCHES - MASKED) // 2  # rows of an image
ROWS = {
    ("vlmo", "packed"): [2 * WORDS + 8 * VLMO, 3 * WORDS + 12 * VLMO],
    ("vlmo", "published"): [4 * VLMO, WORDS, *4 * [WORDS + 4 * VLMO]],
    ("beit3", "packed"): [2 * WORDS + 8 * BEIT3],
    ("beit3", "published"): [WORDS, 4 * BEIT3, WORDS + 4 * BEIT3],
    ("palm", "published"): [4 * PATCHES // 2],
}


@pytest.mark.parametrize(("name", "schedule"), ROWS)
def test_patch_drop_rows_that_a_step_computes(name, schedule):
    step, rows = make_step(name, schedule, patch_drop=0.5), []
    layer = step.model.image_encoder.encoder.blocks[0] if name == "palm" else step.model.encoder.layers[0]
    layer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    run(step, make_inputs(step), name)
    assert Counter(rows) == Counter(ROWS[name, schedule])


@pytest.mark.parametrize("schedule", ["packed", "published"])
@pytest.mark.parametrize(("name", "share", "most"), [("vlmo", 0.75, 0.45), ("beit3", 0.75, 0.68), ("palm", 0.75, 0.7)])
def test_patch_drop_saves_flops(name, share, most, schedule):
    """BEiT-3 keeps 26 masked patches and 10 of 38 others; CoCa on PaLM's blocks has its words as well."""
    counted = []
    for changes in ({}, {"patch_drop": share}):
        step = make_step(name, schedule, **changes)
        inputs = make_inputs(step)
        with FlopCounterMode(display=False) as counter:
            step.total(run(step, inputs, name)).backward()
        counted.append(counter.get_total_flops())
    assert counted[1] < most * counted[0]


@pytest.mark.parametrize("name", FORMS)
def test_patch_drop_is_not_there_in_evaluation(name):
    full, dropping = make_step(name).eval(), make_step(name, patch_drop=0.5)
    assert set(dropping.state_dict()) == set(full.state_dict())
    expected, other = run(full, make_inputs(full), name), run(dropping, make_inputs(dropping), name)
    found = run(dropping.eval(), make_inputs(dropping), name)
    for loss in expected:
        assert torch.equal(found[loss], expected[loss])
        assert not torch.equal(other[loss], expected[loss]) or (loss == "mlm" and name.startswith("beit3"))  # of texts alone


@pytest.mark.parametrize("name", ["vlmo", "beit3"])
def test_patch_drop_draws_anew_every_step(name):
    step = make_step(name, patch_drop=0.5, drop_path=0.0)
    inputs = make_inputs(step)
    torch.manual_seed(5)
    first, second = run(step, inputs, name), run(step, inputs, name)
    torch.manual_seed(5)
    again = run(step, inputs, name)
    assert not torch.equal(step.total(first), step.total(second))
    assert torch.equal(step.total(first), step.total(again))


@pytest.mark.parametrize("schedule", ["packed", "published"])
@pytest.mark.parametrize("name", ["vlmo", "vlmo absolute"])
def test_patch_drop_of_several_captions_of_an_image(name, schedule):
    step = make_step(name, schedule, patch_drop=0.5)
    losses = run(step, make_inputs(step, (1, 0, 1, 1)), name)
    step.total(losses).backward()
    assert all(loss.isfinite() for loss in losses.values())


class _Waits(TorchDispatchMode):
    """Counts operations whose result the host reads, or whose size depends on what is computed."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave.Tensor")

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if name.startswith(self.names):
            self.found[name] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("schedule", ["packed", "published"])
@pytest.mark.parametrize("name", ["vlmo", "beit3", "beit3 of the paper"])
def test_patch_drop_waits_for_the_device_no_more_often(name, schedule, monkeypatch):
    found, read = [], Counter()
    tolist = torch.Tensor.tolist
    for share in (0.0, 0.5):
        step = make_step(name, schedule, patch_drop=share)
        inputs = make_inputs(step)
        monkeypatch.setattr(torch.Tensor, "tolist", lambda self, share=share: read.update([share]) or tolist(self))
        with _Waits() as waits:
            run(step, inputs, name)
        monkeypatch.undo()
        found.append(waits.found)
    assert found[0] == found[1]
    assert read[0.0] == read[0.5]


@pytest.mark.parametrize("share", [-0.1, 1.0])
@pytest.mark.parametrize("name", ["vlmo", "beit3", "palm"])
def test_patch_drop_of_every_model_is_refused_outside_its_range(name, share):
    with pytest.raises(ValueError, match=rf"patch_drop must lie in \[0, 1\); received {share}"):
        make_step(name, patch_drop=share)
