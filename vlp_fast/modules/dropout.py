"""Dropout whose random numbers a CPU draws faster."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Dropout"]

STEPS = 2**16  # p is rounded to this many steps on the CPU


class Dropout(nn.Dropout):
    """nn.Dropout; on the CPU 16 random bits decide of a value, where PyTorch's takes a number in double precision, one at a time.

    There p is rounded to the nearest 1/65536, and what stays is divided by the share that this leaves on average.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape; the same shape and dtype."""
        dropped = round(self.p * STEPS)
        if not self.training or x.device.type != "cpu" or torch.compiler.is_compiling() or not 0 < dropped < STEPS:
            return super().forward(x)
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        kept = (bits >= dropped - STEPS // 2).to(x.dtype).mul_(STEPS / (STEPS - dropped))
        out = x * kept
        return x.copy_(out) if self.inplace else out
