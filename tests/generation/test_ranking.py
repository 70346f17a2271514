"""Captions ranked by matching, and answers by their likelihood."""

import pytest
import torch

from vlp_fast.generation import Questions, generate, rank_answers, rank_captions
from vlp_fast.models import Blip, blip_preset
from vlp_fast.models.blip import BlipRetriever
from vlp_fast.segments import Segments

START, EOS, VOCAB = 1, 2, 97  # of conftest.py's models


@pytest.mark.parametrize("kind", [Blip, BlipRetriever])
def test_ranking_equals_one_caption_after_another(make_images, pack, kind):
    torch.manual_seed(0)
    model = kind(blip_preset("tiny", image_size=32, vocab_size=VOCAB, dec_id=START, enc_id=4)).double().eval()
    images = make_images(2, torch.float64)
    texts = [[START, *range(5, 5 + n), EOS] for n in (1, 4, 2, 9, 3)]
    ids, segments = pack(texts)
    index = [1, 0, 1, 1, 0]
    found = rank_captions(model, images, ids, segments, index)
    alone = [rank_captions(model, images[i : i + 1], *pack([text])).logits for i, text in zip(index, texts, strict=True)]
    torch.testing.assert_close(found.logits, torch.cat(alone), rtol=1e-10, atol=1e-10)
    assert [index[i] for i in found.order.tolist()] == sorted(index)
    for i in range(2):
        mine = [n for n in found.order.tolist() if index[n] == i]
        assert mine == sorted(mine, key=lambda n: -float(found.scores[n]))


def test_generated_captions_can_be_ranked(make_model, make_images):
    model, images = make_model("blip"), make_images(2)
    found = generate(model, images, eos_id=EOS, sample=True, num_captions=3, max_length=8)
    ranking = rank_captions(model, images, found.token_ids, found.segments, found.images)
    assert ranking.scores.shape == (6,)
    assert sorted(ranking.order.tolist()) == list(range(6))


ANSWERS = [
    [START, 9, EOS],
    [START, 33, EOS],
    [START, 70, EOS],
    [START, 7, EOS],
    [START, 7, 8, 9, EOS],
    [START, 50, 51, EOS],
    [START, EOS],
    [START, 60, 8, 61, 62, 63, EOS],
]


def _likelihood(pack, model, image, question, answer):
    """The sum of log probabilities of the words after the first, one forward for each."""
    ids, segments = pack([question])
    context = model.encode_questions(ids, segments, model.encode_image(image), [0])
    total = 0.0
    for end in range(1, len(answer)):
        part, own = pack([answer[:end]])
        (rows,) = model.text_tower([model.answer_pass(part, own, [0])], context, segments)
        total += float(model.word_logits(rows)[-1].log_softmax(-1)[answer[end]])
    return total


@torch.no_grad()
def test_answers_are_ranked_by_their_likelihood(make_model, make_images, pack):
    model, images = make_model("blip_vqa", torch.float64, scale=10.0), make_images(2, torch.float64)
    texts, about = [[4, 20, 21, EOS], [4, 30, EOS], [4, 40, 41, 42, 43, EOS]], [1, 0, 1]
    questions = Questions(*pack(texts), about)
    found = rank_answers(model, images, questions, *pack(ANSWERS))
    expected = torch.tensor(
        [
            [_likelihood(pack, model, images[i : i + 1], text, answer) for answer in ANSWERS]
            for text, i in zip(texts, about, strict=True)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(found.scores, expected)
    assert torch.equal(found.order, expected.argsort(dim=1, descending=True))
    assert len({tuple(order) for order in found.order.tolist()}) > 1, "the weights of this test should make orders differ"
    smoothed = rank_answers(model, images, questions, *pack(ANSWERS), label_smoothing=0.1)
    assert (smoothed.scores - found.scores).abs().min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 2, 4, 9])
def test_answers_kept_are_those_with_the_most_probable_first_words(
    make_model, make_images, pack, make_questions, next_logits, keep
):
    model, images = make_model("blip_vqa", torch.float64), make_images(2, torch.float64)
    questions = make_questions(range(2))
    everything = rank_answers(model, images, questions, *pack(ANSWERS))
    found = rank_answers(model, images, questions, *pack(ANSWERS), keep=keep)
    first = next_logits(model, images, [[START]] * 2, range(2))
    for i in range(2):
        likely = sorted(range(len(ANSWERS)), key=lambda n: -float(first[i, ANSWERS[n][1]]))[:keep]
        assert set(found.order[i].tolist()) == set(likely)
        assert found.order[i].tolist() == [n for n in everything.order[i].tolist() if n in likely]
        torch.testing.assert_close(found.scores[i, likely], everything.scores[i, likely])
        assert all(found.scores[i, n] == -float("inf") for n in range(len(ANSWERS)) if n not in likely)


def test_no_question_gives_no_answer(make_model, make_images, pack, make_questions):
    model, questions = make_model("blip_vqa"), Questions(*pack([]), [])
    questions = questions._replace(token_ids=questions.token_ids.long())
    assert generate(model, make_images(2), eos_id=EOS, questions=questions).lists() == []
    assert rank_answers(model, make_images(2), questions, *pack(ANSWERS)).scores.shape == (0, len(ANSWERS))
    none = rank_answers(model, make_images(2), make_questions(range(2)), torch.zeros(0, dtype=torch.long), Segments([]))
    assert none.order.shape == (2, 0)
