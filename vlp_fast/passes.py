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
from vlp_fast.segments import Segments, _to_device

__all__ = [
    "PackedPasses",
    "Parts",
    "PassInfo",
    "ReadRows",
    "TextPass",
    "current_loss",
    "describe_passes",
    "first_rows",
    "leading_rows",
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


Parts = tuple[tuple[str, int, int], ...]  # (loss, sequences, tokens) of each loss that a call serves


class PassInfo(NamedTuple):
    """What one call of a tower processed.

    Attributes:
        module: the tower's role in this call ("image_encoder", "text_encoder", "text_decoder").
        sequences: images, captions or samples. tokens: rows computed. slots: rows the same call would have on a padded
            rectangle it really allocates; equal to tokens where nothing is padded.
        parts: (loss, sequences, tokens) of each pass packed in the call; empty where it has a single one.
    """

    module: str
    sequences: int
    tokens: int
    slots: int
    parts: Parts = ()


@dataclass(frozen=True)
class TextPass:
    """One pass of captions through a text tower.

    Attributes:
        name: the pass ("itc", "itm_positive", "itm_negative", "lm").
        token_ids: int64 ``[rows]``, packed; or what another tower has made of them, ``[rows, dim]``. segments: the captions' `Segments`.
        expert: which set of self-attention weights. causal: each row sees only itself and earlier rows.
        images: which image each caption reads (host numbers or a device tensor ``[captions]``); None: no cross-attention.
        first_row_only: only the first row of each caption is read afterwards; the tower returns those, ``[captions, dim]``.
        loss: the loss it is for, where one forward serves several; a profile reads it, nothing else does.
    """

    name: str
    token_ids: Tensor
    segments: Segments
    expert: int = 0
    causal: bool = False
    images: Sequence[int] | Tensor | None = None
    first_row_only: bool = False
    loss: str | None = None


class ReadRows(NamedTuple):
    """The rows of a forward that are read afterwards: its last layer computes no others.

    Attributes:
        rows: int64 ``[read rows]``. plan, cross_plan: those of the forward, with these rows as queries. expert_offsets: of these rows.
    """

    rows: Tensor
    plan: AttentionPlan
    cross_plan: AttentionPlan | None
    expert_offsets: tuple[int, ...]


def first_rows(segments: Segments) -> ReadRows:
    """The first row of every segment, each reading all of its own (the class token of an image)."""
    plan = AttentionPlan.cross_attention(Segments([1] * len(segments), segments.device), segments)
    return ReadRows(segments.first_rows(), plan, None, (0, len(segments)))


def leading_rows(plan: AttentionPlan, kept: Sequence[int], expert_offsets: Sequence[int]) -> ReadRows:
    """The first ``kept[i]`` rows of every query segment of a plan whose queries and keys are the same rows."""
    counts = np.asarray(kept, np.int64)
    numbers = np.arange(int(counts.sum())) + np.repeat(plan.query.host_offsets[:-1] - (np.cumsum(counts) - counts), counts)
    assert plan.host_edges is not None
    chosen = AttentionPlan.from_edges(Segments(counts, plan.device), plan.key, plan.host_edges)
    offsets = tuple(int((numbers < offset).sum()) for offset in expert_offsets)
    return ReadRows(_to_device(numbers, plan.device), chosen, None, offsets)


class PackedPasses(NamedTuple):
    """Several passes as one packed forward, expert after expert and, where the images are known on the host, image after image.

    Attributes:
        token_ids: of all passes. positions: int64 ``[rows]``. plan: self-attention, causal where a pass is. cross_plan: which image each
            caption reads, or None; captions that lie side by side and read one image are one segment of it. expert_offsets: rows of
            each expert. read: what the last layer computes, None for all rows.
        picks: for each pass, in the order given, the rows of the last layer's output that it returns: (first, end) or int64 numbers.
    """

    token_ids: Tensor
    positions: Tensor
    plan: AttentionPlan
    cross_plan: AttentionPlan | None
    expert_offsets: tuple[int, ...]
    read: ReadRows | None
    picks: tuple[tuple[int, int] | Tensor, ...]

    def split(self, rows: Tensor) -> list[Tensor]:
        """The last layer's output, pass by pass."""
        return [rows[pick] if isinstance(pick, Tensor) else rows[pick[0] : pick[1]] for pick in self.picks]


def pack_passes(
    passes: Sequence[TextPass], num_experts: int, image_segments: Segments | None, *, whole: bool = False
) -> PackedPasses:
    """Lays passes end to end, expert after expert; they must all read images or all read none.

    Args:
        whole: the last layer computes all rows, as the published codes do, also those that nobody reads.

    Raises:
        ValueError: no pass, an expert that does not exist, passes with and without images together, or an empty caption whose first row
            is to be read.
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
    for p in passes:
        if p.images is not None and len(p.images) != len(p.segments):
            raise ValueError(
                f"images must name one image per caption; received {len(p.images)} for {len(p.segments)} captions of pass {p.name!r}."
            )
        if p.first_row_only and 0 in p.segments.lengths:
            raise ValueError(
                f"an empty segment has no first row; segment {p.segments.lengths.index(0)} of pass {p.name!r} is empty."
            )
    device = passes[0].token_ids.device
    counts = [len(p.segments) for p in passes]
    experts = np.repeat(wanted, counts).astype(np.int64)
    first_only = np.repeat([p.first_row_only for p in passes], counts)
    images = _join([p.images for p in passes], device) if all(readers) else None
    # captions in their places: by expert, then by image
    keys = (experts,) if images is None or isinstance(images, Tensor) else (np.asarray(images, np.int64), experts)
    order = np.lexsort(keys)
    index = np.arange(len(order))
    segments = Segments([n for p in passes for n in p.segments.lengths], device)
    token_ids = torch.cat([p.token_ids for p in passes]) if len(passes) > 1 else passes[0].token_ids
    if not np.array_equal(order, index):
        rows, segments = segments.take(order.tolist())
        token_ids = token_ids[rows]
    causal = np.repeat([p.causal for p in passes], counts)[order].astype(np.int64)
    edges = np.stack([index, index, causal], 1)
    cross = None
    if images is not None:
        assert image_segments is not None
        cross = (
            images[_to_device(order, device)] if isinstance(images, Tensor) else np.asarray(images)[order],
            image_segments,
        )
    lengths = np.asarray(segments.lengths, np.int64)
    kept = lengths if whole else np.where(first_only[order], np.minimum(lengths, 1), lengths)
    plan, offsets = AttentionPlan.from_edges(segments, segments, edges), _expert_offsets(experts[order], lengths, num_experts)
    read = None
    if (kept != lengths).any():
        read = leading_rows(plan, kept.tolist(), offsets)._replace(cross_plan=_cross_plan(Segments(kept, device), cross))
    return PackedPasses(
        token_ids,
        segments.positions(),
        plan,
        _cross_plan(segments, cross),
        offsets,
        read,
        _picks(order, kept, np.where(first_only[order], np.minimum(lengths, 1), lengths), counts, device),
    )


def _picks(
    order: np.ndarray, computed: np.ndarray, wanted: np.ndarray, counts: Sequence[int], device: torch.device
) -> tuple[tuple[int, int] | Tensor, ...]:
    """For each pass the rows it returns: of caption ``order[i]``, which lies at place i, the first ``wanted[i]`` of ``computed[i]``."""
    starts = np.cumsum(computed) - computed
    place = np.argsort(order)
    picks: list[tuple[int, int] | Tensor] = []
    for own in np.split(place, np.cumsum(counts)[:-1]):
        n = wanted[own]
        rows = np.arange(int(n.sum())) + np.repeat(starts[own] - (np.cumsum(n) - n), n)
        first = int(rows[0]) if rows.size else 0
        together = np.array_equal(rows, np.arange(first, first + rows.size))
        picks.append((first, first + rows.size) if together else _to_device(rows, device))
    return tuple(picks)


def _expert_offsets(experts: np.ndarray, lengths: np.ndarray, num_experts: int) -> tuple[int, ...]:
    return (0, *np.cumsum(np.bincount(experts, lengths, num_experts)).astype(np.int64).tolist())


def _cross_plan(queries: Segments, cross: tuple[np.ndarray | Tensor, Segments] | None) -> AttentionPlan | None:
    """Captions, or what is read of them, and the image of each. Neighbours that read one image are one segment."""
    if cross is None:
        return None
    images, image_segments = cross
    if isinstance(images, Tensor):
        return AttentionPlan.cross_attention(queries, image_segments, images)
    first = np.flatnonzero(np.diff(images, prepend=-1))
    lengths = np.add.reduceat(np.asarray(queries.lengths, np.int64), first) if first.size else np.zeros(0, np.int64)
    return AttentionPlan.cross_attention(Segments(lengths, queries.device), image_segments, images[first].tolist())


def _join(indices: Sequence[Sequence[int] | Tensor | None], device: torch.device) -> list[int] | Tensor:
    """One index of images for all passes: on the host where every pass knows it there, else on the device."""
    if all(not isinstance(i, Tensor) or i.device.type == "cpu" for i in indices):
        return [int(x) for i in indices for x in (i.tolist() if isinstance(i, Tensor) else i or ())]
    return torch.cat([torch.as_tensor(i, device=device).reshape(-1).long() for i in indices])


def describe_passes(module: str, passes: Sequence[TextPass]) -> PassInfo:
    """What a call of a tower that takes passes processed; where these are for several losses, the share of each."""
    rows = sum(p.segments.rows for p in passes)
    shares: dict[str, list[int]] = {}
    for p in passes:
        share = shares.setdefault(p.loss or p.name, [0, 0])
        share[0] += len(p.segments)
        share[1] += p.segments.rows
    parts = tuple((loss, sequences, tokens) for loss, (sequences, tokens) in shares.items()) if len(shares) > 1 else ()
    return PassInfo(module, sum(len(p.segments) for p in passes), rows, rows, parts)


def with_first_token(token_ids: Tensor, segments: Segments, token: int) -> Tensor:
    """A copy of packed token ids in which every caption starts with `token` (BLIP's [ENC] and [DEC] replace [CLS])."""
    return token_ids.index_fill(0, segments.first_rows(), token)
