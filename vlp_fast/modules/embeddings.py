"""From pixels and token ids to packed rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlp_fast.modules.linear import Linear

__all__ = ["PatchEmbedding", "TextEmbedding"]


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
        self.word = nn.Embedding(vocab_size, dim, padding_idx=padding_idx)
        self.position = nn.Embedding(max_positions, dim)
        self.norm = nn.Identity() if eps is None else nn.LayerNorm(dim, eps)
        self.dropout = nn.Dropout(dropout_p)

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
