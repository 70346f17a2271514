"""The searches: one word after another (greedy, sampling), and beams. They know `Writing` and nothing of a model.

Both wait for the device once a step, to learn whether any text goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vlp_fast.generation.decoders import Writing
from vlp_fast.generation.rules import Rules, best_scores, draw

__all__ = ["BeamSettings", "Found", "SampleSettings", "search_beams", "search_words"]

NEVER = -1.0e9  # a score no text has: Hugging Face's


class Found(NamedTuple):
    """words: int64 ``[texts, longest]``, what follows each prompt. lengths: how many count, ``[texts]``. scores: fp32 ``[texts]``."""

    words: Tensor
    lengths: Tensor
    scores: Tensor


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How a word is drawn."""

    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | None


@dataclass(frozen=True, kw_only=True)
class BeamSettings:
    """beams, and Hugging Face's length_penalty and early_stopping (True, False or "never")."""

    beams: int
    length_penalty: float
    early_stopping: bool | str


def search_words(writing: Writing, rules: Rules, eos_id: int, limits: Sequence[int], sampling: SampleSettings | None) -> Found:
    """Takes the best word, or draws one, until every text has ended or has its limit of words."""
    logits, steps = writing.logits, max(limits)
    texts, device = logits.shape[0], logits.device
    limit = torch.tensor(list(limits), device=device)
    words = torch.full((texts, steps), eos_id, dtype=torch.long, device=device)
    lengths = torch.zeros(texts, dtype=torch.long, device=device)
    total = torch.zeros(texts, device=device)
    going = limit > 0
    for step in range(steps):
        scores = rules(_own_float(logits), words[:, :step])
        if sampling is None:
            best, word = scores.max(-1)
            score = best - scores.logsumexp(-1)
        else:
            if sampling.temperature != 1.0:
                scores /= sampling.temperature
            word, score = draw(scores, sampling.top_k, sampling.top_p, sampling.generator)
        words[:, step] = torch.where(going, word, eos_id)
        total += torch.where(going, score, 0.0)
        lengths += going
        going = going & (words[:, step] != eos_id) & (limit > step + 1)
        if step + 1 == steps or not bool(going.any()):
            break
        logits = writing.step(words[:, step])
    return Found(words[:, : step + 1], lengths, total)


def search_beams(
    writing: Writing, rules: Rules, eos_id: int, limits: Sequence[int], settings: BeamSettings, num_captions: int
) -> Found:
    """Hugging Face's beam search: the same candidates, the same finished texts, the same end.

    Every step takes the ``2 * beams`` best continuations of an image's running texts. Those that end and are among the first `beams`
    compete, their score divided by a power of their length, for the `beams` places of finished texts; the best that do not end run on.
    """
    beams, power = settings.beams, settings.length_penalty
    stop_when_full = settings.early_stopping is True
    texts, vocab = writing.logits.shape
    images, device, steps = texts // beams, writing.logits.device, max(limits)
    limit = torch.tensor(list(limits), device=device).view(images, beams)[:, :1]
    first = torch.arange(0, texts, beams, device=device)[:, None]
    candidates = torch.arange(2 * beams, device=device)

    running = torch.full((images, beams), NEVER, device=device)
    running[:, 0] = 0.0  # the beams begin alike: only one counts
    running_words = torch.full((images, beams, steps), eos_id, dtype=torch.long, device=device)
    done = running_words.clone()
    done_lengths = torch.zeros(images, beams, dtype=torch.long, device=device)
    done_scores = torch.full((images, beams), NEVER, device=device)
    finished = torch.zeros(images, beams, dtype=torch.bool, device=device)
    open_ = torch.ones(images, 1, dtype=torch.bool, device=device)  # whether running texts may yet better the finished ones

    logits = writing.logits
    for step in range(steps):
        scores = rules(torch.log_softmax(_own_float(logits), -1), running_words.flatten(0, 1)[:, :step])
        scores = (scores.view(images, beams, vocab) + running[..., None]).flatten(1)
        top, place = best_scores(scores, 2 * beams)
        parent, word = place // vocab, place % vocab
        words = _pick(running_words, parent)
        words[:, :, step] = word
        ends = (word == eos_id) | (limit <= step + 1)

        going = top + ends * NEVER
        running, chosen = torch.topk(going, beams)
        running_words = _pick(words, chosen)
        origin = (parent.gather(1, chosen) + first).flatten()

        just = ends & (candidates < beams)
        full = finished.all(-1, keepdim=True) & stop_when_full
        score = top / (step + 1) ** power + full * NEVER + ~open_ * NEVER + ~just * NEVER
        done_scores, best = torch.topk(torch.cat([done_scores, score], 1), beams)
        done = _pick(torch.cat([done, words], 1), best)
        lengths = torch.full_like(word, step + 1)
        done_lengths = torch.cat([done_lengths, lengths], 1).gather(1, best)
        finished = torch.cat([finished, just], 1).gather(1, best)

        furthest = limit if settings.early_stopping == "never" and power > 0 else torch.full_like(limit, step + 1)
        possible = running[:, :1] / furthest.float() ** power
        worst = torch.where(finished, done_scores.amin(1, keepdim=True), NEVER)
        open_ = open_ & (possible > worst).any(-1, keepdim=True)
        stop = ~open_.any() | ends.all() | (finished.all() & stop_when_full)
        if step + 1 == steps or bool(stop):
            break
        writing.reorder(origin)
        logits = writing.step(running_words[:, :, step].flatten())
    kept = (done[:, :num_captions, : step + 1].flatten(0, 1), done_lengths[:, :num_captions].flatten())
    return Found(*kept, done_scores[:, :num_captions].flatten())


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """x ``[images, n, words]``, index ``[images, m]`` -> ``[images, m, words]``."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _own_float(logits: Tensor) -> Tensor:
    """The logits in fp32, free to be changed: fp32 logits are of this step only."""
    return logits.float()
