"""A linear layer as torch.nn.functional has it, through the faster of PyTorch's two fp32 libraries on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_fast.ops._products import is_for_onednn, mm
from vlp_fast.ops.multiway import multiway_linear

__all__ = ["linear"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``.

    Equivalent to: ``torch.nn.functional.linear``, which it calls but for fp32 on a CPU whose products are faster through oneDNN
    (`vlp-fast info` says which); there it is `multiway_linear` with one expert, which has no second derivative.

    Args:
        x: ``[..., in]``. weight: ``[out, in]``. bias: ``[out]`` or None.

    Returns: ``[..., out]``.
    Raises: what ``torch.nn.functional.linear`` raises.
    """
    if _goes_to_products(x, weight, bias):
        rows = x.numel() // weight.shape[1]
        if not _needs_operation(x, weight, bias):
            return mm(x.reshape(rows, weight.shape[1]), weight.t(), bias).view(*x.shape[:-1], weight.shape[0])
        biases = None if bias is None else bias[None]
        out = multiway_linear(x.reshape(rows, weight.shape[1]), weight[None], biases, (0, rows), backend="torch")
        return out.view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


def _goes_to_products(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if x.device.type != "cpu" or weight.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    fits = x.dim() > 0 and weight.dim() == 2 and x.shape[-1] == weight.shape[1]  # where not, F.linear says what is wrong
    fits = fits and x.dtype == weight.dtype and (bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1]))
    return fits and is_for_onednn(x, x.numel() * weight.shape[0])


def _needs_operation(*tensors: Tensor | None) -> bool:
    """Whether a gradient or a compiler must see a registered operation, which costs 30 us more: much to a decoding step."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
