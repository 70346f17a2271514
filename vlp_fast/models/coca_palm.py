"""CoCa on PaLM's blocks, as lucidrains builds it: parallel attention and SwiGLU, one key and value head, rotary positions, no bias.

Source: Yu et al., CoCa (2022), figure 2, with the blocks of Chowdhery et al., PaLM (2022), section 2; the package CoCa-pytorch. It
differs from the paper's model, which is `vlp_fast.models.coca`, in this: one pooler serves both losses, its first row the contrast and
the rest the captions; a decoder layer is a block of self-attention, then one of cross-attention, each with a SwiGLU at its side; the
words that begin the text and those that end it share one weight. The image encoder is anybody's.

Where CLS stands. CLS reads all words of its caption and no word reads it, so packing it right behind them changes nothing but its
rotary position, on which its attention to the words depends. CoCa-pytorch appends CLS behind the padding: in a batch padded to L
columns it stands at position L, whatever the caption's length, and a caption's features depend on L. ``class_position=L`` gives those
numbers. Without it CLS stands right behind each caption: what CoCa-pytorch gives for that caption alone, whatever the batch. States
of words, and so logits, are the same for both.

In training CoCa-pytorch cuts off the batch's last column before the text encoder: L then counts what is left, and CLS of a caption
that filled all columns does not read its last word. A padding id inside a caption, which CLS does not see there, is a word here.

Dimensions: batch images, captions packed as rows, vision_dim = width of image tokens, dim = width of text, V words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.models._config import check_positive, make_preset
from vlp_fast.models.coca import CocaImage, CocaText, CocaTowers
from vlp_fast.modules import (
    Linear,
    MultiQueryPooler,
    ParallelBlock,
    ParallelCrossBlock,
    VisionTransformer,
    rotary_table,
    unit_features,
)
from vlp_fast.passes import PassInfo
from vlp_fast.segments import Segments

__all__ = ["COCA_PALM_PRESETS", "CocaPalm", "CocaPalmConfig", "coca_palm_preset"]

IMAGE_ENCODERS = ("vit", "given")


@dataclass(frozen=True, kw_only=True)
class CocaPalmConfig:
    """Sizes of CoCa on PaLM's blocks; the defaults of text and decoder are those that CoCa-pytorch's introduction uses.

    image_encoder: "vit" (ours, of the sizes named vision, without class token) or "given" (a module passed to `CocaPalm`).
    patch_drop: part of an image's patches left out while training (FLIP), by our image encoder; one that is given does so itself.
    vision_dim: width of the image tokens, whoever makes them. head_dim: of every head of text, decoder and pooler; even.
    caption_queries: rows pooled of each image for captions; one more is pooled for contrast. embed_dim: of the features.
    class_position: see the module; None: right behind each caption.
    """

    image_encoder: str = "vit"
    image_size: int = 256
    patch_size: int = 32
    vision_dim: int = 1024
    vision_depth: int = 6
    vision_heads: int = 16
    patch_drop: float = 0.0
    dim: int = 512
    unimodal_depth: int = 6
    multimodal_depth: int = 6
    num_heads: int = 8
    head_dim: int = 64
    hidden_dim: int = 2048
    vocab_size: int = 20000
    embed_dim: int = 512
    caption_queries: int = 256
    class_position: int | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        check_positive(self, "image_size", "patch_size", "vision_dim", "dim", "unimodal_depth", "multimodal_depth", "num_heads")
        check_positive(self, "head_dim", "hidden_dim", "vocab_size", "embed_dim", "caption_queries")
        if self.image_encoder not in IMAGE_ENCODERS:
            raise ValueError(f"image_encoder must be one of {', '.join(IMAGE_ENCODERS)}; received {self.image_encoder!r}.")
        if self.image_encoder == "given" and self.patch_drop:
            raise ValueError(
                f"patch_drop is of the image encoder 'vit'; received {self.patch_drop} for one that is given, which must leave out "
                "patches itself."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, for rotary positions turn pairs; received {self.head_dim}.")
        if self.class_position is not None:
            check_positive(self, "class_position")


COCA_PALM_PRESETS = {
    # for tests and first steps: seconds on a CPU
    "tiny": {
        "image_size": 64, "patch_size": 16, "vision_dim": 64, "vision_depth": 2, "vision_heads": 4, "dim": 48,
        "unimodal_depth": 2, "multimodal_depth": 2, "num_heads": 3, "head_dim": 16, "hidden_dim": 192, "embed_dim": 32,
        "caption_queries": 16, "vocab_size": 1000,
    },
    # the example of CoCa-pytorch's introduction
    "base": {},
}  # fmt: skip


def coca_palm_preset(size: str, **changes: object) -> CocaPalmConfig:
    """The named preset with some fields changed, such as ``coca_palm_preset("base", vocab_size=32000)``."""
    return make_preset(CocaPalmConfig, COCA_PALM_PRESETS, size, changes)


class CocaPalmImageEncoder(nn.Module):
    """Any encoder of images, and the pooler.

    Shape: images -> (caption tokens ``[batch * caption_queries, dim]``, contrast ``[batch, dim]``), both after the norm.
    """

    def __init__(self, config: CocaPalmConfig, encoder: nn.Module) -> None:
        super().__init__()
        self.vision_dim = config.vision_dim
        self.encoder = encoder
        self.pooler = MultiQueryPooler(
            config.dim,
            config.vision_dim,
            config.num_heads,
            config.head_dim,
            config.caption_queries + 1,
            backend=config.backend,
        )
        self.norm = nn.LayerNorm(config.dim, bias=False)

    def describe(self, images: Tensor) -> PassInfo:
        """What a call processed, for a profile: the encoder's tokens, where it tells; pooled rows where it does not."""
        if hasattr(self.encoder, "describe"):
            return self.encoder.describe(images)  # type: ignore[operator]
        rows = len(images) * self.pooler.num_queries
        return PassInfo("image_encoder", len(images), rows, rows)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens = len(images), self.encoder(images)
        if tokens.shape[-1] != self.vision_dim or (tokens.numel() // self.vision_dim) % max(batch, 1):
            raise ValueError(
                f"the image encoder must return tokens [batch, tokens, {self.vision_dim}], or packed [batch * tokens, "
                f"{self.vision_dim}]; it returned {list(tokens.shape)} for {batch} images."
            )
        rows = tokens.reshape(-1, self.vision_dim)
        return self.pool(rows, Segments([len(rows) // max(batch, 1)] * batch, rows.device))

    def pool(self, rows: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """As forward, from image tokens ``[rows, vision_dim]`` of images that may differ in length."""
        pooled = self.norm(self.pooler(rows, segments))
        pooled = pooled.unflatten(0, (len(segments), self.pooler.num_queries))  # [batch, 1 + caption_queries, dim]
        return pooled[:, 1:].flatten(0, 1), pooled[:, 0]


class CocaPalmTextEncoder(nn.Module):
    """The unimodal half: causal blocks over words and, packed behind each caption, a CLS row that reads them all.

    Shape: embedded words ``[rows, dim]``, segments, position of CLS or None -> (words ``[rows, dim]``, without a final norm; CLS
    ``[captions, dim]`` after it).
    """

    def __init__(self, config: CocaPalmConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.class_token = nn.Parameter(torch.randn(config.dim))
        self.blocks = nn.ModuleList(
            ParallelBlock(config.dim, config.num_heads, config.head_dim, config.hidden_dim, backend=config.backend)
            for _ in range(config.unimodal_depth)
        )
        self.norm = nn.LayerNorm(config.dim, bias=False)

    def describe(self, words: Tensor, segments: Segments, class_position: int | None = None) -> PassInfo:
        """What a call processed, for a profile (the CLS rows count)."""
        rows = segments.rows + len(segments)
        return PassInfo("text_encoder", len(segments), rows, rows)

    def forward(self, words: Tensor, segments: Segments, class_position: int | None = None) -> tuple[Tensor, Tensor]:
        if class_position is not None and class_position < segments.max_length:
            raise ValueError(
                f"class_position must not lie before the end of a caption; received {class_position} for one of "
                f"{segments.max_length} tokens."
            )
        with_class = Segments([n + 1 for n in segments.lengths], words.device)
        kept, ends = with_class.rows_before_last(1), with_class.last_rows()
        positions = with_class.positions()
        if class_position is not None:
            positions = positions.index_fill(0, ends, class_position)
        x = self.class_token.to(words.dtype).repeat(with_class.rows, 1).index_copy(0, kept, words)
        plan = AttentionPlan.self_attention(with_class, causal=True)
        rotary = rotary_table(positions, self.head_dim, dtype=x.dtype)
        for block in self.blocks:
            x = block(x, plan, rotary)
        return x[kept], self.norm(x[ends])


class CocaPalmDecoder(nn.Module):
    """The multimodal half: a causal block over words, then a block that reads the image, by turns; and the words.

    `words` embeds the text for both halves, and its weight, which `hidden` rows meet, also predicts it.

    Shape: rows ``[rows, dim]``, segments, image rows and segments, image of each caption -> ``[rows, dim]``.
    """

    def __init__(self, config: CocaPalmConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        sizes, depth, backend = (config.num_heads, config.head_dim, config.hidden_dim), config.multimodal_depth, config.backend
        self.blocks = nn.ModuleList(ParallelBlock(config.dim, *sizes, backend=backend) for _ in range(depth))
        self.cross_blocks = nn.ModuleList(
            ParallelCrossBlock(config.dim, config.dim, *sizes, backend=backend) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(config.dim, bias=False)
        self.words = nn.Embedding(config.vocab_size, config.dim)
        nn.init.normal_(self.words.weight, std=0.02)

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
        rotary = rotary_table(segments.positions(), self.head_dim, dtype=rows.dtype)
        for block, cross_block in zip(self.blocks, self.cross_blocks, strict=True):
            rows = cross_block(block(rows, plan, rotary), image_rows, cross_plan)
        return self.norm(rows)


class CocaPalm(CocaTowers):
    """CoCa on PaLM's blocks. Captions enter as packed token ids (start, words, end; no padding) and `Segments`.

    Args:
        config: sizes.
        image_encoder: with ``config.image_encoder="given"``, any module from images to tokens ``[batch, tokens, vision_dim]`` or
            packed ``[batch * tokens, vision_dim]``; None then: image tokens take the place of images.

    Raises: ValueError for a module where the config says "vit".
    """

    def __init__(self, config: CocaPalmConfig, image_encoder: nn.Module | None = None) -> None:
        super().__init__()
        if config.image_encoder == "vit" and image_encoder is not None:
            raise ValueError(
                "image_encoder must be left out where config.image_encoder is 'vit'; with 'given' the model takes "
                f"the {type(image_encoder).__name__} received."
            )
        self.config = config
        encoder = _vit(config) if config.image_encoder == "vit" else image_encoder
        self.image_encoder = CocaPalmImageEncoder(config, nn.Identity() if encoder is None else encoder)
        self.text_encoder = CocaPalmTextEncoder(config)
        self.text_decoder = CocaPalmDecoder(config)
        self.image_projection = Linear(config.dim, config.embed_dim, bias=False)
        self.text_projection = Linear(config.dim, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))  # log of the scale

    def encode_image(self, images: Tensor) -> CocaImage:
        """Images, or what else the image encoder takes -> pooled caption tokens and contrastive features."""
        return self._image(*self.image_encoder(images))

    def encode_tokens(self, rows: Tensor, segments: Segments) -> CocaImage:
        """Image tokens made elsewhere, packed ``[rows, vision_dim]``; images may differ in length."""
        return self._image(*self.image_encoder.pool(rows, segments))

    def encode_text(self, token_ids: Tensor, segments: Segments, class_position: int | None = None) -> CocaText:
        """Captions -> unimodal states of their words and contrastive features from their CLS rows.

        Args:
            class_position: rotary position of every CLS, the columns of the batch if it were padded (see the module); default:
                ``config.class_position``.
        """
        position = self.config.class_position if class_position is None else class_position
        rows, pooled = self.text_encoder(self.text_decoder.words(token_ids), segments, position)
        return CocaText(rows, segments, unit_features(self.text_projection(pooled)))

    def _image(self, rows: Tensor, pooled: Tensor) -> CocaImage:
        segments = Segments([self.config.caption_queries] * len(pooled), rows.device)
        return CocaImage(rows, segments, unit_features(self.image_projection(pooled)))


def _vit(config: CocaPalmConfig) -> VisionTransformer:
    return VisionTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        dim=config.vision_dim,
        depth=config.vision_depth,
        num_heads=config.vision_heads,
        hidden_dim=4 * config.vision_dim,
        eps=1e-5,
        class_token=False,
        patch_drop=config.patch_drop,
        backend=config.backend,
    )
