"""The image encoder of BLIP and CoCa: a pre-norm vision transformer on packed rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.modules.blocks import PreNormBlock
from vlp_fast.modules.embeddings import PatchDrop, PatchEmbedding, init_transformer
from vlp_fast.passes import PassInfo, first_rows
from vlp_fast.segments import Segments

__all__ = ["VisionTransformer"]


class VisionTransformer(nn.Module):
    """Patches, an optional class token, learned positions, pre-norm blocks, a final norm.

    Args:
        image_size, patch_size, dim, depth, num_heads, hidden_dim: sizes. eps: of every norm. class_token: prepend one row.
        drop_path: stochastic depth, rising linearly from 0 to this over the depth. patch_drop: part of the patches left out while
            training, as in `PatchDrop`. backend: of attention.

    Shape: images ``[batch, 3, image_size, image_size]`` -> rows of `segments`, image after image; ``[batch * num_tokens, dim]`` where no
        patch is left out.
    Source: Dosovitskiy et al., An Image is Worth 16x16 Words (2021); final norm as in timm.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        hidden_dim: int,
        eps: float,
        class_token: bool,
        drop_path: float = 0.0,
        patch_drop: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(image_size, patch_size, dim)
        self.num_tokens = self.patch_embedding.num_patches + int(class_token)
        self.class_token = nn.Parameter(torch.zeros(dim)) if class_token else None
        self.position_embedding = nn.Parameter(torch.zeros(self.num_tokens, dim))
        self.patch_drop = PatchDrop(self.patch_embedding.num_patches, patch_drop, class_token)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            PreNormBlock(dim, num_heads, hidden_dim, eps=eps, drop_path=rate, backend=backend) for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps)
        self.apply(init_transformer)
        for parameter in (self.position_embedding, self.class_token):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def segments(self, batch: int, device: torch.device | str | None = None) -> Segments:
        """The segments of this encoder's output for `batch` images: fewer rows in training than in evaluation with `patch_drop`."""
        return Segments([self.patch_drop.kept_rows] * batch, device)

    def describe(self, images: Tensor, *, first_row_only: bool = False) -> PassInfo:
        """What a call processed, for a profile."""
        rows = len(images) * self.patch_drop.kept_rows
        return PassInfo("image_encoder", len(images), rows, rows)

    def forward(self, images: Tensor, *, first_row_only: bool = False) -> Tensor:
        """first_row_only: ``[batch, dim]``, the first row of each image; the last block computes no other."""
        batch = images.shape[0]
        x = self.patch_embedding(images)
        if self.class_token is not None:
            x = torch.cat([self.class_token.to(x.dtype).expand(batch, 1, -1), x], 1)
        x = self.patch_drop(x + self.position_embedding).flatten(0, 1)
        segments = self.segments(batch, x.device)
        plan = AttentionPlan.self_attention(segments)
        samples = torch.arange(batch, device=x.device).repeat_interleave(len(x) // max(batch, 1)) if self.training else None
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, plan, samples=samples, num_samples=batch)
        read = first_rows(segments) if first_row_only else None
        return self.norm(last(x, plan, samples=samples, num_samples=batch, read=read))
