"""Layers as plain functions, for many calls with few rows and no gradient: what a layer asks at every call is asked once.

A layer that is not of the type named, or that has hooks, is called as it is, so that one put in its place (LoRA) or watched works as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from vlp_fast.modules.feedforward import MLP
from vlp_fast.modules.linear import Linear, gelu_of, is_plain
from vlp_fast.modules.multiway import MultiwayLayerNorm, MultiwayLinear
from vlp_fast.ops.linear import bind_linear

__all__ = ["Bound", "bind", "bind_expert", "bind_gelu", "bind_mlp"]

Bound = Callable[[Tensor], Tensor]


def bind(layer: nn.Module) -> Bound:
    """A `Linear` or LayerNorm of rows ``[rows, dim]``."""
    if is_plain(layer, Linear):
        return bind_linear(layer.weight, layer.bias)
    if is_plain(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1:
        return _norm(layer.weight, layer.bias, layer.eps, layer.normalized_shape[0])
    return layer


def bind_gelu(layer: nn.Module) -> Bound:
    """GELU of a `Linear`."""
    return bind_linear(layer.weight, layer.bias, gelu=True) if is_plain(layer, Linear) else partial(gelu_of, layer)


def bind_mlp(mlp: nn.Module) -> Bound:
    """An `MLP` of rows ``[rows, dim]``."""
    if not is_plain(mlp, MLP):
        return mlp
    first, second = bind_gelu(mlp.fc1), bind(mlp.fc2)
    return lambda x: second(first(x))


def bind_expert(layer: nn.Module, expert: int, num_experts: int) -> Bound:
    """One expert of a `MultiwayLinear` or `MultiwayLayerNorm`, for rows that are all of it."""
    if is_plain(layer, MultiwayLinear) and _by_torch(layer):
        bias = None if layer.bias is None else layer.bias[expert]
        return bind_linear(layer.weight[expert], bias, gelu=layer.activation == "gelu")
    if is_plain(layer, MultiwayLayerNorm) and _by_torch(layer):
        return _norm(layer.weight[expert], layer.bias[expert], layer.eps, layer.weight.shape[1])
    return lambda x: layer(x, (*[0] * (expert + 1), *[len(x)] * (num_experts - expert)))


def _by_torch(layer: MultiwayLinear | MultiwayLayerNorm) -> bool:
    return layer.weight.device.type == "cpu" and layer.backend in (None, "torch")


def _norm(weight: Tensor | None, bias: Tensor | None, eps: float, width: int) -> Bound:
    shape = (width,)
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
