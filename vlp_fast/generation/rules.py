"""What is done to the scores of the next word before one is taken: penalties, bounds of length, and the filters of sampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["Rules", "draw", "keep_probable"]


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


def keep_probable(scores: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Scores ``[texts, vocab_size]`` with -inf for words that sampling must not take.

    top_k: the k best stay. top_p: of these the best whose probabilities first sum to `top_p` or more; the best word always stays. Words
    that score the same as the last that stays, stay.
    """
    best, least = None, scores.new_full((len(scores), 1), -float("inf"))
    if top_k is not None:
        best = torch.topk(scores, min(top_k, scores.shape[1])).values
        least = best[:, -1:]
    if top_p is not None and top_p < 1.0:
        best = _descending(scores) if best is None else best
        probability = torch.softmax(best.double(), -1)
        # a word stays while those before it hold less than top_p
        stay = (probability.cumsum(-1) - probability < top_p).sum(-1, keepdim=True)
        least = best.gather(1, stay - 1)
    return scores.masked_fill(scores < least, -float("inf"))


def _descending(scores: Tensor) -> Tensor:
    """Sorted values alone: NumPy has a vectorised sort for them, thirty times as fast on a CPU as PyTorch's, which sorts indices too."""
    if scores.device.type == "cpu":
        return torch.from_numpy(np.sort(scores.numpy(), -1)).flip(-1)
    return torch.sort(scores, -1, descending=True).values


def draw(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """One word per row, int64 ``[texts]``, by the softmax of the scores: one random number per row."""
    mass = torch.softmax(scores.double(), -1).cumsum(-1)
    point = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device, generator=generator) * mass[:, -1:]
    # the first word whose mass exceeds the point, never one without probability
    return torch.searchsorted(mass, torch.minimum(point, mass[:, -1:] * (1 - 1e-15)), right=True)[:, 0]
