"""BLIP's smaller models against the whole one, and question answering and NLVR2 on ragged batches, in float64."""

import pytest
import torch

from vlp_fast import Segments
from vlp_fast.models import Blip, BlipCaptioner, BlipNlvr2, BlipVqa, blip_preset
from vlp_fast.training import captioning_loss, vqa_loss

LENGTHS = [5, 2, 8]


def config(**changes):
    return blip_preset("tiny", vocab_size=100, dec_id=98, enc_id=99, vision_dim=32, vision_hidden_dim=80, **changes)


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, dtype=torch.float64)


@pytest.fixture
def captions():
    return torch.randint(5, 90, (sum(LENGTHS),)), Segments(LENGTHS)


def test_captioner_equals_the_whole_model(images, captions):
    blip = Blip(config()).double()
    captioner, (ids, segments) = blip.captioner(), captions
    losses = [captioning_loss(m, m.encode_image(images), ids, segments, [2, 0, 0]) for m in (blip, captioner)]
    torch.testing.assert_close(*losses)
    text_pass = captioner.captioning_pass(ids, segments, [0, 1, 2])
    assert type(captioner) is BlipCaptioner
    assert captioner.text_tower.describe([text_pass]).module == "text_decoder"


def test_retriever_equals_the_whole_model(images, captions):
    blip = Blip(config()).double()
    retriever, (ids, segments) = blip.eval().retriever(), captions
    assert not retriever.training

    def outputs(model):
        image = model.encode_image(images)
        asked = model.matching_pass("itm", ids, segments, [1, 1, 0])
        (rows,) = model.text_tower([asked], image.rows, image.segments)
        return image.features, model.encode_text(ids, segments), model.matching_logits(rows)

    torch.testing.assert_close(outputs(blip), outputs(retriever))


def test_a_prompt_is_not_predicted(images, captions):
    model, (ids, segments) = BlipCaptioner(config()).double(), captions
    image = model.encode_image(images)
    short = [min(length, 3) for length in LENGTHS]
    rows = torch.cat([first + torch.arange(n) for first, n in zip((0, 5, 7), short, strict=True)])
    start = captioning_loss(model, image, ids[rows], Segments(short), range(3))
    rest = captioning_loss(model, image, ids, segments, range(3), prompt_length=3)
    both = captioning_loss(model, image, ids, segments, range(3))
    torch.testing.assert_close((start * 5 + rest * 7) / 12, both)
    with pytest.raises(ValueError, match="prompt_length counts the first token and must be at least 1; received 0"):
        captioning_loss(model, image, ids, segments, range(3), prompt_length=0)


def test_vqa_of_a_batch_is_the_mean_over_its_images(images, captions):
    model, (ids, segments) = BlipVqa(config()).double(), captions
    lengths, weights = [4, 3, 5, 2], torch.tensor([0.5, 0.5, 1.0, 0.25], dtype=torch.float64)
    answers = torch.randint(5, 90, (14,))
    together = vqa_loss(model, images, captions, (answers, Segments(lengths)), [0, 0, 2, 1], weights)
    alone = []
    for i, which in enumerate(([0, 1], [3], [2])):
        question = ids[segments.host_offsets[i] : segments.host_offsets[i + 1]], Segments([LENGTHS[i]])
        rows, own = Segments(lengths).take(which)
        alone.append(vqa_loss(model, images[[i]], question, (answers[rows], own), [0] * len(which), weights[which]))
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_vqa_refuses_what_does_not_belong_together(images, captions):
    model, answers = BlipVqa(config()).double(), (torch.randint(5, 90, (3,)), Segments([3]))
    with pytest.raises(ValueError, match="every image needs one question; received 3 for 2 images"):
        vqa_loss(model, images[:2], captions, answers, [0], torch.ones(1))
    with pytest.raises(ValueError, match=r"weights must be \[1\], one per answer; received \[2\]"):
        vqa_loss(model, images, captions, answers, [0], torch.ones(2))


def test_nlvr2_captions_read_their_own_two_images_in_order(images, captions):
    model, (ids, segments) = BlipNlvr2(config(depth=8)).double(), captions  # layers 6 and 7 merge
    second = torch.randn_like(images)
    together = model(images, second, ids, segments)
    assert together.shape == (3, 2)
    for i, part in enumerate(ids.split(LENGTHS)):
        torch.testing.assert_close(model(images[[i]], second[[i]], part, Segments([len(part)]))[0], together[i])
    assert not torch.isclose(model(second, images, ids, segments), together).any()
    with pytest.raises(ValueError, match="every caption needs two images; received 3 first and 2 second ones for 3 captions"):
        model(images, second[:2], ids, segments)
