"""Attention where query segment i reads key segment i and both fit one tile: captions, short texts.

One program computes one head of one segment, with no loop and no running softmax. The backward is one launch with five products: a tile
of queries sees all of its keys, so dq, dk and dv are complete in one program, and delta never leaves it.
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
    _load_tile,
    _query_hash,
    _segment,
    _store_tile,
    _visible_end,
    input_precision,
    on_device_of,
    readable,
    threshold_bits,
)
from ._configs import SmallConfig


@triton.jit
def _small_scores(q_tile, k_tile, rows, query_length, key_length, causal, scale, HAS_CAUSAL: tl.constexpr,
                  INPUT_PRECISION: tl.constexpr):  # fmt: skip
    """[BLOCK_M, BLOCK_N] scores times scale, -inf where a row does not see a key."""
    columns = tl.arange(0, k_tile.shape[0])  # [BLOCK_N]
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=INPUT_PRECISION) * scale
    row_end = _visible_end(rows, query_length, key_length, causal, HAS_CAUSAL)  # [BLOCK_M]
    return tl.where(columns[None, :] < row_end[:, None], scores, -float("inf"))


@triton.jit(do_not_specialize=["rows_q", "dropout_threshold"])
def _attention_small_forward_kernel(
    # pointers in
    q, k, v, query_offsets, key_offsets, edge_causal, seed,
    # pointers out
    out, lse,
    # sizes
    num_heads, rows_q,
    # strides
    q_row_stride, q_head_stride, k_row_stride, k_head_stride,
    # scalars
    softmax_scale, dropout_threshold,
    # constexpr
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, HAS_CAUSAL: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    HAS_DROPOUT: tl.constexpr = seed is not None
    head = tl.program_id(0) % num_heads
    segment = tl.program_id(0) // num_heads
    query_first, query_length = _segment(query_offsets, segment)
    if query_length == 0:
        return
    key_first, key_length = _segment(key_offsets, segment)
    rows = tl.arange(0, BLOCK)  # [BLOCK]
    q_base = q + query_first * q_row_stride + head.to(tl.int64) * q_head_stride
    key_offset = key_first * k_row_stride + head.to(tl.int64) * k_head_stride
    q_tile = _load_tile(q_base, 0, query_length, q_row_stride, BLOCK, HEAD_DIM)  # [BLOCK, BLOCK_D]
    k_tile = _load_tile(k + key_offset, 0, key_length, k_row_stride, BLOCK, HEAD_DIM)  # [BLOCK, BLOCK_D]
    v_tile = _load_tile(v + key_offset, 0, key_length, k_row_stride, BLOCK, HEAD_DIM)  # [BLOCK, BLOCK_D]
    causal = tl.load(edge_causal + segment)
    scores = _small_scores(
        q_tile, k_tile, rows, query_length, key_length, causal, softmax_scale, HAS_CAUSAL, INPUT_PRECISION
    )  # [BLOCK, BLOCK]
    row_max = tl.max(scores, 1)  # [BLOCK]
    no_key = row_max == -float("inf")
    row_max = tl.where(no_key, 0.0, row_max)
    weights = tl.exp2((scores - row_max[:, None]) * LOG2_E)
    row_sum = tl.where(no_key, 1.0, tl.sum(weights, 1))
    if HAS_DROPOUT:
        query_hash = _query_hash(seed, head, query_first + rows)
        weights *= _dropout_factor(query_hash[:, None], _key_hash(key_first + rows)[None, :], dropout_threshold)
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=INPUT_PRECISION)  # [BLOCK, BLOCK_D]
    out_base = out + (query_first * num_heads + head) * HEAD_DIM
    _store_tile(out_base, acc / row_sum[:, None], 0, query_length, num_heads * HEAD_DIM, BLOCK, HEAD_DIM)
    row_lse = tl.where(no_key, -float("inf"), row_max + tl.log2(row_sum) * LN_2)
    tl.store(lse + head.to(tl.int64) * rows_q + query_first + rows, row_lse, mask=rows < query_length)


@triton.jit(do_not_specialize=["rows_q", "dropout_threshold"])
def _attention_small_backward_kernel(
    # pointers in
    dout, dlse, q, k, v, out, lse, query_offsets, key_offsets, edge_causal, seed,
    # pointers out
    dq, dk, dv,
    # sizes
    num_heads, rows_q,
    # strides
    q_row_stride, q_head_stride, k_row_stride, k_head_stride,
    # scalars
    softmax_scale, dropout_threshold,
    # constexpr
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, HAS_CAUSAL: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    HAS_DROPOUT: tl.constexpr = seed is not None
    head = tl.program_id(0) % num_heads
    segment = tl.program_id(0) // num_heads
    query_first, query_length = _segment(query_offsets, segment)
    key_first, key_length = _segment(key_offsets, segment)
    if query_length + key_length == 0:
        return
    rows = tl.arange(0, BLOCK)  # [BLOCK]
    dense_stride = num_heads * HEAD_DIM
    q_base = q + query_first * q_row_stride + head.to(tl.int64) * q_head_stride
    key_offset = key_first * k_row_stride + head.to(tl.int64) * k_head_stride
    dense_first = (query_first * num_heads + head) * HEAD_DIM
    q_tile = _load_tile(q_base, 0, query_length, q_row_stride, BLOCK, HEAD_DIM)  # [BLOCK, BLOCK_D]
    k_tile = _load_tile(k + key_offset, 0, key_length, k_row_stride, BLOCK, HEAD_DIM)  # [BLOCK, BLOCK_D]
    v_tile = _load_tile(v + key_offset, 0, key_length, k_row_stride, BLOCK, HEAD_DIM)  # [BLOCK, BLOCK_D]
    dout_tile = _load_tile(dout + dense_first, 0, query_length, dense_stride, BLOCK, HEAD_DIM)  # [BLOCK, BLOCK_D]
    out_tile = _load_tile(out + dense_first, 0, query_length, dense_stride, BLOCK, HEAD_DIM)  # [BLOCK, BLOCK_D]

    statistics = head.to(tl.int64) * rows_q + query_first + rows  # [BLOCK]
    row_lse = tl.load(lse + statistics, mask=rows < query_length, other=-float("inf"))
    no_key = row_lse == -float("inf")
    row_delta = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)  # [BLOCK]
    if dlse is not None:
        row_delta -= tl.load(dlse + statistics, mask=rows < query_length, other=0.0)
    row_delta = tl.where(no_key, 0.0, row_delta)  # lse is -inf there and may have any gradient
    causal = tl.load(edge_causal + segment)
    scores = _small_scores(
        q_tile, k_tile, rows, query_length, key_length, causal, softmax_scale, HAS_CAUSAL, INPUT_PRECISION
    )  # [BLOCK, BLOCK]
    # the difference comes before the change of base: large scores would lose digits in both products
    weights = tl.exp2((scores - tl.where(no_key, float("inf"), row_lse)[:, None]) * LOG2_E)
    dweights = tl.dot(dout_tile, tl.trans(v_tile), input_precision=INPUT_PRECISION)  # [BLOCK, BLOCK]
    kept = weights
    if HAS_DROPOUT:
        query_hash = _query_hash(seed, head, query_first + rows)
        factor = _dropout_factor(query_hash[:, None], _key_hash(key_first + rows)[None, :], dropout_threshold)
        kept = weights * factor
        dweights *= factor
    key_dense = (key_first * num_heads + head) * HEAD_DIM
    dv_tile = tl.dot(tl.trans(kept.to(dout_tile.dtype)), dout_tile, input_precision=INPUT_PRECISION)  # [BLOCK, BLOCK_D]
    _store_tile(dv + key_dense, dv_tile, 0, key_length, dense_stride, BLOCK, HEAD_DIM)
    dscores = (weights * (dweights - row_delta[:, None]) * softmax_scale).to(q_tile.dtype)  # [BLOCK, BLOCK]
    dk_tile = tl.dot(tl.trans(dscores), q_tile, input_precision=INPUT_PRECISION)  # [BLOCK, BLOCK_D]
    _store_tile(dk + key_dense, dk_tile, 0, key_length, dense_stride, BLOCK, HEAD_DIM)
    dq_tile = tl.dot(dscores, k_tile, input_precision=INPUT_PRECISION)  # [BLOCK, BLOCK_D]
    _store_tile(dq + dense_first, dq_tile, 0, query_length, dense_stride, BLOCK, HEAD_DIM)


# --------------------------------------------------------------------------------------------------------------- launchers


def attention_small_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    edge_causal: Tensor,
    seed: Tensor | None,
    softmax_scale: float,
    dropout_p: float,
    has_causal: bool,
    config: SmallConfig,
) -> tuple[Tensor, Tensor]:
    """`attention_forward` for a plan of one edge per segment, i to i, whose segments have at most ``config.block`` rows."""
    (rows_q, num_heads, head_dim), dtype = q.shape, q.dtype
    (q,), (k, v) = readable(q), readable(k, v)
    out = torch.empty((rows_q, num_heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, rows_q), dtype=torch.float32, device=q.device)
    with on_device_of(q):
        _attention_small_forward_kernel[((query_offsets.numel() - 1) * num_heads,)](
            q, k, v, query_offsets, key_offsets, edge_causal, seed if dropout_p > 0.0 else None,
            out, lse,
            num_heads, rows_q, q.stride(0), q.stride(1), k.stride(0), k.stride(1), softmax_scale, threshold_bits(dropout_p),
            HEAD_DIM=head_dim, BLOCK=config.block, HAS_CAUSAL=has_causal, INPUT_PRECISION=input_precision(q.dtype),
            **config.options,
        )  # fmt: skip
    return out.to(dtype), lse


def attention_small_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    edge_causal: Tensor,
    seed: Tensor | None,
    softmax_scale: float,
    dropout_p: float,
    has_causal: bool,
    config: SmallConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_backward` for such a plan."""
    (rows_q, num_heads, head_dim), dtype = q.shape, q.dtype
    (q,), (k, v) = readable(q), readable(k, v)
    dout, out = (readable(t)[0].contiguous() for t in (dout, out))
    dq, dk, dv = (torch.empty(t.shape, dtype=q.dtype, device=q.device) for t in (q, k, v))
    with on_device_of(q):
        _attention_small_backward_kernel[((query_offsets.numel() - 1) * num_heads,)](
            dout, None if dlse is None else dlse.contiguous(), q, k, v, out, lse, query_offsets, key_offsets, edge_causal,
            seed if dropout_p > 0.0 else None,
            dq, dk, dv,
            num_heads, rows_q, q.stride(0), q.stride(1), k.stride(0), k.stride(1), softmax_scale, threshold_bits(dropout_p),
            HEAD_DIM=head_dim, BLOCK=config.block, HAS_CAUSAL=has_causal, INPUT_PRECISION=input_precision(q.dtype),
            **config.options,
        )  # fmt: skip
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)
