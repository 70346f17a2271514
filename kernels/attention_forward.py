"""Attention forward: softmax(scale q k^T) v over the key segments that each query segment's edges name.

One program computes one tile of query rows of one head. It walks the segment's edges, and within an edge the key tiles, with one
running softmax over all of them. Only tiles on the diagonal and the last, ragged tile are masked, by a branch that a whole program
takes or does not: so there is one loop, and the loads of its last tile are in flight like those of the others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_common import (
    LN_2,
    LOG2_E,
    _dropout_factor,
    _key_hash,
    _key_range,
    _load_tile,
    _query_base,
    _query_hash,
    _segment,
    _store_tile,
    _visible_end,
    before_sm90,
    input_precision,
    on_device_of,
    readable,
    threshold_bits,
)
from ._configs import attention_config, small_config
from .attention_small import attention_small_forward

NO_KEY = tl.constexpr(-1.0e30)  # the running maximum before any key: finite, so that a row that sees none needs no special case


@triton.jit
def _attend(
    acc, row_max, row_sum, q_tile, query_hash, row_end, k_base, v_base, key_first, key_length, row_stride, full_end, end,
    scale_log2, dropout_threshold,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, HAS_DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """A running softmax over the key tiles up to `end`, masked from `full_end` on. Its state: acc, row_max of the scores as
    they are, row_sum. The difference comes before scale and change of base: large scores would lose digits in the product."""
    for first_column in tl.range(0, end, BLOCK_N):
        columns = first_column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        k_tile = _load_tile(k_base, first_column, key_length, row_stride, BLOCK_N, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
        if first_column >= full_end:
            scores = tl.where(columns[None, :] < row_end[:, None], scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))  # [BLOCK_M]
        weights = tl.exp2((scores - new_max[:, None]) * scale_log2)  # [BLOCK_M, BLOCK_N]
        rescale = tl.exp2((row_max - new_max) * scale_log2)  # [BLOCK_M]
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        row_max = new_max
        if HAS_DROPOUT:
            weights *= _dropout_factor(query_hash[:, None], _key_hash(key_first + columns)[None, :], dropout_threshold)
        v_tile = _load_tile(v_base, first_column, key_length, row_stride, BLOCK_N, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision=INPUT_PRECISION)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["tiles", "rows_q", "dropout_threshold"])
def _attention_forward_kernel(
    # pointers in
    q, k, v, query_offsets, key_offsets, edge_offsets, edge_key, edge_causal, seed,
    # pointers out
    out, lse,
    # sizes
    num_heads, group, tiles, rows_q,
    # strides
    q_row_stride, q_head_stride, k_row_stride, k_head_stride,
    # scalars
    softmax_scale, dropout_threshold,
    # constexpr
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_CAUSAL: tl.constexpr,
    SHARES_QUERIES: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    HAS_DROPOUT: tl.constexpr = seed is not None
    BLOCK_D: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    program = tl.program_id(0)  # tile fastest, then head, then segment: programs that share keys and values run together
    first_row = program % tiles * BLOCK_M
    head = program // tiles % num_heads
    segment = program // tiles // num_heads
    query_first, query_length = _segment(query_offsets, segment)
    if first_row >= query_length:
        return

    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    scale_log2 = softmax_scale * LOG2_E
    q_base = _query_base(q, query_first, head, q_row_stride, q_head_stride, SHARES_QUERIES)
    q_tile = _load_tile(q_base, first_row, query_length, q_row_stride, BLOCK_M, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
    key_head = (head // group).to(tl.int64) * k_head_stride
    query_hash = rows
    if HAS_DROPOUT:
        query_hash = _query_hash(seed, head, query_first + rows)  # [BLOCK_M]

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], NO_KEY, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for edge in range(tl.load(edge_offsets + segment), tl.load(edge_offsets + segment + 1)):
        key_first, key_length = _segment(key_offsets, tl.load(edge_key + edge))
        causal = tl.load(edge_causal + edge)
        row_end = _visible_end(rows, query_length, key_length, causal, HAS_CAUSAL)  # [BLOCK_M]
        full_end, end = _key_range(first_row, query_length, key_length, causal, BLOCK_M, BLOCK_N, HAS_CAUSAL)
        k_base = k + key_first * k_row_stride + key_head
        v_base = v + key_first * k_row_stride + key_head
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q_tile, query_hash, row_end, k_base, v_base, key_first, key_length, k_row_stride, full_end, end,
            scale_log2, dropout_threshold, HEAD_DIM, BLOCK_N, HAS_DROPOUT, INPUT_PRECISION,
        )  # fmt: skip

    no_key = row_sum == 0.0
    row_sum = tl.where(no_key, 1.0, row_sum)
    out_base = out + (query_first * num_heads + head) * HEAD_DIM
    _store_tile(out_base, acc / row_sum[:, None], first_row, query_length, num_heads * HEAD_DIM, BLOCK_M, HEAD_DIM)
    row_lse = tl.where(no_key, -float("inf"), row_max * softmax_scale + tl.log2(row_sum) * LN_2)
    tl.store(lse + head.to(tl.int64) * rows_q + query_first + rows, row_lse, mask=rows < query_length)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    edge_offsets: Tensor,
    edge_key: Tensor,
    edge_causal: Tensor,
    seed: Tensor | None,
    rows_q: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    dropout_p: float,
    has_causal: bool,
    one_to_one: bool,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the keys that each query segment's edges name.

    Args:
        q: ``[rows_q, num_heads, head_dim]``, or the rows of one segment where all segments share them.
        k, v: ``[rows_k, num_heads_k, head_dim]``. Views of a fused projection are read in place.
        query_offsets, key_offsets: int32 ``[segments + 1]``. edge_offsets, edge_key, edge_causal: int32 edges in compressed sparse
            rows by query segment.
        seed: int64 ``[1]``, read where `dropout_p` is above 0.
        rows_q: query rows of all segments. max_seqlen_q, max_seqlen_k: the longest segments, known on the host.
        softmax_scale: above 0. dropout_p: in [0, 1). has_causal: whether any edge is causal. one_to_one: whether segment i reads
            segment i and nothing else, which lets short segments take a kernel of their own.

    Returns:
        out ``[rows_q, num_heads, head_dim]`` in q's dtype, and lse fp32 ``[num_heads, rows_q]``, natural logarithm. A row that sees
        no key gives zeros and -inf.

    Raises:
        ValueError: a softmax_scale that is not above 0, with which the running maximum would be none.
    """
    if not softmax_scale > 0.0:
        raise ValueError(f"softmax_scale must be above 0; received {softmax_scale}.")
    (_, num_heads, head_dim), dtype, shares_queries = q.shape, q.dtype, q.shape[0] != rows_q
    (q,), (k, v) = readable(q), readable(k, v)
    if one_to_one and not shares_queries and num_heads == k.shape[1] and rows_q:
        small = small_config("forward", head_dim, q.element_size(), max(max_seqlen_q, max_seqlen_k))
        if small is not None:
            arguments = (query_offsets, key_offsets, edge_causal, seed, softmax_scale, dropout_p, has_causal, small)
            out, lse = attention_small_forward(q, k, v, *arguments)
            return out.to(dtype), lse
    out = torch.empty((rows_q, num_heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, rows_q), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out.to(dtype), lse
    config = attention_config("forward", head_dim, q.element_size(), max_seqlen_q, before_sm90(q))
    tiles = triton.cdiv(max_seqlen_q, config.block_m)
    with on_device_of(q):
        _attention_forward_kernel[((query_offsets.numel() - 1) * num_heads * tiles,)](
            q, k, v, query_offsets, key_offsets, edge_offsets, edge_key, edge_causal, seed if dropout_p > 0.0 else None,
            out, lse,
            num_heads, num_heads // k.shape[1], tiles, rows_q,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            softmax_scale, threshold_bits(dropout_p),
            HEAD_DIM=head_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, HAS_CAUSAL=has_causal,
            SHARES_QUERIES=shares_queries, INPUT_PRECISION=input_precision(q.dtype), **config.options,
        )  # fmt: skip
    return out.to(dtype), lse
