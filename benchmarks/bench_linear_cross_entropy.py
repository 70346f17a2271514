"""The vocabulary loss without logits in memory, against F.cross_entropy(F.linear()), torch's own fused loss and Liger's.

BLIP's words (30,524, label smoothing 0.1, a bias) and CoCa's (49,408), width 768, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_fast.benchmarks.registry import DTYPES, Entry, NotHere, Options, own_backends
from vlp_fast.benchmarks.side_by_side import BOTH, Operation, entries, needs_cuda, smaller
from vlp_fast.ops import linear_cross_entropy

__all__ = ["PROVIDERS", "cases"]

TORCH, CHUNKED, LIGER = "F.linear_cross_entropy", "F.linear_cross_entropy, chunked", "Liger"
PROVIDERS = {"linear_cross_entropy": ("F.cross_entropy(F.linear)", TORCH, CHUNKED, LIGER, "vlp_fast torch", "vlp_fast triton")}
DIM = 768
Loss = Callable[..., Tensor]  # hidden, weight and perhaps a bias -> the mean loss


class Vocabulary(NamedTuple):
    words: int
    smoothing: float
    bias: bool


def cases(options: Options) -> Iterator[Entry]:
    """Both vocabularies."""
    rows = 128 * options.batch
    for name, (words, smoothing, bias) in {"BLIP": (30524, 0.1, True), "CoCa": (49408, 0.0, False)}.items():
        vocabulary = Vocabulary(smaller(words, options), smoothing, bias)
        title = f"{name}, {rows} rows x {vocabulary.words} words"
        yield from entries("linear_cross_entropy", title, partial(_operation, vocabulary, rows, options), options, (BOTH,))


def _operation(vocabulary: Vocabulary, rows: int, options: Options) -> Operation:
    device, dtype, (words, smoothing, has_bias) = options.device, DTYPES[options.dtype], vocabulary
    hidden = torch.randn(rows, DIM, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(words, DIM, device=device) * 0.02).to(dtype).requires_grad_()
    bias = torch.zeros(words, device=device, dtype=dtype).requires_grad_()
    targets = torch.randint(words, (rows,), device=device)

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias), targets, label_smoothing=smoothing)

    def ours(backend: str) -> Loss:
        return lambda h, w, b=None: linear_cross_entropy(h, w, targets, b, label_smoothing=smoothing, backend=backend)

    def of_torch(chunked: bool) -> Loss:
        function, settings = getattr(F, "linear_cross_entropy", None), getattr(torch.nn, "LinearCrossEntropyOptions", None)
        if function is None or (chunked and settings is None):
            raise NotHere(f"torch {torch.__version__} has none")
        if chunked and smoothing:
            raise NotHere("it has no label smoothing")
        chosen = {"options": settings()} if chunked else {}
        return lambda h, w, b=None: function(h, w, targets, linear_bias=b, label_smoothing=smoothing, **chosen)

    def liger() -> Loss:
        needs_cuda(options)
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

        def call(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
            loss = fused(h, w, targets, bias=b, label_smoothing=smoothing)
            return loss[0] if isinstance(loss, tuple) else loss

        return call

    backends, absent = own_backends(device)
    return Operation(
        [hidden, weight, *([bias] if has_bias else [])],
        {"F.cross_entropy(F.linear)": plain, **{f"vlp_fast {backend}": ours(backend) for backend in backends}},
        {TORCH: partial(of_torch, False), CHUNKED: partial(of_torch, True), LIGER: liger},
        absent,
    )
