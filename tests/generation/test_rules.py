"""Which words may follow: draws follow the filtered distribution, and rules change scores."""

import pytest
import torch

from vlp_fast.generation.rules import Rules, draw, least_score

START, EOS = 1, 2


def _plain_kept(scores, top_k, top_p):
    """The distribution that sampling draws from, one word after another."""
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    ranked = ranked[: top_k or len(ranked)]
    probability = torch.softmax(torch.tensor([scores[i] for i in ranked], dtype=torch.float64), 0).tolist()
    kept, mass = [], 0.0
    for i, p in zip(ranked, probability, strict=True):
        if top_p is not None and kept and mass >= top_p:
            break
        kept.append((i, p))
        mass += p
    return {i: p / mass for i, p in kept}


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.3), (None, 0.9), (3, None), (500, None), (7, 0.6), (None, 1.0)])
def test_draws_follow_the_filtered_distribution(top_k, top_p):
    scores = torch.randn(3, 400, generator=torch.Generator().manual_seed(2)) * torch.tensor([0.2, 1.0, 3.0])[:, None]
    kept = scores.masked_fill(scores < least_score(scores, top_k, top_p), -float("inf"))
    for row in range(3):
        expected = _plain_kept(scores[row].tolist(), top_k, top_p)
        found = dict(enumerate(torch.softmax(kept[row].double(), 0).tolist()))
        assert {i for i, p in found.items() if p > 0} == set(expected)
        assert all(found[i] == pytest.approx(p, rel=1e-5) for i, p in expected.items())


def test_draw_is_unbiased_and_never_takes_what_was_dropped():
    scores = torch.tensor([[-float("inf"), 1.0, -float("inf"), 0.0, -1.0, -float("inf")]]).expand(200_000, -1)
    words, score = draw(scores, torch.full((len(scores), 1), -1.5), torch.Generator().manual_seed(0))
    torch.testing.assert_close(score, scores.log_softmax(-1).gather(1, words[:, None])[:, 0])
    counts = torch.bincount(words, minlength=6) / len(scores)
    torch.testing.assert_close(counts, scores[0].softmax(0), atol=5e-3, rtol=0)
    assert counts[[0, 2, 5]].sum() == 0
    words, score = draw(scores, torch.full((len(scores), 1), 0.5), torch.Generator().manual_seed(0))
    assert (words == 1).all()  # only one is left
    assert (score == 0.0).all()


def test_rules_penalise_words_of_prompt_and_text_and_hold_back_the_end():
    prompts = torch.tensor([[START, 5, 6], [START, START, START]])
    rules = Rules(prompts, [2, 4], EOS, 2.0)
    scores = torch.tensor([[1.0, 1.0, 1.0, -1.0, 1.0, 4.0, -4.0, 1.0]]).repeat(2, 1)
    at_three = rules(scores.clone(), torch.tensor([[3, 3, 5], [7, 7, 7]]))
    assert at_three[0].tolist() == [1.0, 0.5, 1.0, -2.0, 1.0, 2.0, -8.0, 1.0]
    assert at_three[1].tolist() == [1.0, 0.5, -float("inf"), -1.0, 1.0, 4.0, -4.0, 0.5]
    at_one = rules(scores.clone(), torch.tensor([[3], [7]]))
    assert at_one[:, EOS].tolist() == [-float("inf")] * 2
