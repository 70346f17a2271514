"""CoCa as open_clip builds and trains it: one pooler for both losses, decoder layers with two MLPs.

Source: Ilharco et al., OpenCLIP (2021), the models coca_ViT-B-32 and coca_ViT-L-14, trained on LAION-2B; after Yu et al., CoCa (2022).
It differs from the paper's model, which is `vlp_fast.models.coca`, in this: the image encoder has a class token and a norm before
its blocks, and none after; one pooler of 256 queries serves both losses, its first row the contrast and the other 255 the captions;
a decoder layer is a self-attention block followed by a cross-attention block, each with an MLP of its own.

The published weights were trained with a mask that is shifted by one for the class row of a caption: where the caption was padded,
that row sees the words and the first row of padding but not itself (open_clip calls it legacy). ``legacy_class_mask=True`` gives
their numbers. A caption as long as the context has no padding, and both masks agree.

Dimensions: batch images, captions packed as rows, N = patches + 1, vision_dim, dim = width of all else, V words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.models._config import check_positive, make_preset
from vlp_fast.models.coca import CocaTowers
from vlp_fast.modules import (
    MLP,
    AttentionalPooler,
    CrossAttention,
    Linear,
    PatchDrop,
    PatchEmbedding,
    PreNormBlock,
    init_transformer,
)
from vlp_fast.passes import PassInfo
from vlp_fast.segments import Segments

__all__ = ["OPEN_CLIP_COCA_PRESETS", "OpenClipCoca", "OpenClipCocaConfig", "open_clip_coca_preset"]


@dataclass(frozen=True, kw_only=True)
class OpenClipCocaConfig:
    """Sizes of open_clip's CoCa; the defaults are coca_ViT-B-32.

    pooler_queries: rows pooled of each image, the first for contrast. dim: width of text, decoder, pooled rows and features alike.
    context_length: longest caption, and what shorter ones were padded to with `pad_id`. legacy_class_mask: True for the numbers of
    published weights, see above. patch_drop: part of an image's patches left out while training (FLIP; open_clip's patch_dropout).
    """

    image_size: int = 224
    patch_size: int = 32
    vision_dim: int = 768
    vision_depth: int = 12
    vision_heads: int = 12
    vision_hidden_dim: int = 3072
    pooler_queries: int = 256
    pooler_heads: int = 8
    dim: int = 512
    unimodal_depth: int = 12
    num_heads: int = 8
    hidden_dim: int = 2048
    multimodal_depth: int = 12
    decoder_heads: int = 8
    decoder_hidden_dim: int = 2048
    vocab_size: int = 49408
    context_length: int = 76
    pad_id: int = 0
    patch_drop: float = 0.0
    legacy_class_mask: bool = False
    eps: float = 1e-5
    backend: str | None = None

    def __post_init__(self) -> None:
        check_positive(self, "image_size", "patch_size", "vision_dim", "dim", "vocab_size", "context_length")
        if self.pooler_queries < 2:
            raise ValueError(
                f"pooler_queries must be at least 2, one for contrast and the rest for captions; received {self.pooler_queries}."
            )
        if not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(f"pad_id must be a word, 0 to {self.vocab_size - 1}; received {self.pad_id}.")


OPEN_CLIP_COCA_PRESETS = {
    # for tests and first steps: seconds on a CPU
    "tiny": {
        "image_size": 64, "vision_dim": 96, "vision_depth": 2, "vision_heads": 4, "vision_hidden_dim": 384, "pooler_queries": 17,
        "pooler_heads": 4, "dim": 64, "unimodal_depth": 2, "num_heads": 4, "hidden_dim": 256, "multimodal_depth": 2,
        "decoder_heads": 4, "decoder_hidden_dim": 256, "vocab_size": 1000,
    },
    # open_clip, model_configs/coca_ViT-B-32.json
    "ViT-B-32": {},
    # open_clip, model_configs/coca_ViT-L-14.json
    "ViT-L-14": {
        "patch_size": 14, "vision_dim": 1024, "vision_depth": 24, "vision_heads": 16, "vision_hidden_dim": 4096, "dim": 768,
        "num_heads": 12, "hidden_dim": 3072, "decoder_heads": 12, "decoder_hidden_dim": 3072,
    },
}  # fmt: skip


def open_clip_coca_preset(size: str, **changes: object) -> OpenClipCocaConfig:
    """The named preset with some fields changed, such as ``open_clip_coca_preset("ViT-L-14", legacy_class_mask=True)``."""
    return make_preset(OpenClipCocaConfig, OPEN_CLIP_COCA_PRESETS, size, changes)


class OpenClipCocaImageEncoder(nn.Module):
    """The vision transformer and the pooler.

    Shape: images ``[batch, 3, image_size, image_size]`` -> (caption tokens ``[batch * (pooler_queries - 1), dim]``, ``[batch, dim]``).
    """

    def __init__(self, config: OpenClipCocaConfig) -> None:
        super().__init__()
        width, heads = config.vision_dim, config.vision_heads
        self.patch_embedding = PatchEmbedding(config.image_size, config.patch_size, width, bias=False)
        self.num_tokens = self.patch_embedding.num_patches + 1
        self.class_token = nn.Parameter(torch.zeros(width))
        self.position_embedding = nn.Parameter(torch.zeros(self.num_tokens, width))
        self.patch_drop = PatchDrop(self.patch_embedding.num_patches, config.patch_drop, class_token=True)
        self.norm_pre = nn.LayerNorm(width, config.eps)
        self.blocks = nn.ModuleList(
            PreNormBlock(width, heads, config.vision_hidden_dim, eps=config.eps, backend=config.backend)
            for _ in range(config.vision_depth)
        )
        self.pooler = AttentionalPooler(
            config.dim,
            width,
            config.pooler_heads,
            config.pooler_queries,
            lambda n: nn.LayerNorm(n, config.eps),
            backend=config.backend,
        )
        self.norm = nn.LayerNorm(config.dim, config.eps)
        for module in (self.patch_embedding, self.blocks):
            module.apply(init_transformer)
        for parameter in (self.class_token, self.position_embedding):
            nn.init.trunc_normal_(parameter, std=0.02)

    def describe(self, images: Tensor) -> PassInfo:
        """What a call processed, for a profile (the encoder's tokens)."""
        rows = len(images) * self.patch_drop.kept_rows
        return PassInfo("image_encoder", len(images), rows, rows)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        batch = len(images)
        patches = self.patch_embedding(images)
        x = torch.cat([self.class_token.to(patches.dtype).expand(batch, 1, -1), patches], 1)
        x = self.norm_pre(self.patch_drop(x + self.position_embedding).flatten(0, 1))
        tokens = Segments([self.patch_drop.kept_rows] * batch, x.device)
        plan = AttentionPlan.self_attention(tokens)
        for block in self.blocks:
            x = block(x, plan)
        pooled = self.norm(self.pooler(x, self.pooler.plan(tokens))).unflatten(0, (batch, -1))  # [batch, pooler_queries, dim]
        return pooled[:, 1:].flatten(0, 1), pooled[:, 0]


class ClassRows(NamedTuple):
    """Captions with a class row packed at each end, and who reads whom.

    segments: of all rows. words: int64, the rows of words. ends: int64, the class rows. positions: int64, in the table.
    """

    segments: Segments
    words: Tensor
    ends: Tensor
    positions: Tensor
    plan: AttentionPlan


class OpenClipCocaTextEncoder(nn.Module):
    """The unimodal half: causal blocks over words and, packed at each caption's end, a class row.

    Shape: token_ids ``[rows]``, segments -> (words ``[rows, dim]`` without a final norm, class ``[captions, dim]`` after it).
    """

    def __init__(self, config: OpenClipCocaConfig) -> None:
        super().__init__()
        self.context_length, self.pad_id, self.legacy = config.context_length, config.pad_id, config.legacy_class_mask
        self.word = nn.Embedding(config.vocab_size, config.dim)
        self.class_token = nn.Parameter(torch.zeros(config.dim))
        # the last position belongs to the class row, whatever the caption's length
        self.position = nn.Parameter(torch.zeros(config.context_length + 1, config.dim))
        self.blocks = nn.ModuleList(
            PreNormBlock(config.dim, config.num_heads, config.hidden_dim, eps=config.eps, backend=config.backend)
            for _ in range(config.unimodal_depth)
        )
        self.norm = nn.LayerNorm(config.dim, config.eps)
        self.apply(init_transformer)
        for parameter in (self.class_token, self.position):
            nn.init.trunc_normal_(parameter, std=0.02)

    def describe(self, token_ids: Tensor, segments: Segments) -> PassInfo:
        """What a call processed, for a profile (class rows count, and the rows of padding that the legacy mask shows)."""
        rows = segments.rows + len(segments) + sum(self._padding(segments))
        return PassInfo("text_encoder", len(segments), rows, rows)

    def forward(self, token_ids: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        if segments.max_length > self.context_length:
            raise ValueError(f"captions must have at most {self.context_length} tokens; received one of {segments.max_length}.")
        rows = self._class_rows(segments)
        ids = token_ids.new_full((rows.segments.rows,), self.pad_id).index_copy(0, rows.words, token_ids)
        x = self.word(ids).index_copy(0, rows.ends, self.class_token.expand(len(segments), -1))
        x = x + self.position[rows.positions]
        for block in self.blocks:
            x = block(x, rows.plan)
        return x[rows.words], self.norm(x[rows.ends])

    def _padding(self, segments: Segments) -> list[int]:
        """Rows of padding that each caption's class row sees: one under the legacy mask, where the caption has any."""
        return [int(self.legacy and n < self.context_length) for n in segments.lengths]

    def _class_rows(self, segments: Segments) -> ClassRows:
        lengths, device = list(zip(segments.lengths, self._padding(segments), strict=True)), segments.device
        whole = Segments([n + padding + 1 for n, padding in lengths], device)
        parts = Segments([rows for n, padding in lengths for rows in (n, padding + 1)], device)
        words, _ = parts.take(range(0, len(parts), 2))
        ends = whole.last_rows()
        plan = self._legacy_plan(lengths, device) if self.legacy else AttentionPlan.self_attention(whole, causal=True)
        return ClassRows(whole, words, ends, whole.positions().index_fill(0, ends, self.context_length), plan)

    @staticmethod
    def _legacy_plan(lengths: list[tuple[int, int]], device: torch.device) -> AttentionPlan:
        """Words (and a row of padding) read each other causally; the class row reads them all, and itself only without padding."""
        edges = []
        for i, (_, padding) in enumerate(lengths):
            words, end = 2 * i, 2 * i + 1
            edges += [(words, words, True), (end, words, False)] + ([] if padding else [(end, end, False)])
        parts = Segments([rows for n, padding in lengths for rows in (n + padding, 1)], device)
        return AttentionPlan.from_edges(parts, parts, edges)


class CrossBlock(nn.Module):
    """x + cross_attention(norm(x), norm(context)), then x + MLP(norm(x)).

    Shape: x ``[rows, dim]``, context ``[context_rows, dim]`` -> ``[rows, dim]``.
    """

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, *, eps: float, backend: str | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.context_norm = nn.LayerNorm(dim, eps)
        self.cross_attention = CrossAttention(dim, dim, num_heads, backend=backend)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = MLP(dim, hidden_dim)

    def forward(self, x: Tensor, context: Tensor, plan: AttentionPlan) -> Tensor:
        x = x + self.cross_attention(self.norm1(x), self.context_norm(context), plan)
        return x + self.mlp(self.norm2(x))


class OpenClipCocaDecoder(nn.Module):
    """The multimodal half: a causal block over words, then a block that reads the image, by turns; and the weight of the words.

    Shape: rows ``[rows, dim]``, segments, image rows and segments, image of each caption -> ``[rows, dim]``, which `words` meets.
    """

    def __init__(self, config: OpenClipCocaConfig) -> None:
        super().__init__()
        sizes = (config.dim, config.decoder_heads, config.decoder_hidden_dim)
        depth, eps, backend = config.multimodal_depth, config.eps, config.backend
        self.blocks = nn.ModuleList(PreNormBlock(*sizes, eps=eps, backend=backend) for _ in range(depth))
        self.cross_blocks = nn.ModuleList(CrossBlock(*sizes, eps=eps, backend=backend) for _ in range(depth))
        self.norm = nn.LayerNorm(config.dim, eps)
        self.words = Linear(config.dim, config.vocab_size, bias=False)
        self.apply(init_transformer)

    def describe(self, rows: Tensor, segments: Segments, *images: object) -> PassInfo:
        """What a call processed, for a profile."""
        return PassInfo("text_decoder", len(segments), segments.rows, segments.rows)

    def forward(
        self,
        rows: Tensor,
        segments: Segments,
        image_rows: Tensor,
        image_segments: Segments,
        index: list[int] | Tensor | None = None,
    ) -> Tensor:
        plan = AttentionPlan.self_attention(segments, causal=True)
        cross_plan = AttentionPlan.cross_attention(segments, image_segments, index)
        for block, cross_block in zip(self.blocks, self.cross_blocks, strict=True):
            rows = cross_block(block(rows, plan), image_rows, cross_plan)
        return self.norm(rows)


class OpenClipCoca(CocaTowers):
    """The towers and heads of open_clip's CoCa. Captions enter as packed token ids (start, words, end; no padding) and `Segments`."""

    def __init__(self, config: OpenClipCocaConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = OpenClipCocaImageEncoder(config)
        self.text_encoder = OpenClipCocaTextEncoder(config)
        self.text_decoder = OpenClipCocaDecoder(config)
        self.image_projection = Linear(config.dim, config.dim, bias=False)
        self.text_projection = Linear(config.dim, config.dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # log of the scale
        for head in (self.image_projection, self.text_projection):
            init_transformer(head)
