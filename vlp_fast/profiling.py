"""Which loss costs which forward passes: a count of what a pretraining step really ran.

Hooks count every call of a tower; every operation's FLOPs (and, on a real device, its time) go to the call or to the loss it runs
for; in the backward they go to the call whose forward made the autograd node. Which losses a call serves is read off the autograd
graph. Nothing is taken from a table of what the model ought to do.
"""

from __future__ import annotations

import bisect
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vlp_fast.passes import PassInfo, current_loss, observe_losses
from vlp_fast.training import PretrainingObjective, build_pretraining, caption_lengths, synthetic_batch

__all__ = ["ProfileRow", "StepProfile", "profile_model", "profile_step"]

HEADS = "heads and loss"
ACCUMULATE = "gradient accumulation"
STEP, ALL = "step", "all"  # in place of a loss: work outside any loss_scope, and gradients of parameters that all losses share


@dataclass
class ProfileRow:
    """One loss's use of one module.

    Attributes:
        loss: the loss for whose sake it first ran. module: the tower's role, or "heads and loss" for work outside the towers.
        passes: calls. grad: whether they were recorded for a backward. sequences: images, captions or samples in them.
        tokens: rows computed. padding: share of computed rows that are padding, in [0, 1].
        gflops_forward, gflops_backward: 2 per multiply-add, 1e9 each; None where no backward was run.
        ms: time of its operations, forward and backward; None on the meta device.
        mb: memory it keeps for the backward, 2**20 bytes, parameters not counted.
        serves: the losses whose gradient reaches it (for calls without gradient: the loss it ran for).
    """

    loss: str
    module: str
    passes: int = 0
    grad: bool = True
    sequences: int = 0
    tokens: int = 0
    padding: float = 0.0
    gflops_forward: float = 0.0
    gflops_backward: float | None = None
    ms: float | None = None
    mb: float = 0.0
    serves: list[str] = field(default_factory=list)


@dataclass
class StepProfile:
    """A step's rows and their totals; `to_json` is the documented format of ``vlp-fast profile --json``.

    totals: passes, image_passes, text_passes, pair_passes, text_sequences, gflops_forward, gflops_backward, ms, mb, and losses
    (name -> GFLOPs of the rows that serve it alone, and of all rows that serve it).
    """

    model: str
    size: str
    schedule: str
    batch: int
    device: str
    rows: list[ProfileRow]
    totals: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return asdict(self)


@dataclass
class _Bucket:
    """Where costs are booked: one call of a tower, or all work outside the towers for one loss."""

    loss: str
    module: str
    info: PassInfo | None = None
    grad: bool = True
    forward: int = 0
    backward: int = 0
    seconds: float = 0.0
    bytes: int = 0
    serves: list[str] = field(default_factory=list)


class _Recorder(TorchDispatchMode):
    """Books every operation on the bucket that is open, or, in the backward, on the one that made the autograd node."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.buckets: list[_Bucket] = []
        self.outside: dict[str, _Bucket] = {}
        self.calls: list[_Bucket] = []  # open calls, innermost last
        self.starts: list[int] = [0]  # autograd sequence number from which ...
        self.owners: list[_Bucket] = [self._outside()]  # ... nodes belong to this bucket
        self.accumulation = _Bucket(ALL, ACCUMULATE)
        self.events: list[tuple[_Bucket, Any, Any]] = []

    def _outside(self) -> _Bucket:
        loss = current_loss() or STEP
        if loss not in self.outside:
            self.outside[loss] = _Bucket(loss, HEADS)
            self.buckets.append(self.outside[loss])
        return self.outside[loss]

    def current(self) -> _Bucket:
        return self.calls[-1] if self.calls else self._outside()

    def changed(self) -> None:
        """From here on, new autograd nodes belong to the bucket that is open now."""
        self.starts.append(torch.autograd._get_sequence_nr())
        self.owners.append(self.current())

    def owner(self, sequence: int) -> _Bucket:
        return self.owners[bisect.bisect_right(self.starts, sequence) - 1]

    def enter(self, tower: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        info: PassInfo = module.describe(*args, **kwargs)  # type: ignore[operator]
        role = f"momentum_{info.module}" if tower.startswith("momentum_") else info.module
        bucket = _Bucket(current_loss() or STEP, role, info, torch.is_grad_enabled())
        self.buckets.append(bucket)
        self.calls.append(bucket)
        self.changed()

    def leave(self) -> None:
        self.calls.pop()
        self.changed()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        node = torch._C._current_autograd_node()
        if node is None:
            bucket = self.current()
        else:
            bucket = self.accumulation if "AccumulateGrad" in node.name() else self.owner(node._sequence_nr())
        with self._timed(bucket):
            out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=out)
            if node is None:
                bucket.forward += flops
            else:
                bucket.backward += flops
        return out

    @contextlib.contextmanager
    def _timed(self, bucket: _Bucket) -> Iterator[None]:
        if self.device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self.events.append((bucket, first, last))
        else:
            start = time.perf_counter()
            yield
            bucket.seconds += time.perf_counter() - start

    def finish(self) -> None:
        """Reads the CUDA events, once, when the step is over."""
        if self.events:
            torch.cuda.synchronize(self.device)
            for bucket, first, last in self.events:
                bucket.seconds += first.elapsed_time(last) / 1000
            self.events.clear()


def profile_step(
    objective: PretrainingObjective,
    inputs: Any,
    *,
    backward: bool = True,
    device: torch.device | str | None = None,
    **options: Any,
) -> tuple[list[ProfileRow], dict[str, Any], dict[str, Tensor]]:
    """Runs one step of `objective` and books what it cost.

    Args:
        objective: the step. inputs: what ``objective.prepare`` returned, on the step's device. backward: run it too; the gradients
            stay in the parameters. device: of the step; default: the device of the parameters. options: passed to the step.

    Returns: rows, totals (see `StepProfile`), and the step's losses.
    """
    device = torch.device(device) if device is not None else next(objective.parameters()).device
    recorder = _Recorder(device)
    hooks = []
    for name, tower in objective.towers().items():
        hooks.append(
            tower.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: recorder.enter(name, module, args, kwargs), with_kwargs=True
            )
        )
        hooks.append(tower.register_forward_hook(lambda *_: recorder.leave()))
    known = {_storage(t) for t in [*objective.parameters(), *objective.buffers()]}
    pack, unpack = _saved_memory(recorder, known), lambda saved: saved
    try:
        with observe_losses(recorder.changed), recorder:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                losses = objective(inputs, **options)
                total = objective.total(losses)
            _mark_served(recorder, losses)
            if backward:
                total.backward()
        recorder.finish()
    finally:
        for hook in hooks:
            hook.remove()
    rows = _rows([*recorder.buckets, recorder.accumulation], backward, device.type != "meta")
    return rows, _totals(rows, list(losses), backward, device.type != "meta"), losses


def profile_model(
    model: str,
    size: str = "base",
    *,
    schedule: str = "published",
    image_size: int | None = None,
    batch: int = 8,
    device: str = "meta",
    backward: bool = False,
    seed: int = 0,
    **changes: Any,
) -> StepProfile:
    """Builds a model with random weights, gives it a batch of random images and captions, and profiles one pretraining step.

    Captions have `vlp_fast.training.caption_lengths`. On "meta" nothing is computed or allocated: shapes and FLOPs only, and hard
    negatives are the next pair of the batch. On a real device one step runs first to warm up.

    Args:
        model, size, schedule, changes: as in `vlp_fast.training.build_pretraining`. image_size: default: the preset's.
        batch: pairs. device: "meta", "cpu" or "cuda". backward: profile the backward too. seed: of weights and inputs.

    Raises: ValueError for unknown names or a batch below 1; RuntimeError for a device that is not there.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1; received {batch}.")
    kind = torch.device(device).type
    if kind not in ("meta", "cpu", "cuda"):
        raise ValueError(f"device must be meta, cpu or cuda; received {device!r}.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device 'cuda' is not available: PyTorch sees no CUDA device here.")
    if image_size is not None:
        changes["image_size"] = image_size
    torch.manual_seed(seed)
    with torch.device(device):
        objective = build_pretraining(model, size, schedule=schedule, **changes)
    config = objective.model.config
    generator = torch.Generator().manual_seed(seed)
    inputs = objective.prepare(synthetic_batch(config, caption_lengths(batch), generator), generator).to(device)
    options: dict[str, Any] = {}
    if model in ("blip", "albef") and kind == "meta":
        if batch < 2:
            raise ValueError(f"hard negatives need at least 2 pairs in the batch; received {batch}.")
        following = torch.arange(batch).roll(-1)
        options["negatives"] = (following, following)
    if kind != "meta":
        warm = objective.total(objective(inputs, **options))
        if backward:
            warm.backward()
            objective.zero_grad(set_to_none=True)
    rows, totals, _ = profile_step(objective, inputs, backward=backward, device=device, **options)
    return StepProfile(model, size, schedule, batch, str(device), rows, totals)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _saved_memory(recorder: _Recorder, known: set[int]) -> Callable[[Tensor], Tensor]:
    """A pack hook that books the bytes of every storage kept for the backward, once, on whoever first keeps it."""
    alive = []  # a freed storage's number could be given to another

    def pack(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in known:
            known.add(storage)
            alive.append(tensor.untyped_storage())
            recorder.current().bytes += tensor.untyped_storage().nbytes()
        return tensor

    return pack


def _mark_served(recorder: _Recorder, losses: Mapping[str, Tensor]) -> None:
    """Walks the autograd graph of each loss and marks every bucket that made one of its nodes."""
    for name, loss in losses.items():
        seen: set[int] = set()
        todo = [loss.grad_fn] if loss.grad_fn is not None else []
        while todo:
            node = todo.pop()
            sequence = node._sequence_nr()
            if sequence in seen or "AccumulateGrad" in node.name():
                continue
            seen.add(sequence)
            served = recorder.owner(sequence).serves
            if name not in served:
                served.append(name)
            todo.extend(following for following, _ in node.next_functions if following is not None)
    for bucket in recorder.buckets:
        if not bucket.serves:
            bucket.serves.append(bucket.loss)


def _rows(buckets: list[_Bucket], backward: bool, timed: bool) -> list[ProfileRow]:
    """Buckets of one loss, module and kind become one row, in the order in which they first ran; rows without any cost are left out."""
    rows: dict[tuple[str, str, bool], ProfileRow] = {}
    slots: dict[int, int] = {}
    for bucket in sorted(buckets, key=lambda b: b.module in (HEADS, ACCUMULATE)):
        if not (bucket.info or bucket.forward or bucket.backward or bucket.bytes or (timed and bucket.seconds)):
            continue
        key = (bucket.loss, bucket.module, bucket.grad)
        if key not in rows:
            rows[key] = ProfileRow(
                bucket.loss,
                bucket.module,
                grad=bucket.grad,
                gflops_backward=0.0 if backward else None,
                ms=0.0 if timed else None,
            )
        row = rows[key]
        if bucket.info is not None:
            row.passes += 1
            row.sequences += bucket.info.sequences
            row.tokens += bucket.info.tokens
            slots[id(row)] = slots.get(id(row), 0) + bucket.info.slots
            row.padding = 1.0 - row.tokens / slots[id(row)] if slots[id(row)] else 0.0
        row.gflops_forward += bucket.forward / 1e9
        if row.gflops_backward is not None:
            row.gflops_backward += bucket.backward / 1e9
        if row.ms is not None:
            row.ms += bucket.seconds * 1e3
        row.mb += bucket.bytes / 2**20
        row.serves.extend(name for name in bucket.serves if name not in row.serves)
    names = dict.fromkeys(bucket.loss for bucket in buckets if bucket.loss not in (STEP, ALL))
    order = {name: i for i, name in enumerate([*names, STEP, ALL])}
    return sorted(rows.values(), key=lambda row: order[row.loss])


def _totals(rows: list[ProfileRow], losses: list[str], backward: bool, timed: bool) -> dict[str, Any]:
    def cost(some: list[ProfileRow]) -> float:
        return sum(row.gflops_forward + (row.gflops_backward or 0.0) for row in some)

    def passes(kind: str) -> int:
        return sum(row.passes for row in rows if row.module.removeprefix("momentum_").startswith(kind))

    return {
        "passes": sum(row.passes for row in rows),
        "image_passes": passes("image_"),
        "text_passes": passes("text_"),
        "pair_passes": passes("pair_"),
        "text_sequences": sum(row.sequences for row in rows if row.module.removeprefix("momentum_").startswith("text_")),
        "gflops_forward": sum(row.gflops_forward for row in rows),
        "gflops_backward": sum(row.gflops_backward or 0.0 for row in rows) if backward else None,
        "ms": sum(row.ms or 0.0 for row in rows) if timed else None,
        "mb": sum(row.mb for row in rows),
        "losses": {
            name: {
                "gflops_alone": cost([row for row in rows if row.serves == [name]]),
                "gflops_used": cost([row for row in rows if name in row.serves]),
            }
            for name in losses
        },
    }
