"""fp32 matrix products on a CPU: the library that the torch backend chooses against PyTorch's own choice.

The forward, the gradient of the rows and that of the weight of a base model's layers, over images of 197 tokens and over captions; and
words of BLIP; and the forward of a step that writes one word of each caption or beam. Where both are the same library the ratios are 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from vlp_fast.benchmarks.registry import Entry, NotHere, Options
from vlp_fast.benchmarks.side_by_side import FORWARD, Operation, entries, smaller
from vlp_fast.ops._products import fp32_products, mm

__all__ = ["PROVIDERS", "cases"]

PROVIDERS = {"products": ("torch.mm", "vlp_fast")}
# of x [rows, in], weight [out, in] and dout [rows, out]
PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], list[Tensor]]] = {
    "x W^T": lambda x, weight, dout: [x, weight.t()],
    "dout W": lambda x, weight, dout: [dout, weight],
    "dout^T x": lambda x, weight, dout: [dout.t(), x],
}


def cases(options: Options) -> Iterator[Entry]:
    """Every product of a layer's step."""
    batch = options.batch
    for name, sizes in {
        f"{batch} images, fc1": (197 * batch, 768, 3072),
        f"{batch} images, fc2": (197 * batch, 3072, 768),
        f"{batch} captions, fc1": (14 * batch, 768, 3072),
        "BLIP words": (64 * batch, 768, smaller(30524, options)),
    }.items():
        for product, operands in PRODUCTS.items():
            title = f"{name}, {product} of {' x '.join(map(str, sizes))}"
            yield from entries("products", title, partial(_operation, sizes, operands, options), options, (FORWARD,))
    product = "x W^T"
    for name, rows in ((f"{batch} captions", batch), (f"{3 * batch} beams", 3 * batch)):
        for layer, widths in (("fc1", (768, 3072)), ("words", (768, smaller(30524, options)))):
            sizes = (rows, *widths)
            title = f"a step of {name}, {layer}, {product} of {' x '.join(map(str, sizes))}"
            operation = partial(_operation, sizes, PRODUCTS[product], options)
            yield from entries("products", title, operation, options, (FORWARD,))


def _operation(
    sizes: tuple[int, int, int], operands: Callable[[Tensor, Tensor, Tensor], list[Tensor]], options: Options
) -> Operation:
    if (options.device, options.dtype) != ("cpu", "fp32"):
        raise NotHere("fp32 on the CPU is all there is to choose")
    rows, width_in, width_out = sizes
    x, weight, dout = (torch.randn(a, b) for a, b in ((rows, width_in), (width_out, width_in), (rows, width_out)))
    providers: dict[str, Callable[..., Tensor]] = {"torch.mm": torch.mm, "vlp_fast": mm}
    return Operation(operands(x, weight, dout), providers, facts={"library": fp32_products()[0]})
