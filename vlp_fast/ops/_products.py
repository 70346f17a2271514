"""Matrix products of the torch backend, in one place because PyTorch has two ways for fp32 on a CPU and takes the slower on many.

PyTorch gives fp32 products to MKL, which on processors of other makers than Intel keeps to AVX2. oneDNN, which PyTorch brings along for
its 16-bit products, uses AVX-512 on all that have it, and is twice as fast there (benchmarks/bench_products.py); where there is none it
is the faster one with few rows. Products of bf16 on a processor without instructions for them are loops of PyTorch's, slower than fp32:
there the operands are widened, and the result is rounded once.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_fast.ops.packing import any_packed, find_packed, supports_bf16

__all__ = [
    "bf16_products",
    "bound_product",
    "bound_turned",
    "fp32_products",
    "fuses_gelu",
    "is_bf16_for_onednn",
    "is_for_onednn",
    "linear_bf16",
    "linear_gelu",
    "mm",
    "onednn_is_faster",
    "onednn_is_faster_for_few_rows",
    "widens",
]

# multiply-adds below which oneDNN's greater cost per call (10 us) outweighs what it saves
LEAST = 2**21
# rows up to which oneDNN is the faster on AVX2: with any weight, and with one of so many numbers
FEW, FEW_OF_LARGE, LARGE = 32, 256, 2**20
# rows up to which the turned product is faster there than with a packed weight
FEW_OF_PACKED = 16
# multiply-adds for each number read or written from which products are faster in fp32, widening included, than PyTorch's loops
INTENSE = 12


@torch.compiler.assume_constant_result
def onednn_is_faster() -> bool:
    """Whether fp32 products on this CPU go to oneDNN: AVX-512 on a processor for which MKL does not use it."""
    return _may_choose("AVX512")


@torch.compiler.assume_constant_result
def onednn_is_faster_for_few_rows() -> bool:
    """Whether fp32 products of few rows with a weight go to oneDNN: AVX2 without AVX-512, on a processor that is not MKL's own."""
    return _may_choose("AVX2")


@lru_cache(maxsize=2)
def _may_choose(instructions: str) -> bool:
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return has_both and torch.backends.cpu.get_cpu_capability() == instructions and not _made_by_intel()


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
    if onednn_is_faster_for_few_rows():
        return "oneDNN for few rows, else MKL", "oneDNN reads a weight faster here, MKL multiplies many rows faster"
    return "PyTorch's own choice", "MKL uses all of this processor, or this PyTorch lacks MKL or oneDNN"


def bf16_products() -> tuple[str, str]:
    """The way of bf16 products on this CPU, and why: for ``vlp-fast info``."""
    if supports_bf16():
        return "oneDNN", "this processor has instructions for them"
    return "those of fp32, rounded once", "this processor has no instructions for bf16"


def mm(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """``a @ b + bias + residual``, written into `out` where it is given. b may be the transpose of a packed weight (`packed_weights`).

    Args:
        a: ``[m, k]``. b: ``[k, n]``. bias: ``[n]`` or None. residual: ``[m, n]`` or None. All of one dtype and device. No gradient:
            it is used inside of operations.
        scratch: instead of out, memory that the result takes where the library can write into it; what is returned counts.
    """
    packed = find_packed(b) if any_packed() else None
    turned = _is_turned(a, b.t(), packed)
    if packed is None and widens(a) and a.numel() * b.shape[1] >= INTENSE * (a.numel() + b.numel() + a.shape[0] * b.shape[1]):
        result = mm(a.float(), b.float(), None if bias is None else bias.float())
        result = result if residual is None else result.add_(residual)
        return result.to(a.dtype) if out is None else out.copy_(result)
    if turned or packed is not None or is_for_onednn(a, b.shape[1], with_weight=_by_rows(b.t())):
        if turned:
            result = _turned(a, b.t(), bias)
        elif packed is not None:
            result = _linear(a, packed, bias)
        else:
            result = _onednn(a, b, bias)
        if residual is not None:
            return torch.add(result, residual, out=result if out is None else out)
        return result if out is None else out.copy_(result)
    out = scratch if out is None else out
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
    product, bias = _linear_pointwise(), None if bias is None else bias.to(packed.dtype).contiguous()
    form, narrow, wide = "none" if activation == "gelu" else "", weight.dtype, packed.dtype
    if wide != narrow:
        return lambda x: product(x.to(wide).contiguous(), packed, bias, activation, [], form).to(narrow)
    return lambda x: product(x.contiguous(), packed, bias, activation, [], form)


def bound_turned(
    weight: Tensor, bias: Tensor | None, activation: str, otherwise: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """x ``[rows, in]`` -> activation(x @ weight.T + bias), turned where the rows are so few that this is faster; else by `otherwise`."""
    least = max(2, -(-LEAST // max(weight.numel(), 1)))
    packed = find_packed(weight.t()) if any_packed() else None
    if len(weight) < least or not _is_turned(weight[:least], weight, packed):
        return otherwise
    rows, gelu = range(least, (FEW if packed is None else FEW_OF_PACKED) + 1), activation == "gelu"

    def product(x: Tensor) -> Tensor:
        if len(x) not in rows:
            return otherwise(x)
        return F.gelu(_turned(x, weight, bias)) if gelu else _turned(x, weight, bias)

    return product


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """GELU(x @ weight.T + bias), by oneDNN in one pass with the GELU (with erf) of sums in fp32. As `mm`: CPU, one dtype, no gradient."""
    packed = find_packed(weight.t()) if any_packed() else None
    if _is_turned(x, weight, packed):
        return F.gelu(_turned(x, weight, bias))
    return _linear(x, weight if packed is None else packed, bias, "gelu", "none")


def fuses_gelu(x: Tensor, width: int) -> bool:
    """Whether `linear_gelu` is for rows like x: where the product is oneDNN's in any case; PyTorch gives it bf16 by itself."""
    return is_bf16_for_onednn(x) or is_for_onednn(x, width)


def is_bf16_for_onednn(x: Tensor) -> bool:
    """Whether x is bf16 on a CPU where PyTorch gives such products to oneDNN."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.numel() > 0
        and supports_bf16()
        and bool(torch.backends.mkldnn.enabled)
    )


def widens(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether products of operands like x (in `dtype`, where autocast will cast them) are of bf16 on a CPU without such products."""
    return (x.dtype if dtype is None else dtype) == torch.bfloat16 and x.device.type == "cpu" and not supports_bf16()


def is_for_onednn(x: Tensor, width: int, *, with_weight: bool = True) -> bool:
    """Whether a product of x ``[..., k]`` with ``[k, width]`` goes to oneDNN.

    with_weight: whether that is the transpose of a weight whose rows are dense.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.numel() * width < LEAST or not torch.backends.mkldnn.enabled:
        return False
    if onednn_is_faster():
        return True
    rows, numbers = x.numel() // x.shape[-1], x.shape[-1] * width
    few = rows <= FEW or (rows <= FEW_OF_LARGE and numbers >= LARGE)
    return few and with_weight and onednn_is_faster_for_few_rows()


def _is_turned(x: Tensor, weight: Tensor, packed: Tensor | None) -> bool:
    """Whether x ``[rows, in]`` is for `_turned`. packed: the weight's packed copy, if there is one."""
    return (
        2 <= x.shape[0] <= (FEW if packed is None else FEW_OF_PACKED)
        and onednn_is_faster_for_few_rows()
        and is_for_onednn(x, weight.shape[0])
        and weight.dtype == x.dtype
        and _by_rows(weight)
    )


def _turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias as the transpose of weight @ x.T: on AVX2 oneDNN reads the first operand as it lies, and reorders the second,
    here the few rows of x instead of the weight."""
    # rows that lie apart are, as a second operand, by far slower
    product = _linear_pointwise()(weight, x.contiguous(), None, "none", [], "").t()
    out = x.new_empty(product.shape)
    return out.copy_(product) if bias is None else torch.add(product, bias, out=out)


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
    if weight.dtype != x.dtype:  # a packed weight that was widened
        wide = _linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype), activation, form)
        return wide.to(x.dtype)
    bias = None if bias is None else bias.contiguous()
    return _linear_pointwise()(x if _by_rows(x) else x.contiguous(), weight, bias, activation, [], form)


@lru_cache(maxsize=1)
def _linear_pointwise() -> Callable[..., Tensor]:
    """The overload itself, which costs a call less than choosing it; a PyTorch without oneDNN has none."""
    return torch.ops.mkldnn._linear_pointwise.default


def _by_rows(x: Tensor) -> bool:
    """Rows dense, one after the other, none of them twice."""
    return x.stride(1) == 1 and x.stride(0) >= x.shape[1]
