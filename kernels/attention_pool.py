"""Attention pooling: a few queries, the same for every segment, read its rows once; keys and values are never formed.

Rows and queries share one space (the caller folds the key projection and the norm's scale into the queries), so a row is key and value
at once: the forward needs, per tile of rows, their statistics, one narrow product for the scores and one for the weighted sum. Everything
about a tile is done while it lies in the caches, and of the forward only one row per query and the statistics are kept. The width is
cut into chunks held in a tuple: a width that is no power of two wastes nothing. Where the sums over rows of all chunks are more than a
program's registers hold, programs that run side by side take a part of the chunks each, and form the narrow products again.

The norm is LayerNorm without scale and shift. Its statistics are sums of differences d from `shift`, the mean of a row's first elements,
so that a large common offset of a row does no harm: mean = shift + E[d], variance = E[d^2] - E[d]^2, and a score is
rstd * (q . d - E[d] * sum(q)).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_common import LOG2_E, before_sm90, input_precision, on_device_of, readable
from ._configs import POOL_QUERIES, PoolConfig, pool_config

NO_ROW = tl.constexpr(-1.0e30)  # the running maximum before any row


@triton.jit
def _row_chunk(base, rows, length, row_stride, chunk, DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K] of a segment's rows; 0 beyond its end and beyond DIM."""
    dims = chunk * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    mask = (rows < length)[:, None] & (dims < DIM)[None, :]
    return tl.load(base + (rows[:, None].to(tl.int64) * row_stride + dims[None, :]), mask=mask, other=0.0)


@triton.jit
def _first_mean(base, rows, length, row_stride, DIM: tl.constexpr):
    """[BLOCK_N]: the mean of each row's first 32 elements."""
    first = _row_chunk(base, rows, length, row_stride, 0, min(DIM, 32), 32)  # [BLOCK_N, 32]
    return tl.sum(first.to(tl.float32), 1) / min(DIM, 32)


@triton.jit
def _shifted(tile, shift, chunk, DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """fp32 differences of a tile's rows from `shift`; 0 beyond DIM."""
    inside = (chunk * BLOCK_K + tl.arange(0, BLOCK_K) < DIM)[None, :]
    return tl.where(inside, tile.to(tl.float32) - shift[:, None], 0.0)


@triton.jit
def _query_chunk(base, members, num_queries, chunk, DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_R, BLOCK_K] of dense rows per query; 0 beyond the last and beyond DIM."""
    dims = chunk * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    mask = (members < num_queries)[:, None] & (dims < DIM)[None, :]
    return tl.load(base + (members[:, None] * DIM + dims[None, :]), mask=mask, other=0.0)


@triton.jit
def _store_query_chunk(base, tile, members, num_queries, chunk, DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    dims = chunk * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    mask = (members < num_queries)[:, None] & (dims < DIM)[None, :]
    tl.store(base + (members[:, None] * DIM + dims[None, :]), tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _part(offsets, segment, split, splits, BLOCK_N: tl.constexpr):
    """First packed row of a segment (int64), and the rows [begin, end) of it that this split reads: whole tiles, equally many."""
    first = tl.load(offsets + segment)
    length = tl.load(offsets + segment + 1) - first
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    return first.to(tl.int64), split * share, tl.minimum(length, (split + 1) * share)


@triton.jit(do_not_specialize=["splits", "segments"])
def _attention_pool_forward_kernel(
    # pointers in
    x, queries, query_sums, offsets,
    # pointers out
    out, lse, mean, rstd,
    # sizes
    num_queries, segments, splits,
    # strides
    row_stride,
    # scalars
    eps,
    # constexpr
    DIM: tl.constexpr, PARTS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    HAS_NORM: tl.constexpr = mean is not None
    part = tl.program_id(0) % PARTS  # part fastest: programs that read the same rows run together
    split = tl.program_id(0) // PARTS % splits
    segment = tl.program_id(0) // PARTS // splits
    first_chunk = part * CHUNKS
    first, begin, end = _part(offsets, segment, split, splits, BLOCK_N)
    base = x + first * row_stride
    members = tl.arange(0, BLOCK_R)  # [BLOCK_R]

    acc = ()  # per chunk [BLOCK_R, BLOCK_K]
    for _chunk in tl.static_range(CHUNKS):
        acc = acc + (tl.zeros([BLOCK_R, BLOCK_K], tl.float32),)  # noqa: RUF005
    row_max = tl.full([BLOCK_R], NO_ROW, tl.float32)
    row_sum = tl.zeros([BLOCK_R], tl.float32)
    for first_row in tl.range(begin, end, BLOCK_N):
        rows = first_row + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        scores = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        shift = tl.zeros([BLOCK_N], tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        square = tl.zeros([BLOCK_N], tl.float32)
        if HAS_NORM:
            shift = _first_mean(base, rows, end, row_stride, DIM)
        for chunk in range((DIM + BLOCK_K - 1) // BLOCK_K):
            tile = _row_chunk(base, rows, end, row_stride, chunk, DIM, BLOCK_K)  # [BLOCK_N, BLOCK_K]
            if HAS_NORM:
                shifted = _shifted(tile, shift, chunk, DIM, BLOCK_K)
                total += tl.sum(shifted, 1)
                square += tl.sum(shifted * shifted, 1)
                tile = shifted.to(tile.dtype)
            q_tile = _query_chunk(queries, members, num_queries, chunk, DIM, BLOCK_K)  # [BLOCK_R, BLOCK_K]
            scores = tl.dot(q_tile, tl.trans(tile), scores, input_precision=INPUT_PRECISION)
        centre = shift
        scale = shift
        if HAS_NORM:
            centre = total / DIM
            scale = 1.0 / tl.sqrt(tl.maximum(square / DIM - centre * centre, 0.0) + eps)
            sums = tl.load(query_sums + members, mask=members < num_queries, other=0.0)  # [BLOCK_R]
            scores = (scores - sums[:, None] * centre[None, :]) * scale[None, :]
            if part == 0:
                tl.store(mean + first + rows, centre, mask=rows < end)
                tl.store(rstd + first + rows, scale, mask=rows < end)
            centre += shift
        scores = tl.where((rows < end)[None, :], scores, -float("inf")) * LOG2_E
        new_max = tl.maximum(row_max, tl.max(scores, 1))  # [BLOCK_R]
        weights = tl.exp2(scores - new_max[:, None])  # [BLOCK_R, BLOCK_N]
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        row_max = new_max
        pooled = ()
        for chunk in tl.static_range(CHUNKS):
            tile = _row_chunk(base, rows, end, row_stride, first_chunk + chunk, DIM, BLOCK_K)  # [BLOCK_N, BLOCK_K], cached
            if HAS_NORM:
                tile = ((tile.to(tl.float32) - centre[:, None]) * scale[:, None]).to(tile.dtype)
            product = tl.dot(weights.to(tile.dtype), tile, acc[chunk] * rescale[:, None], input_precision=INPUT_PRECISION)
            pooled = pooled + (product,)  # noqa: RUF005
        acc = pooled

    place = (split.to(tl.int64) * segments + segment) * num_queries
    no_row = row_sum == 0.0
    row_sum = tl.where(no_row, 1.0, row_sum)
    for chunk in tl.static_range(CHUNKS):
        pooled_chunk = acc[chunk] / row_sum[:, None]
        _store_query_chunk(out + place * DIM, pooled_chunk, members, num_queries, first_chunk + chunk, DIM, BLOCK_K)
    row_lse = tl.where(no_row, -float("inf"), row_max / LOG2_E + tl.log(row_sum))
    if part == 0:
        tl.store(lse + place + members, row_lse, mask=members < num_queries)


@triton.jit(do_not_specialize=["splits", "segments"])
def _attention_pool_backward_kernel(
    # pointers in
    dout, x, queries, query_sums, dout_sums, lse, delta, mean, rstd, offsets,
    # pointers out
    dx, dqueries,
    # sizes
    num_queries, segments, splits,
    # strides
    row_stride,
    # constexpr
    DIM: tl.constexpr, PARTS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    HAS_NORM: tl.constexpr = mean is not None
    part = tl.program_id(0) % PARTS  # part fastest: programs that read the same rows run together
    split = tl.program_id(0) // PARTS % splits
    segment = tl.program_id(0) // PARTS // splits
    first_chunk = part * CHUNKS
    first, begin, end = _part(offsets, segment, split, splits, BLOCK_N)
    base = x + first * row_stride
    members = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    present = members < num_queries
    per_segment = segment.to(tl.int64) * num_queries
    dout_base = dout + per_segment * DIM
    row_lse = tl.load(lse + per_segment + members, mask=present, other=float("inf"))  # no weight for queries that do not exist
    row_delta = tl.load(delta + per_segment + members, mask=present, other=0.0)

    acc = ()  # per chunk [BLOCK_R, BLOCK_K]
    for _chunk in tl.static_range(CHUNKS):
        acc = acc + (tl.zeros([BLOCK_R, BLOCK_K], tl.float32),)  # noqa: RUF005
    for first_row in tl.range(begin, end, BLOCK_N):
        rows = first_row + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        shift = tl.zeros([BLOCK_N], tl.float32)
        centre = tl.zeros([BLOCK_N], tl.float32)
        scale = tl.zeros([BLOCK_N], tl.float32)
        if HAS_NORM:
            shift = _first_mean(base, rows, end, row_stride, DIM)
            centre = tl.load(mean + first + rows, mask=rows < end, other=0.0)
            scale = tl.load(rstd + first + rows, mask=rows < end, other=0.0)
        scores = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        dweights = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        for chunk in range((DIM + BLOCK_K - 1) // BLOCK_K):
            tile = _row_chunk(base, rows, end, row_stride, chunk, DIM, BLOCK_K)  # [BLOCK_N, BLOCK_K]
            if HAS_NORM:
                tile = _shifted(tile, shift, chunk, DIM, BLOCK_K).to(tile.dtype)
            q_tile = _query_chunk(queries, members, num_queries, chunk, DIM, BLOCK_K)  # [BLOCK_R, BLOCK_K]
            dout_tile = _query_chunk(dout_base, members, num_queries, chunk, DIM, BLOCK_K)  # [BLOCK_R, BLOCK_K]
            scores = tl.dot(q_tile, tl.trans(tile), scores, input_precision=INPUT_PRECISION)
            dweights = tl.dot(dout_tile, tl.trans(tile), dweights, input_precision=INPUT_PRECISION)
        sums = tl.zeros([BLOCK_R], tl.float32)
        dout_sum = tl.zeros([BLOCK_R], tl.float32)
        if HAS_NORM:  # as the forward forms them: the same scores to the last bit
            sums = tl.load(query_sums + members, mask=present, other=0.0)
            dout_sum = tl.load(dout_sums + per_segment + members, mask=present, other=0.0)
            scores = (scores - sums[:, None] * centre[None, :]) * scale[None, :]
            dweights = (dweights - dout_sum[:, None] * centre[None, :]) * scale[None, :]
            centre += shift
        weights = tl.exp2((scores - row_lse[:, None]) * LOG2_E)  # [BLOCK_R, BLOCK_N]
        weights = tl.where((rows < end)[None, :], weights, 0.0)
        dscores = weights * (dweights - row_delta[:, None])  # [BLOCK_R, BLOCK_N]
        dmean = tl.zeros([BLOCK_N], tl.float32)
        dscale = tl.zeros([BLOCK_N], tl.float32)
        if HAS_NORM:  # the two means of LayerNorm's gradient, from products that are there already
            dmean = tl.sum(weights * dout_sum[:, None] + dscores * sums[:, None], 0) / DIM
            dscale = tl.sum(weights * dweights + dscores * scores, 0) / DIM
        gradient = ()
        for chunk in tl.static_range(CHUNKS):
            tile = _row_chunk(base, rows, end, row_stride, first_chunk + chunk, DIM, BLOCK_K)  # [BLOCK_N, BLOCK_K], cached
            normal = tile.to(tl.float32)
            if HAS_NORM:
                normal = (normal - centre[:, None]) * scale[:, None]
                tile = normal.to(tile.dtype)
            product = tl.dot(dscores.to(tile.dtype), tile, acc[chunk], input_precision=INPUT_PRECISION)
            gradient = gradient + (product,)  # noqa: RUF005
            q_tile = _query_chunk(queries, members, num_queries, first_chunk + chunk, DIM, BLOCK_K)  # [BLOCK_R, BLOCK_K]
            dout_tile = _query_chunk(dout_base, members, num_queries, first_chunk + chunk, DIM, BLOCK_K)  # [BLOCK_R, BLOCK_K]
            drow = tl.dot(tl.trans(weights.to(tile.dtype)), dout_tile, input_precision=INPUT_PRECISION)  # [BLOCK_N, BLOCK_K]
            drow = tl.dot(tl.trans(dscores.to(tile.dtype)), q_tile, drow, input_precision=INPUT_PRECISION)
            if HAS_NORM:
                drow = (drow - dmean[:, None] - normal * dscale[:, None]) * scale[:, None]
            dims = (first_chunk + chunk) * BLOCK_K + tl.arange(0, BLOCK_K)
            pointers = dx + (first + rows[:, None].to(tl.int64)) * DIM + dims[None, :]
            tl.store(pointers, drow.to(dx.dtype.element_ty), mask=(rows < end)[:, None] & (dims < DIM)[None, :])
        acc = gradient

    place = (split.to(tl.int64) * segments + segment) * num_queries * DIM
    for chunk in tl.static_range(CHUNKS):
        _store_query_chunk(dqueries + place, acc[chunk], members, num_queries, first_chunk + chunk, DIM, BLOCK_K)


# ---------------------------------------------------------------------------------------------------------------- launcher


def attention_pool_forward(
    x: Tensor, queries: Tensor, offsets: Tensor, max_seqlen: int, eps: float | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """softmax(queries n(x)^T) n(x) within each segment; n is LayerNorm without scale and shift, or nothing where eps is None.

    Args:
        x: ``[rows, dim]``, rows of any stride. queries: ``[num_queries, dim]``; x is read once for every 16 of them.
        offsets: int32 ``[segments + 1]``. max_seqlen: the longest segment, known on the host.

    Returns:
        out ``[segments, num_queries, dim]`` in x's dtype, lse fp32 ``[segments, num_queries]``, and fp32 ``[rows]`` or None: each
        row's mean, less that of its first elements, and 1 / its deviation.
        An empty segment gives zeros and -inf.
    """
    dtype, segments = x.dtype, offsets.numel() - 1
    (x,), (queries,) = readable(x), readable(queries)
    mean, rstd = (None, None) if eps is None else (_float32(x, x.shape[0]), _float32(x, x.shape[0]))
    if queries.numel() == 0 or segments == 0:
        return x.new_empty((segments, *queries.shape), dtype=dtype), _float32(x, segments, queries.shape[0]), mean, rstd
    parts = [_pool(x, group.contiguous(), offsets, max_seqlen, eps, mean, rstd) for group in queries.split(POOL_QUERIES)]
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(pieces, 1) for pieces in zip(*parts, strict=True))
    return out.to(dtype), lse, mean, rstd


def _pool(x, queries, offsets, max_seqlen, eps, mean, rstd):
    config, segments, (num_queries, dim) = (
        pool_config("forward", x.element_size(), before_sm90(x)),
        offsets.numel() - 1,
        queries.shape,
    )
    parts, chunks = config.cut(dim)
    splits = _splits(segments * parts, max_seqlen, config)
    lse = _float32(x, splits, segments, num_queries)
    out = torch.empty((*lse.shape, dim), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    with on_device_of(x):
        _attention_pool_forward_kernel[(segments * splits * parts,)](
            x, queries, None if eps is None else queries.float().sum(1), offsets,
            out, lse, mean, rstd,
            num_queries, segments, splits, x.stride(0), 0.0 if eps is None else eps,
            DIM=dim, PARTS=parts, CHUNKS=chunks, BLOCK_N=config.block_n, BLOCK_R=POOL_QUERIES, BLOCK_K=config.block_k,
            INPUT_PRECISION=input_precision(x.dtype), **config.options,
        )  # fmt: skip
    if splits == 1:
        return out[0], lse[0]
    total = torch.logsumexp(lse, 0)  # a few rows: the splits are put together in their order
    share = torch.exp(lse - total.masked_fill(total == -float("inf"), 0.0))
    return (share[..., None] * out).sum(0).to(x.dtype), total


def attention_pool_backward(
    dout: Tensor,
    x: Tensor,
    queries: Tensor,
    out: Tensor,
    lse: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    offsets: Tensor,
    max_seqlen: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of `attention_pool_forward`'s out with respect to x and queries, dense, in their dtypes.

    The gradient of the queries is summed over segments in their order: the same bits every time.
    """
    dtypes = x.dtype, queries.dtype
    (x,), (queries,), (dout,), (out,) = readable(x), readable(queries), readable(dout), readable(out)
    if queries.numel() == 0 or offsets.numel() == 1:
        return torch.zeros_like(x, dtype=dtypes[0]), torch.zeros_like(queries, dtype=dtypes[1])
    delta = (dout.float() * out.float()).sum(-1)  # [segments, num_queries]
    groups = [t.split(POOL_QUERIES, dim) for t, dim in ((dout, 1), (queries, 0), (lse, 1), (delta, 1))]
    wide = torch.float32 if len(groups[0]) > 1 else x.dtype
    grads = [
        _pool_backward(*(t.contiguous() for t in group), x, mean, rstd, offsets, max_seqlen, wide)
        for group in zip(*groups, strict=True)
    ]
    dx = grads[0][0] if len(grads) == 1 else torch.stack([d for d, _ in grads]).sum(0)
    return dx.to(dtypes[0]), torch.cat([d for _, d in grads]).to(dtypes[1])


def _pool_backward(dout, queries, lse, delta, x, mean, rstd, offsets, max_seqlen, wide):
    config, segments, (num_queries, dim) = (
        pool_config("backward", x.element_size(), before_sm90(x)),
        offsets.numel() - 1,
        queries.shape,
    )
    parts, chunks = config.cut(dim)
    splits = _splits(segments * parts, max_seqlen, config)
    dx = torch.empty(x.shape, dtype=wide, device=x.device)
    dqueries = _float32(x, splits * segments, num_queries, dim)
    with on_device_of(x):
        _attention_pool_backward_kernel[(segments * splits * parts,)](
            dout, x, queries, queries.float().sum(1), dout.float().sum(-1), lse, delta, mean, rstd, offsets,
            dx, dqueries,
            num_queries, segments, splits, x.stride(0),
            DIM=dim, PARTS=parts, CHUNKS=chunks, BLOCK_N=config.block_n, BLOCK_R=POOL_QUERIES, BLOCK_K=config.block_k,
            INPUT_PRECISION=input_precision(x.dtype), **config.options,
        )  # fmt: skip
    return dx, dqueries.sum(0)


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _splits(programs: int, max_seqlen: int, config: PoolConfig) -> int:
    """Parts of a segment's rows: one where there are programs enough, more for few and long segments, at least four tiles each."""
    wanted = triton.cdiv(config.programs, programs)
    return max(1, min(wanted, max_seqlen // (4 * config.block_n)))
