"""Attention of a decoding step: a few query rows per segment read slots of a buffer whose lengths grow on the device.

All rows of a segment and all query heads that share a key head form one tile, so the beams of a caption read their image once. Where
segments are few, the keys of each are split over programs; a second kernel puts the parts together in their order. Lengths are read on
the device: the launch depends on capacities only, and can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_common import LN_2, LOG2_E, input_precision, on_device_of, readable
from ._configs import DecodeConfig, decode_config
from .attention_forward import NO_KEY, _attend


@triton.jit
def _row_pointers(base, first, members, row_stride, head_stride, head, group, HEAD_DIM: tl.constexpr):
    """[BLOCK_M, BLOCK_D]: member m of a tile is row ``m // group`` of the segment and query head ``head * group + m % group``."""
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))  # [BLOCK_D]
    rows = (first + members // group) * row_stride + (head * group + members % group) * head_stride  # [BLOCK_M]
    return base + rows[:, None] + dims[None, :], (dims < HEAD_DIM)[None, :]


@triton.jit(do_not_specialize=["tiles", "splits", "rows_q"])
def _decode_attention_kernel(
    # pointers in
    q, k, v, query_offsets, edge_offsets, edge_key, key_starts, key_lengths,
    # pointers out
    out, lse,
    # sizes
    num_heads_k, group, tiles, splits, rows_q,
    # strides
    q_row_stride, q_head_stride, k_row_stride, k_head_stride,
    # scalars
    softmax_scale,
    # constexpr
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    program = tl.program_id(0)  # split fastest, then tile, key head, segment
    split = program % splits
    tile = program // splits % tiles
    head = (program // splits // tiles % num_heads_k).to(tl.int64)
    segment = program // splits // tiles // num_heads_k
    first = tl.load(query_offsets + segment)
    count = (tl.load(query_offsets + segment + 1) - first) * group
    if tile * BLOCK_M >= count:
        return
    first_edge, last_edge = tl.load(edge_offsets + segment), tl.load(edge_offsets + segment + 1)
    total = 0
    for edge in range(first_edge, last_edge):
        total += tl.load(key_lengths + tl.load(edge_key + edge))
    share = tl.cdiv(tl.cdiv(total, splits), BLOCK_N) * BLOCK_N
    begin, end = split * share, tl.minimum(total, (split + 1) * share)  # of all the segment's keys, end to end

    members = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    present = members < count
    pointers, inside = _row_pointers(q, first.to(tl.int64), members, q_row_stride, q_head_stride, head, group, HEAD_DIM)
    q_tile = tl.load(pointers, mask=present[:, None] & inside, other=0.0)  # [BLOCK_M, BLOCK_D]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], NO_KEY, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    before = 0
    for edge in range(first_edge, last_edge):
        slot = tl.load(edge_key + edge)
        length = tl.load(key_lengths + slot)
        low, high = tl.maximum(begin - before, 0), tl.minimum(end - before, length)
        before += length
        offset = (tl.load(key_starts + slot).to(tl.int64) + low) * k_row_stride + head * k_head_stride
        row_end = tl.zeros([BLOCK_M], tl.int32) + (high - low)
        acc, row_max, row_sum = _attend(  # nothing where high is not above low
            acc, row_max, row_sum, q_tile, members, row_end, k + offset, v + offset, 0, high - low, k_row_stride,
            (high - low) // BLOCK_N * BLOCK_N, high - low, softmax_scale * LOG2_E, 0,
            HEAD_DIM, BLOCK_N, False, INPUT_PRECISION,
        )  # fmt: skip

    no_key = row_sum == 0.0
    row_sum = tl.where(no_key, 1.0, row_sum)
    heads = num_heads_k * group
    place = split.to(tl.int64) * rows_q + first
    pointers, inside = _row_pointers(out, place, members, heads * HEAD_DIM, HEAD_DIM, head, group, HEAD_DIM)
    tl.store(pointers, (acc / row_sum[:, None]).to(out.dtype.element_ty), mask=present[:, None] & inside)
    row_lse = tl.where(no_key, -float("inf"), row_max * softmax_scale + tl.log2(row_sum) * LN_2)
    tl.store(lse + (place + members // group) * heads + head * group + members % group, row_lse, mask=present)


@triton.jit(do_not_specialize=["splits"])
def _decode_combine_kernel(
    # pointers in
    parts, part_lse,
    # pointers out
    out, lse,
    # sizes
    rows_by_heads, splits,
    # constexpr
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))  # [BLOCK_D]
    split = tl.arange(0, BLOCK_S)  # [BLOCK_S]
    part = split.to(tl.int64) * rows_by_heads + row
    each = tl.load(part_lse + part, mask=split < splits, other=-float("inf"))
    largest = tl.max(each, 0)
    none = largest == -float("inf")
    weights = tl.exp2((each - tl.where(none, 0.0, largest)) * LOG2_E)  # [BLOCK_S]
    total = tl.where(none, 1.0, tl.sum(weights, 0))
    mask = (split < splits)[:, None] & (dims < HEAD_DIM)[None, :]
    values = tl.load(parts + part[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)  # [BLOCK_S, BLOCK_D]
    pooled = tl.sum(values * (weights / total)[:, None], 0)
    tl.store(out + row * HEAD_DIM + dims, pooled.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
    tl.store(lse + row, tl.where(none, -float("inf"), largest + tl.log2(total) * LN_2))


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offsets: Tensor,
    edge_offsets: Tensor,
    edge_key: Tensor,
    key_starts: Tensor,
    key_lengths: Tensor,
    max_rows: int,
    max_keys: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the slots that each query segment reads.

    Args:
        q: ``[rows, num_heads, head_dim]``. k, v: ``[buffer_rows, num_heads_k, head_dim]``.
        query_offsets, edge_offsets, edge_key, key_starts, key_lengths: int32, as in a `DecodePlan`.
        max_rows: of a query segment. max_keys: the most keys a segment may come to read; the splits follow from it.

    Returns:
        out ``[rows, num_heads, head_dim]`` in q's dtype and lse fp32 ``[rows, num_heads]``; zeros and -inf where nothing is read.
    """
    (rows_q, num_heads, head_dim), num_heads_k, dtype = q.shape, k.shape[1], q.dtype
    (q,), (k, v) = readable(q), readable(k, v)
    segments, group = query_offsets.numel() - 1, num_heads // max(num_heads_k, 1)
    config = decode_config(q.element_size(), max_rows * group)
    tiles = triton.cdiv(max_rows * group, config.block_m)
    splits = _splits(segments * num_heads_k * tiles, max_keys, config)
    out = torch.empty((rows_q, num_heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((rows_q, num_heads), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out.to(dtype), lse
    parts, part_lse = out, lse
    if splits > 1:
        parts = torch.empty((splits, rows_q, num_heads, head_dim), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((splits, rows_q, num_heads), dtype=torch.float32, device=q.device)
    with on_device_of(q):
        _decode_attention_kernel[(segments * num_heads_k * tiles * splits,)](
            q, k, v, query_offsets, edge_offsets, edge_key, key_starts, key_lengths,
            parts, part_lse,
            num_heads_k, group, tiles, splits, rows_q,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), softmax_scale,
            HEAD_DIM=head_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, INPUT_PRECISION=input_precision(q.dtype),
            **config.options,
        )  # fmt: skip
        if splits > 1:
            _decode_combine_kernel[(rows_q * num_heads,)](
                parts, part_lse,
                out, lse,
                rows_q * num_heads, splits, HEAD_DIM=head_dim, BLOCK_S=triton.next_power_of_2(splits),
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out.to(dtype), lse


def _splits(programs: int, max_keys: int, config: DecodeConfig) -> int:
    """Parts of a segment's keys: one where there are programs enough, more where they are few, at least two tiles each."""
    wanted = triton.cdiv(config.programs, max(programs, 1))
    return max(1, min(wanted, max_keys // (2 * config.block_n), config.most_splits))
