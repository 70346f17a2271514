"""What is done to the scores of the next word before one is taken: penalties, bounds of length, and the filters of sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Rules", "draw", "kept_words"]

CANDIDATES = 256  # words sorted at first for top_p on a CPU; all are sorted where these do not hold enough probability


class Rules:
    """Repetition penalty, then no end before the least length: Hugging Face's processors, in their order.

    Args:
        prompts: int64 ``[texts, longest]``, the tokens with which each text begins; shorter ones repeat any token of theirs behind.
        least: words that each text must have after its prompt before it may end. eos_id: the word that ends a text.
    """

    def __init__(self, prompts: Tensor, least: Sequence[int], eos_id: int, repetition_penalty: float) -> None:
        self.prompts, self.eos_id, self.penalty = prompts, eos_id, repetition_penalty
        self._all, self._some = min(least, default=0), max(least, default=0)
        self._least = torch.tensor(list(least), device=prompts.device)

    def __call__(self, scores: Tensor, words: Tensor) -> Tensor:
        """Changes scores ``[texts, vocab_size]`` in place; words: int64 ``[texts, steps so far]``."""
        step = words.shape[1]
        if self.penalty != 1.0:
            used = torch.cat([self.prompts, words], 1)
            score = scores.gather(1, used)
            scores.scatter_(1, used, torch.where(score < 0, score * self.penalty, score / self.penalty))
        if step < self._all:
            scores[:, self.eos_id] = -float("inf")
        elif step < self._some:
            scores[:, self.eos_id].masked_fill_(self._least > step, -float("inf"))
        return scores


def kept_words(scores: Tensor, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor]:
    """The words that sampling may take: (their scores, the others' -inf, best first; their ids), both ``[texts, candidates]``.

    top_k: the k best. top_p: of these the best whose probabilities first sum to `top_p` or more; the best word always stays.
    """
    vocab = scores.shape[1]
    if top_p is None:
        return torch.topk(scores, min(top_k or vocab, vocab))
    count = min(top_k, vocab) if top_k else CANDIDATES if scores.device.type == "cpu" else vocab
    best, ids = torch.topk(scores, min(count, vocab))
    total = torch.logsumexp(best if top_k else scores, -1, keepdim=True)
    probability = torch.exp(best - total)
    before = probability.cumsum(-1) - probability
    # reading the sums waits for nothing on a CPU, and elsewhere all words are sorted at once
    if not top_k and count < vocab and bool((before[:, -1] + probability[:, -1] < top_p).any()):
        best, ids = torch.sort(scores, -1, descending=True)
        probability = torch.exp(best - total)
        before = probability.cumsum(-1) - probability
    drop = before >= top_p
    drop[:, 0] = False
    return best.masked_fill(drop, -float("inf")), ids


def draw(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """One column per row, int64 ``[texts]``, by the softmax of the scores: one random number per row, whatever the columns."""
    mass = torch.softmax(scores.double(), -1).cumsum(-1)
    point = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device, generator=generator) * mass[:, -1:]
    # the first column whose mass exceeds the point, never one without probability
    return torch.searchsorted(mass, torch.minimum(point, mass[:, -1:] * (1 - 1e-15)), right=True)[:, 0]
