"""What masked data modelling hides: blocks of image patches and tokens of captions (BEiT-3, section 2.3; BEiT, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["MaskedTokens", "blockwise_mask", "mask_tokens"]

MIN_BLOCK = 4  # patches
ASPECT = (0.3, 1 / 0.3)
MISSES = 10  # blocks in a row that add nothing, after which the rest is drawn patch by patch


def blockwise_mask(
    batch: int, grid_height: int, grid_width: int, ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """Masks of whole blocks of patches, with exactly ``round(ratio * grid_height * grid_width)`` masked in each image.

    Blocks are drawn until enough is masked: at least 4 patches each, aspect ratio log-uniform in [0.3, 1/0.3], anywhere in
    the grid. The last one is cut, top rows first, to the exact count.

    Args:
        batch: images.
        grid_height, grid_width: patches in a column and in a row.
        ratio: part of the patches to mask, in [0, 1]; BEiT-3 takes 0.4.
        generator: on the CPU.

    Returns:
        bool ``[batch, grid_height * grid_width]``, True where masked, patches row by row.

    Raises:
        ValueError: a negative batch, an empty grid or a ratio outside [0, 1].
    """
    if batch < 0 or grid_height < 1 or grid_width < 1:
        raise ValueError(f"blockwise_mask needs a grid of patches; received batch={batch}, grid {grid_height} x {grid_width}.")
    _check_ratio(ratio)
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    target = round(ratio * grid_height * grid_width)
    masks = np.zeros((batch, grid_height, grid_width), bool)
    for mask in masks:
        _mask_blocks(mask, target, rng)
    return torch.from_numpy(masks.reshape(batch, grid_height * grid_width))


def _mask_blocks(mask: np.ndarray, target: int, rng: np.random.Generator) -> None:
    """Mask `target` cells of one grid in place."""
    height, width = mask.shape
    remaining, misses = target, 0
    while remaining and misses < MISSES:
        area = rng.uniform(min(MIN_BLOCK, remaining), remaining)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        rows = min(max(round(math.sqrt(area * aspect)), 1), height)
        columns = min(max(round(math.sqrt(area / aspect)), 1), width)
        top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
        new_rows, new_columns = np.nonzero(~mask[top : top + rows, left : left + columns])
        mask[top + new_rows[:remaining], left + new_columns[:remaining]] = True
        misses = 0 if len(new_rows) else misses + 1
        remaining -= min(len(new_rows), remaining)
    if remaining:
        free = np.flatnonzero(~mask)
        mask.flat[rng.choice(free, remaining, replace=False)] = True


class MaskedTokens(NamedTuple):
    """Tokens with some hidden: `input_ids` int64 ``[rows]``; `masked_rows` int64, ascending, the rows to be predicted."""

    input_ids: Tensor
    masked_rows: Tensor


def mask_tokens(
    token_ids: Tensor,
    lengths: Sequence[int],
    ratio: float,
    mask_id: int,
    special_ids: Iterable[int],
    generator: torch.Generator | None = None,
    *,
    vocab_size: int | None = None,
) -> MaskedTokens:
    """Hide some tokens of every packed caption, for masked language modelling.

    Of a caption's n tokens that are not special, ``max(1, round(ratio * n))`` drawn at random are masked: at least one in every
    caption that has any, unless `ratio` is 0. What was hidden is ``token_ids[masked_rows]``.

    Args:
        token_ids: int64 ``[rows]``, captions one after the other; not changed.
        lengths: tokens of each caption.
        ratio: in [0, 1]; BEiT-3 takes 0.15 for text alone and 0.5 for the text of pairs.
        mask_id: the id of [MASK].
        special_ids: ids never masked: [CLS], [SEP] and their like.
        generator: on the device of `token_ids`.
        vocab_size: if given, BERT's rule: of the masked, 80 % become [MASK], 10 % a random id in [0, vocab_size) that is not
            special, 10 % stay as they are. Otherwise all become [MASK].

    Raises:
        ValueError: lengths that do not sum to the rows, a ratio outside [0, 1], or no ordinary id below `vocab_size`.
    """
    rows = token_ids.numel()
    if token_ids.dim() != 1 or sum(lengths) != rows:
        raise ValueError(
            f"lengths must sum to the rows of token_ids; they sum to {sum(lengths)}, token_ids is {list(token_ids.shape)}."
        )
    _check_ratio(ratio)
    device = token_ids.device
    special = torch.tensor(sorted(set(special_ids)), dtype=token_ids.dtype, device=device)
    maskable = ~torch.isin(token_ids, special)
    counts = torch.tensor(list(lengths), dtype=torch.int64, device=device)
    caption = torch.repeat_interleave(torch.arange(len(counts), device=device), counts)
    maskable_counts = torch.zeros_like(counts).index_add_(0, caption, maskable.long())
    wanted = (ratio * maskable_counts.double()).round().long()
    if ratio > 0:
        wanted = torch.maximum(wanted, maskable_counts.clamp(max=1))

    # Random order within each caption, special tokens last; the first `wanted` of each caption are masked.
    draw = torch.rand(rows, generator=generator, dtype=torch.float64, device=device)
    order = torch.argsort(2 * caption + torch.where(maskable, draw, 1.5))
    place = torch.arange(rows, device=device) - (counts.cumsum(0) - counts)[caption]
    masked_rows = order[place < wanted[caption]].sort().values

    replacement = torch.full_like(masked_rows, mask_id, dtype=token_ids.dtype)
    if vocab_size is not None:
        ordinary = torch.arange(vocab_size, dtype=token_ids.dtype, device=device)
        ordinary = ordinary[~torch.isin(ordinary, special)]
        if not ordinary.numel():
            raise ValueError(f"vocab_size must leave ids that are not special to draw from; received {vocab_size}.")
        kind = torch.rand(len(masked_rows), generator=generator, dtype=torch.float64, device=device)
        drawn = ordinary[torch.randint(len(ordinary), (len(masked_rows),), generator=generator, device=device)]
        replacement = torch.where(kind < 0.8, replacement, torch.where(kind < 0.9, drawn, token_ids[masked_rows]))
    input_ids = token_ids.clone()
    input_ids[masked_rows] = replacement
    return MaskedTokens(input_ids, masked_rows)


def _check_ratio(ratio: float) -> None:
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must lie in [0, 1]; received {ratio}.")
