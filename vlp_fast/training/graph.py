"""A pretraining step as a CUDA graph: its kernels are recorded once, and started again for new inputs without the host between them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlp_fast.distributed import world
from vlp_fast.segments import KeptTensors, keep_host_tensors
from vlp_fast.training.objective import PretrainingObjective

__all__ = ["GraphedStep"]

WARM_UP_STEPS = 3  # as torch.cuda.make_graphed_callables


class GraphedStep:
    """Forward and backward of a pretraining step for inputs of fixed lengths, captured in one CUDA graph.

    Equivalent to: ``losses = objective(inputs, **options); objective.total(losses).backward()``, under autocast where `autocast` is given.

    Args:
        objective: on a CUDA device, in the mode (training or evaluation) that its steps are to have. Losses of its earlier steps must
            not be alive, and its parameters and buffers must stay where they are: update them in place, as optimizers do.
        inputs: an example of what ``objective.prepare`` gives, on the same device. Its tensors are copied. Whatever it holds besides
            tensors and texts (the lengths of captions, which image each describes, how many patches are masked) is the same for all inputs.
        autocast: the dtype of torch.autocast around the forward; None: no autocast.
        options: of ``objective.forward``, the same in every step (`alpha` too). BLIP, ALBEF and VLMo need `negatives`, on the CPU:
            captions differ in length, so which are negatives decides how many rows a step has, and a step that draws them waits for the
            device.

    Three steps run before the capture, on a side stream; what a step writes besides gradients (momentum encoders, queues) is then put
    back. No other thread may allocate CUDA or pinned memory meanwhile. Gradients of the objective's parameters are zero afterwards.
    Every call draws new random numbers (dropout, patches left out) from the default generator of the device.

    Raises: ValueError for inputs or parameters that are not on one CUDA device, negatives that are not given, options on a device, inputs
        that are no dataclass, or more than one process.
    Memory: a graph keeps the memory of all activations of a step to itself for as long as it lives.
    """

    def __init__(
        self, objective: PretrainingObjective, inputs: Any, *, autocast: torch.dtype | None = None, **options: Any
    ) -> None:
        device = _check(objective, inputs, options)
        self._inputs = _copy(inputs)
        # the graph has the addresses of these
        self._objective, self._kept = objective, KeptTensors()
        written = [*objective.buffers(), *(p for p in objective.parameters() if not p.requires_grad)]
        before = [t.detach().clone() for t in written]
        objective.zero_grad(set_to_none=True)

        def step() -> dict[str, Tensor]:
            # casts that autocast remembers would outlive the graph's run
            with torch.autocast("cuda", autocast, enabled=autocast is not None, cache_enabled=False):
                losses = objective(self._inputs, **options)
                total = objective.total(losses)
            total.backward()
            return {name: loss.detach() for name, loss in losses.items()}

        with torch.cuda.device(device), keep_host_tensors(self._kept):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_STEPS):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.no_grad():
                for tensor, value in zip(written, before, strict=True):
                    tensor.copy_(value)
            # made before the capture, so that the backward adds to them
            self._gradients = [(p, torch.zeros_like(p)) for p in objective.parameters() if p.grad is not None]
            objective.zero_grad(set_to_none=True)
            self._bind_gradients()
            self._graph = torch.cuda.CUDAGraph()
            # on the stream of the warm-up, where libraries and caches have what they need
            with torch.cuda.graph(self._graph, stream=stream):
                self._losses = step()

    def __call__(self, inputs: Any) -> dict[str, Tensor]:
        """One step: the losses of these inputs; their gradients are added to ``parameter.grad``.

        Args:
            inputs: as those captured but for the numbers in their tensors, on any device; from pinned memory the copy does not wait.

        Returns: scalars by name, without a gradient.
        Raises: ValueError where a length, a shape or a dtype is not the captured one.
        """
        _fill(self._inputs, inputs)
        self._bind_gradients()
        self._graph.replay()
        return {name: loss.clone() for name, loss in self._losses.items()}

    def _bind_gradients(self) -> None:
        """Gradients are where the graph adds to them, also after ``zero_grad(set_to_none=True)`` or a step without the graph."""
        moved = [(p, own) for p, own in self._gradients if p.grad is not own]
        if moved:
            torch._foreach_zero_([own for _, own in moved])
        for parameter, own in moved:
            if parameter.grad is not None:
                own.copy_(parameter.grad)
            parameter.grad = own


def _check(objective: PretrainingObjective, inputs: Any, options: dict[str, Any]) -> torch.device:
    """The device of all; raises where a step cannot be captured."""
    if not is_dataclass(inputs):
        raise ValueError(f"inputs must be what the objective's prepare gives; received {type(inputs).__name__}.")
    places = {name: value.device for name, value in _leaves(inputs, "inputs") if isinstance(value, Tensor)}
    places |= {f"the objective's {name}": parameter.device for name, parameter in objective.named_parameters()}
    device = next(iter(places.values()))
    for name, place in places.items():
        if place.type != "cuda" or place != device:
            raise ValueError(f"a CUDA graph needs inputs and objective on one CUDA device; {name} is on {place}.")
    for name, value in options.items():
        for part in value if isinstance(value, tuple | list) else [value]:
            if isinstance(part, Tensor) and part.device.type != "cpu":
                raise ValueError(
                    f"{name} must be on the CPU, as the host reads it while the step is captured; received {part.device}."
                )
    chooses = "negatives" in inspect.signature(objective.forward).parameters and "itm" in objective.losses
    if chooses and options.get("negatives") is None:
        raise ValueError(
            "negatives must be given to a step that is captured, as one that draws them waits for the device; received None."
        )
    size = world()[1]
    if size > 1:
        raise ValueError(
            f"a captured step must run in one process, as gathering features waits for the device; received {size}."
        )
    return device


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Whatever inputs hold, with its name: "inputs.pairs.token_ids"."""
    if is_dataclass(value):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name), f"{name}.{field.name}")
    else:
        yield name, value


def _copy(inputs: Any) -> Any:
    """Inputs with tensors of their own."""
    if isinstance(inputs, Tensor):
        return inputs.clone()
    if is_dataclass(inputs):
        return replace(inputs, **{f.name: _copy(getattr(inputs, f.name)) for f in fields(inputs)})  # type: ignore[type-var]
    return inputs


def _fill(captured: Any, inputs: Any) -> None:
    """Copies the tensors of inputs into those captured, after a look at everything else."""
    if type(inputs) is not type(captured):
        raise ValueError(f"inputs must be {type(captured).__name__}, as captured; received {type(inputs).__name__}.")
    pairs = list(zip(_leaves(captured, "inputs"), _leaves(inputs, "inputs"), strict=True))
    for (name, own), (_, new) in pairs:
        if isinstance(own, Tensor):
            if (own.shape, own.dtype) != (new.shape, new.dtype):
                raise ValueError(
                    f"{name} must be {own.dtype} of shape {list(own.shape)}, as captured; received {new.dtype} of {list(new.shape)}."
                )
        elif own != new and not (isinstance(own, tuple) and all(isinstance(text, str) for text in own)):
            raise ValueError(f"{name} must be what was captured, as a CUDA graph has fixed lengths: {own}; received {new}.")
    for (_, own), (_, new) in pairs:
        if isinstance(own, Tensor):
            own.copy_(new, non_blocking=True)
