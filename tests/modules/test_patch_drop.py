"""Patch dropping: how many rows stay, which ones, what it saves, and that evaluation does not know of it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlp_fast import AttentionPlan
from vlp_fast.data import Batch
from vlp_fast.models import OpenClipCoca, open_clip_coca_preset
from vlp_fast.modules import PatchDrop, VisionTransformer
from vlp_fast.training import build_pretraining

LENGTHS = (6, 3, 9, 4)


def encoder(patch_drop=0.0, class_token=True, **changes):
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 4, "dim": 32, "depth": 2, "num_heads": 4, "hidden_dim": 128, "eps": 1e-6}
    return VisionTransformer(**{**sizes, **changes}, class_token=class_token, patch_drop=patch_drop)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize(("share", "kept"), [(0.0, 64), (0.5, 32), (0.75, 16), (0.3, 45), (0.999, 1)])
def test_patch_drop_rows_are_as_many_as_segments_say(share, kept, class_token):
    model, images = encoder(share, class_token), torch.randn(3, 3, 32, 32)
    rows = model(images)
    assert model.segments(3).lengths == (kept + class_token,) * 3
    assert len(rows) == model.segments(3).rows == model.describe(images).tokens
    assert model(images, first_row_only=True).shape == (3, 32)
    model.eval()
    assert model.segments(3).lengths == (64 + class_token,) * 3
    assert len(model(images)) == model.describe(images).tokens == 3 * (64 + class_token)


@pytest.mark.parametrize("class_token", [True, False])
def test_patch_drop_evaluation_and_share_zero_are_the_full_encoder(class_token):
    full, images = encoder(0.0, class_token), torch.randn(2, 3, 32, 32)
    dropping = encoder(0.5, class_token)
    assert set(dropping.state_dict()) == set(full.state_dict())
    assert torch.equal(dropping.eval()(images), full(images))


def test_patch_drop_keeps_rows_in_order_and_draws_for_each_image():
    drop = PatchDrop(20, 0.5, class_token=True)
    x = torch.arange(21.0).expand(8, 21)[..., None] + 100 * torch.arange(8.0)[:, None, None]
    kept = drop(x)[..., 0] - 100 * torch.arange(8.0)[:, None]
    assert kept.shape == (8, 11)
    assert (kept[:, 0] == 0).all()
    assert (kept.diff() > 0).all()
    assert len({tuple(row.tolist()) for row in kept}) == 8


@pytest.mark.parametrize("class_token", [True, False])
def test_patch_drop_keeps_every_patch_equally_often(class_token):
    drop, images, patches = PatchDrop(12, 0.75, class_token), 8000, 12
    index = torch.arange(patches + class_token).expand(images, -1)[..., None]
    counts = torch.bincount(drop(index).flatten(), minlength=patches + class_token)
    assert not class_token or counts[0] == images
    share, deviation = 0.25, (0.25 * 0.75 / images) ** 0.5
    assert ((counts[int(class_token) :] / images - share).abs() < 5 * deviation).all()


MASK_COUNTS = (0, 5, 12, 11, 1)


@pytest.mark.parametrize("class_token", [True, False])
def test_patch_drop_keeps_every_masked_patch_and_a_part_of_the_others(class_token):
    drop, first = PatchDrop(12, 0.5, class_token), int(class_token)
    mask = torch.zeros(5, 12, dtype=torch.bool)
    for i, count in enumerate(MASK_COUNTS):
        mask[i, torch.randperm(12)[:count]] = True
    lengths = drop.kept_lengths(MASK_COUNTS)
    assert lengths == [first + n for n in (6, 5 + 4, 12, 11 + 1, 1 + 6)]  # round(3.5) is 4, round(5.5) is 6; one visible stays
    rows = drop.draw_masked(mask, lengths)
    assert len(rows) == sum(lengths)
    assert (rows.diff() > 0).all()
    stays = (
        torch.zeros(len(mask), first + 12, dtype=torch.bool).flatten().index_fill(0, rows, True).unflatten(0, (-1, first + 12))
    )
    assert stays.sum(1).tolist() == lengths
    assert stays[:, :first].all()
    assert stays[:, first:][mask].all()
    assert drop.eval().kept_lengths(MASK_COUNTS) == [first + 12] * 5


def test_patch_drop_keeps_every_visible_patch_equally_often():
    drop, images = PatchDrop(12, 0.5, class_token=False), 8000
    mask = torch.zeros(images, 12, dtype=torch.bool)
    mask[:, 2:6] = True
    kept = drop.draw_masked(mask, drop.kept_lengths([4] * images))
    counts = torch.bincount(kept % 12, minlength=12)
    assert (counts[2:6] == images).all()
    visible, deviation = counts[[0, 1, 6, 7, 8, 9, 10, 11]] / images, (0.25 / images) ** 0.5
    assert ((visible - 0.5).abs() < 5 * deviation).all()


def test_patch_drop_is_the_encoder_over_the_patches_that_stay():
    """Against the full encoder's own parts on the rows that the same random numbers keep."""
    model, images = encoder(0.5), torch.randn(2, 3, 32, 32)
    torch.manual_seed(3)
    rows = model(images).unflatten(0, (2, -1))
    torch.manual_seed(3)
    numbers = torch.arange(65.0).expand(2, 65)[..., None]
    kept = model.patch_drop(numbers)[..., 0].long()
    for i in range(2):
        patches = torch.cat([model.class_token[None], model.patch_embedding(images)[i]]) + model.position_embedding
        x, plan = patches[kept[i]], AttentionPlan.self_attention([33])
        for block in model.blocks:
            x = block(x, plan)
        torch.testing.assert_close(model.norm(x), rows[i])


def test_patch_drop_gradients_reach_what_stays_only():
    model, images = encoder(0.5), torch.randn(1, 3, 32, 32)
    torch.manual_seed(3)
    model(images).square().sum().backward()
    torch.manual_seed(3)
    kept = set(model.patch_drop(torch.arange(65)[None, :, None])[0, :, 0].tolist())
    reached = model.position_embedding.grad.abs().amax(1) > 0
    assert set(reached.nonzero().flatten().tolist()) == kept
    assert model.patch_embedding.proj.weight.grad.abs().max() > 0


def flops(model, images):
    with FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_patch_drop_saves_work_in_proportion(share):
    images = torch.randn(2, 3, 32, 32)
    full, less, embedding = (
        flops(encoder(0.0, False), images),
        flops(encoder(share, False), images),
        flops(encoder(share, False).patch_embedding, images),
    )
    assert (less - embedding) <= (1 - share) * (full - embedding)
    assert (less - embedding) >= (1 - share) ** 2 * (full - embedding)


STEPS = {
    "blip": {"queue_size": 8}, "albef": {"queue_size": 8}, "coca": {}, "coca experts": {"experts": True},
}  # fmt: skip


@pytest.mark.parametrize("schedule", ["packed", "published"])
@pytest.mark.parametrize("name", STEPS)
def test_patch_drop_pretraining_runs_and_trains(name, schedule):
    """Every model whose image encoder has the option: fewer rows enter the first layer, and all losses have gradients."""
    changes = {**STEPS[name], "vocab_size": 200, "patch_drop": 0.5}
    step = build_pretraining(name.split()[0], "tiny", schedule=schedule, **changes)
    size, patches = step.model.config.image_size, (step.model.config.image_size // step.model.config.patch_size) ** 2
    batch = Batch(torch.randn(4, 3, size, size), torch.randint(3, 190, (sum(LENGTHS),)), LENGTHS, ("",) * 4)
    rows = []
    layer = (
        step.model.encoder.layers[0]
        if "experts" in name
        else step.model.get_submodule("image_encoder.encoder.blocks.0" if name == "coca" else "image_encoder.blocks.0")
    )
    layer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    losses = step(step.prepare(batch, torch.Generator().manual_seed(0)))
    kept = 4 * (patches // 2 + (name in ("blip", "albef")))
    assert rows[0] == kept + (sum(LENGTHS) + 4 if "experts" in name else 0)
    step.total(losses).backward()
    gradient = next(p.grad for n, p in step.model.named_parameters() if n.endswith("patch_embedding.proj.weight"))
    assert all(loss.isfinite() for loss in losses.values())
    assert gradient.abs().max() > 0


def test_patch_drop_of_open_clip_coca():
    torch.manual_seed(0)
    full = OpenClipCoca(open_clip_coca_preset("tiny", patch_size=8))
    dropping, images = OpenClipCoca(open_clip_coca_preset("tiny", patch_size=8, patch_drop=0.75)), torch.randn(2, 3, 64, 64)
    dropping.load_state_dict(full.state_dict())
    assert dropping.image_encoder.describe(images).tokens == 2 * 17
    assert dropping.encode_image(images).rows.shape == full.encode_image(images).rows.shape
    assert (dropping.encode_image(images).features - full.encode_image(images).features).abs().max() > 1e-4
    assert torch.equal(dropping.eval().encode_image(images).features, full.encode_image(images).features)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_patch_drop_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match=rf"patch_drop must lie in \[0, 1\); received {share}"):
        encoder(share)
