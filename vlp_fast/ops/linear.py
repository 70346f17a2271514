"""A linear layer as torch.nn.functional has it, through the faster of PyTorch's two fp32 libraries on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_fast.ops import _products
from vlp_fast.ops._autocast import autocast_dtype, autocast_to_compute
from vlp_fast.ops._direct import runs_directly
from vlp_fast.ops._products import bound_product, bound_turned, is_bf16_for_onednn, is_for_onednn, linear_bf16, mm, widens
from vlp_fast.ops.multiway import multiway_linear
from vlp_fast.ops.packing import any_packed

__all__ = ["bind_linear", "linear", "linear_gelu"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``.

    Equivalent to: ``torch.nn.functional.linear``, which it calls but for weights that `packed_weights` holds, for bf16 on a CPU where no
    gradient is recorded, for fp32 on a CPU whose products are faster through oneDNN (`vlp-fast info` says which), and for bf16 on a CPU
    without products of it, which are made in fp32 and rounded; there it is `multiway_linear` with one expert, which has no second
    derivative.

    Args:
        x: ``[..., in]``. weight: ``[out, in]``. bias: ``[out]`` or None.

    Returns: ``[..., out]``.
    Raises: what ``torch.nn.functional.linear`` raises.
    """
    if x.device.type == "cpu" and widens(x, autocast_dtype("cpu")):
        x, weight, bias = autocast_to_compute(x, weight, bias)  # type: ignore[assignment]
    if _fits(x, weight, bias):
        if (
            bias is not None
            and is_bf16_for_onednn(x)
            and not any_packed()
            and weight.is_contiguous()
            and runs_directly("torch", x, weight, bias)
        ):
            return linear_bf16(x, weight, bias)
        rows, shape = x.numel() // weight.shape[1], (*x.shape[:-1], weight.shape[0])
        ours = is_for_onednn(x, weight.shape[0]) or widens(x)
        # where some weights are packed, mm sees whether this one is
        if (ours or any_packed()) and runs_directly("torch", x, weight, bias):
            return mm(x.reshape(rows, weight.shape[1]), weight.t(), bias).view(shape)
        if ours:
            biases = None if bias is None else bias[None]
            flat = x.reshape(rows, weight.shape[1])
            return multiway_linear(flat, weight[None], biases, (0, rows), backend="torch").view(shape)
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``gelu(linear(x, weight, bias))`` with erf; without a gradient on a CPU one pass of oneDNN: the GELU of sums in fp32 for 16-bit x."""
    if _fits(x, weight, bias) and runs_directly("torch", x, weight, bias) and _products.fuses_gelu(x, weight.shape[0]):
        rows, shape = x.numel() // weight.shape[1], (*x.shape[:-1], weight.shape[0])
        return _products.linear_gelu(x.reshape(rows, weight.shape[1]), weight, bias).view(shape)
    return F.gelu(linear(x, weight, bias))


def bind_linear(weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Callable[[Tensor], Tensor]:
    """`linear`, or `linear_gelu`, as a function of x alone: for many calls with few rows, where choosing costs as much as the product.

    What depends on the weight is decided now: whether `packed_weights` holds a copy of it, and who computes. For x ``[rows, in]`` of the
    weight's dtype and device, without a gradient, while the weight is unchanged and the same blocks of `packed_weights` are open.
    """
    plain = partial(linear_gelu if gelu else linear, weight=weight, bias=bias)
    if weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and runs_directly("torch", weight, bias):
        activation = "gelu" if gelu else "none"
        return bound_turned(weight, bias, activation, bound_product(weight, bias, activation) or plain)
    return plain


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether this is a plain product on the CPU; where it is not, F.linear does it or says what is wrong."""
    if x.device.type != "cpu" or weight.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu") and not widens(x):
        return False
    fits = x.dim() > 0 and weight.dim() == 2 and x.shape[-1] == weight.shape[1] and weight.shape[1] > 0
    return fits and x.dtype == weight.dtype and (bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1]))
