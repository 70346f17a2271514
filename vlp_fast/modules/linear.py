"""nn.Linear whose fp32 products on a CPU go through the faster of PyTorch's two libraries."""

from __future__ import annotations

from torch import Tensor, nn

from vlp_fast.ops import linear

__all__ = ["Linear"]


class Linear(nn.Linear):
    """`torch.nn.Linear`, its parameters and all, that calls `vlp_fast.ops.linear`. Shape: ``[..., in]`` -> ``[..., out]``."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
