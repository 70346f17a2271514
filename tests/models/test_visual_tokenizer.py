"""The trainable visual tokenizer: it learns to reconstruct, uses its codes, and gives the same ids for the same images."""

import copy

import pytest
import torch
import torch.nn.functional as F

from vlp_fast.data import Batch
from vlp_fast.models import VqTokenizer, VqTokenizerConfig, beit3_preset
from vlp_fast.training import Beit3Pretraining, train_visual_tokenizer, visual_tokenizer_losses

SIZES = {
    "image_size": 16, "patch_size": 4, "dim": 32, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 4, "hidden_dim": 64,
    "num_codes": 24, "code_dim": 8, "decay": 0.9,
}  # fmt: skip


def pictures(count, seed=0):
    """Two colours of eight, one above the other, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    colors = torch.tensor([[r, g, b] for r in (-1.0, 1.0) for g in (-1.0, 1.0) for b in (-1.0, 1.0)])
    halves = colors[torch.randint(8, (count, 2), generator=generator)].transpose(1, 2)  # [count, 3, 2]
    images = halves.repeat_interleave(8, 2)[..., None].expand(count, 3, 16, 16)
    return images + 0.05 * torch.randn(images.shape, generator=generator)


def batches(images, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (images[torch.randint(len(images), (16,), generator=generator)] for _ in range(steps))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    tokenizer, images = VqTokenizer(VqTokenizerConfig(**SIZES)), pictures(200)
    return tokenizer, train_visual_tokenizer(tokenizer, batches(images, 200), lr=3e-3)


def test_visual_tokenizer_learns_to_reconstruct_images_it_has_not_seen(trained):
    tokenizer, steps = trained
    held_out = pictures(64, seed=1)
    assert steps[0].reconstruction > 0.9  # zero is as good
    assert steps[-1].reconstruction < 0.2 * steps[0].reconstruction
    error = F.mse_loss(tokenizer.reconstruct(held_out), held_out).item()
    assert error < 0.2
    assert error == pytest.approx(visual_tokenizer_losses(tokenizer, held_out)[0]["reconstruction"].item(), rel=1e-4)


def test_visual_tokenizer_uses_more_codes_than_there_are_colours(trained):
    tokenizer, steps = trained
    counts = torch.bincount(tokenizer.encode(pictures(200)).flatten(), minlength=24)
    assert (counts > 0).sum() > 8  # 12 to 18, of twelve seeds
    perplexity = torch.distributions.Categorical(counts.float()).entropy().exp()
    assert perplexity > 6  # all vectors pointing one way would make it 1
    assert 1 <= steps[-1].codes_used <= 24


def test_visual_tokenizer_codes_tell_colours_apart(trained):
    tokenizer, _ = trained
    colors = torch.tensor([[r, g, b] for r in (-1.0, 1.0) for g in (-1.0, 1.0) for b in (-1.0, 1.0)])
    ids = tokenizer.encode(colors[..., None, None].expand(8, 3, 16, 16).contiguous())
    assert len({tuple(row) for row in ids.tolist()}) == 8


def test_visual_tokenizer_encode_is_deterministic_and_the_nearest_code(trained, monkeypatch):
    tokenizer, _ = trained
    images = pictures(70, seed=2)
    ids = tokenizer.encode(images)
    assert ids.shape == (70, 16)
    assert ids.dtype == torch.int64
    state = copy.deepcopy(tokenizer.state_dict())
    assert torch.equal(tokenizer.train().encode(images), ids)
    assert torch.equal(tokenizer.eval().encode(images), ids)
    assert all(torch.equal(state[name], tensor) for name, tensor in tokenizer.state_dict().items())
    found = tokenizer.quantise(images)
    assert torch.equal(torch.cdist(found.rows.double(), tokenizer.codes.double()).argmin(1), ids.flatten())
    monkeypatch.setattr("vlp_fast.models.visual_tokenizer.MAX_SIMILARITIES", 100)
    monkeypatch.setattr("vlp_fast.models.visual_tokenizer.IMAGES_AT_ONCE", 3)
    assert torch.equal(tokenizer.encode(images), ids)


def test_visual_tokenizer_save_and_load(trained, tmp_path):
    tokenizer, _ = trained
    torch.save(tokenizer.state_dict(), tmp_path / "tokenizer.pt")
    loaded = VqTokenizer(tokenizer.config)
    assert not torch.equal(loaded.encode(pictures(8)), tokenizer.encode(pictures(8)))
    loaded.load_state_dict(torch.load(tmp_path / "tokenizer.pt", weights_only=True))
    assert torch.equal(loaded.encode(pictures(8)), tokenizer.encode(pictures(8)))


def test_visual_tokenizer_gradient_passes_straight_through():
    tokenizer, images = VqTokenizer(VqTokenizerConfig(**SIZES)), pictures(4)
    losses, found = visual_tokenizer_losses(tokenizer, images)
    found.rows.retain_grad()
    losses["reconstruction"].backward()
    codes = found.codes.clone().requires_grad_()
    F.mse_loss(tokenizer.decode(codes), tokenizer.patches(images)).backward()
    torch.testing.assert_close(found.rows.grad, codes.grad)
    assert tokenizer.encoder.patch_embedding.proj.weight.grad.abs().max() > 0
    assert not tokenizer.codes.requires_grad


def test_visual_tokenizer_revives_dead_codes_and_keeps_codes_of_length_one():
    tokenizer = VqTokenizer(VqTokenizerConfig(**SIZES))
    tokenizer.codes.copy_(-tokenizer.quantise(pictures(1)).rows[0])  # all codes far from everything
    for images in batches(pictures(50), 3):
        tokenizer.update_codes(tokenizer.quantise(images))
    assert len(tokenizer.encode(pictures(50)).unique()) > 8
    torch.testing.assert_close(tokenizer.codes.norm(dim=1), torch.ones(24))
    before = copy.deepcopy(tokenizer.state_dict())
    tokenizer.update_codes(tokenizer.quantise(pictures(0)))
    assert all(torch.equal(before[name], tensor) for name, tensor in tokenizer.state_dict().items())


def test_visual_tokenizer_codes_are_the_moving_average_of_their_patches():
    """With every code far from death: after one update at decay 0.9 the sums are 0.9 old + 0.1 new."""
    tokenizer = VqTokenizer(VqTokenizerConfig(**{**SIZES, "num_codes": 2, "revive_below": 0.0}))
    for _ in range(20):
        tokenizer.update_codes(tokenizer.quantise(pictures(50)))
    sums, found = tokenizer.sums.clone(), tokenizer.quantise(pictures(50, seed=1))
    tokenizer.update_codes(found)
    rows = F.normalize((found.projected - tokenizer.centre) / tokenizer.spread, dim=1)
    for code in range(2):
        expected = 0.9 * sums[code] + 0.1 * rows[found.ids == code].sum(0) / len(rows)
        torch.testing.assert_close(tokenizer.sums[code], expected)
        torch.testing.assert_close(tokenizer.codes[code], F.normalize(expected, dim=0))


def test_visual_tokenizer_learns_features_of_a_teacher():
    torch.manual_seed(0)
    tokenizer, weight = VqTokenizer(VqTokenizerConfig(**SIZES, target_dim=5)), torch.randn(48, 5)

    def teacher(images):
        assert not torch.is_grad_enabled()
        return F.unfold(images, 4, stride=4).transpose(1, 2) @ weight

    steps = train_visual_tokenizer(tokenizer, batches(pictures(200), 150), lr=3e-3, teacher=teacher)
    assert steps[0].reconstruction > 0.7  # 1 - cosine
    assert steps[-1].reconstruction < 0.15
    with pytest.raises(ValueError, match=r"reconstruct needs pixels, target_dim=None; received target_dim=5"):
        tokenizer.reconstruct(pictures(1))
    with pytest.raises(ValueError, match=r"targets must be .* = \[16, 5\]; received \[16, 48\] from the pixels"):
        visual_tokenizer_losses(tokenizer, pictures(1))
    with pytest.raises(ValueError, match=r"targets must be .* = \[16, 5\]; received \[16, 7\] from the teacher"):
        visual_tokenizer_losses(tokenizer, pictures(1), lambda images: torch.zeros(1, 16, 7))


def test_visual_tokenizer_is_no_part_of_the_step_that_it_serves(trained):
    tokenizer, _ = trained
    config = beit3_preset("tiny", image_size=16, patch_size=4, visual_vocab_size=24, vocab_size=50)
    step = Beit3Pretraining(config, tokenizer, mask_id=49, special_ids=[0, 1, 2])
    assert step.visual_tokenizer is tokenizer
    assert not any("visual_tokenizer" in name for name in step.state_dict())
    assert {id(p) for p in step.parameters()}.isdisjoint({id(p) for p in tokenizer.parameters()})
    inputs = step.prepare(Batch(pictures(3), torch.arange(3, 12), (3, 3, 3), ("",) * 3), torch.Generator().manual_seed(0))
    assert torch.equal(inputs.images.targets, tokenizer.encode(pictures(3))[inputs.images.mask])
    with pytest.raises(ValueError, match="visual_vocab_size must hold the visual tokenizer's 24 codes; received 23"):
        Beit3Pretraining(beit3_preset("tiny", visual_vocab_size=23), tokenizer, mask_id=49, special_ids=[0, 1, 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_codes": 0}, "num_codes must be at least 1; received 0"),
        ({"target_dim": 0}, "target_dim must be at least 1; received 0"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\); received 1.0"),
        ({"revive_below": -0.1}, r"revive_below must lie in \[0, 1\); received -0.1"),
    ],
)
def test_visual_tokenizer_config_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        VqTokenizerConfig(**{**SIZES, **changes})
    with pytest.raises(ValueError, match=r"images must be \[batch, 3, 16, 16\]; received \[1, 3, 8, 8\]"):
        VqTokenizer(VqTokenizerConfig(**SIZES)).encode(torch.zeros(1, 3, 8, 8))
