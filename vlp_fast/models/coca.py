"""CoCa: an image encoder, attentional poolers, and a causal text decoder whose first half does not look at the image.

Paper: Yu et al., CoCa: Contrastive Captioners are Image-Text Foundation Models (2022), figures 2 and 3. One forward serves both
losses: the unimodal half ends in a CLS row per caption (contrast), the multimodal half predicts the next word. Blocks are pre-norm
with biases, exact GELU and LayerNorm eps 1e-5, as in open_clip; decoder layers are self-attention, cross-attention, MLP (paper).

Dimensions: batch images, captions packed as rows, N = patches (no class token), dim = text width, vision_dim, V words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.models._config import check_positive, make_preset
from vlp_fast.modules import AttentionalPooler, Linear, PreNormBlock, VisionTransformer, init_transformer, unit_features
from vlp_fast.ops import linear
from vlp_fast.passes import PassInfo
from vlp_fast.segments import Segments

__all__ = ["COCA_PRESETS", "CocaConfig", "Coca", "CocaImage", "CocaText", "CocaTowers", "coca_preset"]

POOLERS = ("cascade", "parallel")


@dataclass(frozen=True, kw_only=True)
class CocaConfig:
    """Sizes of CoCa; the defaults are the paper's base model (table 1) with 16-pixel patches at 224 pixels.

    The paper trains at 288 pixels with 18-pixel patches: ``coca_preset("base", image_size=288, patch_size=18)``.
    pooler: "cascade" (the contrastive query reads the caption queries, the paper's default) or "parallel" (both read the image).
    patch_drop: part of an image's patches left out while training (FLIP).
    experts: the image encoder and the unimodal text encoder are one stack of layers with an expert of each modality: `CocaExperts`.
    """

    image_size: int = 224
    patch_size: int = 16
    vision_dim: int = 768
    vision_depth: int = 12
    vision_heads: int = 12
    dim: int = 768
    unimodal_depth: int = 12
    multimodal_depth: int = 12
    num_heads: int = 12
    hidden_dim: int = 3072
    eps: float = 1e-5
    vocab_size: int = 64000
    context_length: int = 76
    embed_dim: int = 768
    caption_queries: int = 256
    pooler: str = "cascade"
    pooler_heads: int = 8
    patch_drop: float = 0.0
    experts: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        check_positive(self, "image_size", "patch_size", "vision_dim", "dim", "vocab_size", "context_length", "caption_queries")
        if self.pooler not in POOLERS:
            raise ValueError(f"pooler must be one of {', '.join(POOLERS)}; received {self.pooler!r}.")
        image, text = (self.vision_dim, self.vision_depth, self.vision_heads), (self.dim, self.unimodal_depth, self.num_heads)
        if self.experts and image != text:
            raise ValueError(
                "experts need vision_dim, vision_depth and vision_heads equal to dim, unimodal_depth and num_heads; "
                f"received {image} and {text}."
            )


COCA_PRESETS = {
    # for tests and first steps: seconds on a CPU
    "tiny": {
        "image_size": 64, "vision_dim": 64, "vision_depth": 2, "vision_heads": 4, "dim": 64, "unimodal_depth": 2,
        "multimodal_depth": 2, "num_heads": 4, "hidden_dim": 256, "embed_dim": 32, "caption_queries": 16, "pooler_heads": 4,
        "vocab_size": 1000,
    },
    # table 1, CoCa-Base
    "base": {},
    # table 1, CoCa-Large
    "large": {
        "vision_dim": 1024, "vision_depth": 24, "vision_heads": 16, "dim": 1024, "num_heads": 16, "hidden_dim": 4096,
        "embed_dim": 1024,
    },
}  # fmt: skip


def coca_preset(size: str, **changes: object) -> CocaConfig:
    """The named preset with some fields changed, such as ``coca_preset("base", image_size=384)``."""
    return make_preset(CocaConfig, COCA_PRESETS, size, changes)


class CocaImage(NamedTuple):
    """rows: pooled caption tokens ``[batch * caption_queries, dim]``. segments: one image each. features: ``[batch, embed_dim]``."""

    rows: Tensor
    segments: Segments
    features: Tensor


class CocaText(NamedTuple):
    """rows: unimodal states of the words ``[rows, dim]``. segments: captions. features: ``[captions, embed_dim]``, L2-normalised."""

    rows: Tensor
    segments: Segments
    features: Tensor


class CocaWords(nn.Module):
    """Words with their positions and, packed at each caption's end, a CLS row.

    Shape: token_ids ``[rows]``, segments -> (``[rows + captions, dim]``, its segments).
    """

    def __init__(self, config: CocaConfig) -> None:
        super().__init__()
        self.context_length = config.context_length
        self.word = nn.Embedding(config.vocab_size, config.dim)
        self.class_token = nn.Parameter(torch.zeros(config.dim))
        # the last position belongs to CLS, whatever the caption's length
        self.position = nn.Parameter(torch.zeros(config.context_length + 1, config.dim))
        init_transformer(self.word)
        for parameter in (self.class_token, self.position):
            nn.init.trunc_normal_(parameter, std=0.02)

    def embed(self, token_ids: Tensor, segments: Segments) -> tuple[Tensor, Segments]:
        if segments.max_length > self.context_length:
            raise ValueError(f"captions must have at most {self.context_length} tokens; received one of {segments.max_length}.")
        with_class = Segments([n + 1 for n in segments.lengths], token_ids.device)
        words = self.word(token_ids).to(self.class_token.dtype)
        x = self.class_token.repeat(with_class.rows, 1).index_copy(0, with_class.rows_before_last(1), words)
        positions = with_class.positions().index_fill(0, with_class.last_rows(), self.context_length)
        return x + self.position[positions], with_class


class CocaTextEncoder(CocaWords):
    """The unimodal half: causal blocks over words and CLS rows, each of which sees its caption's words.

    Shape: token_ids ``[rows]``, segments -> (words ``[rows, dim]``, CLS ``[captions, dim]`` after the final norm).
    """

    def __init__(self, config: CocaConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(
            PreNormBlock(config.dim, config.num_heads, config.hidden_dim, eps=config.eps, backend=config.backend)
            for _ in range(config.unimodal_depth)
        )
        self.norm = nn.LayerNorm(config.dim, config.eps)
        self.blocks.apply(init_transformer)

    def describe(self, token_ids: Tensor, segments: Segments) -> PassInfo:
        """What a call processed, for a profile (the CLS rows count)."""
        rows = segments.rows + len(segments)
        return PassInfo("text_encoder", len(segments), rows, rows)

    def forward(self, token_ids: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        x, with_class = self.embed(token_ids, segments)
        words, ends = with_class.rows_before_last(1), with_class.last_rows()
        plan = AttentionPlan.self_attention(with_class, causal=True)
        for block in self.blocks:
            x = block(x, plan)
        return x[words], self.norm(x[ends])


class CocaDecoder(nn.Module):
    """The multimodal half: causal self-attention, cross-attention to the pooled image tokens, MLP; and the weight of the words.

    Shape: rows ``[rows, dim]``, segments, image rows and segments, image of each caption -> ``[rows, dim]``, which `words` meets.
    """

    def __init__(self, config: CocaConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            PreNormBlock(
                config.dim, config.num_heads, config.hidden_dim, eps=config.eps, context_dim=config.dim, backend=config.backend
            )
            for _ in range(config.multimodal_depth)
        )
        self.norm = nn.LayerNorm(config.dim, config.eps)
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
        for block in self.blocks:
            rows = block(rows, plan, image_rows, cross_plan)
        return self.norm(rows)


class CocaPoolers(nn.Module):
    """Both attentional poolers over an image encoder's tokens.

    Shape: tokens ``[rows, vision_dim]``, lengths of the images -> (caption tokens ``[batch * caption_queries, dim]``, ``[batch, dim]``).
    """

    def __init__(self, config: CocaConfig) -> None:
        super().__init__()
        self.cascade = config.pooler == "cascade"
        second = config.dim if self.cascade else config.vision_dim
        heads, backend = config.pooler_heads, config.backend
        self.caption_pooler = AttentionalPooler(config.dim, config.vision_dim, heads, config.caption_queries, backend=backend)
        self.caption_norm = nn.LayerNorm(config.dim, config.eps)
        self.contrastive_pooler = AttentionalPooler(config.dim, second, heads, 1, backend=backend)
        self.contrastive_norm = nn.LayerNorm(config.dim, config.eps)

    def pool(self, tokens: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Caption tokens and the contrastive row of every image."""
        captioning = self.caption_norm(self.caption_pooler(tokens, self.caption_pooler.plan(lengths, tokens.device)))
        queries = [self.caption_pooler.n_queries] * len(lengths)
        context, context_lengths = (captioning, queries) if self.cascade else (tokens, lengths)
        pooled = self.contrastive_pooler(context, self.contrastive_pooler.plan(context_lengths, tokens.device))
        return captioning, self.contrastive_norm(pooled)


class CocaImageEncoder(CocaPoolers):
    """The vision transformer and both attentional poolers.

    Shape: images ``[batch, 3, image_size, image_size]`` -> (caption tokens ``[batch * caption_queries, dim]``, ``[batch, dim]``).
    """

    def __init__(self, config: CocaConfig) -> None:
        super().__init__(config)
        self.encoder = VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            dim=config.vision_dim,
            depth=config.vision_depth,
            num_heads=config.vision_heads,
            hidden_dim=4 * config.vision_dim,
            eps=config.eps,
            class_token=False,
            patch_drop=config.patch_drop,
            backend=config.backend,
        )

    def describe(self, images: Tensor) -> PassInfo:
        """What a call processed, for a profile (the encoder's tokens)."""
        return self.encoder.describe(images)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.pool(self.encoder(images), self.encoder.segments(len(images)).lengths)


class CocaTowers(nn.Module):
    """What the towers of every CoCa do together: features of images and captions, and the next word of each word.

    Subclasses hold `image_encoder` (images -> caption tokens, pooled), `text_encoder` (captions -> words, CLS), `text_decoder` and both
    projections.
    """

    image_encoder: Any
    text_encoder: Any
    text_decoder: Any
    image_projection: Linear
    text_projection: Linear

    def encode_image(self, images: Tensor) -> CocaImage:
        """Images ``[batch, 3, image_size, image_size]`` -> pooled caption tokens and contrastive features."""
        return self._image_output(len(images), *self.image_encoder(images))

    def encode_text(self, token_ids: Tensor, segments: Segments) -> CocaText:
        """Captions -> unimodal states of their words and contrastive features from their CLS rows."""
        return self._text_output(segments, *self.text_encoder(token_ids, segments))

    def encode(self, images: Tensor, token_ids: Tensor, segments: Segments) -> tuple[CocaImage, CocaText]:
        """Images and captions, of which there need not be equally many; neither sees the other."""
        return self.encode_image(images), self.encode_text(token_ids, segments)

    def _image_output(self, batch: int, rows: Tensor, pooled: Tensor) -> CocaImage:
        segments = Segments([rows.shape[0] // max(batch, 1)] * batch, rows.device)
        return CocaImage(rows, segments, unit_features(self.image_projection(pooled)))

    def _text_output(self, segments: Segments, rows: Tensor, pooled: Tensor) -> CocaText:
        return CocaText(rows, segments, unit_features(self.text_projection(pooled)))

    def word_hidden(self, text: CocaText, image: CocaImage, index: list[int] | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The decoder over every word but each caption's last, which has no next.

        Args:
            index: which image each caption describes; default: caption i describes image i.

        Returns: ``[rows - captions, dim]``, which ``text_decoder.words.weight`` meets, and the rows of `text` they belong to, int64.
        """
        kept = text.segments.rows_before_last(1)
        shorter = Segments([max(n - 1, 0) for n in text.segments.lengths], text.rows.device)
        return self.text_decoder(text.rows[kept], shorter, image.rows, image.segments, index), kept

    def word_logits(self, text: CocaText, image: CocaImage, index: list[int] | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Next-word logits ``[rows - captions, vocab_size]`` of `word_hidden`'s rows, and those rows."""
        hidden, kept = self.word_hidden(text, image, index)
        return linear(hidden, self.text_decoder.words.weight), kept


class Coca(CocaTowers):
    """CoCa's towers and heads. Captions enter as packed token ids (start, words, end; no padding) and `Segments`."""

    def __init__(self, config: CocaConfig) -> None:
        super().__init__()
        if config.experts:
            raise ValueError(
                "Coca has a tower of each modality, experts=False; experts=True is CocaExperts. Received experts=True."
            )
        self.config = config
        self.image_encoder = CocaImageEncoder(config)
        self.text_encoder = CocaTextEncoder(config)
        self.text_decoder = CocaDecoder(config)
        self.image_projection = Linear(config.dim, config.embed_dim, bias=False)
        self.text_projection = Linear(config.dim, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # log of the scale
        for head in (self.image_projection, self.text_projection):
            init_transformer(head)
