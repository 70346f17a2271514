"""Which tensors hold the same values because the same operations made them, and which calls without gradient they come from.

Every storage has a number. Two operations of the same kind on the same numbers, shapes and options give results with the same number;
random operations, writes in place and storages from outside get new ones. So a second product of the same tensors is known as a
repetition, however much the tensor was cast, reshaped or computed anew in between.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Values", "storage_key", "tensors_in"]

_NOTHING: frozenset[Any] = frozenset()


def storage_key(tensor: Tensor) -> int:
    """The storage's identity as long as somebody holds the storage or a `StorageWeakRef` of it; 0 for tensors without one."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without one storage
        return 0


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, dicts and objects of transformers (which are dicts)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


@cache
def _schema(func: Any) -> tuple[tuple[int | str, ...], bool, tuple[tuple[int, str, Any], ...]]:
    """Positions or names of written arguments; whether results are random or unset; arguments that say how random (0: not at all)."""
    arguments = func._schema.arguments
    written: tuple[int | str, ...] = tuple(
        argument.name if argument.kwarg_only else i
        for i, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    random = torch.Tag.nondeterministic_seeded in func.tags or "empty" in func.__name__
    dropout = tuple(
        (i, argument.name, argument.default_value if argument.has_default_value() else None)
        for i, argument in enumerate(arguments)
        if argument.name in ("dropout_p", "dropout")
    )
    return written, random, dropout


class Values:
    """Numbers of storages, and for each storage the buckets without gradient whose output went into it."""

    def __init__(self) -> None:
        self.fresh = itertools.count(1)
        self.numbers: dict[int, Any] = {}
        self.held: dict[int, StorageWeakRef] = {}  # keeps the identities from being given to other storages
        self.results: dict[Any, int] = {}
        self.made_by: dict[int, frozenset[Any]] = {}

    def _number(self, tensor: Tensor, key: int) -> Any:
        number = self.numbers.get(key)
        if number is None:
            number = self._renumber(tensor, key, next(self.fresh))
        return number

    def _renumber(self, tensor: Tensor, key: int, number: Any) -> Any:
        if key:
            self.numbers[key] = number
            if key not in self.held:
                self.held[key] = StorageWeakRef(tensor.untyped_storage())
        return number

    def _identity(self, value: Any, keys: set[int]) -> Any:
        if isinstance(value, Tensor):
            key = storage_key(value)
            keys.add(key)
            number = self._number(value, key) if key else next(self.fresh)
            place = (value.storage_offset(), value.stride()) if key else ()
            return (number, tuple(value.shape), *place, value.dtype, value.is_conj(), value.is_neg())
        if isinstance(value, (list, tuple)):
            return tuple(self._identity(item, keys) for item in value)
        return value if isinstance(value, (int, float, bool, str, type(None))) else repr(value)

    def update(self, func: Any, args: Any, kwargs: Any, out: Any, *, forward: bool) -> bool:
        """Takes note of one operation that has run; True where an earlier one had computed the same from the same."""
        written, random, dropout = _schema(func)
        again = False
        if forward:
            keys: set[int] = set()
            identity = (
                func,
                self._identity(args, keys),
                tuple((name, self._identity(kwargs[name], keys)) for name in sorted(kwargs)),
            )
            for i, name, default in dropout:
                random = bool(args[i] if i < len(args) else kwargs.get(name, default))
            again = not written and not random and identity in self.results
            number = self.results.get(identity, 0) if again else next(self.fresh)
            if not written and not random:
                self.results[identity] = number
            sources = _NOTHING.union(*(self.made_by.get(key, _NOTHING) for key in keys)) if self.made_by else _NOTHING
            for i, tensor in enumerate(tensors_in(out)):
                key = storage_key(tensor)
                if key and key not in keys:
                    self._renumber(tensor, key, (number, i))
                if key and sources:
                    self.made_by[key] = self.made_by.get(key, _NOTHING) | sources
        for place in written:
            target = args[place] if isinstance(place, int) and place < len(args) else kwargs.get(place)
            for tensor in tensors_in(target):
                key = storage_key(tensor)
                self._renumber(tensor, key, next(self.fresh))
                if forward and key and sources:
                    self.made_by[key] = self.made_by.get(key, _NOTHING) | sources
        return again

    def mark(self, output: Any, bucket: Any) -> None:
        """From here on, what is computed from `output` comes from this bucket."""
        for tensor in tensors_in(output):
            key = storage_key(tensor)
            if key:
                self._number(tensor, key)
                self.made_by[key] = self.made_by.get(key, _NOTHING) | {bucket}

    def origins(self, tensor: Tensor) -> frozenset[Any]:
        """The buckets marked on what `tensor` was computed from."""
        return self.made_by.get(storage_key(tensor), _NOTHING)
