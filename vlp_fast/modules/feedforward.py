"""MLP and stochastic depth on packed rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlp_fast.modules.linear import Linear, gelu_of, is_plain
from vlp_fast.ops import mlp

__all__ = ["MLP", "DropPath"]


class MLP(nn.Module):
    """fc2(GELU(fc1(x))) with the exact (erf) GELU.

    Shape: ``[rows, dim]`` -> ``[rows, dim]``.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        if (
            x.device.type == "cpu"
            and x.dim() == 2
            and torch.is_grad_enabled()
            and is_plain(fc1, Linear)
            and is_plain(fc2, Linear)
        ):
            return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return fc2(gelu_of(fc1, x))


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole samples while training, and divides the rest by what is kept.

    Args:
        p: probability of dropping, in [0, 1).

    Shape: x ``[rows, dim]``; samples int64 ``[rows]``, the sample each row belongs to; num_samples.
    Source: Huang et al., Deep Networks with Stochastic Depth (2016).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p must be in [0, 1); received {p}.")
        self.p = p

    def forward(self, x: Tensor, samples: Tensor | None, num_samples: int) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        if samples is None:
            raise ValueError("DropPath needs the sample of each row while training with p > 0; received None.")
        keep = (torch.rand(num_samples, device=x.device) >= self.p).to(x.dtype) / (1.0 - self.p)
        return x * keep[samples, None]
