"""open_clip's CoCa without open_clip: packed batches, both class masks, shared images, backends, configurations."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vlp_fast import Segments
from vlp_fast.data import Batch
from vlp_fast.models.coca_open_clip import OpenClipCoca, OpenClipCocaConfig, open_clip_coca_preset
from vlp_fast.ops import attention
from vlp_fast.testing import assert_as_accurate_as
from vlp_fast.training import CocaPretraining

CONTEXT = 9
LENGTHS = [5, 1, CONTEXT]  # the last has no padding


def make(legacy, dtype=torch.float64, **changes):
    config = open_clip_coca_preset("tiny", vocab_size=100, context_length=CONTEXT, legacy_class_mask=legacy, **changes)
    return OpenClipCoca(config).to(dtype)


@pytest.fixture
def captions():
    return torch.randint(1, 100, (sum(LENGTHS),)), Segments(LENGTHS)


@pytest.mark.parametrize("legacy", [True, False])
def test_ragged_captions_equal_one_at_a_time(captions, legacy):
    model, (ids, segments) = make(legacy), captions
    together = model.encode_text(ids, segments)
    for i, part in enumerate(ids.split(LENGTHS)):
        alone = model.encode_text(part, Segments([len(part)]))
        torch.testing.assert_close(alone.features[0], together.features[i])
        torch.testing.assert_close(alone.rows, together.rows.split(LENGTHS)[i])


@pytest.mark.parametrize("legacy", [True, False])
def test_what_the_class_row_sees(captions, legacy):
    """Under the legacy mask, where there is padding: the words and the first row of it, but not itself."""
    model, (ids, segments) = make(legacy), captions
    rows = model.text_encoder._class_rows(segments)
    q, k, v = torch.randn(3, rows.segments.rows, 2, 16, dtype=torch.float64)
    v.requires_grad_()
    out = attention(q, k, v, rows.plan)
    starts = rows.segments.first_rows().tolist()
    for n, start, end in zip(LENGTHS, starts, rows.ends.tolist(), strict=True):
        seen = torch.autograd.grad(out[end].sum(), v, retain_graph=True)[0].abs().sum((1, 2)).nonzero().flatten().tolist()
        words = list(range(start, start + n))
        assert end == start + n + (legacy and n < CONTEXT)
        assert seen == [*words, start + n]  # a row of padding, or else itself

    text = model.encode_text(ids, segments)
    with torch.no_grad():
        model.text_encoder.word.weight[model.config.pad_id].normal_()
    changed = model.encode_text(ids, segments)
    torch.testing.assert_close(text.rows, changed.rows)
    same = torch.isclose(text.features, changed.features).all(1).tolist()
    assert same == [not legacy, not legacy, True]


def test_captions_may_share_an_image(captions):
    model, (ids, segments) = make(True), captions
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    text, image = model.encode_text(ids, segments), model.encode_image(images)
    shared, rows = model.word_logits(text, image, [1, 0, 1])
    repeated, _ = model.word_logits(text, model.encode_image(images[[1, 0, 1]]))
    torch.testing.assert_close(shared, repeated)
    assert len(rows) == sum(LENGTHS) - len(LENGTHS)
    torch.testing.assert_close(image.features[1:], model.encode_image(images[1:]).features)


@pytest.mark.parametrize("legacy", [True, False])
def test_kernels_are_as_accurate_as_plain_torch(captions, legacy, device):
    ids, segments = captions[0].to(device), captions[1].to(device)
    images = torch.randn(3, 3, 32, 32, device=device)
    plain = make(legacy, torch.float32, image_size=32, vision_depth=1, backend="torch").to(device)

    def run(backend, dtype):
        model = OpenClipCoca(replace(plain.config, backend=backend)).to(device, dtype)
        model.load_state_dict(plain.state_dict())
        image, text = model.encode_image(images.to(dtype)), model.encode_text(ids, segments)
        logits, _ = model.word_logits(text, image)
        loss = logits.pow(2).mean() + (image.features - text.features).pow(3).sum()
        named = {name: parameter for name, parameter in model.named_parameters() if name != "logit_scale"}
        gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        return {"image": image.features, "text": text.features, "logits": logits, **gradients}

    exact, baseline = run("torch", torch.float64), run("torch", torch.float32)
    for name, actual in run("triton", torch.float32).items():
        assert_as_accurate_as(actual, baseline[name], exact[name], factor=3.0, what=name)


def test_the_pad_word_is_no_target():
    objective = CocaPretraining(open_clip_coca_preset("tiny"))
    ids = torch.tensor([5, 6, 7, 0, 5, 8, 0])
    batch = Batch(torch.randn(2, 3, 64, 64), ids, (4, 3), ("", ""))
    image, text = objective.model.encode_image(batch.images), objective.model.encode_text(ids, batch.segments())
    logits, rows = objective.model.word_logits(text, image)
    torch.testing.assert_close(objective(batch)["caption"], F.cross_entropy(logits, ids[rows + 1], ignore_index=0))


def test_configurations_say_what_is_wrong():
    config = open_clip_coca_preset("tiny")
    assert open_clip_coca_preset("ViT-L-14", legacy_class_mask=True).legacy_class_mask
    with pytest.raises(ValueError, match="size must be one of tiny, ViT-B-32, ViT-L-14"):
        open_clip_coca_preset("base")
    with pytest.raises(ValueError, match="pooler_queries must be at least 2"):
        replace(config, pooler_queries=1)
    with pytest.raises(ValueError, match="pad_id must be a word, 0 to 999; received 1000"):
        replace(config, pad_id=1000)
    with pytest.raises(ValueError, match="num_heads must divide dim"):
        OpenClipCoca(replace(config, num_heads=7))
    with pytest.raises(ValueError, match="captions must have at most 76 tokens; received one of 77"):
        OpenClipCoca(config).encode_text(torch.ones(77, dtype=torch.int64), Segments([77]))
    assert OpenClipCocaConfig() == open_clip_coca_preset("ViT-B-32")
