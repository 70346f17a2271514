"""Which words may follow: draws follow the filtered distribution, and rules change scores."""

import pytest
import torch

from vlp_fast.generation import rules as rules_module
from vlp_fast.generation.rules import Rules, best_scores, draw

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


def _draw_at(scores, top_k, top_p, shares, monkeypatch, *, by_sorting=False):
    """`draw` with these random numbers, one per row of scores; by_sorting: as on a GPU."""
    shares = torch.as_tensor(shares, dtype=torch.float64)
    if by_sorting:
        return rules_module._draw_sorted(scores, top_k, top_p, shares)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: shares.expand(shape))
    found = draw(scores, top_k, top_p, None)
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("by_sorting", [False, True], ids=["buckets", "sorting"])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, None), (None, 0.3), (None, 0.9), (3, None), (500, None), (7, 0.6), (None, 1.0)]
)
def test_draws_follow_the_filtered_distribution(top_k, top_p, by_sorting, monkeypatch):
    """Each word that stays is drawn by the numbers between the share of those before it and its own, the best word first."""
    scores = torch.randn(3, 400, generator=torch.Generator().manual_seed(2)) * torch.tensor([0.2, 1.0, 3.0])[:, None]
    for row in scores:
        expected = _plain_kept(row.tolist(), top_k, top_p)
        share = torch.tensor(list(expected.values()), dtype=torch.float64)
        ends = share.cumsum(0)
        for at in (ends - share * 0.999, ends - share * 0.001):
            words, score = _draw_at(row.expand(len(at), -1), top_k, top_p, at, monkeypatch, by_sorting=by_sorting)
            assert words.tolist() == list(expected)
            torch.testing.assert_close(score, share.log().float(), rtol=1e-5, atol=1e-5)
        ends_of_range = [0.0, 1.0 - 2**-53]
        words, _ = _draw_at(row.expand(2, -1), top_k, top_p, ends_of_range, monkeypatch, by_sorting=by_sorting)
        assert words.tolist() == [next(iter(expected)), list(expected)[-1]]


@pytest.mark.parametrize("spread", [0.0, 1e-4, 0.5, 3.0, 40.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (None, 1e-6), (None, 0.9), (None, 0.99999), (50, None), (50, 0.8)])
def test_buckets_draw_what_sorting_draws(spread, top_k, top_p, monkeypatch):
    """A large vocabulary; flat scores are all in one bucket, and steep ones leave most of it without probability."""
    scores = torch.randn(40, 20_011, generator=torch.Generator().manual_seed(3)) * spread
    scores[1, ::2] = -float("inf")
    scores[2, 7] = scores.max() + 50.0  # one word has all the mass
    scores[3] = scores[3].bfloat16().float()  # many score the same
    shares = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    words, score = _draw_at(scores, top_k, top_p, shares, monkeypatch)
    expected, expected_score = _draw_at(scores, top_k, top_p, shares, monkeypatch, by_sorting=True)
    assert words.dtype == expected.dtype
    assert score.dtype == expected_score.dtype
    # words whose scores differ by less than their probabilities show are the same to `draw`
    at, expected_at = (scores.gather(1, w[:, None]) for w in (words, expected))
    torch.testing.assert_close(at, expected_at, rtol=0, atol=1e-6)
    assert spread == 1e-4 or torch.equal(words, expected)
    torch.testing.assert_close(score, expected_score)


@pytest.mark.parametrize("words", [5, 256, 257, 30_524])
def test_best_scores_are_those_of_topk(words):
    scores = torch.randn(3, words, generator=torch.Generator().manual_seed(4))
    scores[0, -1] = 9.0  # behind the last whole block
    scores[1] = -float("inf")
    scores[1, words // 2] = 0.0
    for count in (1, min(words, 6), min(words, 200)):
        best, index = best_scores(scores, count)
        assert torch.equal(best, torch.topk(scores, count).values)
        assert torch.equal(best, scores.gather(1, index))
        assert all(len(set(row)) == count for row in index.tolist())


@pytest.mark.parametrize("words", [6, 256, 700])
def test_draw_is_unbiased_and_never_takes_what_was_dropped(words, monkeypatch):
    scores = torch.full((1, words), -float("inf"))
    at = torch.tensor([1, words // 2, words - 2])
    scores[0, at] = torch.tensor([1.0, 0.0, -1.0])
    scores = scores.expand(2000, -1)
    shares = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    chosen, score = _draw_at(scores, None, None, shares, monkeypatch)
    torch.testing.assert_close(score, scores.log_softmax(-1).gather(1, chosen[:, None])[:, 0])
    counts = torch.bincount(chosen, minlength=words)[at]
    torch.testing.assert_close(counts / len(scores), scores[0].softmax(0)[at], atol=1e-3, rtol=0)
    assert counts.sum() == len(scores)
    shares = torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, _ = _draw_at(scores, None, None, shares, monkeypatch)
    assert torch.equal(draw(scores, None, None, torch.Generator().manual_seed(1))[0], expected)
    chosen, score = draw(scores, None, 0.5, torch.Generator().manual_seed(0))
    assert (chosen == 1).all()  # only one is left
    assert (score == 0.0).all()
    assert torch.equal(chosen, draw(scores, 1, None, None)[0])


def test_rules_penalise_words_of_prompt_and_text_and_hold_back_the_end():
    prompts = torch.tensor([[START, 5, 6], [START, START, START]])
    rules = Rules(prompts, [2, 4], EOS, 2.0)
    scores = torch.tensor([[1.0, 1.0, 1.0, -1.0, 1.0, 4.0, -4.0, 1.0]]).repeat(2, 1)
    at_three = rules(scores.clone(), torch.tensor([[3, 3, 5], [7, 7, 7]]))
    assert at_three[0].tolist() == [1.0, 0.5, 1.0, -2.0, 1.0, 2.0, -8.0, 1.0]
    assert at_three[1].tolist() == [1.0, 0.5, -float("inf"), -1.0, 1.0, 4.0, -4.0, 0.5]
    at_one = rules(scores.clone(), torch.tensor([[3], [7]]))
    assert at_one[:, EOS].tolist() == [-float("inf")] * 2
