"""From pixels and token ids to packed rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_fast.modules.dropout import Dropout
from vlp_fast.modules.linear import Linear
from vlp_fast.ops._autocast import shared_table
from vlp_fast.segments import Segments

__all__ = ["PatchDrop", "PatchEmbedding", "TextEmbedding", "WordEmbedding"]


class PatchEmbedding(nn.Module):
    """Non-overlapping square patches, each projected to one row: a convolution with stride = kernel, as one linear.

    Args:
        image_size: side of the square image, a multiple of patch_size. patch_size: side of a patch. dim: width of the rows.
        bias: of the projection.

    Shape: images ``[batch, 3, image_size, image_size]`` -> ``[batch, num_patches, dim]``, patches in row-major order.
    Raises: ValueError for images of another shape.
    """

    def __init__(self, image_size: int, patch_size: int, dim: int, *, bias: bool = True) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size; received {image_size} and {patch_size}.")
        self.image_size, self.patch_size = image_size, patch_size
        self.grid = image_size // patch_size
        self.num_patches = self.grid**2
        self.proj = Linear(3 * patch_size**2, dim, bias)

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"images must be [batch, 3, {self.image_size}, {self.image_size}]; received {list(images.shape)}.")
        p, g = self.patch_size, self.grid
        patches = images.unflatten(3, (g, p)).unflatten(2, (g, p))  # [batch, 3, g, p, g, p]
        return self.proj(patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.num_patches, 3 * p * p))


class PatchDrop(nn.Module):
    """Leaves out patches drawn at random, for each image others, while training; in evaluation every patch stays.

    What is left out is gone: no later layer computes its row. As many patches stay in every image, ``round((1 - share) * num_patches)``
    and one at least, so lengths are known on the host, and nothing waits for the device, where the draw is made. Masked patches, whose
    content is to be predicted, all stay (`draw_masked`): the share is then of the visible ones, and an image keeps its masked patches and
    ``round((1 - share) * visible)`` others, one at least where any is visible.

    Args:
        num_patches: of an image. share: part of the patches left out, in [0, 1); FLIP takes 0.5 and 0.75. class_token: the first row of
            an image is no patch and stays.

    Shape: ``[batch, rows of an image, dim]`` -> ``[batch, kept_rows, dim]``, rows in their order.
    Raises: ValueError for a share outside [0, 1).
    Source: Li et al., Scaling Language-Image Pre-training via Masking (2022), section 3.
    """

    def __init__(self, num_patches: int, share: float, class_token: bool) -> None:
        super().__init__()
        if not 0.0 <= share < 1.0:
            raise ValueError(f"patch_drop must lie in [0, 1); received {share}.")
        self.num_patches, self.share, self.num_class_rows = num_patches, share, int(class_token)

    @property
    def kept_rows(self) -> int:
        """Rows that an image has behind this module, as it stands: in training or in evaluation."""
        return self.num_class_rows + self._count(self.num_patches)

    def kept_lengths(self, mask_counts: Sequence[int]) -> list[int]:
        """Rows that images have behind this module, as it stands, of whose patches so many are masked."""
        return [self.num_class_rows + n + self._count(self.num_patches - n) for n in mask_counts]

    def draw(self, batch: int, device: torch.device) -> Tensor | None:
        """Which rows stay of each image: int64 ``[batch, kept_rows]``, rising, drawn anew by every call; None: all."""
        rows, first = self.kept_rows, self.num_class_rows
        if rows == first + self.num_patches:
            return None
        drawn = torch.rand(batch, self.num_patches, device=device).argsort(1)[:, : rows - first].sort(1).values + first
        return torch.cat([drawn.new_zeros(batch, 1), drawn], 1) if first else drawn

    def draw_masked(self, mask: Tensor, lengths: Sequence[int]) -> Tensor:
        """As `draw`, of packed images, with every masked patch: int64 ``[sum(lengths)]``, rising.

        Args:
            mask: bool ``[batch, num_patches]``. lengths: `kept_lengths` of its counts.
        """
        batch, first = len(mask), self.num_class_rows
        draw = torch.rand(batch, self.num_patches, device=mask.device).masked_fill(mask, -1.0)  # masked patches come first
        limits = Segments([n - first for n in lengths], mask.device).offsets.diff()
        stays = torch.cat([mask.new_ones(batch, first), draw.argsort(1).argsort(1) < limits[:, None]], 1).flatten()
        # a sort, where nonzero would make the host wait for how many there are
        rows = torch.arange(len(stays), device=mask.device).masked_fill(~stays, len(stays))
        return rows.sort().values[: sum(lengths)]

    def forward(self, x: Tensor) -> Tensor:
        kept = self.draw(len(x), x.device)
        return x if kept is None else x[torch.arange(len(x), device=x.device)[:, None], kept]

    def _count(self, patches: int) -> int:
        """How many stay of so many patches that may be left out."""
        return max(round((1.0 - self.share) * patches), min(patches, 1)) if self.training else patches


class WordEmbedding(nn.Embedding):
    """nn.Embedding of words, with a head of the same weight or without. Shape: int64 ``[rows]`` -> ``[rows, embedding_dim]``."""

    def head_weight(self) -> Tensor:
        """The weight, for a head: within a step on a CPU its gradient is added to those of the lookups (`ops._autocast`)."""
        return shared_table(self.weight).head

    def forward(self, input: Tensor) -> Tensor:
        table = shared_table(self.weight).lookups
        return F.embedding(input, table, self.padding_idx, sparse=table is not self.weight)


class TextEmbedding(nn.Module):
    """Word plus learned position embedding, then (BERT) LayerNorm and dropout.

    Args:
        vocab_size, max_positions, dim: table sizes. eps: of the LayerNorm; None leaves the norm out. dropout_p: after the norm.
        padding_idx: a word whose row is never trained.

    Shape: token_ids int64 ``[rows]``, positions int64 ``[rows]`` -> ``[rows, dim]``.
    """

    def __init__(
        self,
        vocab_size: int,
        max_positions: int,
        dim: int,
        *,
        eps: float | None = None,
        dropout_p: float = 0.0,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.word = WordEmbedding(vocab_size, dim, padding_idx=padding_idx)
        self.position = nn.Embedding(max_positions, dim)
        self.norm = nn.Identity() if eps is None else nn.LayerNorm(dim, eps)
        self.dropout = Dropout(dropout_p)

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        return self.dropout(self.norm(self.word(token_ids) + self.position(positions)))


def init_transformer(module: nn.Module, std: float = 0.02) -> None:
    """Truncated normal weights, zero biases, unit norms: how ViT and BERT start. For `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
