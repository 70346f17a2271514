"""Which modules of a model are towers, and what a call of one was given where the tower cannot say so itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from vlp_fast.passes import PassInfo
from vlp_fast.profiling.repeats import storage_key, tensors_in

__all__ = ["Described", "Padding", "called_modules", "default_towers", "describe_call", "named_towers"]

_NOT_IDS = ("mask", "position", "type", "segment", "label", "target")
_IMAGE_CHANNELS = (1, 3, 4)


class Described(NamedTuple):
    """`PassInfo` of a call, its kind ("image", "text", "pair", "other"), and whether padding could be seen at all."""

    info: PassInfo
    kind: str
    padding_known: bool


def named_towers(model: nn.Module, towers: Mapping[str, nn.Module | str] | Sequence[str] | None) -> dict[str, nn.Module]:
    """What `vlp_fast.profile` takes as `towers`, as modules by name.

    Raises: ValueError for a name that is no submodule; TypeError for what is no module.
    """
    if towers is None:
        return default_towers(model)
    if isinstance(towers, str):
        towers = [towers]
    pairs = towers.items() if isinstance(towers, Mapping) else [(name, name) for name in towers]
    inside = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name, tower in pairs:
        if isinstance(tower, str):
            if tower not in inside:
                raise ValueError(f"towers must name submodules of the model; received {tower!r}, which is none of them.")
            tower = inside[tower]
        if not isinstance(tower, nn.Module):
            raise TypeError(f"towers must be modules or names of submodules; received {type(tower).__name__} for {name!r}.")
        found[name] = tower
    if not found:
        raise ValueError("towers must name at least one module; received none.")
    return found


def default_towers(model: nn.Module) -> dict[str, nn.Module]:
    """The towers of a model that nobody named.

    The model's own ``towers()``, where it has that method. Else the outermost modules that hold a stack of layers (a ModuleList or
    Sequential of modules that have parts): a module with several such children is opened, and so is one that only wraps another, but
    not one that holds its stack itself. A model whose stacks lie in itself beside such modules has its stacks as towers. Without
    any stack: the children that have parameters, or the model itself.
    """
    own = getattr(model, "towers", None)
    if callable(own) and not isinstance(own, nn.Module):
        return dict(own())
    name, module = "", model
    while True:
        stacks, holders = _stacks(module), _holders(module)
        if stacks or len(holders) != 1:
            break
        ((child, module),) = holders.items()
        name = f"{name}.{child}" if name else child
    if holders:
        found = {**stacks, **{inner: m for child, part in holders.items() for inner, m in _opened(child, part).items()}}
    elif stacks:
        found = {name.rpartition(".")[2] or "model": module}
    else:
        found = {child: part for child, part in module.named_children() if any(True for _ in part.parameters())} or {
            "model": module
        }
    return found


def _opened(name: str, module: nn.Module) -> dict[str, nn.Module]:
    holders = _holders(module)
    if _stacks(module) or len(holders) < 2:
        return {name: module}
    return {inner: m for child, part in holders.items() for inner, m in _opened(f"{name}.{child}", part).items()}


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    with_parts = [type(child) for child in module if any(True for _ in child.children())]
    needed = 1 if isinstance(module, nn.ModuleList) else 2
    return any(with_parts.count(kind) >= needed for kind in with_parts)


def _stacks(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if _is_stack(child)}


def _holders(module: nn.Module) -> dict[str, nn.Module]:
    children = {name: child for name, child in module.named_children() if not _is_stack(child)}
    return {name: child for name, child in children.items() if any(_is_stack(part) for part in child.modules())}


def called_modules(tower: nn.Module) -> list[nn.Module]:
    """The tower, or, where it is a ModuleList or ModuleDict, which nobody calls, the modules in it in order."""
    if isinstance(tower, (nn.ModuleList, nn.ModuleDict)):
        return [module for child in tower.children() for module in called_modules(child)]
    return [tower]


class Padding:
    """Padding that one call saw and another, which is given neither ids nor a mask, has too.

    Args:
        embedded: shape of token ids that were embedded -> how many of them were padding; filled by the recorder.
    """

    def __init__(self, embedded: Mapping[tuple[int, int], int]) -> None:
        self.embedded = embedded
        self.known: dict[int, int] = {}
        self.alive: list[Tensor] = []

    def remember(self, output: Any, padded: int) -> None:
        """Notes that `padded` rows of the tensors ``[batch, length, dim]`` in `output` are padding."""
        for tensor in tensors_in(output):
            key = storage_key(tensor)
            if tensor.dim() == 3 and key:
                self.known[key] = padded
                self.alive.append(tensor)  # its storage's number could be given to another

    def of(self, tensors: Sequence[Tensor], sequences: int, slots: int) -> int | None:
        """Rows of padding of a call with `slots` rows that was given these tensors; None: unknown."""
        for tensor in tensors:
            found = self.known.get(storage_key(tensor))
            if found is not None and tensor.dim() == 3 and tensor.shape[0] * tensor.shape[1] == slots:
                return found
        same = (self.embedded.get((sequences, slots // sequences - more)) for more in (0, 1)) if sequences else ()
        return next((padded for padded in same if padded is not None), None)


def describe_call(
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    product_rows: Mapping[int, int],
    padding: Padding,
    pad_id: int | None,
) -> Described:
    """What one call of a tower processed.

    A tower with a `describe` that returns a `PassInfo` says it itself. Else: token ids ``[batch, length]`` make a call of text, images
    ``[batch, channels, height, width]`` one of images, both one of pairs. Rows are batch x length of the ids; without ids, those of the
    returned ``[batch, length, dim]`` where an argument has as many, else those of the linear layers that cost most. Padding is read off
    an argument named ``...attention_mask`` (1: keep) or ``...padding...`` (True: padding), or ids equal to `pad_id`; embedded rows have
    that of the call that returned them, or of ids of their shape that were embedded before. Nothing is known of padding on the meta
    device, or where there is neither a mask nor `pad_id`.
    """
    own = getattr(module, "describe", None)
    if callable(own):
        info = own(*args, **kwargs)
        if isinstance(info, PassInfo):
            role = f"momentum_{info.module}" if name.startswith("momentum_") else info.module
            kind = info.module.partition("_")[0]
            return Described(info._replace(module=role), kind if kind in ("image", "text", "pair") else "other", True)
    named = [(key, tensor) for key, value in _arguments(module, args, kwargs) for tensor in tensors_in(value)]
    ids = [t for key, t in named if t.dim() == 2 and _integer(t) and not any(word in key for word in _NOT_IDS)]
    images = [t for key, t in named if t.is_floating_point() and _image(t)]
    rows = [t for key, t in named if t.is_floating_point() and t.dim() == 3]
    kind = "pair" if ids and images else "image" if images else "text" if ids else _guess(name)
    main = next(iter([*ids, *images, *rows, *(t for _, t in named)]), None)
    sequences = 0 if main is None or main.dim() == 0 else int(main.shape[0]) * (int(main.shape[1]) if main.dim() == 5 else 1)
    costliest = max(product_rows, key=lambda n: product_rows[n], default=0)
    returned = [t.shape[0] * t.shape[1] for t in tensors_in(output) if t.dim() == 3 and t.is_floating_point()]
    if ids and not images:
        slots = ids[0].numel()
        if sequences and costliest > slots and (costliest - slots) in (sequences, 2 * sequences):
            slots = costliest  # class tokens beside the words
    elif ids:
        slots = next(iter(returned), costliest)
    else:
        given = {t.shape[0] * t.shape[1] for t in rows}
        slots = next((n for n in returned if n in given), None) or costliest or next(iter(returned), sequences)
    padded = _padded(named, ids, slots, pad_id)
    if padded is None and kind != "image":
        padded = padding.of(rows, sequences, slots)
    known = padded is not None or kind == "image"
    info = PassInfo(name, sequences, slots - (padded or 0), slots)
    if padded:
        padding.remember(output, padded)
    return Described(info, kind, known)


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # the call itself will say what is wrong with it
        bound = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    for name, value in bound.items():
        if isinstance(value, dict):  # **kwargs, or a tokenizer's dict
            yield from ((str(key), inner) for key, inner in value.items())
        else:
            yield name, value


def _integer(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)


def _image(tensor: Tensor) -> bool:
    return (tensor.dim() == 4 and tensor.shape[1] in _IMAGE_CHANNELS) or (
        tensor.dim() == 5 and tensor.shape[2] in _IMAGE_CHANNELS
    )


def _guess(name: str) -> str:
    words = {"image": ("image", "img", "vis"), "text": ("text", "txt", "caption", "lang", "modal")}
    return next((kind for kind, parts in words.items() if any(part in name.lower() for part in parts)), "other")


def _padded(named: Sequence[tuple[str, Tensor]], ids: Sequence[Tensor], slots: int, pad_id: int | None) -> int | None:
    """Rows of padding, None where they cannot be read."""
    tests: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = []
    for name, tensor in named:
        if tensor.dim() != 2 or tensor.device.type == "meta" or not (tensor.shape.numel() == slots or ids):
            continue
        if "padding" in name:
            tests.append((tensor, lambda mask: mask.bool()))
        elif name.endswith("attention_mask") and not name.startswith(("encoder_", "cross_")):
            tests.append((tensor, lambda mask: mask == 0))
    if not tests and pad_id is not None and ids and ids[0].device.type != "meta":
        tests.append((ids[0], lambda tokens: tokens == pad_id))
    if not tests:
        return None
    with _disable_current_modes():
        mask, is_padding = tests[0]
        return int(is_padding(mask).sum())
