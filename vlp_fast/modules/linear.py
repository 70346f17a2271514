"""nn.Linear whose products on a CPU go through the faster of PyTorch's two libraries."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from vlp_fast.ops import linear, linear_gelu

__all__ = ["Linear", "gelu_of", "is_plain"]


class Linear(nn.Linear):
    """`torch.nn.Linear`, its parameters and all, that calls `vlp_fast.ops.linear`. Shape: ``[..., in]`` -> ``[..., out]``."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


Layer = TypeVar("Layer", bound=nn.Module)


def is_plain(layer: nn.Module, kind: type[Layer]) -> TypeGuard[Layer]:
    """Whether the layer is of this type itself, unhooked: one that stands in its place (LoRA), or is watched, must be called as it is."""
    return type(layer) is kind and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)


def gelu_of(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU(layer(x)); one operation where the layer is plain."""
    if is_plain(layer, Linear):
        return linear_gelu(x, layer.weight, layer.bias)
    return F.gelu(layer(x))
