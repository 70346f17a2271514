"""VLMo: one self-attention for images, texts and pairs, with a feed-forward expert for each.

Paper: Bao et al., VLMo: Unified Vision-Language Pre-Training with Mixture-of-Modality-Experts (2021), figure 1. Pre-norm, LayerNorm
eps 1e-6, exact GELU, LayerScale; attention and its norm are shared, feed-forward and its norm belong to the row's modality. The top
layers have a third expert, for vision and language, that takes all rows of a pair. Rows are all texts, then all images. Positions are
a bias on the scores, learned per layer and head (base, large), or embeddings (base plus). Heads: pooling and matching of pairs, word
prediction, contrast. Sizes and layers are in `vlp_fast.models.vlmo_encoder`.

Dimensions: samples, N = image tokens (class token first), T = text tokens ([CLS] first), dim, V words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_fast.models._config import make_preset
from vlp_fast.models.vlmo_encoder import VlmoConfig, VlmoEncoder
from vlp_fast.modules import Dropout, Linear, PatchDrop, PatchEmbedding, WordEmbedding, init_transformer
from vlp_fast.segments import Segments, _int_array, _to_device

__all__ = ["VLMO_PRESETS", "Vlmo", "VlmoConfig", "VlmoContrast", "VlmoOutput", "VlmoPairs", "vlmo_preset"]

TEXT_EPS = 1e-12  # of BERT's norms: after the text embedding, before the word head
TEMPERATURE = 0.07

VLMO_PRESETS: dict[str, dict[str, Any]] = {
    # for tests and first steps: seconds on a CPU
    "tiny": {
        "image_size": 64, "dim": 64, "depth": 3, "num_heads": 4, "hidden_dim": 256, "vl_start": 2, "drop_path": 0.0,
        "vocab_size": 1000, "relative_text_length": 40,
    },
    # vlmo_base_patch16, vlmo_large_patch16 and vlmo_base_plus_patch16 of the published code
    "base": {},
    "large": {"dim": 1024, "depth": 24, "num_heads": 16, "hidden_dim": 4096, "vl_start": 21},
    # heads are 34 wide, which the attention kernels do not take
    "base_plus": {
        "dim": 544, "depth": 24, "num_heads": 16, "hidden_dim": 2176, "vl_start": 21, "layer_scale": None, "relative": False,
        "backend": "torch",
    },
}  # fmt: skip


def vlmo_preset(size: str, **changes: object) -> VlmoConfig:
    """The named preset with some fields changed, such as ``vlmo_preset("base", image_size=384)``."""
    return make_preset(VlmoConfig, VLMO_PRESETS, size, changes)


class VlmoOutput(NamedTuple):
    """rows: ``[rows, dim]`` with their segments, one per sample. features: ``[samples, dim]``, L2-normalised."""

    rows: Tensor
    segments: Segments
    features: Tensor


class VlmoContrast(NamedTuple):
    """As `VlmoOutput`; vl_features: ``[samples, dim]``, of the top layers run again with their vision-language experts. Where only one
    of the two was asked for, the other is ``[0, dim]``."""

    rows: Tensor
    segments: Segments
    features: Tensor
    vl_features: Tensor


class VlmoPairs(NamedTuple):
    """text ``[text rows, dim]``, image ``[image rows, dim]``, with a segment per pair in both; pooled ``[pairs, dim]``."""

    text: Tensor
    text_segments: Segments
    image: Tensor
    image_segments: Segments
    pooled: Tensor


class Vlmo(nn.Module):
    """VLMo with the heads of its pretraining. Captions enter as packed token ids ([CLS], words, [SEP]; no padding) and `Segments`.

    log_scale, log_vl_scale: logarithms of what multiplies similarities of `features` and `vl_features`.
    """

    def __init__(self, config: VlmoConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = PatchEmbedding(config.image_size, config.patch_size, dim)
        self.num_image_tokens = self.patch_embedding.num_patches + 1
        self.patch_drop = PatchDrop(self.patch_embedding.num_patches, config.patch_drop, class_token=True)
        self.class_token = nn.Parameter(torch.zeros(dim))
        self.word = WordEmbedding(config.vocab_size, dim)
        self.sentence_type = nn.Parameter(torch.zeros(2, dim))  # BERT's table, of which only row 0 is read
        self.image_position = None if config.relative else nn.Parameter(torch.zeros(self.num_image_tokens, dim))
        self.text_position = None if config.relative else nn.Embedding(config.max_positions, dim)
        self.text_norm = nn.LayerNorm(dim, TEXT_EPS)
        self.text_dropout = Dropout(config.drop_path)
        self.modality = nn.Parameter(torch.zeros(2, dim))  # text, image
        self.encoder = VlmoEncoder(config)
        self.pooler = Linear(dim, dim)
        self.matching_head = Linear(dim, 2)
        self.word_transform = Linear(dim, dim)
        self.word_norm = nn.LayerNorm(dim, TEXT_EPS)
        self.word_head = Linear(dim, config.vocab_size)
        self.text_projection = Linear(dim, dim, bias=False)
        self.image_projection = Linear(dim, dim, bias=False)
        self.vl_text_projection = Linear(dim, dim, bias=False)
        self.vl_image_projection = Linear(dim, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(TEMPERATURE)))
        self.log_vl_scale = nn.Parameter(torch.tensor(-math.log(TEMPERATURE)))
        self.apply(init_transformer)
        for parameter in (self.class_token, self.sentence_type, self.modality, self.image_position):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def embed_text(self, token_ids: Tensor, segments: Segments) -> Tensor:
        """Packed token ids -> ``[rows, dim]``.

        Raises: ValueError for no caption, an empty one or one longer than the configuration's max_positions.
        """
        if len(segments) == 0:
            raise ValueError("segments must hold at least one caption; received none.")
        if segments.max_length > self.config.max_positions:
            raise ValueError(
                f"captions must have at most {self.config.max_positions} tokens; received one of {segments.max_length}."
            )
        if 0 in segments.lengths:
            raise ValueError(f"captions must have at least one token; caption {segments.lengths.index(0)} is empty.")
        if token_ids.shape != (segments.rows,):
            raise ValueError(f"token_ids must be one row per token, [{segments.rows}]; received {list(token_ids.shape)}.")
        x = self.word(token_ids) + self.sentence_type[0]
        if self.text_position is not None:
            x = x + self.text_position(segments.positions())
        return self.text_dropout(self.text_norm(x)) + self.modality[0]

    def embed_images(self, images: Tensor) -> Tensor:
        """Images ``[batch, 3, S, S]`` -> ``[batch * N, dim]``, all patches.

        Raises: ValueError for images of another shape, or none.
        """
        if len(images) == 0:
            raise ValueError("images must hold at least one image; received none.")
        x = self.patch_embedding(images)
        x = torch.cat([self.class_token.to(x.dtype).expand(len(images), 1, -1), x], 1)
        if self.image_position is not None:
            x = x + self.image_position
        return (x + self.modality[1]).flatten(0, 1)

    def encode_text(self, token_ids: Tensor, segments: Segments) -> VlmoOutput:
        """Captions alone: text experts in every layer."""
        rows = self._alone_text(token_ids, segments, (False,))[0]
        return VlmoOutput(rows, segments, _features(rows, segments, self.text_projection))

    def encode_image(self, images: Tensor) -> VlmoOutput:
        """Images alone: image experts in every layer."""
        segments = self.image_segments(images)
        rows = self._alone_image(images, (False,))[0]
        return VlmoOutput(rows, segments, _features(rows, segments, self.image_projection))

    def contrast_text(self, token_ids: Tensor, segments: Segments, vl: Sequence[bool] = (False, True)) -> VlmoContrast:
        """`encode_text` (False), and the top layers a second time with their vision-language experts (True); or one of the two."""
        found = self._alone_text(token_ids, segments, vl)
        return _contrast(found, segments, vl, (self.text_projection, self.vl_text_projection))

    def contrast_image(self, images: Tensor, vl: Sequence[bool] = (False, True)) -> VlmoContrast:
        """`encode_image` (False), and the top layers a second time with their vision-language experts (True); or one of the two."""
        found = self._alone_image(images, vl)
        return _contrast(found, self.image_segments(images), vl, (self.image_projection, self.vl_image_projection))

    def encode_pairs(self, images: Tensor, token_ids: Tensor, segments: Segments) -> VlmoPairs:
        """Pairs: caption i and image i attend to each other; vision-language experts in the top layers.

        Raises: ValueError if there is not one caption per image.
        """
        if len(images) != len(segments):
            raise ValueError(
                f"encode_pairs needs one caption per image; received {len(segments)} captions for {len(images)} images."
            )
        image_segments = self.image_segments(images)
        image, positions = self._image_rows(self.embed_images(images))
        rows = torch.cat([self.embed_text(token_ids, segments), image])
        (rows,) = self.encoder(rows, segments.lengths, image_segments.lengths, vl=(True,), image_positions=positions)
        text, image = rows[: segments.rows], rows[segments.rows :]
        pooled = torch.tanh(self.pooler(text[segments.first_rows()]))
        return VlmoPairs(text, segments, image, image_segments, pooled)

    def pool_pairs(self, images: Tensor, token_ids: Tensor, segments: Segments, index: Sequence[int]) -> Tensor:
        """Caption i with image ``images[index[i]]``, the pixels of each embedded once -> pooled ``[captions, dim]``."""
        image, positions = self._image_rows(self.embed_images(images), index)
        rows = torch.cat([self.embed_text(token_ids, segments), image])
        lengths = [self.patch_drop.kept_rows] * len(segments)
        (first,) = self.encoder(rows, segments.lengths, lengths, vl=(True,), image_positions=positions, first_row_only=True)
        return torch.tanh(self.pooler(first))

    def contrast_and_mask(
        self,
        images: Tensor,
        token_ids: Tensor,
        segments: Segments,
        masked_ids: Tensor | None,
        index: Sequence[int],
        vl: Sequence[bool] = (False, True),
    ) -> tuple[VlmoContrast, VlmoContrast, Tensor]:
        """`contrast_image` and `contrast_text`, without rows, and text rows ``[rows, dim]`` of pairs whose captions are masked, as one
        forward.

        masked_ids: int64 ``[rows]``, the captions with some words hidden; None: no pairs. index: the image of each caption. vl: as in
        `contrast_image`; empty: no contrast.
        """
        tokens, length = self.embed_images(images), self.patch_drop.kept_rows
        texts, shown, parts = [], [], []
        num_pairs = num_images = 0
        if masked_ids is not None:
            num_pairs = len(segments)
            shown.append(self._image_rows(tokens, index))
            parts.append(("mlm", num_pairs, segments.rows + num_pairs * length))
        if vl:
            num_images = len(images)
            texts.append(self.embed_text(token_ids, segments))
            shown.append(self._image_rows(tokens))
            parts.append(("itc" if False in vl else "itc_vl", len(segments) + num_images, segments.rows + num_images * length))
        if masked_ids is not None:
            texts.append(self.embed_text(masked_ids, segments))
        positions = [p for _, p in shown if p is not None]
        found = self.encoder(
            torch.cat([*texts, *(rows for rows, _ in shown)]),
            len(texts) * segments.lengths,
            [length] * (num_pairs + num_images),
            vl,
            image_positions=torch.cat(positions) if positions else None,
            num_pairs=num_pairs,
            parts=tuple(parts),
        )
        text, picture, vl_text, vl_picture, masked = found
        projections = (self.image_projection, self.vl_image_projection, self.text_projection, self.vl_text_projection)
        features = [
            F.normalize(project(first), dim=1)
            for project, first in zip(projections, (picture, vl_picture, text, vl_text), strict=True)
        ]
        contrast = (
            VlmoContrast(picture, self.image_segments(images), *features[:2]),
            VlmoContrast(text, segments, *features[2:]),
        )
        return *contrast, masked

    def matching_logits(self, pooled: Tensor) -> Tensor:
        """Pooled pairs -> ``[pairs, 2]``: no match, match."""
        return self.matching_head(pooled)

    def word_hidden(self, rows: Tensor) -> Tensor:
        """Text rows -> what the word head multiplies."""
        return self.word_norm(F.gelu(self.word_transform(rows)))

    def image_segments(self, images: Tensor) -> Segments:
        """One segment per image: of fewer rows in training than in evaluation with `patch_drop`."""
        return Segments([self.patch_drop.kept_rows] * len(images), images.device)

    def _alone_text(self, token_ids: Tensor, segments: Segments, vl: Sequence[bool]) -> list[Tensor]:
        return self.encoder(self.embed_text(token_ids, segments), segments.lengths, [0] * len(segments), vl=vl)

    def _alone_image(self, images: Tensor, vl: Sequence[bool]) -> list[Tensor]:
        rows, positions = self._image_rows(self.embed_images(images))
        lengths = [self.patch_drop.kept_rows] * len(images)
        return self.encoder(rows, [0] * len(images), lengths, vl=vl, image_positions=positions)

    def _image_rows(self, tokens: Tensor, index: Sequence[int] | None = None) -> tuple[Tensor, Tensor | None]:
        """Rows of samples with the image ``index[i]``, or an image each, drawn anew for every sample; their tokens, None: all."""
        images = tokens.unflatten(0, (-1, self.num_image_tokens))
        chosen = None if index is None else _to_device(_int_array(index, "index"), tokens.device)
        kept = self.patch_drop.draw(len(images) if index is None else len(index), tokens.device)
        if kept is None:
            return tokens if chosen is None else images[chosen].flatten(0, 1), None
        chosen = torch.arange(len(images), device=tokens.device) if chosen is None else chosen
        return images[chosen[:, None], kept].flatten(0, 1), kept.flatten()


def _contrast(
    found: Sequence[Tensor], segments: Segments, vl: Sequence[bool], projections: tuple[nn.Module, nn.Module]
) -> VlmoContrast:
    """Rows, and features of what the encoder found for each entry of `vl`."""
    features = [found[0][:0], found[0][:0]]
    for joint, rows in zip(vl, found, strict=True):
        features[joint] = _features(rows, segments, projections[joint])
    return VlmoContrast(found[0], segments, *features)


def _features(rows: Tensor, segments: Segments, projection: nn.Module) -> Tensor:
    return F.normalize(projection(rows[segments.first_rows()]), dim=1)
