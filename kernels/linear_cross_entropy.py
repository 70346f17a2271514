"""Cross-entropy of rows of logits, with their gradient in place of them.

A vocabulary loss is three products and this. The products stay with the vendor's library, on chunks of 2048 rows and more: there a
matrix product of its own would have to beat it first, and would read the weight no less often. What is left is a row of logits: one
program reads it for the running maximum and sum, once more (from the cache, a row is 100 KB) for the gradient, and writes that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_common import INTERPRETED, LN_2, LOG2_E, on_device_of
from ._configs import cross_entropy_config


@triton.jit(do_not_specialize=["label_smoothing"])
def _cross_entropy_rows_kernel(
    # pointers in and out
    logits,
    # pointers in
    targets, scale, given_lse,
    # pointers out
    loss, lse,
    # sizes
    vocab_size,
    # strides
    row_stride,
    # scalars
    label_smoothing,
    # constexpr
    BLOCK: tl.constexpr,
):  # fmt: skip
    HAS_GRADIENT: tl.constexpr = scale is not None
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)  # [BLOCK]
    if given_lse is not None:
        row_lse = tl.load(given_lse + row) * LOG2_E
    else:
        picked = tl.load(base + target).to(
            tl.float32
        )  # before the reductions, whose barriers keep it ahead of the stores below
        largest = tl.full([BLOCK], -float("inf"), tl.float32)  # per lane: one reduction at the end, not one per block
        total = tl.zeros([BLOCK], tl.float32)
        plain = tl.zeros([BLOCK], tl.float32)
        for first in tl.range(0, vocab_size, BLOCK):
            inside = first + columns < vocab_size
            value = tl.load(base + first + columns, mask=inside, other=-float("inf")).to(tl.float32) * LOG2_E
            new_largest = tl.maximum(largest, value)
            finite = tl.where(new_largest == -float("inf"), 0.0, new_largest)
            total = total * tl.exp2(largest - finite) + tl.exp2(value - finite)
            plain += tl.where(inside, value, 0.0)
            largest = new_largest
        row_max = tl.max(largest, 0)
        row_lse = row_max + tl.log2(tl.sum(total * tl.exp2(largest - row_max), 0))
        mean = tl.sum(plain, 0) / vocab_size * LN_2
        tl.store(lse + row, row_lse * LN_2)
        tl.store(loss + row, row_lse * LN_2 - (1.0 - label_smoothing) * picked - label_smoothing * mean)
    if HAS_GRADIENT:
        factor = tl.load(scale + row)
        spread = label_smoothing / vocab_size
        for first in tl.range(0, vocab_size, BLOCK):
            inside = first + columns < vocab_size
            value = tl.load(base + first + columns, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.exp2(value * LOG2_E - row_lse) - spread
            gradient -= tl.where(first + columns == target, 1.0 - label_smoothing, 0.0)
            tl.store(base + first + columns, (gradient * factor).to(logits.dtype.element_ty), mask=inside)


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, scale: Tensor | None, label_smoothing: float, lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each row; with `scale`, the loss's gradient times it takes the place of the logits.

    Args:
        logits: ``[rows, vocab_size]``, dense along the vocabulary, written to where `scale` is given. targets: int64 ``[rows]``,
            each within the vocabulary. scale: fp32 ``[rows]`` or None. lse: fp32 ``[rows]`` where it is known; then there is no loss.

    Returns:
        loss and lse, fp32 ``[rows]``; the given lse twice where it was known.
    """
    rows, vocab_size = logits.shape
    loss, new_lse = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    config = cross_entropy_config(vocab_size)
    work = logits.float() if INTERPRETED and logits.dtype == torch.bfloat16 else logits
    if rows:
        with on_device_of(logits):
            _cross_entropy_rows_kernel[(rows,)](
                work,
                targets, scale, lse,
                loss, new_lse,
                vocab_size, work.stride(0), label_smoothing,
                BLOCK=config.block, **config.options,
            )  # fmt: skip
    if work is not logits and scale is not None:
        logits.copy_(work)
    return (loss, new_lse) if lse is None else (lse, lse)
