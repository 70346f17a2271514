"""A profile as rows: one loss's use of one module, and the totals of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from vlp_fast.profiling.recorder import ACCUMULATE, ALL, HEADS, STEP, Bucket, Recorder

__all__ = ["Call", "ProfileRow", "StepProfile", "calls_of", "rows_of", "totals_of"]


@dataclass
class ProfileRow:
    """One loss's use of one module.

    Attributes:
        loss: the loss for whose sake it first ran. module: the tower's role, or "heads and loss" for work outside the towers.
        kind: "image", "text", "pair", "other", or "" for work outside the towers.
        passes: calls. shared: how many of them are packed with passes of other losses, and so appear in their rows too.
        grad: whether they were recorded for a backward. sequences: images, captions or samples in them.
        tokens: rows computed, padding apart. padding: share of computed rows that are padding, in [0, 1]; None where it cannot be seen.
        gflops_forward, gflops_backward: 2 per multiply-add, 1e9 each; None where no backward was run.
        ms: time of its operations, forward and backward; None on the meta device.
        mb: memory it keeps for the backward, 2**20 bytes, parameters not counted.
        serves: the losses whose gradient reaches it (for calls without gradient: those computed from it, else the loss it ran for).
        gflops_repeated: of the forward, products whose operands an earlier product of the same step had already had.
        gflops_padding: the share of padding of the FLOPs, forward and backward.
        waste: both of these together, what is repeated not counted twice.
        unread: share of the output's rows that no loss read (gradient zero throughout), padding apart; None where no gradient came.
    """

    loss: str
    module: str
    kind: str = ""
    passes: int = 0
    shared: int = 0
    grad: bool = True
    sequences: int = 0
    tokens: int = 0
    padding: float | None = 0.0
    gflops_forward: float = 0.0
    gflops_backward: float | None = None
    ms: float | None = None
    mb: float = 0.0
    serves: list[str] = field(default_factory=list)
    gflops_repeated: float = 0.0
    gflops_padding: float = 0.0
    waste: float = 0.0
    unread: float | None = None

    @property
    def also_serves(self) -> list[str]:
        """The losses it serves beside its own."""
        return [name for name in self.serves if name != self.loss]

    @property
    def gflops(self) -> float:
        """Forward and backward together."""
        return self.gflops_forward + (self.gflops_backward or 0.0)


class Call(NamedTuple):
    """The forward or the backward of one call of a tower, in the order they ran.

    Attributes:
        module, loss: as in `ProfileRow`. phase: "forward" or "backward". grad: recorded for a backward.
        start, end: ms since the start, counting operations only; on the meta device GFLOPs since the start.
        gflops: of this phase. sequences, tokens, serves: as in `ProfileRow`.
    """

    module: str
    loss: str
    phase: str
    grad: bool
    start: float
    end: float
    gflops: float
    sequences: int
    tokens: int
    serves: list[str]


@dataclass
class StepProfile:
    """A step's rows and their totals; `to_json` is the documented format of ``vlp-fast profile --json``.

    totals: passes (a packed one counts once), image_passes, text_passes, pair_passes, other_passes, without_gradient (kind -> passes),
    sequences, text_sequences, tokens, padding, gflops_forward, gflops_backward, ms, mb, gflops_repeated, gflops_padding, waste,
    repeated (layer -> GFLOPs of products done again), and losses (name -> GFLOPs of the rows that serve it alone, and of all rows
    that serve it).
    calls: the timeline, see `Call`. towers_not_called: towers that the step never ran.
    """

    model: str
    size: str
    schedule: str
    batch: int
    device: str
    rows: list[ProfileRow]
    totals: dict[str, Any]
    calls: list[Call] = field(default_factory=list)
    towers_not_called: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Model, size and schedule, as far as it has them."""
        return " ".join(word for word in (self.model, self.size, self.schedule) if word)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return {**asdict(self), "calls": [call._asdict() for call in self.calls]}


class _Part(NamedTuple):
    loss: str
    share: float
    sequences: int
    tokens: float
    serves: list[str]
    packed: bool


def _parts(bucket: Bucket) -> Iterator[_Part]:
    """A bucket split over the losses whose passes are packed in it, in proportion to their tokens."""
    info = bucket.info
    if info is None:
        yield _Part(_loss(bucket), 1.0, 0, 0, bucket.serves, False)
        return
    named: dict[str, tuple[int, int]] = {}
    for loss, sequences, tokens in info.parts:
        before = named.get(loss, (0, 0))
        named[loss] = (before[0] + sequences, before[1] + tokens)
    total = sum(tokens for _, tokens in named.values())
    if len(named) < 2 or not total:
        yield _Part(_loss(bucket), 1.0, info.sequences, info.tokens, bucket.serves, False)
        return
    for loss, (sequences, tokens) in named.items():
        yield _Part(loss, tokens / total, sequences, tokens, [loss], True)


def _loss(bucket: Bucket) -> str:
    return bucket.serves[0] if bucket.loss == STEP and bucket.serves else bucket.loss


def _wasted(bucket: Bucket) -> tuple[float, float, float]:
    """GFLOPs repeated, of padding, and both."""
    info, repeated = bucket.info, sum(bucket.repeated.values())
    padding = 1.0 - info.tokens / info.slots if info is not None and info.slots else 0.0
    whole = bucket.forward + bucket.backward
    return repeated / 1e9, padding * whole / 1e9, (repeated + padding * (whole - repeated)) / 1e9


def rows_of(recorder: Recorder, losses: Sequence[str]) -> list[ProfileRow]:
    """Buckets of one loss, module and kind become one row, in the order in which they first ran; rows without any cost are left out."""
    backward, timed = recorder.ran_backward, recorder.device.type != "meta"
    rows: dict[tuple[str, str, bool], ProfileRow] = {}
    slots: dict[int, float] = {}
    gradients: dict[int, tuple[float, float]] = {}
    buckets = [*recorder.buckets, recorder.accumulation]
    for bucket in sorted(buckets, key=lambda b: b.module in (HEADS, ACCUMULATE)):
        if not (bucket.call or bucket.forward or bucket.backward or bucket.bytes or (timed and bucket.seconds)):
            continue
        repeated, padded, waste = _wasted(bucket)
        for part in _parts(bucket):
            key = (part.loss, bucket.module, bucket.grad)
            if key not in rows:
                rows[key] = ProfileRow(
                    part.loss,
                    bucket.module,
                    bucket.kind,
                    grad=bucket.grad,
                    gflops_backward=0.0 if backward else None,
                    ms=0.0 if timed else None,
                )
            row = rows[key]
            if bucket.info is not None:
                row.passes += 1
                row.shared += part.packed
                row.sequences += part.sequences
                row.tokens += round(part.tokens)
                slots[id(row)] = slots.get(id(row), 0.0) + bucket.info.slots * part.share
                if not bucket.padding_known:
                    row.padding = None
                elif row.padding is not None and slots[id(row)]:
                    row.padding = 1.0 - row.tokens / slots[id(row)]
                if bucket.unread is not None:
                    read = gradients.get(id(row), (0.0, 0.0))
                    unread = max(bucket.unread - (bucket.info.slots - bucket.info.tokens), 0)
                    gradients[id(row)] = (read[0] + unread * part.share, read[1] + bucket.info.tokens * part.share)
                    row.unread = gradients[id(row)][0] / max(gradients[id(row)][1], 1.0)
            row.gflops_forward += part.share * bucket.forward / 1e9
            if row.gflops_backward is not None:
                row.gflops_backward += part.share * bucket.backward / 1e9
            if row.ms is not None:
                row.ms += part.share * bucket.seconds * 1e3
            row.mb += part.share * bucket.bytes / 2**20
            row.gflops_repeated += part.share * repeated
            row.gflops_padding += part.share * padded
            row.waste += part.share * waste
            row.serves.extend(name for name in part.serves or [part.loss] if name not in row.serves)
    names = dict.fromkeys([*losses, *(row.loss for row in rows.values() if row.loss not in (STEP, ALL))])
    order = {name: i for i, name in enumerate([*names, STEP, ALL])}
    return sorted(rows.values(), key=lambda row: order[row.loss])


def totals_of(recorder: Recorder, rows: Sequence[ProfileRow], losses: Sequence[str]) -> dict[str, Any]:
    """The totals of a step, see `StepProfile`."""
    calls = [bucket for bucket in recorder.buckets if bucket.call and bucket.info is not None]
    backward, timed = recorder.ran_backward, recorder.device.type != "meta"
    repeated: dict[str, float] = {}
    for bucket in recorder.buckets:
        for name, flops in bucket.repeated.items():
            repeated[name] = repeated.get(name, 0.0) + flops / 1e9

    def passes(kind: str) -> int:
        return sum(bucket.kind == kind for bucket in calls)

    def infos(buckets: Sequence[Bucket]) -> tuple[int, int, int]:
        some = [bucket.info for bucket in buckets if bucket.info is not None]
        return sum(i.sequences for i in some), sum(i.tokens for i in some), sum(i.slots for i in some)

    _, tokens, slots = infos(calls)
    return {
        "passes": len(calls),
        "image_passes": passes("image"),
        "text_passes": passes("text"),
        "pair_passes": passes("pair"),
        "other_passes": passes("other"),
        "without_gradient": {
            kind: sum(bucket.kind == kind and not bucket.grad for bucket in calls)
            for kind in ("image", "text", "pair", "other")
        },
        "sequences": infos(calls)[0],
        "text_sequences": infos([bucket for bucket in calls if bucket.kind == "text"])[0],
        "tokens": tokens,
        "padding": None if any(not b.padding_known for b in calls) else 1.0 - tokens / slots if slots else 0.0,
        "gflops_forward": sum(row.gflops_forward for row in rows),
        "gflops_backward": sum(row.gflops_backward or 0.0 for row in rows) if backward else None,
        "ms": sum(row.ms or 0.0 for row in rows) if timed else None,
        "mb": sum(row.mb for row in rows),
        "gflops_repeated": sum(row.gflops_repeated for row in rows),
        "gflops_padding": sum(row.gflops_padding for row in rows),
        "waste": sum(row.waste for row in rows),
        "repeated": dict(sorted(repeated.items(), key=lambda item: -item[1])),
        "losses": {
            name: {
                "gflops_alone": sum(row.gflops for row in rows if row.serves == [name]),
                "gflops_used": sum(row.gflops for row in rows if name in row.serves),
            }
            for name in losses
        },
    }


def calls_of(recorder: Recorder) -> list[Call]:
    """The timeline: every call's forward and backward, by start."""
    scale = 1.0 if recorder.device.type == "meta" else 1e3
    calls = []
    for bucket in recorder.buckets:
        if not bucket.call or bucket.info is None:
            continue
        for phase, (first, end) in bucket.spans.items():
            flops = bucket.forward if phase == "forward" else bucket.backward
            start, stop = scale * recorder.clock[first], scale * recorder.clock[end]
            info, serves = bucket.info, bucket.serves or [_loss(bucket)]
            calls.append(
                Call(
                    bucket.module,
                    _loss(bucket),
                    phase,
                    bucket.grad,
                    start,
                    stop,
                    flops / 1e9,
                    info.sequences,
                    info.tokens,
                    serves,
                )
            )
    return sorted(calls, key=lambda call: (call.start, -call.end))
