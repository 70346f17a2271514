"""A pass is data: what a loss needs from a text tower, and how several passes are packed into one forward.

A model's step lists its passes; a schedule only says how they are grouped. Whoever looks on (`vlp_fast.profiling`) learns from
`loss_scope` for which loss a forward runs and from each tower's `describe` what it was given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.segments import Segments

__all__ = [
    "PackedPasses",
    "PassInfo",
    "TextPass",
    "current_loss",
    "loss_scope",
    "observe_losses",
    "pack_passes",
    "with_first_token",
]

_LOSS: ContextVar[str | None] = ContextVar("vlp_fast_loss", default=None)
_OBSERVER: ContextVar[Callable[[], None] | None] = ContextVar("vlp_fast_observer", default=None)


@contextlib.contextmanager
def loss_scope(name: str) -> Iterator[None]:
    """What runs inside runs first of all for the loss `name`; a profile reads it, nothing else does."""
    token = _LOSS.set(name)
    _notify()
    try:
        yield
    finally:
        _LOSS.reset(token)
        _notify()


@contextlib.contextmanager
def observe_losses(changed: Callable[[], None]) -> Iterator[None]:
    """Calls `changed` whenever a `loss_scope` is entered or left, inside this block."""
    token = _OBSERVER.set(changed)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


def _notify() -> None:
    changed = _OBSERVER.get()
    if changed is not None:
        changed()


def current_loss() -> str | None:
    """The innermost `loss_scope`, None outside of any."""
    return _LOSS.get()


class PassInfo(NamedTuple):
    """What one call of a tower processed.

    Attributes:
        module: the tower's role in this call ("image_encoder", "text_encoder", "text_decoder").
        sequences: images, captions or samples. tokens: rows computed. slots: rows the same call would have on a padded
            rectangle it really allocates; equal to tokens where nothing is padded.
    """

    module: str
    sequences: int
    tokens: int
    slots: int


@dataclass(frozen=True)
class TextPass:
    """One pass of captions through a text tower.

    Attributes:
        name: the pass ("itc", "itm_positive", "itm_negative", "lm").
        token_ids: int64 ``[rows]``, packed. segments: the captions' `Segments`.
        expert: which set of self-attention weights. causal: each row sees only itself and earlier rows.
        images: which image each caption reads (host numbers or a device tensor ``[captions]``); None: no cross-attention.
    """

    name: str
    token_ids: Tensor
    segments: Segments
    expert: int = 0
    causal: bool = False
    images: Sequence[int] | Tensor | None = None


class PackedPasses(NamedTuple):
    """Several passes as one packed forward, expert after expert.

    Attributes:
        token_ids, positions: int64 ``[rows]``. plan: self-attention, causal where a pass is. cross_plan: which image each
            caption reads, or None. expert_offsets: rows of each expert. bounds: (first row, end row) of each pass, in the order given.
    """

    token_ids: Tensor
    positions: Tensor
    plan: AttentionPlan
    cross_plan: AttentionPlan | None
    expert_offsets: tuple[int, ...]
    bounds: tuple[tuple[int, int], ...]


def pack_passes(passes: Sequence[TextPass], num_experts: int, image_segments: Segments | None) -> PackedPasses:
    """Lays passes end to end, expert after expert; they must all read images or all read none.

    Raises:
        ValueError: no pass, an expert that does not exist, or passes with and without images together.
    """
    if not passes:
        raise ValueError("a text tower needs at least one pass; received none.")
    wanted = [p.expert for p in passes]
    if not all(0 <= e < num_experts for e in wanted):
        raise ValueError(f"expert must be from 0 to {num_experts - 1}; received {wanted}.")
    readers = [p.images is not None for p in passes]
    if any(readers) != all(readers):
        raise ValueError("passes with and without cross-attention cannot share one forward; group them apart.")
    if any(readers) and image_segments is None:
        raise ValueError("a pass that reads images needs image_segments; received None.")
    order = sorted(range(len(passes)), key=lambda i: wanted[i])
    lengths = [length for i in order for length in passes[i].segments.lengths]
    device = passes[0].token_ids.device
    segments = Segments(lengths, device)
    causal = np.repeat([int(passes[i].causal) for i in order], [len(passes[i].segments) for i in order])
    index = np.arange(len(segments))
    plan = AttentionPlan.from_edges(segments, segments, np.stack([index, index, causal], 1))
    cross_plan = None
    if image_segments is not None and all(readers):
        cross_plan = AttentionPlan.cross_attention(segments, image_segments, _join([passes[i].images for i in order], device))
    starts, used = {}, 0
    expert_offsets = [0] * (num_experts + 1)
    for i in order:
        starts[i] = used
        used += passes[i].segments.rows
        expert_offsets[wanted[i] + 1] = used
    for e in range(num_experts):
        expert_offsets[e + 1] = max(expert_offsets[e + 1], expert_offsets[e])
    return PackedPasses(
        torch.cat([passes[i].token_ids for i in order]),
        segments.positions(),
        plan,
        cross_plan,
        tuple(expert_offsets),
        tuple((starts[i], starts[i] + passes[i].segments.rows) for i in range(len(passes))),
    )


def _join(indices: Sequence[Sequence[int] | Tensor | None], device: torch.device) -> Sequence[int] | Tensor:
    """One index of images for all passes: on the host where every pass knows it there, else on the device."""
    if all(not isinstance(i, Tensor) or i.device.type == "cpu" for i in indices):
        return [int(x) for i in indices for x in (i.tolist() if isinstance(i, Tensor) else i or ())]
    return torch.cat([torch.as_tensor(i, device=device).reshape(-1).long() for i in indices])


def with_first_token(token_ids: Tensor, segments: Segments, token: int) -> Tensor:
    """A copy of packed token ids in which every caption starts with `token` (BLIP's [ENC] and [DEC] replace [CLS])."""
    return token_ids.index_fill(0, segments.first_rows(), token)
