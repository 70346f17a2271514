"""VLMo on tiny configurations, in float64: ragged batches, who sees whom, which expert runs, configurations, its pretraining step."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vlp_fast import Segments
from vlp_fast.data.batches import Batch
from vlp_fast.models.vlmo import Vlmo, VlmoConfig, vlmo_preset
from vlp_fast.training.vlmo import VlmoPretraining

LENGTHS = [5, 1, 8]
CLS, SEP, MASK, CONTINUES = 1, 2, 3, range(50, 100)


def vlmo(**changes):
    torch.manual_seed(0)
    model = Vlmo(vlmo_preset("tiny", **{"image_size": 32, "vocab_size": 100, **changes})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(params=[True, False], ids=["relative", "absolute"])
def model(request):
    return vlmo(relative=request.param, layer_scale=0.1 if request.param else None)


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, dtype=torch.float64)


@pytest.fixture
def captions():
    return torch.randint(5, 100, (sum(LENGTHS),)), Segments(LENGTHS)


def batch(lengths=(7, 4, 9), size=32):
    rows = [[CLS, *torch.randint(5, 100, (n - 2,)).tolist(), SEP] for n in lengths]
    images = torch.randn(len(lengths), 3, size, size, dtype=torch.float64)
    return Batch(images, torch.tensor([token for row in rows for token in row]), tuple(lengths), ("",) * len(lengths))


def test_vlmo_packed_captions_equal_one_at_a_time(model, captions):
    ids, segments = captions
    together = model.contrast_text(ids, segments)
    apart = [model.contrast_text(part, Segments([len(part)])) for part in ids.split(LENGTHS)]
    torch.testing.assert_close(together.rows, torch.cat([out.rows for out in apart]))
    torch.testing.assert_close(together.features, torch.cat([out.features for out in apart]))
    torch.testing.assert_close(together.vl_features, torch.cat([out.vl_features for out in apart]))
    torch.testing.assert_close(model.encode_text(ids, segments).features, together.features)


def test_vlmo_images_equal_one_at_a_time(model, images):
    together = model.contrast_image(images)
    apart = [model.contrast_image(image[None]) for image in images]
    torch.testing.assert_close(together.rows, torch.cat([out.rows for out in apart]))
    torch.testing.assert_close(together.vl_features, torch.cat([out.vl_features for out in apart]))
    torch.testing.assert_close(model.encode_image(images).features, together.features)


def test_vlmo_packed_pairs_equal_one_at_a_time_with_their_gradients(model, images, captions):
    ids, segments = captions
    together = model.encode_pairs(images, ids, segments)
    parts = zip(images, ids.split(LENGTHS), strict=True)
    apart = [model.encode_pairs(image[None], part, Segments([len(part)])) for image, part in parts]
    outs = [(getattr(together, name), torch.cat([getattr(out, name) for out in apart])) for name in ("text", "image", "pooled")]
    for one, other in outs:
        torch.testing.assert_close(one, other)
    weights = [torch.randn_like(one) for one, _ in outs]
    gradients = []
    for side in (0, 1):
        total = sum((out[side] * weight).sum() for out, weight in zip(outs, weights, strict=True))
        gradients.append(torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*gradients)


def test_vlmo_permuted_pairs_give_permuted_results(model, images, captions):
    ids, segments = captions
    order = [2, 0, 1]
    rows, permuted = segments.take(order)
    out, other = model.encode_pairs(images, ids, segments), model.encode_pairs(images[order], ids[rows], permuted)
    torch.testing.assert_close(other.pooled, out.pooled[order])
    torch.testing.assert_close(other.text, out.text[rows])


def test_vlmo_samples_of_all_kinds_in_one_forward(model, images, captions):
    """The encoder takes captions alone, images alone and pairs together; each gives what it gives alone."""
    ids, segments = captions
    text, image, n = model.embed_text(ids, segments), model.embed_images(images), model.num_image_tokens
    rows = torch.cat([text, image])
    (mixed,) = model.encoder(rows, [5, 1, 8, 0], [0, n, n, n], vl=(False,))
    torch.testing.assert_close(mixed[:5], model.encode_text(ids[:5], Segments([5])).rows)
    torch.testing.assert_close(mixed[-n:], model.encode_image(images[2:]).rows)


def test_vlmo_modalities_meet_in_pairs_only(model, images, captions):
    ids, segments = captions
    pairs, others = model.encode_pairs(images, ids, segments), model.encode_pairs(images.roll(1, 0), ids, segments)
    assert not torch.isclose(pairs.text, others.text).all(1).any()
    assert not torch.allclose(pairs.text, model.encode_text(ids, segments).rows)


def experts_with_gradient(model, out):
    """Of each layer, which experts of the feed-forward and its norm got a gradient."""
    model.zero_grad()
    out.square().sum().backward()
    return [[i for i, g in enumerate(layer.fc2.weight.grad) if g.abs().max() > 0] for layer in model.encoder.layers]


def test_vlmo_runs_the_experts_of_the_mode(images, captions):
    model, (ids, segments) = vlmo(depth=4, vl_start=2), captions
    assert experts_with_gradient(model, model.encode_text(ids, segments).rows) == [[0], [0], [0], [0]]
    assert experts_with_gradient(model, model.encode_image(images).rows) == [[1], [1], [1], [1]]
    assert experts_with_gradient(model, model.encode_pairs(images, ids, segments).pooled) == [[0, 1], [0, 1], [2], [2]]
    vl = model.contrast_text(ids, segments).vl_features.sum(1)
    assert experts_with_gradient(model, vl) == [[0], [0], [2], [2]]


def test_vlmo_relative_positions_tell_words_apart(captions):
    model, ids = vlmo(), torch.tensor([CLS, 7, 9, 11, SEP])
    rows = model.encode_text(ids, Segments([5])).rows
    swapped = model.encode_text(ids[[0, 2, 1, 3, 4]], Segments([5])).rows
    assert not torch.allclose(rows[0], swapped[0])
    with torch.no_grad():
        model.encoder.relative_bias.zero_()
    rows = model.encode_text(ids, Segments([5])).rows
    swapped = model.encode_text(ids[[0, 2, 1, 3, 4]], Segments([5])).rows
    torch.testing.assert_close(rows[0], swapped[0])


def dense_rows(model, rows, positions):
    """Rows of an image alone, with full matrices; positions are those in the bias table."""
    encoder, n = model.encoder, len(rows)
    for i, layer in enumerate(encoder.layers):
        part = layer.attention
        bias = torch.cat([part.q_bias, torch.zeros_like(part.q_bias), part.v_bias])
        qkv = F.linear(layer.attention_norm(rows), part.qkv.weight, bias)
        q, k, v = qkv.view(n, 3, part.num_heads, -1).permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        scores = scores + encoder.relative_bias[encoder.buckets[positions][:, positions], i].permute(2, 0, 1)
        rows = rows + layer.attention_scale * part.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        offsets = (0, 0, n) if layer.num_experts == 2 else (0, 0, n, n)
        rows = rows + layer.ffn_scale * layer.fc2(layer.fc1(layer.ffn_norm(rows, offsets), offsets), offsets)
    return encoder.norm(rows)


def test_vlmo_bias_follows_the_patches_that_stay(images, monkeypatch):
    model = vlmo(patch_size=8, patch_drop=0.5)
    draws, draw = [], model.patch_drop.draw
    monkeypatch.setattr(model.patch_drop, "draw", lambda *args: draws.append(draw(*args)) or draws[-1])
    out = model.encode_image(images)
    (kept,) = draws
    assert kept.shape == (3, 9)
    assert out.segments.lengths == (9, 9, 9)
    tokens = model.embed_images(images).unflatten(0, (3, 17))
    for i, rows in enumerate(out.rows.split(9)):
        torch.testing.assert_close(rows, dense_rows(model, tokens[i][kept[i]], model.config.max_positions + kept[i]))


def test_vlmo_pairs_of_one_image_draw_patches_of_their_own(images, captions, monkeypatch):
    model, (ids, segments) = vlmo(patch_size=8, patch_drop=0.5), captions
    draws, draw = [], model.patch_drop.draw
    monkeypatch.setattr(model.patch_drop, "draw", lambda *args: draws.append(draw(*args)) or draws[-1])
    together = model.pool_pairs(images, ids, segments, [1, 1, 0])
    assert len({tuple(row.tolist()) for row in draws[0]}) == 3
    drawn = iter(draws[0].split(1))
    monkeypatch.setattr(model.patch_drop, "draw", lambda *args: next(drawn))
    parts = zip(ids.split(LENGTHS), (1, 1, 0), strict=True)
    apart = [model.encode_pairs(images[i : i + 1], part, Segments([len(part)])).pooled for part, i in parts]
    torch.testing.assert_close(together, torch.cat(apart))


def test_vlmo_says_what_is_empty_or_does_not_fit(model, images, captions):
    ids, segments = captions
    with pytest.raises(ValueError, match="caption 1 is empty"):
        model.encode_text(ids[:5], Segments([3, 0, 2]))
    with pytest.raises(ValueError, match="at least one caption; received none"):
        model.encode_text(ids[:0], Segments([]))
    with pytest.raises(ValueError, match="images must hold at least one image"):
        model.encode_image(images[:0])
    with pytest.raises(ValueError, match="at most 40 tokens; received one of 41"):
        model.encode_text(torch.full((41,), 7), Segments([41]))
    with pytest.raises(ValueError, match=r"one row per token, \[14\]; received \[13\]"):
        model.encode_text(ids[:-1], segments)
    with pytest.raises(ValueError, match="received 3 captions for 2 images"):
        model.encode_pairs(images[:2], ids, segments)
    with pytest.raises(ValueError, match=r"images must be \[batch, 3, 32, 32\]"):
        model.encode_image(images[..., :16])


def test_vlmo_config_says_what_is_wrong():
    with pytest.raises(ValueError, match="num_heads must divide dim"):
        VlmoConfig(dim=100)
    with pytest.raises(ValueError, match="vl_start must be a layer from 1 to depth 12; received 13"):
        VlmoConfig(vl_start=13)
    with pytest.raises(ValueError, match="max_positions must be at most relative_text_length 196"):
        VlmoConfig(max_positions=200)
    with pytest.raises(ValueError, match="size must be one of tiny, base, large, base_plus"):
        vlmo_preset("huge")


@pytest.mark.parametrize(("size", "millions"), [("base", 176.0), ("base_plus", 166.9), ("large", 562.6)])
def test_vlmo_presets_have_the_published_number_of_parameters(size, millions):
    """175, 167 and 562 million, says the published code, of what all tasks share."""
    with torch.device("meta"):
        model = Vlmo(vlmo_preset(size))
    heads = ("matching_head", "word_", "text_projection", "image_projection", "vl_", "log_")
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(heads))
    assert round(count / 1e6, 1) == millions


def test_vlmo_drops_paths_while_training_only(images, captions):
    model, (ids, segments) = vlmo(drop_path=0.5), captions
    outs = [model.encode_pairs(images, ids, segments).pooled for _ in range(2)]
    assert not torch.allclose(*outs)
    model.eval()
    outs = [model.encode_pairs(images, ids, segments).pooled for _ in range(2)]
    assert torch.equal(*outs)


# ------------------------------------------------------------------------------------------------------------- pretraining


def pretraining(**changes):
    step = VlmoPretraining(vlmo().config, mask_id=MASK, special_ids=[0, CLS, SEP], continuation_ids=CONTINUES, **changes)
    return step.double()


def test_vlmo_step_hides_whole_words():
    step, generator = pretraining(), torch.Generator().manual_seed(0)
    pairs = batch([20, 15, 30, 11, 8])
    offsets = [*pairs.segments().host_offsets.tolist()]
    for _ in range(5):
        inputs = step.prepare(pairs, generator)
        rows = set(inputs.masked_rows.tolist())
        untouched = [i for i in range(len(pairs.token_ids)) if i not in rows]
        assert torch.equal(inputs.masked_ids[untouched], pairs.token_ids[untouched])
        assert not torch.isin(pairs.token_ids[inputs.masked_rows], torch.tensor([CLS, SEP])).any()
        for first, last in zip(offsets, offsets[1:], strict=False):
            assert rows & set(range(first, last))  # something is hidden in every caption
        for row in range(1, len(pairs.token_ids)):
            if pairs.token_ids[row] in CONTINUES and pairs.token_ids[row - 1] != CLS:
                assert (row in rows) == (row - 1 in rows)
        assert (inputs.masked_ids[inputs.masked_rows] == MASK).any()


def test_vlmo_step_trains_every_parameter_that_is_read():
    step = pretraining()
    losses = step(step.prepare(batch()))
    assert list(losses) == ["mlm", "itc", "itc_vl", "itm"]
    total = step.total(losses)
    torch.testing.assert_close(total, 0.25 * losses["mlm"] + 0.5 * (losses["itc"] + losses["itc_vl"]) + losses["itm"])
    total.backward()
    for name, parameter in step.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_vlmo_step_permuted_pairs_give_the_same_losses():
    step, pairs = pretraining(), batch()
    order = [2, 0, 1]
    rows, segments = pairs.segments().take(order)
    permuted = Batch(pairs.images[order], pairs.token_ids[rows], segments.lengths, pairs.captions)
    inputs = step.prepare(pairs)
    hidden = torch.isin(rows, inputs.masked_rows).nonzero()[:, 0]
    other = type(inputs)(permuted, inputs.masked_ids[rows], hidden)
    image_index, text_index = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
    place = torch.tensor(order).argsort()
    losses = step(inputs, negatives=(image_index, text_index))
    again = step(other, negatives=(place[image_index[order]], place[text_index[order]]))
    for name, loss in losses.items():
        torch.testing.assert_close(loss, again[name])


def test_vlmo_step_on_meta_computes_nothing():
    with torch.device("meta"):
        step = VlmoPretraining(vlmo_preset("base"), mask_id=MASK, special_ids=[0, CLS, SEP])
    with torch.device("cpu"):
        pairs = batch(size=224)
        pairs = replace(pairs, images=pairs.images.float())
        inputs = step.prepare(pairs).to("meta")
    following = torch.tensor([1, 2, 0])
    losses = step(inputs, negatives=(following, following))
    assert all(loss.device.type == "meta" for loss in losses.values())
    step.total(losses).backward()


def test_vlmo_step_draws_other_pairs_as_negatives(monkeypatch):
    step, pairs = pretraining(schedule="published"), batch()
    seen = []
    original = step.model.encode_pairs
    monkeypatch.setattr(step.model, "encode_pairs", lambda *args: seen.append(args) or original(*args))
    step(step.prepare(pairs))
    _, positive, other_images, other_texts = seen
    assert torch.equal(positive[0], pairs.images)
    assert not any(torch.equal(a, b) for a, b in zip(other_images[0], pairs.images, strict=True))
    assert sum(other_texts[2].lengths) == len(other_texts[1])
