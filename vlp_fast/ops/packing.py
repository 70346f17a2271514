"""Weights in the layout in which oneDNN computes, kept for as long as they do not change: for generating and encoding on a CPU."""

from __future__ import annotations

from functools import lru_cache
from types import TracebackType

import torch
from torch import Tensor, nn

__all__ = ["packed_weights"]

DTYPES = (torch.float32, torch.bfloat16)


class packed_weights:
    """Within the block, products with the model's weights read copies of them in oneDNN's own layout: faster, the fewer the rows.

        with packed_weights(model):
            for images in batches:
                generate(model, images, eos_id=102)

    A weight is copied when it is first used in a call that records no gradient. The copies belong to the object: one that is kept may be
    entered again and again. A weight that is changed in place (an optimizer's step, `load_state_dict`) is copied again at its next use;
    a change that PyTorch does not count (through ``.data`` or NumPy) must not happen while the object is in use.

    Args:
        model: its parameters on the CPU, fp32 or bf16.

    Memory: the weights a second time, in fp32 where the CPU has no products of bf16. Blocks of several objects may be nested; other
    threads see them too.
    Raises: ValueError: parameters elsewhere or of another dtype. RuntimeError: a PyTorch without oneDNN.
    """

    def __init__(self, model: nn.Module) -> None:
        if not torch.backends.mkldnn.is_available():
            raise RuntimeError("packed_weights needs a PyTorch built with oneDNN; this one is not.")
        for name, parameter in model.named_parameters():
            if parameter.device.type != "cpu" or parameter.dtype not in DTYPES:
                raise ValueError(
                    f"packed_weights takes fp32 and bf16 parameters on the CPU; {name} is {parameter.dtype} on {parameter.device}."
                )
        # the experts of a multiway layer are stacked
        parts = [list(p) if p.dim() == 3 else [p] for p in model.parameters() if p.dim() in (2, 3)]
        weights = [weight.detach() for several in parts for weight in several if weight.is_contiguous()]
        self._entries = {weight.data_ptr(): _Entry(weight) for weight in weights}
        self._added: list[int] = []

    def __enter__(self) -> packed_weights:
        self._added = [pointer for pointer in self._entries if pointer not in _PACKED]
        _PACKED.update({pointer: self._entries[pointer] for pointer in self._added})
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for pointer in self._added:
            del _PACKED[pointer]
        self._added = []


class _Entry:
    """A weight ``[out, in]``, which stays alive here, so that no other can take its address; and its copy."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.version, self.packed = weight, -1, weight

    def copy(self) -> Tensor:
        version = 0 if self.weight.is_inference() else self.weight._version
        if self.version != version:
            weight = self.weight if self.weight.dtype == torch.float32 or supports_bf16() else self.weight.float()
            self.packed, self.version = torch.ops.mkldnn._reorder_linear_weight(weight, None), version
        return self.packed


@torch.compiler.assume_constant_result
def supports_bf16() -> bool:
    """Whether this CPU has products of bf16 that oneDNN uses."""
    return _supports_bf16()


@lru_cache(maxsize=1)
def _supports_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


_PACKED: dict[int, _Entry] = {}  # by the address of the weight


def any_packed() -> bool:
    """Whether any block of `packed_weights` is open."""
    return bool(_PACKED)


def find_packed(transposed: Tensor) -> Tensor | None:
    """The copy of the weight whose transpose ``[in, out]`` is the second operand of a product."""
    entry = _PACKED.get(transposed.data_ptr())
    if entry is None or transposed.dtype != entry.weight.dtype or transposed.shape[::-1] != entry.weight.shape:
        return None
    return entry.copy() if transposed.stride() == (1, transposed.shape[0]) else None
