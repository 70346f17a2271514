"""Autocast for our ops: under `torch.autocast` floating inputs are cast as `torch.nn.functional.linear` casts its own.

And what the forwards of a step share of a parameter: its cast, and the gradients of a table of words.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["autocast_to_compute", "parameters_shared", "table_of_lookups"]

# (id, dtype) -> a parameter, its version, and what it was cast to
_Casts = dict[tuple[int, torch.dtype], tuple[Tensor, int, Tensor]]
_casts: ContextVar[_Casts | None] = ContextVar("casts", default=None)
_tables: ContextVar[dict[int, tuple[Tensor, Tensor]]] = ContextVar(
    "tables"
)  # id -> a parameter, and the table through which it is read


@contextmanager
def parameters_shared() -> Iterator[None]:
    """Within it, a parameter that several forwards use is cast by the first; their gradients add up before they are cast back.

    For the forwards of one step, whose graph is alive. A parameter that was written to meanwhile is cast again. See `table_of_lookups`.
    """
    if _casts.get() is not None or torch.compiler.is_compiling():
        yield
        return
    tokens = _casts.set({}), _tables.set({})
    try:
        yield
    finally:
        _casts.reset(tokens[0])
        _tables.reset(tokens[1])


def table_of_lookups(weight: Tensor) -> Tensor:
    """A parameter in which rows are looked up; within `parameters_shared` on a CPU a view, of which gradients may be sparse.

    A lookup's dense gradient fills as much memory as the table for a few hundred rows, which costs a CPU more than the rows. Through one
    view the sparse gradients of a step's lookups, and the dense one of a head with the same weight, add up into one dense gradient.
    """
    tables = None if torch.compiler.is_compiling() else _tables.get(None)
    if (
        tables is None
        or weight.device.type != "cpu"
        or not (weight.is_leaf and weight.requires_grad and torch.is_grad_enabled())
    ):
        return weight
    found = tables.get(id(weight))
    if found is None:
        found = tables[id(weight)] = (weight, _Table.apply(weight))
    return found[1]


class _Table(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.to_dense() if grad.is_sparse else grad


def autocast_to_compute(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on for their device, unchanged otherwise (float64 is left alone)."""
    device_type = next(t.device.type for t in tensors if t is not None)
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype in (torch.float64, dtype) else _cast(t, dtype) for t in tensors
    )


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling() or not (t.is_leaf and t.requires_grad and torch.is_grad_enabled()):
        return t.to(dtype)
    casts = _casts.get()
    if casts is None:
        return t.to(dtype)
    found = casts.get((id(t), dtype))
    if found is None or found[1] != t._version:
        found = casts[id(t), dtype] = (t, t._version, t.to(dtype))
    return found[2]
