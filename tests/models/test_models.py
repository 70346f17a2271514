"""The three models on tiny configurations, in float64: ragged batches, who sees whom, grouped passes, configurations."""

from dataclasses import replace

import pytest
import torch

from vlp_fast import Segments
from vlp_fast.models import Beit3, Blip, Coca, beit3_preset, blip_preset, coca_preset

LENGTHS = [5, 1, 8]


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, dtype=torch.float64)


@pytest.fixture
def captions():
    return torch.randint(5, 90, (sum(LENGTHS),)), Segments(LENGTHS)


def blip():
    return Blip(blip_preset("tiny", vocab_size=100, dec_id=98, enc_id=99)).double()


def test_blip_ragged_captions_equal_one_at_a_time(captions):
    model, (ids, segments) = blip(), captions
    together = model.encode_text(ids, segments)
    for i, part in enumerate(ids.split(LENGTHS)):
        torch.testing.assert_close(model.encode_text(part, Segments([len(part)]))[0], together[i])


@pytest.mark.parametrize("causal", [True, False])
def test_blip_only_captioning_hides_later_words(images, captions, causal):
    model, (ids, segments) = blip(), captions
    image = model.encode_image(images)
    changed = ids.clone()
    changed[-1] = (changed[-1] + 1) % 90

    def rows(tokens):
        if causal:
            text_pass = model.captioning_pass(tokens, segments, [0, 1, 2])
        else:
            text_pass = replace(model.matching_pass("itm", tokens, segments, [0, 1, 2]), first_row_only=False)
        return model.text_tower([text_pass], image.rows, image.segments)[0]

    same = torch.isclose(rows(ids), rows(changed)).all(1)
    assert same[:6].all()  # the other captions
    assert same[6:-1].all() == causal
    assert not same[-1]


def test_blip_grouped_passes_equal_separate_calls_with_their_gradients(images, captions):
    model, (ids, segments) = blip(), captions
    image = model.encode_image(images)
    rows = image.rows.detach().requires_grad_()
    passes = [
        model.captioning_pass(ids, segments, [0, 1, 2]),
        model.matching_pass("itm_positive", ids, segments, [0, 1, 2]),
        model.matching_pass("itm_negative", ids, segments, [2, 2, 0]),
    ]
    together = model.text_tower(passes, rows, image.segments)
    assert [len(x) for x in together] == [segments.rows, 3, 3]
    apart = [model.text_tower([p], rows, image.segments, whole=True)[0] for p in passes]
    weights = [torch.randn_like(x) for x in together]
    wanted = [rows, *model.text_tower.parameters()]
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(out, weights, strict=True)), wanted) for out in (together, apart)
    ]
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("pooler", ["cascade", "parallel"])
def test_coca_images_do_not_mix_and_class_rows_stay_unseen(images, captions, pooler):
    model, (ids, segments) = Coca(coca_preset("tiny", vocab_size=100, pooler=pooler)).double(), captions
    together, alone = model.encode_image(images), model.encode_image(images[1:2])
    torch.testing.assert_close(together.features[1:2], alone.features)
    before = model.encode_text(ids, segments)
    with torch.no_grad():
        model.text_encoder.class_token.copy_(model.text_encoder.class_token.flip(0))
    after = model.encode_text(ids, segments)
    torch.testing.assert_close(before.rows, after.rows)
    assert not torch.allclose(before.features, after.features)


def test_beit3_modalities_meet_in_pairs_only(images, captions):
    model, (ids, segments) = Beit3(beit3_preset("tiny", vocab_size=100)).double(), captions
    pairs = model.encode_pairs(images, ids, segments)
    shifted = model.encode_pairs(images.roll(1, 0), ids, segments)
    assert not torch.allclose(pairs.text, shifted.text)
    with pytest.raises(ValueError, match="one caption per image"):
        model.encode_pairs(images[:2], ids, segments)
    alone = model.encode_pairs(images[2:], ids[6:], Segments([8]))
    torch.testing.assert_close(pairs.text[6:], alone.text)


def test_beit3_base_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = Beit3(beit3_preset("base"))
    unused = 4 * 768  # rows 0 and 1 of both published position tables are never read
    assert sum(p.numel() for p in model.parameters()) == 220_987_392 - unused


@pytest.mark.parametrize("preset", [blip_preset, coca_preset, beit3_preset])
def test_presets_say_what_is_wrong(preset):
    assert preset("base", image_size=384).image_size == 384
    with pytest.raises(ValueError, match="size must be one of tiny, base, large"):
        preset("huge")
    with pytest.raises(ValueError, match="has no field 'widht'"):
        preset("base", widht=3)


@pytest.mark.parametrize("make", [blip, lambda: Coca(coca_preset("tiny")), lambda: Beit3(beit3_preset("tiny"))])
def test_state_dict_round_trip(make):
    first, second = make(), make()
    second.load_state_dict(first.state_dict(), strict=True)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
