"""Hard negatives: a draw from each row of softmax(scale q k^T) + floor, its own key left out, in two steps and without the matrix.

The first kernel (_similarity.py) leaves a log-sum-exp for every row and tile of keys. The second, a program per row, draws the tile from
these, forms the similarities of that tile once more, and draws the key: an inverse distribution function over whole rows, which is
what `vlp_fast.reference.hard_negatives` computes. A row's own key often has nearly all of the weight, so it is left out of the sums
from the start instead of being subtracted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_common import LN_2, on_device_of
from ._configs import DRAW_COLUMNS, ELEMENTWISE, similarity_config
from ._multiway_common import readable_rows
from ._similarity import _exp, similarity_parts


@triton.jit(do_not_specialize=["tiles", "first", "floor"])
def _hard_negatives_kernel(
    # pointers in
    queries, keys, scale, parts, own, uniform,
    # pointers out
    index,
    # sizes
    rows_q, rows_k, dim, tiles, first,
    # strides
    query_row_stride, key_row_stride,
    # scalars
    floor,
    # constexpr
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pair = row + first
    tile = tl.arange(0, BLOCK_T)  # [BLOCK_T]
    present = tile < tiles
    part = tl.load(parts + tile.to(tl.int64) * rows_q + row, mask=present, other=-float("inf"))
    mine = tl.load(own + row)
    largest = tl.maximum(tl.max(part, 0), mine)
    lse = largest + tl.log2(tl.sum(_exp(part - largest), 0) + _exp(mine - largest)) * LN_2  # of the whole row
    keys_in_tile = tl.minimum(rows_k - tile * BLOCK_N, BLOCK_N) - tl.where(pair // BLOCK_N == tile, 1, 0)
    weight = tl.where(present, _exp(part - lse) + floor * keys_in_tile, 0.0)
    running = tl.cumsum(weight, 0)
    target = tl.load(uniform + row) * tl.sum(weight, 0)
    chosen = tl.minimum(tl.sum(tl.where(present & (running <= target), 1, 0), 0), tiles - 1)
    before = tl.sum(tl.where(tile < chosen, weight, 0.0), 0)

    columns = tl.cast(chosen, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    valid = columns < rows_k
    steps = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    similarity = tl.zeros([BLOCK_N], tl.float32)
    for first_step in tl.range(0, dim, BLOCK_K):
        inside = first_step + steps < dim
        query = tl.load(queries + row * query_row_stride + first_step + steps, mask=inside, other=0.0).to(tl.float32)
        pointers = keys + columns[:, None] * key_row_stride + (first_step + steps)[None, :]
        key = tl.load(pointers, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_K]
        similarity += tl.sum(key * query[None, :], 1)
    counted = valid & (columns != pair)
    weight = tl.where(counted, _exp(similarity * tl.load(scale) - lse) + floor, 0.0)
    running = before + tl.cumsum(weight, 0)
    drawn = tl.cast(chosen, tl.int64) * BLOCK_N + tl.sum(tl.where(valid & (running <= target), 1, 0), 0)
    # rounding may draw past the end of a tile, and a row whose other weights are all 0 its own key: then the neighbour
    drawn = tl.minimum(drawn, tl.max(tl.where(valid, columns, 0), 0))
    drawn = tl.where(drawn == pair, tl.where(pair == rows_k - 1, pair - 1, pair + 1), drawn)
    tl.store(index + row, drawn)


def hard_negatives(queries: Tensor, keys: Tensor, scale: Tensor, uniform: Tensor, floor: float, first: int) -> Tensor:
    """For each row the first key whose running sum of weights passes `uniform` times their total.

    Args:
        queries: ``[n, dim]``. keys: ``[m, dim]`` of the same dtype; key ``first + i`` is that of row i and is never drawn.
        scale: fp32, one number. uniform: fp32 ``[n]`` in [0, 1). floor: added to every weight.

    Returns:
        int64 ``[n]``.
    """
    queries, keys = readable_rows(queries), readable_rows(keys)
    (n, dim), m = queries.shape, keys.shape[0]
    parts, own = similarity_parts(queries, keys, scale, first)
    index = torch.empty(n, dtype=torch.int64, device=queries.device)
    with on_device_of(queries):
        _hard_negatives_kernel[(n,)](
            queries, keys, scale, parts, own, uniform,
            index,
            n, m, dim, parts.shape[0], first,
            queries.stride(0), keys.stride(0),
            floor,
            BLOCK_T=triton.next_power_of_2(parts.shape[0]), BLOCK_N=similarity_config("lse", queries.element_size()).block_n,
            BLOCK_K=DRAW_COLUMNS, **ELEMENTWISE,
        )  # fmt: skip
    return index
