"""ALBEF: an image encoder, a text encoder and a fusion encoder that reads images; the last two are the halves of one BERT.

Paper: Li et al., Align before Fuse (2021), figure 1. A pre-norm ViT; BERT-base in post-norm order, whose lower layers read text
alone and whose upper layers have cross-attention too; heads for contrast, matching and masked words. The momentum encoders and the
queue belong to pretraining (`vlp_fast.training.AlbefPretraining`).

Dimensions: batch images, captions packed as rows, N = image tokens (class token first), dim = text width, vision_dim, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_fast.models._config import check_positive, make_preset
from vlp_fast.models.blip import ImageOutput, project
from vlp_fast.modules import Linear, PostNormBlock, TextEmbedding, VisionTransformer, init_transformer, unit_features
from vlp_fast.ops import linear
from vlp_fast.passes import PackedPasses, PassInfo, TextPass, describe_passes, pack_passes
from vlp_fast.segments import Segments

__all__ = [
    "ALBEF_PRESETS",
    "Albef",
    "AlbefConfig",
    "AlbefEncoders",
    "AlbefFusionEncoder",
    "AlbefTextEmbedding",
    "AlbefTextEncoder",
    "AlbefWordHead",
    "albef_preset",
]


@dataclass(frozen=True, kw_only=True)
class AlbefConfig:
    """Sizes and constants of ALBEF; the defaults are the released model at 256 pixels.

    Layers 0 to ``fusion_layer - 1`` of the `depth` text layers read text alone; the others read an image too.
    `vocab_size` counts bert-base-uncased's words; the three ids are its [PAD], [CLS] and [MASK]. `patch_drop` is the part of an image's
    patches left out while training (FLIP), by the momentum encoder too, which draws others.
    """

    image_size: int = 256
    patch_size: int = 16
    vision_dim: int = 768
    vision_depth: int = 12
    vision_heads: int = 12
    vision_eps: float = 1e-6
    drop_path: float = 0.0
    patch_drop: float = 0.0
    dim: int = 768
    depth: int = 12
    fusion_layer: int = 6
    num_heads: int = 12
    hidden_dim: int = 3072
    text_eps: float = 1e-12
    dropout_p: float = 0.1
    vocab_size: int = 30522
    max_positions: int = 512
    token_types: int = 2
    pad_id: int = 0
    cls_id: int = 101
    mask_id: int = 103
    embed_dim: int = 256
    queue_size: int = 65536
    momentum: float = 0.995
    backend: str | None = None

    def __post_init__(self) -> None:
        check_positive(
            self,
            "image_size",
            "patch_size",
            "vision_dim",
            "vision_depth",
            "dim",
            "depth",
            "token_types",
            "embed_dim",
            "queue_size",
        )
        if not 0 < self.fusion_layer < self.depth:
            raise ValueError(
                f"fusion_layer must leave layers of text alone and layers of fusion, from 1 to {self.depth - 1}; received "
                f"{self.fusion_layer}."
            )
        for name in ("pad_id", "cls_id", "mask_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name} must be a word of the vocabulary of {self.vocab_size}; received {getattr(self, name)}."
                )


ALBEF_PRESETS = {
    # for tests and first steps: seconds on a CPU
    "tiny": {
        "image_size": 64, "vision_dim": 64, "vision_depth": 2, "vision_heads": 4, "dim": 64, "depth": 4, "fusion_layer": 2,
        "num_heads": 4, "hidden_dim": 256, "embed_dim": 32, "queue_size": 256, "dropout_p": 0.0, "max_positions": 64,
    },
    # section 3.1: ViT-B/16, the first six layers of BERT-base and the last six
    "base": {},
}  # fmt: skip


def albef_preset(size: str, **changes: object) -> AlbefConfig:
    """The named preset with some fields changed, such as ``albef_preset("base", image_size=384)``."""
    return make_preset(AlbefConfig, ALBEF_PRESETS, size, changes)


class AlbefTextEmbedding(TextEmbedding):
    """BERT's embedding: word plus position plus token type, LayerNorm, dropout.

    Every token is of type 0. The table keeps all its rows: folding row 0 into the positions would give the same numbers, but another
    model once it is trained, and other weights to save. Shape: as `vlp_fast.modules.TextEmbedding`.
    """

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__(
            config.vocab_size,
            config.max_positions,
            config.dim,
            eps=config.text_eps,
            dropout_p=config.dropout_p,
            padding_idx=config.pad_id,
        )
        self.token_type = nn.Embedding(config.token_types, config.dim)

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        words = self.word(token_ids) + self.token_type.weight[0]
        return self.dropout(self.norm(words + self.position(positions)))


def _text_layers(config: AlbefConfig, first: int, end: int) -> nn.ModuleList:
    return nn.ModuleList(
        PostNormBlock(
            config.dim,
            config.num_heads,
            config.hidden_dim,
            eps=config.text_eps,
            context_dim=config.vision_dim if layer >= config.fusion_layer else None,
            num_experts=1,
            dropout_p=config.dropout_p,
            backend=config.backend,
        )
        for layer in range(first, end)
    )


class AlbefTextEncoder(nn.Module):
    """The lower layers: text alone. Passes given together run as one packed forward.

    Shape: passes -> one ``[rows, dim]`` per pass, or ``[captions, dim]`` where only first rows are read. whole: the last layer computes all
    rows, as the published code does.
    """

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__()
        self.embedding = AlbefTextEmbedding(config)
        self.blocks = _text_layers(config, 0, config.fusion_layer)
        self.apply(init_transformer)

    def forward(self, passes: Sequence[TextPass], *, whole: bool = False) -> list[Tensor]:
        packed = pack_passes(passes, 1, None, whole=whole)
        return packed.split(_run(self.blocks, self.embedding(packed.token_ids, packed.positions), packed, None))

    def describe(self, passes: Sequence[TextPass], *, whole: bool = False) -> PassInfo:
        """What a call processed, for a profile."""
        return describe_passes("text_encoder", passes)


class AlbefFusionEncoder(nn.Module):
    """The upper layers: captions, as the text encoder has made them, read themselves and an image each.

    Shape: passes whose rows are ``[rows, dim]``, image_rows ``[image_rows, vision_dim]`` -> as `AlbefTextEncoder`.
    """

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__()
        self.blocks = _text_layers(config, config.fusion_layer, config.depth)
        self.apply(init_transformer)

    def forward(
        self, passes: Sequence[TextPass], image_rows: Tensor, image_segments: Segments, *, whole: bool = False
    ) -> list[Tensor]:
        packed = pack_passes(passes, 1, image_segments, whole=whole)
        return packed.split(_run(self.blocks, packed.token_ids, packed, image_rows))

    def describe(self, passes: Sequence[TextPass], *images: object, whole: bool = False) -> PassInfo:
        """What a call processed, for a profile."""
        return describe_passes("pair_encoder", passes)


def _run(blocks: nn.ModuleList, x: Tensor, packed: PackedPasses, context: Tensor | None) -> Tensor:
    for i, block in enumerate(blocks, 1):
        read = packed.read if i == len(blocks) else None
        x = block(x, packed.plan, packed.expert_offsets, context, packed.cross_plan, read=read)
    return x


class AlbefWordHead(nn.Module):
    """BERT's head for masked words: Linear, GELU, LayerNorm, then the words, whose weight is that of the embedding."""

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__()
        self.transform = Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, config.text_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        init_transformer(self.transform)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows of the fusion encoder -> ``[rows, dim]``, which the words meet."""
        return self.norm(F.gelu(self.transform(rows)))


class AlbefEncoders(nn.Module):
    """What the momentum model has a slow copy of: the encoders, their projections and the head for words.

    Captions enter as packed token ids and `Segments`: [CLS] words [SEP], no padding.
    """

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            dim=config.vision_dim,
            depth=config.vision_depth,
            num_heads=config.vision_heads,
            hidden_dim=4 * config.vision_dim,
            eps=config.vision_eps,
            class_token=True,
            drop_path=config.drop_path,
            patch_drop=config.patch_drop,
            backend=config.backend,
        )
        self.text_encoder = AlbefTextEncoder(config)
        self.fusion_encoder = AlbefFusionEncoder(config)
        self.image_projection = Linear(config.vision_dim, config.embed_dim)
        self.text_projection = Linear(config.dim, config.embed_dim)
        self.word_head = AlbefWordHead(config)
        for projection in (self.image_projection, self.text_projection):
            init_transformer(projection)

    def encode_image(self, images: Tensor) -> ImageOutput:
        """Images ``[batch, 3, image_size, image_size]`` -> rows, their segments, and contrastive features."""
        rows = self.image_encoder(images)
        segments = self.image_encoder.segments(len(images), rows.device)
        return ImageOutput(rows, segments, project(rows, segments, self.image_projection))

    def encode_text(self, token_ids: Tensor, segments: Segments) -> Tensor:
        """Captions, without looking at an image -> contrastive features ``[captions, embed_dim]``, L2-normalised."""
        (rows,) = self.text_encoder([TextPass("itc", token_ids, segments, first_row_only=True)])
        return unit_features(self.text_projection(rows))

    def encode_words(self, token_ids: Tensor, segments: Segments) -> Tensor:
        """Captions, without looking at an image -> ``[rows, dim]`` of the text encoder."""
        (rows,) = self.text_encoder([TextPass("text", token_ids, segments)])
        return rows

    def fuse(self, rows: Tensor, segments: Segments, image: ImageOutput, images: Sequence[int] | Tensor) -> Tensor:
        """Rows of the text encoder, caption i with image ``images[i]`` -> ``[rows, dim]``."""
        (fused,) = self.fusion_encoder([TextPass("fusion", rows, segments, images=images)], image.rows, image.segments)
        return fused

    def word_weights(self) -> tuple[Tensor, Tensor]:
        """Weight ``[vocab_size, dim]`` and bias of the words: the weight is that of the input embeddings."""
        return self.text_encoder.embedding.word.head_weight(), self.word_head.bias

    def word_logits(self, rows: Tensor) -> Tensor:
        """Rows of the fusion encoder -> ``[rows, vocab_size]``: which word was masked there."""
        return linear(self.word_head(rows), *self.word_weights())


class Albef(AlbefEncoders):
    """ALBEF's encoders and heads, with what has no slow copy: the temperature and the head for matching."""

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__(config)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.itm_head = Linear(config.dim, 2)
        init_transformer(self.itm_head)

    def matching_logits(self, rows: Tensor) -> Tensor:
        """First rows of the fusion encoder, ``[captions, dim]`` -> ``[captions, 2]``; class 1 is "matches"."""
        return self.itm_head(rows)
