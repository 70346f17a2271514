"""Contrastive losses in blocks of rows, against the whole matrix of similarities; in fp32, as models compute them.

CLIP's and CoCa's loss over a batch; BLIP's with a queue of 57,600 and soft targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_fast.benchmarks.registry import Entry, Options
from vlp_fast.benchmarks.side_by_side import Operation, entries, smaller
from vlp_fast.ops import contrastive_loss, distilled_contrastive_loss

__all__ = ["PROVIDERS", "cases"]

PROVIDERS = {"contrastive": ("plain", "vlp_fast")}
QUEUE = 57600
NOTE = "computed in fp32 whatever the dtype, as models do"


def cases(options: Options) -> Iterator[Entry]:
    """Batch against batch, and batch against queue."""
    pairs, queue = 128 * options.batch, smaller(QUEUE, options)
    yield from entries("contrastive", f"CLIP, {pairs} pairs of 512", partial(_clip, pairs, options), options)
    name = f"BLIP, {options.batch} pairs of 256, queue {queue}"
    yield from entries("contrastive", name, partial(_blip, options.batch, queue, options), options)


def _features(rows: int, dim: int, options: Options) -> Tensor:
    return F.normalize(torch.randn(rows, dim, device=options.device), dim=1)


def _scale(options: Options) -> Tensor:
    return torch.tensor(14.0, device=options.device, requires_grad=True)


def _clip(pairs: int, options: Options) -> Operation:
    def plain(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        s, labels = scale * a @ b.T, torch.arange(len(a), device=a.device)
        return (F.cross_entropy(s, labels) + F.cross_entropy(s.T, labels)) / 2

    sides = [_features(pairs, 512, options).requires_grad_() for _ in range(2)]
    return Operation([*sides, _scale(options)], {"plain": plain, "vlp_fast": contrastive_loss}, note=NOTE)


def _blip(pairs: int, queue: int, options: Options) -> Operation:
    student, teacher = _features(pairs, 256, options).requires_grad_(), _features(pairs, 256, options)
    keys = _features(pairs + queue, 256, options)

    def plain(f: Tensor, s: Tensor) -> Tensor:
        t, k = teacher.to(f.dtype), keys.to(f.dtype)
        with torch.no_grad():
            targets = 0.4 * torch.softmax(s * t @ k.T, 1)
            targets.diagonal().add_(0.6)
        return -(targets * torch.log_softmax(s * f @ k.T, 1)).sum(1).mean()

    providers = {"plain": plain, "vlp_fast": lambda f, s: distilled_contrastive_loss(f, teacher, keys, s, 0.4)}
    return Operation([student, _scale(options)], providers, reads=[teacher, keys], note=NOTE)
