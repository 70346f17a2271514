"""FLOP formulas of PyTorch's CPU attention, which torch.utils.flop_counter leaves out: without them a CPU profile misses attention."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

__all__ = ["register_cpu_attention_flops"]


def register_cpu_attention_flops() -> None:
    """Registers them once; a PyTorch that brings its own keeps its own."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def forward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(q_shape, k_shape, v_shape)

    def backward_flops(dout_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(q_shape, k_shape, v_shape) * 5 // 2  # five products where the forward has two

    for op, formula in ((forward, forward_flops), (backward, backward_flops)):
        if op not in flop_registry:
            register_flop_formula(op)(formula)
