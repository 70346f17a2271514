"""Autocast for our ops: under `torch.autocast` floating inputs are cast as `torch.nn.functional.linear` casts its own."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["autocast_to_compute"]


def autocast_to_compute(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on for their device, unchanged otherwise (float64 is left alone)."""
    device_type = next(t.device.type for t in tensors if t is not None)
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
