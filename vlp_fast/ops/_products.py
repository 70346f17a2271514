"""Matrix products of the torch backend, in one place because PyTorch has two ways for fp32 on a CPU and takes the slower on many.

PyTorch gives fp32 products to MKL, which on processors of other makers than Intel keeps to AVX2. oneDNN, which PyTorch brings along for
its 16-bit products, uses AVX-512 on all that have it, and is twice as fast there (benchmarks/bench_products.py).
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from vlp_fast.ops.packing import any_packed, find_packed

__all__ = [
    "bound_product",
    "fp32_products",
    "fuses_gelu",
    "is_bf16_for_onednn",
    "is_for_onednn",
    "linear_bf16",
    "linear_gelu",
    "mm",
    "onednn_is_faster",
]

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
    """``a @ b + bias + residual``, written into `out` where it is given. b may be the transpose of a packed weight (`packed_weights`).

    Args:
        a: ``[m, k]``. b: ``[k, n]``. bias: ``[n]`` or None. residual: ``[m, n]`` or None. All of one dtype and device. No gradient:
            it is used inside of operations.
    """
    packed = find_packed(b) if any_packed() else None
    if packed is not None or is_for_onednn(a, a.numel() * b.shape[1]):
        result = _onednn(a, b, bias) if packed is None else _linear(a, packed, bias)
        if residual is not None:
            return torch.add(result, residual, out=result if out is None else out)
        return result if out is None else out.copy_(result)
    if out is None and bias is not None and is_bf16_for_onednn(a) and b.numel() > 0 and _by_rows(a):
        # addmm begins with a copy of the bias, or of the residual, and takes 1 to 7 % longer
        result = _linear(a, b.t(), bias)
        return result if residual is None else result.add_(residual)
    if residual is not None:
        # the product starts from the residual: one pass less over the result
        start = residual if bias is None else torch.add(residual, bias, out=out)
        return torch.addmm(start, a, b, out=out)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight.T + bias for x ``[..., in]`` of which `is_bf16_for_onednn` is true, and a contiguous weight ``[out, in]``; no gradient."""
    return _linear_pointwise()(x if x.is_contiguous() else x.contiguous(), weight, bias.contiguous(), "none", [], "")


def bound_product(weight: Tensor, bias: Tensor | None, activation: str) -> Callable[[Tensor], Tensor] | None:
    """x ``[rows, in]`` -> activation(x @ weight.T + bias) where that is oneDNN's whatever the rows: packed weights, and bf16; else None."""
    packed = find_packed(weight.t()) if any_packed() else None
    if packed is None:
        if not (is_bf16_for_onednn(weight) and weight.is_contiguous()):
            return None
        packed = weight
    product, bias = _linear_pointwise(), None if bias is None else bias.contiguous()
    form = "none" if activation == "gelu" else ""
    return lambda x: product(x.contiguous(), packed, bias, activation, [], form)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """GELU(x @ weight.T + bias) in one pass of oneDNN, the GELU (with erf) of sums in fp32. As `mm`: CPU, one dtype, no gradient."""
    packed = find_packed(weight.t()) if any_packed() else None
    return _linear(x, weight if packed is None else packed, bias, "gelu", "none")


def fuses_gelu(x: Tensor, width: int) -> bool:
    """Whether `linear_gelu` is for rows like x: where the product is oneDNN's in any case; PyTorch gives it bf16 by itself."""
    return is_bf16_for_onednn(x) or (x.numel() > 0 and is_for_onednn(x, x.numel() * width))


def is_bf16_for_onednn(x: Tensor) -> bool:
    """Whether x is bf16 on a CPU where PyTorch gives such products to oneDNN."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.numel() > 0
        and _supports_bf16()
        and bool(torch.backends.mkldnn.enabled)
    )


@lru_cache(maxsize=1)
def _supports_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


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
    return _linear(a, b.t(), bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", form: str = "") -> Tensor:
    if not (weight.is_mkldnn or _by_rows(weight) or _by_rows(weight.t())):
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    return _linear_pointwise()(x if _by_rows(x) else x.contiguous(), weight, bias, activation, [], form)


@lru_cache(maxsize=1)
def _linear_pointwise() -> Callable[..., Tensor]:
    """The overload itself, which costs a call less than choosing it; a PyTorch without oneDNN has none."""
    return torch.ops.mkldnn._linear_pointwise.default


def _by_rows(x: Tensor) -> bool:
    """Rows dense, one after the other, none of them twice."""
    return x.stride(1) == 1 and x.stride(0) >= x.shape[1]
