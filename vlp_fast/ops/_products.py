"""Matrix products of the torch backend, in one place because PyTorch has two ways for fp32 on a CPU and takes the slower on many.

PyTorch gives fp32 products to MKL, which on processors of other makers than Intel keeps to AVX2. oneDNN, which PyTorch brings along for
its 16-bit products, uses AVX-512 on all that have it, and is twice as fast there (benchmarks/bench_products.py).
"""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["fp32_products", "is_for_onednn", "mm", "onednn_is_faster"]

# multiply-adds below which oneDNN's greater cost per call (10 us) outweighs what it saves
LEAST = 2**21


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Whether fp32 products on this CPU go to oneDNN: AVX-512 on a processor for which MKL does not use it."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return has_both and torch.backends.cpu.get_cpu_capability() == "AVX512" and not _made_by_intel()


def _made_by_intel() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:  # no Linux
        text = platform.processor()
    return "GenuineIntel" in text


def fp32_products() -> tuple[str, str]:
    """The library of fp32 products on this CPU, and why: for ``vlp-fast info``."""
    if onednn_is_faster():
        return "oneDNN", "MKL would use AVX2 only on this processor"
    return "PyTorch's own choice", "MKL uses all of this processor, or this PyTorch lacks MKL or oneDNN"


def mm(
    a: Tensor, b: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """``a @ b + bias + residual``, written into `out` where it is given.

    Args:
        a: ``[m, k]``. b: ``[k, n]``. bias: ``[n]`` or None. residual: ``[m, n]`` or None. All of one dtype and device. No gradient:
            it is used inside of operations.
    """
    if is_for_onednn(a, a.numel() * b.shape[1]):
        result = _onednn(a, b, bias)
        if residual is not None:
            return torch.add(result, residual, out=result if out is None else out)
        return result if out is None else out.copy_(result)
    if residual is not None:
        # the product starts from the residual: one pass less over the result
        start = residual if bias is None else torch.add(residual, bias, out=out)
        return torch.addmm(start, a, b, out=out)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def is_for_onednn(x: Tensor, multiply_adds: int) -> bool:
    """Whether a product of operands like x goes to oneDNN."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and multiply_adds >= LEAST
        and onednn_is_faster()
        and bool(torch.backends.mkldnn.enabled)
    )


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN reads its second operand in any dense layout; the first is copied where its rows are not dense.

    So where a lies by columns (the gradient of a weight), the transposed product may copy less: b, and the result when it is used.
    """
    if not _by_rows(a) and bias is None and b.numel() + a.shape[0] * b.shape[1] < a.numel():
        return _linear(b.t(), a).t()
    return _linear(a, b.t(), None if bias is None else bias.contiguous())


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    weight = weight if _by_rows(weight) or _by_rows(weight.t()) else weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x if _by_rows(x) else x.contiguous(), weight, bias, "none", [], "")


def _by_rows(x: Tensor) -> bool:
    """Rows dense, one after the other, none of them twice."""
    return x.stride(1) == 1 and x.stride(0) >= x.shape[1]
