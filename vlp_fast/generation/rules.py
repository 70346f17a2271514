"""What is done to the scores of the next word before one is taken: penalties, bounds of length, and the filters of sampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["Rules", "draw", "least_score"]


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


def least_score(scores: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """The least score ``[texts, 1]`` that a word of scores ``[texts, vocab_size]`` may have for sampling to take it.

    top_k: the k best stay. top_p: of these the best whose probabilities first sum to `top_p` or more; the best word always stays. Words
    that score the same as the last that stays, stay.
    """
    if top_p is None or top_p == 1.0:
        if top_k is None:
            return scores.new_full((len(scores), 1), -float("inf"))
        return torch.topk(scores, min(top_k, scores.shape[1])).values[:, -1:]
    best = _ascending(scores) if top_k is None else torch.topk(scores, min(top_k, scores.shape[1])).values.flip(-1)
    mass = (best - best[:, -1:]).exp_().cumsum(-1, dtype=torch.float64)
    # a word stays while those above it hold less than top_p
    last = torch.searchsorted(mass, mass[:, -1:] * (1.0 - top_p), right=True)
    return best.gather(1, last.clamp(max=best.shape[1] - 1))


def _ascending(scores: Tensor) -> Tensor:
    """Sorted values alone: NumPy has a vectorised sort for them, thirty times as fast on a CPU as PyTorch's, which sorts indices too."""
    if scores.device.type == "cpu":
        return torch.from_numpy(np.sort(scores.numpy(), -1))
    return torch.sort(scores, -1).values


def draw(scores: Tensor, least: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """One word per row by the softmax of the scores that are not below `least`, int64 ``[texts]``, and its log probability.

    Args: scores: fp32 ``[texts, vocab_size]``. least: ``[texts, 1]``. generator: of one random number per row.
    """
    best = scores.amax(-1, keepdim=True)
    mass = (scores - best).exp_().mul_(scores >= least).cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    point = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device, generator=generator) * total
    # the first word whose mass exceeds the point, never one without probability
    word = torch.searchsorted(mass, torch.minimum(point, total * (1 - 1e-15)), right=True)
    return word[:, 0], (scores.gather(1, word) - best - total.log())[:, 0].float()
