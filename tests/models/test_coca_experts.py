"""CoCa with modality experts: joint and separate forwards, what each modality trains, training, and what it refuses."""

import pytest
import torch

from vlp_fast import Segments
from vlp_fast.data import Batch
from vlp_fast.models import Coca, CocaExperts, coca_preset
from vlp_fast.models.coca_experts import CocaExpertEncoder
from vlp_fast.training import CocaPretraining

LENGTHS = (5, 1, 8)
EXPERTS = ("ffn_norm.weight", "ffn_norm.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


def config(**changes):
    return coca_preset("tiny", vocab_size=100, image_size=32, caption_queries=4, experts=True, **changes)


@pytest.fixture
def batch():
    return Batch(torch.randn(3, 3, 32, 32), torch.randint(3, 98, (sum(LENGTHS),)), LENGTHS, ("",) * 3)


@pytest.mark.parametrize("pooler", ["cascade", "parallel"])
def test_coca_experts_joint_forward_is_each_modality_alone(batch, pooler):
    model, images, captions = CocaExperts(config(pooler=pooler)).double(), batch.images.double(), batch.segments()
    image, text = model.encode(images, batch.token_ids, captions)
    alone = model.encode_image(images)
    assert alone.segments == image.segments == Segments([4, 4, 4])
    torch.testing.assert_close([alone.rows, alone.features], [image.rows, image.features])
    alone = model.encode_text(batch.token_ids, captions)
    torch.testing.assert_close([alone.rows, alone.features], [text.rows, text.features])
    # and every image and caption by itself, with another number of captions than images
    one, ragged = model.encode(images[1:2], batch.token_ids, captions)
    torch.testing.assert_close([one.rows, one.features], [image.rows[4:8], image.features[1:2]])
    torch.testing.assert_close(ragged.features, text.features)
    for i, ids in enumerate(batch.token_ids.split(LENGTHS)):
        torch.testing.assert_close(model.encode_text(ids, Segments([len(ids)])).features[0], text.features[i])


def test_coca_experts_words_do_not_see_later_words_and_cls_sees_all(batch):
    model, changed = CocaExperts(config()).double(), batch.token_ids.clone()
    changed[-1] = (changed[-1] + 1) % 90
    before, after = (model.encode_text(ids, batch.segments()) for ids in (batch.token_ids, changed))
    torch.testing.assert_close(after.rows[:-1], before.rows[:-1])
    assert (after.rows[-1] - before.rows[-1]).abs().max() > 1e-6
    torch.testing.assert_close(after.features[:2], before.features[:2])
    assert (after.features[2] - before.features[2]).abs().max() > 1e-6


def test_coca_experts_is_one_forward_of_the_layers(batch):
    step = CocaPretraining(config())
    rows = []
    step.model.encoder.layers[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    step(batch)
    assert rows == [3 * 4 + sum(LENGTHS) + 3]
    assert step.model.encoder.describe(batch.images, batch.token_ids, batch.segments()).tokens == rows[0]


def gradients(model, output):
    model.zero_grad()
    output.square().sum().backward()
    return {name: p.grad for name, p in model.encoder.layers[0].named_parameters()}


def test_coca_experts_attention_is_shared_and_feed_forwards_are_not(batch):
    model = CocaExperts(config())
    weights = torch.randn(64)
    image = gradients(model, model.encode_image(batch.images).rows * weights)
    text = gradients(model, model.encode_text(batch.token_ids, batch.segments()).rows * weights)
    for name in EXPERTS:
        assert image[name][0].abs().max() > 0, name
        assert image[name][1].abs().max() == 0, name
        assert text[name][0].abs().max() == 0, name
        assert text[name][1].abs().max() > 0, name
    for name in set(image) - set(EXPERTS):
        assert image[name].shape == text[name].shape
        assert image[name].abs().max() > 0, name
        assert text[name].abs().max() > 0, name


def test_coca_experts_joint_gradients_are_the_sum_of_both_modalities(batch):
    model, weights = CocaExperts(config()).double(), torch.randn(64, dtype=torch.float64)
    images, captions = batch.images.double(), batch.segments()
    image = gradients(model, model.encode_image(images).rows * weights)
    text = gradients(model, model.encode_text(batch.token_ids, captions).rows * weights)
    both = model.encode(images, batch.token_ids, captions)
    joint = gradients(model, torch.cat([part.rows * weights for part in both]))
    for name, gradient in joint.items():
        torch.testing.assert_close(gradient, image[name] + text[name])


def test_coca_experts_shares_what_two_towers_have_twice():
    def encoders(model):
        return {name: p.numel() for name, p in model.named_parameters() if not name.startswith("text_decoder")}

    shared = encoders(CocaExperts(config()))
    apart = encoders(Coca(coca_preset("tiny", vocab_size=100, image_size=32, caption_queries=4)))
    attention = 4 * 64 * 64 + 4 * 64  # of one layer
    assert sum(apart.values()) - sum(shared.values()) == 2 * (attention + 2 * 64)


@pytest.mark.parametrize("experts", [True, False])
def test_coca_experts_learns_pairs(experts):
    """Four coloured images with captions that say so: both losses fall from chance, with experts as with two towers."""
    torch.manual_seed(0)
    images = torch.eye(4)[:, :3, None, None].expand(4, 3, 32, 32) + 0.1 * torch.randn(4, 3, 32, 32)
    words = torch.tensor([[1, 10 + i, 20 + i, 30 + i, 2] for i in range(4)])
    batch = Batch(images, words.flatten(), (5,) * 4, ("",) * 4)
    step = CocaPretraining(coca_preset("tiny", vocab_size=100, image_size=32, caption_queries=4, experts=experts))
    optimizer = torch.optim.AdamW(step.parameters(), lr=1e-3)
    history = []
    for _ in range(60):
        losses = step(batch)
        optimizer.zero_grad()
        step.total(losses).backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    first, last = history[0], history[-1]
    assert first["contrastive"] > 1.2  # log 4 = 1.39
    assert first["caption"] > 4.4  # log 100 = 4.6
    assert last["contrastive"] < 0.1 * first["contrastive"]
    assert last["caption"] < 0.2 * first["caption"]


def test_coca_experts_without_images_or_captions():
    encoder = CocaExpertEncoder(config())
    image, words, pooled = encoder(torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.long), Segments([]))
    assert [x.shape for x in (image, words, pooled)] == [(0, 64)] * 3


def test_coca_experts_says_what_is_wrong(batch):
    with pytest.raises(ValueError, match=r"experts need .* received \(64, 2, 4\) and \(64, 3, 4\)"):
        config(unimodal_depth=3)
    with pytest.raises(ValueError, match="CocaExperts needs a config with experts=True"):
        CocaExperts(coca_preset("tiny"))
    with pytest.raises(ValueError, match="experts=True is CocaExperts"):
        Coca(config())
    with pytest.raises(ValueError, match="captions must have at most 4 tokens; received one of 8"):
        CocaExperts(config(context_length=4)).encode_text(batch.token_ids, batch.segments())
