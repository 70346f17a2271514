"""Profiles of a step: anybody's, in a ``with`` block, and those of this library's models."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlp_fast.passes import current_loss, observe_losses
from vlp_fast.profiling.recorder import STEP, Bucket, Recorder
from vlp_fast.profiling.repeats import storage_key, tensors_in
from vlp_fast.profiling.rows import ProfileRow, StepProfile, calls_of, rows_of, totals_of
from vlp_fast.profiling.table import text_table
from vlp_fast.profiling.towers import Padding, called_modules, describe_call, named_towers
from vlp_fast.training import PretrainingObjective, build_pretraining, caption_lengths, synthetic_batch

__all__ = ["Profile", "profile", "profile_model", "profile_step"]


class Profile:
    """A block of code under observation; made by `profile`, read when the block is left."""

    def __init__(
        self,
        model: nn.Module,
        towers: Mapping[str, nn.Module | str] | Sequence[str] | None,
        *,
        pad_id: int | None,
        device: torch.device | str | None,
    ) -> None:
        self._towers = named_towers(model, towers)
        parameters = [*model.parameters(), *model.buffers(), *(p for t in self._towers.values() for p in t.parameters())]
        first = next(iter(parameters), None)
        self.device = torch.device(device) if device is not None else first.device if first is not None else torch.device("cpu")
        self._known = {storage_key(tensor) for tensor in parameters}
        self._names = {storage_key(parameter): name for name, parameter in reversed(list(model.named_parameters()))}
        self._model, self._pad_id = model, pad_id
        self._recorder: Recorder | None = None
        self._closed = False
        self._losses: dict[str, Tensor | None] = {}

    def __enter__(self) -> Profile:
        if self._recorder is not None:
            raise RuntimeError("a profile observes one block; make another one with vlp_fast.profile for the next.")
        recorder = self._recorder = Recorder(self.device, self._names, self._pad_id)
        padding = Padding(recorder.embedded)
        with contextlib.ExitStack() as stack:
            for name, tower in self._towers.items():
                _hook(stack, recorder, name, tower, padding, self._pad_id)
            stack.enter_context(observe_losses(recorder.changed))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(recorder.keep(self._known), lambda saved: saved))
            stack.enter_context(recorder)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        assert self._recorder is not None
        self._recorder.changed()  # nodes made from here on are no tower's
        self._recorder.finish()
        self._closed = True

    def attribute(self, losses: Mapping[str, Tensor] | Tensor) -> None:
        """Says which calls each loss needed, from the autograd graph that ends in it.

        Call it once for all losses, inside the block or after it, before or after the backward: a backward frees the tensors that a
        graph kept, not its edges, which live as long as the loss does. The losses must still carry their graph: not detached, not
        ``.item()``. A call without gradient is in no graph; it serves the losses whose value was computed from what it returned.

        Args:
            losses: name -> scalar, or one scalar, which is then called "loss". Others in the mapping than tensors are left out.

        Raises:
            ValueError: a loss has no graph, or there is none. RuntimeError: the block was not entered yet.
        """
        if self._recorder is None:
            raise RuntimeError(
                "attribute needs a step that ran: call it inside the with block of vlp_fast.profile, or after it."
            )
        given = {"loss": losses} if isinstance(losses, Tensor) else {k: v for k, v in losses.items() if isinstance(v, Tensor)}
        if not given:
            raise ValueError("losses must have at least one tensor; received none.")
        for name, loss in given.items():
            if loss.grad_fn is None:
                raise ValueError(
                    f"losses must carry their autograd graph; {name!r} has none (detached, or computed without gradient)."
                )
        self._recorder.attribute(given)
        self._losses.update(dict.fromkeys(given))

    @property
    def rows(self) -> list[ProfileRow]:
        """One row per loss and module, see `ProfileRow`; without `attribute`, the loss of everything is "step"."""
        return rows_of(self._finished(), list(self._losses))

    @property
    def totals(self) -> dict[str, Any]:
        """Totals of the step, see `StepProfile`."""
        return totals_of(self._finished(), self.rows, list(self._losses))

    def report(self, name: str | None = None, *, size: str = "", schedule: str = "", batch: int | None = None) -> StepProfile:
        """All of it as data, for `vlp_fast.profile_page` and `chrome_trace`.

        Args:
            name: of the model; default: its class. size, schedule: words for the title. batch: pairs; default: the sequences of the
                largest call.
        """
        recorder = self._finished()
        calls = [bucket for bucket in recorder.buckets if bucket.call and bucket.info is not None]
        if batch is None:
            batch = min((b.info.sequences for b in calls if b.info is not None), default=0)
        called = {bucket.tower for bucket in calls}
        silent = [name for name in self._towers if name not in called]
        return StepProfile(
            name or type(self._model).__name__,
            size,
            schedule,
            batch,
            str(self.device),
            self.rows,
            self.totals,
            calls_of(recorder),
            silent,
        )

    def to_json(self) -> dict[str, Any]:
        """`report` as plain dicts and lists."""
        return self.report().to_json()

    def table(self) -> str:
        """`rows` and `totals` as text, 100 columns or somewhat more."""
        return text_table(self.report())

    def _finished(self) -> Recorder:
        if self._recorder is None or not self._closed:
            raise RuntimeError("a profile is read when its with block has been left.")
        return self._recorder


def profile(
    model: nn.Module,
    towers: Mapping[str, nn.Module | str] | Sequence[str] | None = None,
    *,
    pad_id: int | None = None,
    device: torch.device | str | None = None,
) -> Profile:
    """Observes what runs in a ``with`` block: which loss costs which forward passes, in any PyTorch model and unchanged.

    Every call of a tower is counted; every operation's FLOPs, time and kept memory go to the innermost call that is open, in the
    backward to the call whose forward made the autograd node; work outside the towers goes to the loss that its node leads to.

    Example: ``with vlp_fast.profile(model) as p: losses = step(); p.attribute(losses)``, then ``print(p.table())``. A backward
    inside the block is profiled too.

    Args:
        model: the model, or whatever module holds the towers.
        towers: name -> submodule or its dotted name, or a list of names. A ModuleList counts as one tower: a call of its first module
            starts a pass. Default: the model's own ``towers()``, where it has that method; else the outermost modules that hold a stack of
            layers, a module with several of them being opened.
        pad_id: token id that is padding, for towers that are given ids and no mask. Without a mask or it, padding is not seen.
        device: of the step; default: the device of the first parameter. On "meta" there are FLOPs and no times.

    Rows of repeated work: a product is repeated when the same operation was already done in this block on tensors with the same values, by
    descent: results of the same deterministic operations on the same storages with nothing written to them in between. So an image that
    is encoded twice, or whose keys are projected thrice with tied weights, is found; two different tensors that happen to be equal are
    not, and nothing is found behind dropout with p > 0. Only products (what has a FLOP formula) are booked, and only their forward.

    Rows never read: where a backward runs in the block, rows of a tower's output whose gradient is zero. All but the last layer may have
    needed them, as keys and values; what could be saved is the last layer's row work. A second call for the same rows is not seen here.

    Not seen: operations inside other compiled or fused regions (`torch.compile`), other threads (nn.DataParallel), FLOPs of operations
    without a formula. A backward that recomputes activations books the recomputation on the backward. Times contain no
    overhead of the observation but that of launching each operation alone, and CUDA times are the device's.

    Raises: ValueError or TypeError for towers that are none of the model's modules.
    """
    return Profile(model, towers, pad_id=pad_id, device=device)


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
    found, losses = _observed(objective, inputs, backward, device, options)
    return found.rows, found.totals, losses


def _observed(
    objective: PretrainingObjective, inputs: Any, backward: bool, device: torch.device | str | None, options: dict[str, Any]
) -> tuple[Profile, dict[str, Tensor]]:
    with profile(objective, device=device) as found:
        losses = objective(inputs, **options)
        total = objective.total(losses)
        found.attribute(losses)
        if backward:
            total.backward()
    return found, losses


def profile_model(
    model: str,
    size: str = "base",
    *,
    schedule: str = "packed",
    losses: Sequence[str] | None = None,
    image_size: int | None = None,
    batch: int = 8,
    device: str = "meta",
    backward: bool = False,
    seed: int = 0,
    **changes: Any,
) -> StepProfile:
    """Builds a model with random weights, gives it a batch of random images and captions, and profiles one pretraining step.

    Captions have `vlp_fast.training.caption_lengths`. On "meta" nothing is computed or allocated: shapes and FLOPs only, and hard
    negatives are the next pair of the batch, as they are for matching without the contrast that draws them. On a real device one step
    runs first to warm up.

    Args:
        model, size, schedule, losses, changes: as in `vlp_fast.training.build_pretraining`. image_size: default: the preset's.
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
        objective = build_pretraining(model, size, schedule=schedule, losses=losses, **changes)
    config = objective.model.config
    generator = torch.Generator().manual_seed(seed)
    inputs = objective.prepare(synthetic_batch(config, caption_lengths(batch), generator), generator).to(device)
    options: dict[str, Any] = {}
    if "itm" in objective.losses and (kind == "meta" or "itc" not in objective.losses):
        if batch < 2:
            raise ValueError(f"hard negatives need at least 2 pairs in the batch; received {batch}.")
        following = torch.arange(batch).roll(-1)
        options["negatives"] = (following, following)
    if kind != "meta":
        warm = objective.total(objective(inputs, **options))
        if backward:
            warm.backward()
            objective.zero_grad(set_to_none=True)
    found, _ = _observed(objective, inputs, backward, device, options)
    return found.report(model, size=size, schedule=schedule, batch=batch)


def _hook(
    stack: contextlib.ExitStack, recorder: Recorder, name: str, tower: nn.Module, padding: Padding, pad_id: int | None
) -> None:
    """Hooks that open and close a call of the tower; the first module of a list opens a new call, the others go on with it."""
    modules = called_modules(tower)
    latest: list[Bucket] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is modules[0] or not latest:
            bucket = Bucket(current_loss() or STEP, name, tower=name)
        else:
            bucket = latest[-1]
        latest.append(recorder.enter(bucket))

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        bucket = recorder.leave()
        if torch._C._current_autograd_node() is not None:
            return
        if bucket.info is None:
            described = describe_call(name, module, args, kwargs, output, bucket.product_rows, padding, pad_id)
            bucket.info, bucket.kind, bucket.padding_known = described
            bucket.module = bucket.info.module
        outputs = list(tensors_in(output))
        bucket.grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in outputs)
        if not bucket.grad:
            recorder.values.mark(outputs, bucket)
        elif module is modules[-1]:
            whole = (t for t in outputs if t.requires_grad and t.dim() > 1 and t.numel() == bucket.info.slots * t.shape[-1])
            watched = next(whole, None)
            if watched is not None:
                recorder.watch_gradient(bucket, watched)

    for module in modules:
        for handle in (
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        ):
            stack.callback(handle.remove)
