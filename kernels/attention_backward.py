"""Attention backward in two kernels, without atomics: the same bits every time.

The first walks the forward's edges, one program per tile of query rows: it forms delta = rowsum(dout * out) - dlse, stores it, and
accumulates dq. The second walks the transposed edges, one program per tile of key rows of one key head: dk and dv of a key segment
read by many are sums in the order of its edges. Both recompute the weights from lse.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_common import (
    LOG2_E,
    _dropout_factor,
    _key_hash,
    _key_range,
    _load_tile,
    _query_base,
    _query_hash,
    _query_range,
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
from .attention_small import attention_small_backward


@triton.jit
def _row_lse(lse, mask):
    """lse; +inf, with which every weight is 0, for rows that see no key or do not exist."""
    row_lse = tl.load(lse, mask=mask, other=float("inf"))
    return tl.where(row_lse == -float("inf"), float("inf"), row_lse)


@triton.jit
def _weights(scores, scale, lse):
    """exp(scores * scale - lse). The difference comes before the change of base: large scores would lose digits in both products."""
    return tl.exp2((scores * scale - lse) * LOG2_E)


# ------------------------------------------------------------------------------------------------------------ query gradient


@triton.jit
def _accumulate_dq(
    dq_acc, q_tile, dout_tile, row_lse, row_delta, query_hash, row_end, k_base, v_base, key_first, key_length, row_stride,
    full_end, end, softmax_scale, dropout_threshold,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, HAS_DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dq_acc + dscores k over the key tiles up to `end`; from `full_end` on they are masked."""
    for first_column in tl.range(0, end, BLOCK_N):
        columns = first_column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        k_tile = _load_tile(k_base, first_column, key_length, row_stride, BLOCK_N, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
        v_tile = _load_tile(v_base, first_column, key_length, row_stride, BLOCK_N, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
        weights = _weights(scores, softmax_scale, row_lse[:, None])  # [BLOCK_M, BLOCK_N]
        if first_column >= full_end:
            weights = tl.where(columns[None, :] < row_end[:, None], weights, 0.0)
        dweights = tl.dot(dout_tile, tl.trans(v_tile), input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
        if HAS_DROPOUT:
            dweights *= _dropout_factor(query_hash[:, None], _key_hash(key_first + columns)[None, :], dropout_threshold)
        dscores = weights * (dweights - row_delta[:, None])  # [BLOCK_M, BLOCK_N]
        dq_acc = tl.dot(dscores.to(k_tile.dtype), k_tile, dq_acc, input_precision=INPUT_PRECISION)
    return dq_acc


@triton.jit(do_not_specialize=["tiles", "rows_q", "dropout_threshold"])
def _attention_backward_query_kernel(
    # pointers in
    dout, dlse, q, k, v, out, lse, query_offsets, key_offsets, edge_offsets, edge_key, edge_causal, seed,
    # pointers out
    dq, delta,
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
    program = tl.program_id(0)  # as in the forward
    first_row = program % tiles * BLOCK_M
    head = program // tiles % num_heads
    segment = program // tiles // num_heads
    query_first, query_length = _segment(query_offsets, segment)
    if first_row >= query_length:
        return

    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    q_base = _query_base(q, query_first, head, q_row_stride, q_head_stride, SHARES_QUERIES)
    q_tile = _load_tile(q_base, first_row, query_length, q_row_stride, BLOCK_M, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
    dense_first = (query_first * num_heads + head) * HEAD_DIM  # out, dout and dq are dense
    dense_stride = num_heads * HEAD_DIM
    dout_tile = _load_tile(dout + dense_first, first_row, query_length, dense_stride, BLOCK_M, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
    out_tile = _load_tile(out + dense_first, first_row, query_length, dense_stride, BLOCK_M, HEAD_DIM)  # [BLOCK_M, BLOCK_D]

    row_mask = rows < query_length
    statistics = head.to(tl.int64) * rows_q + query_first + rows  # [BLOCK_M]
    row_lse = _row_lse(lse + statistics, row_mask)  # [BLOCK_M]
    row_delta = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)  # [BLOCK_M]
    if dlse is not None:
        row_delta -= tl.load(dlse + statistics, mask=row_mask, other=0.0)
    row_delta = tl.where(row_lse == float("inf"), 0.0, row_delta)  # lse is -inf there and may have any gradient
    tl.store(delta + statistics, row_delta, mask=row_mask)

    key_head = (head // group).to(tl.int64) * k_head_stride
    query_hash = rows
    if HAS_DROPOUT:
        query_hash = _query_hash(seed, head, query_first + rows)  # [BLOCK_M]
    dq_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for edge in range(tl.load(edge_offsets + segment), tl.load(edge_offsets + segment + 1)):
        key_first, key_length = _segment(key_offsets, tl.load(edge_key + edge))
        causal = tl.load(edge_causal + edge)
        row_end = _visible_end(rows, query_length, key_length, causal, HAS_CAUSAL)  # [BLOCK_M]
        full_end, end = _key_range(first_row, query_length, key_length, causal, BLOCK_M, BLOCK_N, HAS_CAUSAL)
        k_base = k + key_first * k_row_stride + key_head
        v_base = v + key_first * k_row_stride + key_head
        dq_acc = _accumulate_dq(
            dq_acc, q_tile, dout_tile, row_lse, row_delta, query_hash, row_end, k_base, v_base, key_first, key_length, k_row_stride,
            full_end, end, softmax_scale, dropout_threshold, HEAD_DIM, BLOCK_N, HAS_DROPOUT, INPUT_PRECISION,
        )  # fmt: skip
    _store_tile(dq + dense_first, dq_acc * softmax_scale, first_row, query_length, dense_stride, BLOCK_M, HEAD_DIM)


# -------------------------------------------------------------------------------------------------------- key, value gradients


@triton.jit
def _accumulate_dk_dv(
    dk_acc, dv_acc, k_tile, v_tile, key_hash, columns, q_base, dout_base, lse_base, delta_base, seed, head, query_first,
    query_length, key_length, causal, row_stride, dense_stride, first, full_first, softmax_scale, dropout_threshold,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, HAS_CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dk_acc + dscores^T q and dv_acc + weights^T dout over the query tiles from row `first` on; before `full_first` they are masked."""
    for first_row in tl.range(first, query_length, BLOCK_M):
        rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        q_tile = _load_tile(q_base, first_row, query_length, row_stride, BLOCK_M, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
        dout_tile = _load_tile(dout_base, first_row, query_length, dense_stride, BLOCK_M, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
        row_mask = rows < query_length
        row_lse = _row_lse(lse_base + rows, row_mask)  # [BLOCK_M]
        row_delta = tl.load(delta_base + rows, mask=row_mask, other=0.0)  # [BLOCK_M]
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=INPUT_PRECISION)  # [BLOCK_N, BLOCK_M]
        weights = _weights(scores, softmax_scale, row_lse[None, :])  # [BLOCK_N, BLOCK_M]
        if HAS_CAUSAL:
            if first_row < full_first:
                row_end = _visible_end(rows, query_length, key_length, causal, HAS_CAUSAL)  # [BLOCK_M]
                weights = tl.where(columns[:, None] < row_end[None, :], weights, 0.0)
        dweights = tl.dot(v_tile, tl.trans(dout_tile), input_precision=INPUT_PRECISION)  # [BLOCK_N, BLOCK_M]
        kept = weights
        if HAS_DROPOUT:
            factor = _dropout_factor(_query_hash(seed, head, query_first + rows)[None, :], key_hash[:, None], dropout_threshold)
            kept = weights * factor
            dweights *= factor
        dv_acc = tl.dot(kept.to(dout_tile.dtype), dout_tile, dv_acc, input_precision=INPUT_PRECISION)
        dscores = weights * (dweights - row_delta[None, :])  # [BLOCK_N, BLOCK_M]
        dk_acc = tl.dot(dscores.to(q_tile.dtype), q_tile, dk_acc, input_precision=INPUT_PRECISION)
    return dk_acc, dv_acc


@triton.jit(do_not_specialize=["tiles", "rows_q", "dropout_threshold"])
def _attention_backward_key_kernel(
    # pointers in
    dout, q, k, v, lse, delta, query_offsets, key_offsets, key_edge_offsets, key_edge_query, key_edge_causal, seed,
    # pointers out
    dk, dv,
    # sizes
    num_heads_k, group, tiles, rows_q,
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
    program = tl.program_id(0)  # tile fastest, then key head, then segment: programs that share queries run together
    first_column = program % tiles * BLOCK_N
    key_head = program // tiles % num_heads_k
    segment = program // tiles // num_heads_k
    key_first, key_length = _segment(key_offsets, segment)
    if first_column >= key_length:
        return

    columns = first_column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # Columns beyond the segment are zero keys: they spoil only their own rows of dk and dv, which are not stored.
    key_offset = key_first * k_row_stride + key_head.to(tl.int64) * k_head_stride
    k_tile = _load_tile(k + key_offset, first_column, key_length, k_row_stride, BLOCK_N, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
    v_tile = _load_tile(v + key_offset, first_column, key_length, k_row_stride, BLOCK_N, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
    key_hash = columns
    if HAS_DROPOUT:
        key_hash = _key_hash(key_first + columns)  # [BLOCK_N]
    dense_stride = num_heads_k * group * HEAD_DIM

    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for edge in range(tl.load(key_edge_offsets + segment), tl.load(key_edge_offsets + segment + 1)):
        query_first, query_length = _segment(query_offsets, tl.load(key_edge_query + edge))
        causal = tl.load(key_edge_causal + edge)
        first, full_first = _query_range(first_column, query_length, key_length, causal, BLOCK_M, BLOCK_N, HAS_CAUSAL)
        for member in range(group):
            head = key_head * group + member
            q_base = _query_base(q, query_first, head, q_row_stride, q_head_stride, SHARES_QUERIES)
            dout_base = dout + query_first * dense_stride + head * HEAD_DIM
            statistics = head.to(tl.int64) * rows_q + query_first
            dk_acc, dv_acc = _accumulate_dk_dv(
                dk_acc, dv_acc, k_tile, v_tile, key_hash, columns, q_base, dout_base, lse + statistics, delta + statistics, seed,
                head, query_first, query_length, key_length, causal, q_row_stride, dense_stride, first, full_first, softmax_scale,
                dropout_threshold, HEAD_DIM, BLOCK_M, HAS_CAUSAL, HAS_DROPOUT, INPUT_PRECISION,
            )  # fmt: skip
    key_dense_first = (key_first * num_heads_k + key_head) * HEAD_DIM
    key_dense_stride = num_heads_k * HEAD_DIM
    _store_tile(dk + key_dense_first, dk_acc * softmax_scale, first_column, key_length, key_dense_stride, BLOCK_N, HEAD_DIM)
    _store_tile(dv + key_dense_first, dv_acc, first_column, key_length, key_dense_stride, BLOCK_N, HEAD_DIM)


# ---------------------------------------------------------------------------------------------------------------- launcher


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    edge_offsets: Tensor,
    edge_key: Tensor,
    edge_causal: Tensor,
    key_edge_offsets: Tensor,
    key_edge_query: Tensor,
    key_edge_causal: Tensor,
    seed: Tensor | None,
    rows_q: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    dropout_p: float,
    has_causal: bool,
    one_to_one: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention_forward`'s out (dout) and lse (dlse, or None) with respect to q, k and v.

    Args:
        dout: like out; any strides. dlse: fp32 ``[num_heads, rows_q]`` or None. out, lse: what the forward returned.
        key_edge_offsets, key_edge_query, key_edge_causal: int32, the edges in compressed sparse rows by key segment.
        The rest: as given to the forward.

    Returns:
        dq, dk, dv: dense, in q's dtype. Zeros for rows that see no key and for keys that no row sees. dq of shared queries is a
        sum over the segments in their order.
    """
    (_, num_heads, head_dim), (rows_k, num_heads_k, _), dtype = q.shape, k.shape, q.dtype
    shares_queries = q.shape[0] != rows_q
    (q,), (k, v) = readable(q), readable(k, v)
    if one_to_one and not shares_queries and num_heads == num_heads_k and rows_q + rows_k:
        small = small_config("backward", head_dim, q.element_size(), max(max_seqlen_q, max_seqlen_k))
        if small is not None:
            arguments = (query_offsets, key_offsets, edge_causal, seed, softmax_scale, dropout_p, has_causal, small)
            grads = attention_small_backward(dout, dlse, q, k, v, out, lse, *arguments)
            return grads[0].to(dtype), grads[1].to(dtype), grads[2].to(dtype)
    dout, out = (readable(t)[0].contiguous() for t in (dout, out))
    dlse = None if dlse is None else dlse.contiguous()
    dq = torch.empty((rows_q, num_heads, head_dim), dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty((rows_k, num_heads_k, head_dim), dtype=k.dtype, device=k.device) for _ in "kv")
    delta = torch.empty((num_heads, rows_q), dtype=torch.float32, device=q.device)
    facts = (head_dim, q.element_size(), max_seqlen_q, before_sm90(q))
    group = num_heads // max(num_heads_k, 1)
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1))
    scalars = (softmax_scale, threshold_bits(dropout_p))
    seed = seed if dropout_p > 0.0 else None
    if dq.numel():
        config = attention_config("backward_query", *facts)
        tiles = triton.cdiv(max_seqlen_q, config.block_m)
        with on_device_of(q):
            _attention_backward_query_kernel[((query_offsets.numel() - 1) * num_heads * tiles,)](
                dout, dlse, q, k, v, out, lse, query_offsets, key_offsets, edge_offsets, edge_key, edge_causal, seed,
                dq, delta,
                num_heads, group, tiles, rows_q, *strides, *scalars,
                HEAD_DIM=head_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, HAS_CAUSAL=has_causal,
                SHARES_QUERIES=shares_queries, INPUT_PRECISION=input_precision(q.dtype), **config.options,
            )  # fmt: skip
    if dk.numel():
        config = attention_config("backward_key", *facts)
        tiles = triton.cdiv(max_seqlen_k, config.block_n)
        with on_device_of(q):
            _attention_backward_key_kernel[((key_offsets.numel() - 1) * num_heads_k * tiles,)](
                dout, q, k, v, lse, delta, query_offsets, key_offsets, key_edge_offsets, key_edge_query, key_edge_causal, seed,
                dk, dv,
                num_heads_k, group, tiles, rows_q, *strides, *scalars,
                HEAD_DIM=head_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, HAS_CAUSAL=has_causal,
                SHARES_QUERIES=shares_queries, INPUT_PRECISION=input_precision(q.dtype), **config.options,
            )  # fmt: skip
    if shares_queries:
        dq = dq.view(-1, *q.shape).sum(0, dtype=torch.float32) if rows_q else torch.zeros_like(q)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)
