"""What is done to the scores of the next word before one is taken: penalties, bounds of length, and the filters of sampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["Rules", "best_scores", "draw"]

BLOCK = 256  # words that are looked at together
MANY = 4  # blocks for each of the best that are asked for, from which looking at blocks first pays
DROPPED_BITS = 18  # of a probability's 32: what is left, of 1.0 at most, is the number of its bucket
BUCKETS = (int(np.float32(1.0).view(np.int32)) >> DROPPED_BITS) + 1


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


def best_scores(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``torch.topk(scores, count)`` of ``[texts, n]``; on a CPU the best are looked for in those blocks alone that can hold them."""
    head = scores.shape[1] // BLOCK * BLOCK
    if scores.device.type != "cpu" or head < MANY * count * BLOCK:
        return torch.topk(scores, count)
    blocks = scores[:, :head].unflatten(1, (-1, BLOCK))
    chosen = torch.topk(blocks.amax(-1), count).indices
    places = (chosen[..., None] * BLOCK + torch.arange(BLOCK)).flatten(1)
    places = torch.cat([places, torch.arange(head, scores.shape[1]).expand(len(scores), -1)], 1)
    best, index = torch.topk(scores.gather(1, places), count)
    return best, places.gather(1, index)


def draw(scores: Tensor, top_k: int | None, top_p: float | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """One word per row by the softmax of the scores that stay, int64 ``[texts]``, and its log probability.

    Args:
        scores: fp32 ``[texts, vocab_size]``.
        top_k: the k best stay, and what scores the same as the last of them. top_p: of these the best whose probabilities first sum to
            `top_p` or more, and those of the same probability as the last of them.
        generator: of one random number per row: the share of the mass that stays, the best words first, at which the word is found.
    """
    point = torch.rand(len(scores), dtype=torch.float64, device=scores.device, generator=generator)
    if scores.device.type != "cpu":
        return _draw_sorted(scores, top_k, top_p, point)
    # row by row: what is formed of one row stays in the processor's cache, and its memory in the process
    drawn = [_Words(row, top_k).draw(top_p, share) for row, share in zip(scores, point.tolist(), strict=True)]
    return torch.tensor([word for word, _ in drawn]), torch.tensor([score for _, score in drawn], dtype=torch.float32)


def _draw_sorted(scores: Tensor, top_k: int | None, top_p: float | None, point: Tensor) -> tuple[Tensor, Tensor]:
    best, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    mass = (best - best[:, :1]).exp_()
    if top_k is not None and top_k < mass.shape[1]:
        mass *= best >= best[:, top_k - 1 : top_k]
    if top_p is not None and top_p < 1.0:
        mass *= mass >= mass.gather(1, _first_reaching(mass.cumsum(-1, dtype=torch.float64), top_p))
    ends = mass.cumsum(-1, dtype=torch.float64)
    place = _first_reaching(ends, point[:, None])
    return order.gather(1, place)[:, 0], (mass.gather(1, place) / ends[:, -1:]).log_()[:, 0].float()


def _first_reaching(ends: Tensor, share: Tensor | float) -> Tensor:
    """The first place ``[texts, 1]`` at which so great a share of the whole is reached."""
    return torch.searchsorted(ends, ends[:, -1:] * share).clamp_(max=ends.shape[1] - 1)


class _Words:
    """The words of one text on a CPU, the best first, without sorting them all: those whose probabilities begin with the same bits share a
    bucket, and only a bucket that is asked for is sorted.

    Args: scores: fp32 ``[vocab_size]``. top_k: as `draw` has it.
    """

    def __init__(self, scores: Tensor, top_k: int | None) -> None:
        self._index = None
        if top_k is not None and top_k < len(scores):
            self._index = torch.nonzero(scores >= best_scores(scores[None], top_k)[0][0, -1])[:, 0]
            scores = scores[self._index]
        self._mass = (scores - scores.max()).exp_().numpy()
        self._bucket = self._mass.view(np.int32) >> DROPPED_BITS
        self._ends = np.bincount(self._bucket, self._mass, BUCKETS)[::-1].cumsum()

    def draw(self, top_p: float | None, share: float) -> tuple[int, float]:
        """The word at this share of the mass that stays, and its log probability."""
        total = self._ends[-1]
        if top_p is not None and top_p < 1.0:
            _, mass, ends, place = self._find(total * top_p)
            total = ends[np.count_nonzero(mass >= mass[place]) - 1]
        words, mass, _, place = self._find(total * share)
        alike = words[self._mass[words] == mass[place]]
        word = int(alike[place - np.count_nonzero(mass > mass[place])])
        return (word if self._index is None else int(self._index[word])), float(np.log(mass[place] / total))

    def _find(self, reached: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Where the mass of the best words reaches so much: the words of that bucket as they come; the masses of its words in descending
        order, what is reached with each of them, and the place there."""
        reached = min(reached, self._ends[-1])
        behind = int(self._ends.searchsorted(reached))
        words = np.flatnonzero(self._bucket == BUCKETS - 1 - behind)
        mass = np.sort(self._mass[words])[::-1]
        ends = mass.cumsum(dtype=np.float64) + (self._ends[behind - 1] if behind else 0.0)
        return words, mass, ends, min(int(ends.searchsorted(reached)), len(words) - 1)
