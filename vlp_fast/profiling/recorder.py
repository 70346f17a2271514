"""What a block of code runs: every operation booked on the call of a tower, or on the loss, for which it runs."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from vlp_fast.passes import PassInfo, current_loss
from vlp_fast.profiling.repeats import Values, storage_key, tensors_in

__all__ = ["ACCUMULATE", "ALL", "HEADS", "STEP", "Bucket", "Recorder"]

HEADS = "heads and loss"
ACCUMULATE = "gradient accumulation"
STEP, ALL = "step", "all"  # in place of a loss: work outside any loss, and gradients of parameters that all losses share
_PRODUCTS = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")  # [rows, k] x [k, n]: what a linear layer becomes


@dataclass(eq=False)
class Bucket:
    """Where costs are booked: one call of a tower, or work outside the towers.

    Attributes:
        loss: `loss_scope` in which it ran, else "step". module: the tower's role. tower: its name, "" for work outside the towers.
        info, kind, padding_known: what the call processed ("image", "text", "pair", "other"). grad: recorded for a backward.
        forward, backward: FLOPs. seconds: of its operations. bytes: kept for the backward.
        repeated: forward FLOPs that an earlier operation had already done, by the module whose parameter they used, "" without one.
        product_rows: FLOPs of linear layers by their number of rows. unread: rows of the output whose gradient is zero, or None.
        spans: first and end index among all operations, "forward" and "backward". serves: losses, marked by `attribute`.
    """

    loss: str
    module: str
    tower: str = ""
    info: PassInfo | None = None
    kind: str = ""
    padding_known: bool = True
    grad: bool = True
    forward: int = 0
    backward: int = 0
    seconds: float = 0.0
    bytes: int = 0
    repeated: dict[str, int] = field(default_factory=dict)
    product_rows: dict[int, int] = field(default_factory=dict)
    unread: Any = None
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    serves: list[str] = field(default_factory=list)

    @property
    def call(self) -> bool:
        """Whether it is a call of a tower."""
        return bool(self.tower)

    def extend(self, phase: str, first: int, end: int) -> None:
        """Lengthens the span of a phase to hold operations [first, end)."""
        old = self.spans.get(phase, (first, end))
        self.spans[phase] = (min(old[0], first), max(old[1], end))


class Recorder(TorchDispatchMode):
    """Books every operation on the call that is open, or, in the backward, on the one whose forward made the autograd node.

    Outside the towers and outside any `loss_scope`, each autograd node has a bucket of its own, so that `attribute` can give it to the
    loss it belongs to.

    Args:
        device: of the step. names: storage of a parameter -> its name. pad_id: token id that is padding.
    """

    def __init__(self, device: torch.device, names: dict[int, str], pad_id: int | None = None) -> None:
        super().__init__()
        self.device = device
        self.names = names
        self.pad_id = pad_id
        self.embedded: dict[tuple[int, int], int] = {}  # shape of token ids that were embedded -> how many were padding
        self.values = Values()
        self.step = Bucket(STEP, HEADS)
        self.accumulation = Bucket(ALL, ACCUMULATE)
        self.buckets: list[Bucket] = [self.step]
        self.calls: list[Bucket] = []  # open calls, innermost last
        self.scopes: dict[str, Bucket] = {}
        self.fragment: Bucket | None = None  # of the newest autograd node outside towers and scopes
        self.in_function = False  # whether that node is a custom function, whose operations run without gradient
        self.waiting = False  # whether that node's operation is still to run
        self.next = 0  # autograd sequence number from which nodes have no owner yet
        self.starts: list[int] = []  # autograd sequence number from which ...
        self.owners: list[Bucket] = []  # ... nodes belong to this bucket
        self.operations: list[tuple[Bucket, bool, Any]] = []  # bucket, whether in the backward, and its time
        self.clock: list[float] = []  # start of each operation, and the end of the last
        self.ran_backward = False
        self.changed()

    def changed(self) -> None:
        """From here on, new autograd nodes belong to the call, scope or fragment that is open now."""
        self.next = torch.autograd._get_sequence_nr()
        self.fragment = None
        self.starts.append(self.next)
        loss = current_loss()
        self.owners.append(self.calls[-1] if self.calls else self.step if loss is None else self._scope(loss))

    def owner(self, sequence: int) -> Bucket:
        """The bucket whose forward made the autograd node with this sequence number."""
        return self.owners[max(bisect.bisect_right(self.starts, sequence) - 1, 0)]

    def current(self, *, saving: bool = False) -> Bucket:
        """The bucket of what runs now in the forward, or of the node that saves a tensor now."""
        if self.calls:
            return self.calls[-1]
        loss = current_loss()
        if loss is not None:
            return self._scope(loss)
        following = torch.autograd._get_sequence_nr()
        if following > self.next:  # a node was made since: the operation that is about to run is its
            self.fragment = Bucket(STEP, HEADS)
            self.in_function, self.waiting = not torch.is_grad_enabled(), True
            self.buckets.append(self.fragment)
            self.starts.append(self.next)
            self.owners.append(self.fragment)
            self.next = following
            return self.fragment
        if self.fragment is not None and (saving or self.waiting or (self.in_function and not torch.is_grad_enabled())):
            return self.fragment
        return self.step

    def _scope(self, loss: str) -> Bucket:
        if loss not in self.scopes:
            self.scopes[loss] = Bucket(loss, HEADS)
            self.buckets.append(self.scopes[loss])
        return self.scopes[loss]

    def enter(self, bucket: Bucket) -> Bucket:
        """Opens a call; in a backward that recomputes activations, the call whose node is being worked on goes on instead."""
        node = torch._C._current_autograd_node()
        if node is not None:
            bucket = self.owner(node._sequence_nr())
        elif not bucket.spans:
            self.buckets.append(bucket)
        self.calls.append(bucket)
        self.changed()
        bucket.extend("forward" if node is None else "backward", len(self.operations), len(self.operations))
        return bucket

    def leave(self) -> Bucket:
        """Closes the innermost call."""
        bucket = self.calls.pop()
        phase = "forward" if torch._C._current_autograd_node() is None else "backward"
        bucket.extend(phase, len(self.operations), len(self.operations))
        self.changed()
        return bucket

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        node = torch._C._current_autograd_node()
        if node is None:
            bucket = self.current()
            self.waiting = False
        else:
            self.ran_backward = True
            bucket = self.accumulation if "AccumulateGrad" in node.name() else self.owner(node._sequence_nr())
        out, spent = self._timed(func, args, kwargs)
        formula = flop_registry.get(func.overloadpacket)
        flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
        again = self.values.update(func, args, kwargs, out, forward=node is None)
        if node is None:
            if func is torch.ops.aten.embedding.default and self.pad_id is not None:
                self._see_padding(args[1], self.pad_id)
            bucket.forward += flops
            if flops and again:
                name = self._parameter(args)
                bucket.repeated[name] = bucket.repeated.get(name, 0) + flops
            if flops and func.overloadpacket._qualified_op_name in _PRODUCTS:
                rows = out.numel() // out.shape[-1] if out.numel() else 0
                bucket.product_rows[rows] = bucket.product_rows.get(rows, 0) + flops
        else:
            bucket.backward += flops
            if bucket.call:
                bucket.extend("backward", len(self.operations), len(self.operations) + 1)
        self.operations.append((bucket, node is not None, flops / 1e9 if spent is None else spent))
        return out

    def _timed(self, func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
        if self.device.type == "meta":
            return func(*args, **kwargs), None
        if self.device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            out = func(*args, **kwargs)
            last.record()
            return out, (first, last)
        start = time.perf_counter()
        out = func(*args, **kwargs)
        return out, time.perf_counter() - start

    def _see_padding(self, ids: Tensor, pad_id: int) -> None:
        if ids.dim() == 2 and ids.device.type != "meta":
            self.embedded[int(ids.shape[0]), int(ids.shape[1])] = int((ids == pad_id).sum())

    def _parameter(self, args: Any) -> str:
        found = (self.names.get(storage_key(tensor)) for tensor in tensors_in(args))
        name = next((name for name in found if name is not None), "")
        return name.rpartition(".")[0] or name

    def keep(self, known: set[int]) -> Callable[[Tensor], Tensor]:
        """A pack hook for ``saved_tensors_hooks`` that books the bytes of every storage kept for the backward, once, on whoever keeps
        it first."""
        alive = []  # a freed storage's number could be given to another

        def pack(tensor: Tensor) -> Tensor:
            storage = storage_key(tensor)
            if storage not in known and torch._C._current_autograd_node() is None:
                known.add(storage)
                alive.append(tensor.untyped_storage())
                self.current(saving=True).bytes += tensor.untyped_storage().nbytes()
            return tensor

        return pack

    def watch_gradient(self, bucket: Bucket, output: Tensor) -> None:
        """Counts, when the gradient of `output` is known, its rows that no loss read: those whose gradient is zero throughout."""

        def count(gradient: Tensor) -> None:
            if gradient.device.type != "meta":
                with _disable_current_modes():
                    unread = torch.all(gradient.reshape(-1, gradient.shape[-1]) == 0, 1).sum()
                bucket.unread = unread if bucket.unread is None else torch.minimum(bucket.unread, unread)

        output.register_hook(count)

    def finish(self) -> None:
        """Reads what the device measured, once, when everything has run."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.clock = [0.0]
        for bucket, _, spent in self.operations:
            seconds = spent[0].elapsed_time(spent[1]) / 1000 if isinstance(spent, tuple) else spent
            if self.device.type != "meta":
                bucket.seconds += seconds
            self.clock.append(self.clock[-1] + seconds)
        for bucket in self.buckets:
            if isinstance(bucket.unread, Tensor):
                bucket.unread = int(bucket.unread)
        self.operations.clear()

    def attribute(self, losses: dict[str, Tensor]) -> None:
        """Walks the autograd graph of each loss and marks every bucket that made one of its nodes.

        Calls without gradient made no node; they serve the losses whose value was computed from what they returned.
        """
        for name, loss in losses.items():
            seen: set[int] = set()
            todo = [loss.grad_fn] if loss.grad_fn is not None else []
            while todo:
                node = todo.pop()
                sequence = node._sequence_nr()
                if sequence in seen or "AccumulateGrad" in node.name():
                    continue
                seen.add(sequence)
                _mark(self.owner(sequence), name)
                todo.extend(following for following, _ in node.next_functions if following is not None)
            for bucket in self.values.origins(loss):
                _mark(bucket, name)


def _mark(bucket: Bucket, name: str) -> None:
    if name not in bucket.serves:
        bucket.serves.append(name)
