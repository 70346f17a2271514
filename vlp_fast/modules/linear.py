"""nn.Linear whose products on a CPU go through the faster of PyTorch's two libraries."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vlp_fast.ops import linear, linear_gelu

__all__ = ["Linear", "gelu_of"]


class Linear(nn.Linear):
    """`torch.nn.Linear`, its parameters and all, that calls `vlp_fast.ops.linear`. Shape: ``[..., in]`` -> ``[..., out]``."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def gelu_of(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU(layer(x)); one operation where the layer is ours, unhooked: one that stands in its place (LoRA) is called as it is."""
    if type(layer) is Linear and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks):
        return linear_gelu(x, layer.weight, layer.bias)
    return F.gelu(layer(x))
