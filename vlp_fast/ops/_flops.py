"""FLOP formulas of PyTorch's CPU attention and oneDNN products, which torch.utils.flop_counter leaves out."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

__all__ = ["register_cpu_flops"]


def register_cpu_flops() -> None:
    """Registers them once; a PyTorch that brings its own keeps its own."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def forward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(q_shape, k_shape, v_shape)

    def backward_flops(dout_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(q_shape, k_shape, v_shape) * 5 // 2  # five products where the forward has two

    def product_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]

    formulas: list[tuple[Any, Any]] = [(forward, forward_flops), (backward, backward_flops)]
    if torch.backends.mkldnn.is_available():
        formulas.append((torch.ops.mkldnn._linear_pointwise, product_flops))
    for op, formula in formulas:
        if op not in flop_registry:
            register_flop_formula(op)(formula)
