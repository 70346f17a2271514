"""Attention with a learned bias per pair of positions: relative positions as T5, BEiT and VLMo have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.ops._attention_torch import attention
from vlp_fast.padding import padded_plan

__all__ = ["biased_attention", "pair_buckets", "relative_buckets"]


def relative_buckets(grid: int, text_length: int, max_positions: int) -> tuple[Tensor, int]:
    """Which entry of VLMo's bias table a pair of positions reads, and how many entries there are.

    Positions are `max_positions` text tokens, then ``1 + grid**2`` image tokens. Entries, in order: offsets between two patches; image
    class token to any, any to it, it to itself; text to image, image to text; distances between two words, of texts up to
    `text_length`; and the three of the text's first token.

    Returns: int64 ``[positions, positions]``, rows being queries; the number of entries.
    """
    span = 2 * grid - 1
    patches, entries = span**2, span**2 + 3 + 2 * text_length + 2
    y, x = torch.arange(grid).repeat_interleave(grid), torch.arange(grid).repeat(grid)
    text, image = slice(0, max_positions), slice(max_positions, None)
    buckets = torch.empty((max_positions + 1 + grid**2,) * 2, dtype=torch.int64)
    buckets[text, image], buckets[image, text] = patches + 3, patches + 4
    word = torch.arange(max_positions)
    buckets[text, text] = word[None] - word[:, None] + (text_length - 2) + patches + 5
    buckets[max_positions + 1 :, max_positions + 1 :] = (y[:, None] - y + grid - 1) * span + (x[:, None] - x + grid - 1)
    for first, part, entry in ((0, text, entries - 3), (max_positions, image, patches)):
        buckets[first, part], buckets[part, first], buckets[first, first] = entry, entry + 1, entry + 2
    return buckets, entries


def pair_buckets(
    plan: AttentionPlan, positions: Tensor, buckets: Tensor, *, queries: Tensor | None = None, alike: bool = False
) -> list[Tensor]:
    """Which entry of a bias table each pair of a plan reads: made once for a plan, read by every layer.

    Args:
        plan: rows attend to rows of the same tensor, such as `self_attention` and `joint`.
        positions: int64 ``[rows]``, what the bias depends on. queries: those of the query rows, where these are not all rows.
        buckets: int64 ``[n, n]``, the entry for (position of the query, position of the key). alike: all samples
            have the same positions, so those of the first serve all.

    Returns:
        int64 ``[groups, seqlen_q, seqlen_k]`` (``[1, ...]`` where alike) for each padded call that attention makes; padding gets the
        entry of some row and is never read.
    """
    queries, found = positions if queries is None else queries, []
    for group in padded_plan(plan).buckets:
        query = queries[group.query_rows].view(group.groups, group.seqlen_q, 1)
        key = positions[group.key_rows].view(group.groups, 1, group.seqlen_k)
        found.append(buckets[query[:1], key[:1]] if alike else buckets[query, key])
    return found


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, table: Tensor, pairs: Sequence[Tensor], *, scale: float | None = None
) -> Tensor:
    """Attention whose scores get a learned number per head and pair of positions added.

    Equivalent to: ``softmax(scale * q @ k.T + table[pairs].T) @ v`` over the pairs of the plan, 0 for a row that reads nothing.
    On every device this is PyTorch's `scaled_dot_product_attention` with an additive mask: there is no kernel of ours behind it, and
    no backend to choose. Rows are padded to groups inside it and packed again behind it.

    Args:
        q, k, v: ``[rows, heads, head_dim]``. plan: of full edges. table: ``[entries, heads]``, differentiable; kept in its own dtype
            until it meets the scores. pairs: from `pair_buckets` for this plan. scale: of the scores; default ``head_dim**-0.5``.

    Returns: ``[rows, heads, head_dim]`` in q's dtype.
    Raises: ValueError for a plan with causal edges, a table of another number of heads, or pairs of another plan.
    Memory: the biases, ``heads * seqlen_q * seqlen_k`` numbers of every group (once where `pairs` are alike and nothing is masked),
        and where PyTorch has no fused kernel for a mask that needs a gradient (on a CPU) the scores as well.
    Source: Raffel et al., T5 (2020), section 2.1; Bao et al., BEiT (2021); Bao et al., VLMo (2021).
    """
    if plan.facts.has_causal:
        raise ValueError("biased_attention takes plans of full edges; received one with causal edges.")
    if table.dim() != 2 or table.shape[1] != q.shape[1]:
        raise ValueError(f"table must be [entries, {q.shape[1]}], a column per head; received shape {list(table.shape)}.")
    groups = padded_plan(plan).buckets
    wanted = [(group.seqlen_q, group.seqlen_k) for group in groups]
    received = [tuple(pair.shape[1:]) for pair in pairs]
    if wanted != received:
        raise ValueError(f"pairs must come from pair_buckets for this plan, of sizes {wanted}; received {received}.")
    biases = [torch.nn.functional.embedding(pair, table).permute(0, 3, 1, 2) for pair in pairs]
    out = attention(q, k, v, plan, q.shape[-1] ** -0.5 if scale is None else scale, 0.0, None, False, biases)
    assert isinstance(out, Tensor)
    return out
