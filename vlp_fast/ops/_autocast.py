"""Autocast for our ops: under `torch.autocast` floating inputs are cast as `torch.nn.functional.linear` casts its own.

And what the forwards of a step share of a parameter: its cast, and the gradients of a table of words.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["autocast_dtype", "autocast_to_compute", "parameters_shared", "shared_table"]

# (id, dtype) -> a parameter, its version, and what it was cast to
_Casts = dict[tuple[int, torch.dtype], tuple[Tensor, int, Tensor]]
_casts: ContextVar[_Casts | None] = ContextVar("casts", default=None)
_tables: ContextVar[dict[int, tuple[Tensor, Table]]] = ContextVar("tables")  # id -> a parameter, and what it is read through


@contextmanager
def parameters_shared() -> Iterator[None]:
    """Within it, a parameter that several forwards use is cast by the first; their gradients add up before they are cast back.

    For the forwards of one step, whose graph is alive. A parameter that was written to meanwhile is cast again. See `shared_table`.
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


class Table(NamedTuple):
    """A table of words twice: for lookups, of which the gradients are sparse where the two are not one, and for a head."""

    lookups: Tensor
    head: Tensor


def shared_table(weight: Tensor) -> Table:
    """A parameter in which rows are looked up, and which may be a head's weight too; within `parameters_shared` on a CPU as two views.

    A lookup's dense gradient fills as much memory as the table for a few hundred rows, which costs a CPU more than the rows. So those of
    all lookups of a step add up sparse, and then with the head's into one dense gradient.
    """
    tables = None if torch.compiler.is_compiling() else _tables.get(None)
    if (
        tables is None
        or weight.device.type != "cpu"
        or not (weight.is_leaf and weight.requires_grad and torch.is_grad_enabled())
    ):
        return Table(weight, weight)
    found = tables.get(id(weight))
    if found is None:
        found = tables[id(weight)] = (weight, Table(*_SharedTable.apply(weight)))
    return found[1]


class _SharedTable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx, of_lookups: Tensor | None, of_head: Tensor | None) -> Tensor | None:
        if of_lookups is None:
            return of_head
        return of_lookups.to_dense() if of_head is None else of_head + of_lookups


def autocast_to_compute(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on for their device, unchanged otherwise (float64 is left alone)."""
    dtype = autocast_dtype(next(t.device.type for t in tensors if t is not None))
    if dtype is None:
        return tensors
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype in (torch.float64, dtype) else _cast(t, dtype) for t in tensors
    )


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of linear layers under autocast; None where it is off."""
    on = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else None


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
