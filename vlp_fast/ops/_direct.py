"""When an operation may run without its registration, which costs 30 to 65 us a call on a CPU: much to a decoding step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["runs_directly"]


def runs_directly(backend: str, *tensors: Tensor | None) -> bool:
    """Whether nobody has to see the registered operation: no gradient, no compiler, no mode that counts or fakes, PyTorch on a CPU."""
    if backend != "torch" or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    on_cpu = all(t is None or t.device.type == "cpu" for t in tensors)
    return on_cpu and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
