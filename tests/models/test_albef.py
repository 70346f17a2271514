"""ALBEF on a tiny configuration, in float64: ragged batches, who sees whom, grouped calls, configurations."""

import pytest
import torch

from vlp_fast import Segments
from vlp_fast.models.albef import Albef, albef_preset

LENGTHS = [5, 1, 8]


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, dtype=torch.float64)


@pytest.fixture
def captions():
    return torch.randint(5, 90, (sum(LENGTHS),)), Segments(LENGTHS)


def albef(**changes):
    return Albef(albef_preset("tiny", **{"vocab_size": 100, "cls_id": 1, "mask_id": 3, **changes})).double()


def fused(model, images, ids, segments, index):
    image = model.encode_image(images)
    return model.fuse(model.encode_words(ids, segments), segments, image, index)


def test_shapes(images, captions):
    model, (ids, segments) = albef(), captions
    image = model.encode_image(images)
    rows = fused(model, images, ids, segments, [0, 1, 2])
    assert image.rows.shape == (3 * 17, 64)
    assert image.features.shape == (3, 32)
    assert model.encode_text(ids, segments).shape == (3, 32)
    assert rows.shape == (14, 64)
    assert model.matching_logits(rows[segments.first_rows()]).shape == (3, 2)
    assert model.word_logits(rows).shape == (14, 100)
    torch.testing.assert_close(image.features.norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_ragged_captions_equal_one_at_a_time(images, captions):
    model, (ids, segments) = albef(), captions
    together = model.encode_text(ids, segments), fused(model, images, ids, segments, [2, 0, 1])
    start = 0
    for i, (part, image) in enumerate(zip(ids.split(LENGTHS), [2, 0, 1], strict=True)):
        alone = Segments([len(part)])
        torch.testing.assert_close(model.encode_text(part, alone)[0], together[0][i])
        rows = fused(model, images[image : image + 1], part, alone, [0])
        torch.testing.assert_close(rows, together[1][start : start + len(part)])
        start += len(part)


def test_every_row_sees_its_whole_caption_and_its_image_only(images, captions):
    model, (ids, segments) = albef(), captions
    before = fused(model, images, ids, segments, [0, 1, 2])
    changed = ids.clone()
    changed[-1] = (changed[-1] + 1) % 90
    same = torch.isclose(before, fused(model, images, changed, segments, [0, 1, 2])).all(1)
    assert same[:6].all()
    assert not same[6:].any()
    other = images.clone()
    other[0] += 1.0
    same = torch.isclose(before, fused(model, other, ids, segments, [0, 1, 2])).all(1)
    assert same[5:].all()
    assert not same[:5].any()


def test_text_features_come_from_the_lower_layers_alone(images, captions):
    model, (ids, segments) = albef(), captions
    model.encode_text(ids, segments).sum().backward()
    assert all(p.grad is not None for p in model.text_encoder.parameters())
    assert all(p.grad is None for p in model.fusion_encoder.parameters())
    assert not hasattr(model.text_encoder.blocks[1], "cross_attention")
    assert len(model.text_encoder.blocks) == len(model.fusion_encoder.blocks) == 2


def test_captions_fused_together_equal_separate_calls_with_their_gradients(images, captions):
    model, (ids, segments) = albef(), captions
    image, text = model.encode_image(images), model.encode_words(ids, segments)
    rows = image.rows.detach().requires_grad_()
    image = image._replace(rows=rows)
    text = text.detach().requires_grad_()
    indices = [[0, 1, 2], [2, 2, 0]]
    both = model.fuse(torch.cat([text, text]), Segments(2 * LENGTHS), image, [*indices[0], *indices[1]])
    together = list(both.split(segments.rows))
    apart = [model.fuse(text, segments, image, index) for index in indices]
    weights = [torch.randn_like(x) for x in together]
    wanted = [rows, text, *model.fusion_encoder.parameters()]
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(out, weights, strict=True)), wanted) for out in (together, apart)
    ]
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(*gradients)


def test_images_may_be_named_by_a_tensor(images, captions):
    model, (ids, segments) = albef(), captions
    index = [2, 0, 0]
    torch.testing.assert_close(
        fused(model, images, ids, segments, torch.tensor(index)), fused(model, images, ids, segments, index), rtol=0, atol=0
    )


def test_every_token_is_of_type_0(captions):
    model, (ids, segments) = albef(token_types=3), captions
    model.encode_words(ids, segments).square().sum().backward()
    gradient = model.text_encoder.embedding.token_type.weight.grad
    torch.testing.assert_close(gradient[0], model.text_encoder.embedding.position.weight.grad.sum(0))
    assert gradient[0].abs().max() > 0
    assert gradient[1:].abs().max() == 0


def test_base_has_as_many_parameters_as_the_published_code():
    with torch.device("meta"):
        model = Albef(albef_preset("base"))
    assert sum(p.numel() for p in model.parameters()) == 209_937_725  # its model_pretrain.py, momentum copies not counted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion_layer": 4}, "fusion_layer must leave layers of text alone and layers of fusion, from 1 to 3; received 4"),
        ({"fusion_layer": 0}, "received 0"),
        ({"pad_id": 100}, "pad_id must be a word of the vocabulary of 100; received 100"),
        ({"mask_id": 103}, "mask_id must be a word of the vocabulary of 100; received 103"),
        ({"token_types": 0}, "token_types must be at least 1; received 0"),
        ({"widht": 3}, "AlbefConfig has no field 'widht'"),
    ],
)
def test_configuration_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        albef(**changes)


def test_presets():
    assert albef_preset("base", image_size=384).image_size == 384
    with pytest.raises(ValueError, match="size must be one of tiny, base; received 'large'"):
        albef_preset("large")


def test_state_dict_round_trip():
    first, second = albef(), albef()
    second.load_state_dict(first.state_dict(), strict=True)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
