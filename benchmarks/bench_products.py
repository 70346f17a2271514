"""fp32 matrix products on a CPU: the library that the torch backend chooses against PyTorch's own choice.

    python benchmarks/bench_products.py [--threads 1] [--seconds 4] [--json F]

Shapes: the forward, the gradient of the rows and that of the weight of BEiT-3 base's layers, over 8 images of 197 tokens and over
8 captions; and words of BLIP. On a processor where both are the same library the ratios are 1.
"""

import sys

import torch
from side_by_side import Case, main, parser

from vlp_fast.ops._products import fp32_products, mm

SHAPES = {"8 images, fc1": (1576, 768, 3072), "8 images, fc2": (1576, 3072, 768), "8 captions, fc1": (112, 768, 3072)}
SHAPES["BLIP words"] = (512, 768, 30524)


def cases(arguments):
    """Every product of a layer's step."""
    for name, (rows, width_in, width_out) in SHAPES.items():
        x, weight, dout = (torch.randn(a, b) for a, b in ((rows, width_in), (width_out, width_in), (rows, width_out)))
        for product, operands in {
            "x W^T": (x, weight.t()), "dout W": (dout, weight), "dout^T x": (dout.t(), x),
        }.items():  # fmt: skip
            providers = {"torch.mm": torch.mm, f"vlp_fast ({fp32_products()[0]})": mm}
            yield Case(f"{name}, {product}: {rows} x {width_in} x {width_out}", operands, providers, directions=("fwd",))


if __name__ == "__main__":
    chosen = parser("fp32 products on a CPU.").parse_args()
    if (chosen.device, chosen.dtype) != ("cpu", "fp32"):
        sys.exit("fp32 on the CPU is all there is to choose; received " + f"{chosen.dtype} on {chosen.device}.")
    sys.exit(main(chosen, lambda: cases(chosen)))
