"""Scores of pairs from hidden words, against one pair, one half and one word at a time."""

import pytest
import torch

from vlp_fast import Segments
from vlp_fast.models import Beit3MaskedModel, beit3_preset, masked_word_scores

LENGTHS = (6, 2, 4, 3)
MASK, SPECIAL = 59, (0, 1, 2)


@pytest.fixture
def model():
    model = Beit3MaskedModel(beit3_preset("tiny", image_size=32, vocab_size=60)).double().eval()
    for parameter in model.parameters():  # a new model barely looks at the image
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def captions():
    """Each [1, words, 2]; the second has no word."""
    return [torch.tensor([1, *torch.randint(3, 58, (n - 2,)).tolist(), 2]) for n in LENGTHS]


@torch.no_grad()
def plain(model, images, captions):
    scores = torch.zeros(len(captions), len(images), dtype=torch.float64)
    for i, caption in enumerate(captions):
        places = range(1, len(caption) - 1)
        for j in range(len(images)):
            for half in (places[0::2], places[1::2]):
                hidden = caption.clone()
                hidden[list(half)] = MASK
                out = model.encode_pairs(images[j : j + 1], hidden, Segments([len(caption)]))
                words = model.word_head(out.text).log_softmax(1)
                scores[i, j] += sum(words[place, caption[place]] for place in half)
    return scores


@pytest.mark.parametrize("pairs_at_once", [256, 3])
def test_masked_word_scores_are_sums_over_hidden_words(model, captions, pairs_at_once, monkeypatch):
    monkeypatch.setattr("vlp_fast.models.beit3_scoring.PAIRS_AT_ONCE", pairs_at_once)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    scores = masked_word_scores(model, images, torch.cat(captions), Segments(LENGTHS), mask_id=MASK, special_ids=SPECIAL)
    expected = plain(model, images, captions)
    torch.testing.assert_close(scores, expected.float())
    assert expected.std(1)[[0, 2, 3]].min() > 1e-3  # the image matters
    assert (scores[1] == 0).all()


def test_masked_word_scores_of_nothing(model, captions):
    ids = {"mask_id": MASK, "special_ids": SPECIAL}
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert masked_word_scores(model, images[:0], torch.cat(captions), Segments(LENGTHS), **ids).shape == (4, 0)
    none = torch.zeros(0, dtype=torch.long)
    assert masked_word_scores(model, images, none, Segments([]), **ids).shape == (0, 2)


def test_masked_word_scores_need_evaluation(model, captions):
    with pytest.raises(ValueError, match="masked_word_scores needs the model in eval mode"):
        masked_word_scores(
            model.train(), torch.zeros(1, 3, 32, 32), captions[0], Segments([6]), mask_id=MASK, special_ids=SPECIAL
        )
