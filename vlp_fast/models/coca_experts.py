"""CoCa with modality experts: one stack of layers for images and for the unimodal text, as VLMo and BEiT-3 share theirs.

Papers: Yu et al., CoCa (2022); Bao et al., VLMo (2021), section 3.1, and Wang et al., BEiT-3 (2022), figure 2, for the experts: the
self-attention of a layer, with its norm, is shared by both modalities, and each has a feed-forward with its norm of its own. No paper
has this CoCa. It differs from `vlp_fast.models.coca` in the two encoders only; poolers, decoder and losses are the same.

Images and captions run through the layers together, all image rows and then all text rows: one product of the attention's shared
weights for both, one grouped product for the experts. Neither modality attends to the other: an image's rows read that image, a
caption's words and its CLS read what stands before them. So an image alone, or a caption alone, gives the same rows.

Dimensions: batch images, captions packed as rows, N = patches (no class token), dim = width of both modalities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.models.coca import CocaConfig, CocaDecoder, CocaImage, CocaPoolers, CocaText, CocaTowers, CocaWords
from vlp_fast.modules import (
    Linear,
    MultiwayLayerNorm,
    MultiwayLinear,
    PatchDrop,
    PatchEmbedding,
    SelfAttention,
    init_transformer,
)
from vlp_fast.modules.multiway import multiway_mlp_of
from vlp_fast.passes import PassInfo
from vlp_fast.segments import Segments

__all__ = ["CocaExpertLayer", "CocaExperts"]


class CocaExpertLayer(nn.Module):
    """x + attention(norm(x)) with weights for all rows, then x + MLP(norm(x)) with those of the row's modality.

    Shape: rows ``[image rows + text rows, dim]``, images first -> the same.
    """

    def __init__(self, config: CocaConfig) -> None:
        super().__init__()
        dim, eps, backend = config.dim, config.eps, config.backend
        self.attention_norm = nn.LayerNorm(dim, eps)
        self.attention = SelfAttention(dim, config.num_heads, backend=backend)
        self.ffn_norm = MultiwayLayerNorm(dim, eps=eps, before_linear=True, backend=backend)
        self.fc1 = MultiwayLinear(dim, config.hidden_dim, activation="gelu", backend=backend)
        self.fc2 = MultiwayLinear(config.hidden_dim, dim, backend=backend)

    def forward(self, x: Tensor, plan: AttentionPlan, expert_offsets: Sequence[int]) -> Tensor:
        return self.feed_forward(x + self.attention(self.attention_norm(x), plan), expert_offsets)

    def feed_forward(self, x: Tensor, expert_offsets: Sequence[int]) -> Tensor:
        """The layer's second half: each row with the weights of its modality."""
        return multiway_mlp_of(self.fc1, self.fc2, self.ffn_norm(x, expert_offsets), expert_offsets, x)


class CocaExpertEncoder(CocaWords):
    """Patches and words, and the layers for both.

    Shape: images ``[batch, 3, image_size, image_size]`` or None, token_ids ``[rows]`` or None with their segments -> (image tokens
        ``[batch * N, dim]``, words ``[rows, dim]``, CLS ``[captions, dim]``), empty for what is not given; image tokens and CLS are
        normalised.
    """

    def __init__(self, config: CocaConfig) -> None:
        super().__init__(config)
        self.dim = config.dim
        self.patch_embedding = PatchEmbedding(config.image_size, config.patch_size, config.dim)
        self.num_image_tokens = self.patch_embedding.num_patches
        self.image_position = nn.Parameter(torch.zeros(self.num_image_tokens, config.dim))
        self.patch_drop = PatchDrop(self.num_image_tokens, config.patch_drop, class_token=False)
        self.layers = nn.ModuleList(CocaExpertLayer(config) for _ in range(config.unimodal_depth))
        self.image_norm = nn.LayerNorm(config.dim, config.eps)
        self.text_norm = nn.LayerNorm(config.dim, config.eps)
        self.apply(init_transformer)
        nn.init.trunc_normal_(self.image_position, std=0.02)

    def image_lengths(self, batch: int) -> list[int]:
        """Rows of each image, as the encoder stands: fewer in training than in evaluation with `patch_drop`."""
        return [self.patch_drop.kept_rows] * batch

    def describe(self, images: Tensor | None, token_ids: Tensor | None = None, segments: Segments | None = None) -> PassInfo:
        """What a call processed, for a profile (the CLS rows count)."""
        batch, captions = 0 if images is None else len(images), 0 if segments is None else len(segments)
        rows = sum(self.image_lengths(batch)) + (0 if segments is None else segments.rows + captions)
        kind = "image_encoder" if not captions else "text_encoder" if not batch else "image_text_encoder"
        return PassInfo(kind, batch + captions, rows, rows)

    def forward(
        self, images: Tensor | None, token_ids: Tensor | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = self.class_token.device
        image, lengths = self.class_token.new_zeros(0, self.dim), []
        text, with_class = image, Segments([], device)
        if images is not None:
            image = self.patch_drop(self.patch_embedding(images) + self.image_position).flatten(0, 1)
            lengths = self.image_lengths(len(images))
        if token_ids is not None and segments is not None:
            text, with_class = self.embed(token_ids, segments)
        split = len(image)
        x = torch.cat([image, text.to(image.dtype)]) if split and len(text) else image if split else text
        plan, offsets = self._plan(lengths, with_class), (0, split, len(x))
        for layer in self.layers:
            x = layer(x, plan, offsets)
        text = x[split:]
        return self.image_norm(x[:split]), text[with_class.rows_before_last(1)], self.text_norm(text[with_class.last_rows()])

    def _plan(self, image_lengths: Sequence[int], captions: Segments) -> AttentionPlan:
        """Every image all of itself, every caption itself causally."""
        segments = Segments([*image_lengths, *captions.lengths], captions.device)
        edges = [(i, i, i >= len(image_lengths)) for i in range(len(segments))]
        return AttentionPlan.from_edges(segments, segments, edges)


class CocaExperts(CocaTowers):
    """CoCa for ``CocaConfig(experts=True)``. `encode` runs images and captions in one forward; `CocaPretraining` trains it.

    Both feed-forwards have ``hidden_dim``.
    """

    def __init__(self, config: CocaConfig) -> None:
        super().__init__()
        if not config.experts:
            raise ValueError("CocaExperts needs a config with experts=True; experts=False is Coca. Received experts=False.")
        self.config = config
        self.encoder = CocaExpertEncoder(config)
        self.poolers = CocaPoolers(config)
        self.text_decoder = CocaDecoder(config)
        self.image_projection = Linear(config.dim, config.embed_dim, bias=False)
        self.text_projection = Linear(config.dim, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # log of the scale
        for head in (self.image_projection, self.text_projection):
            init_transformer(head)

    def encode_image(self, images: Tensor) -> CocaImage:
        """Images ``[batch, 3, image_size, image_size]`` -> pooled caption tokens and contrastive features."""
        tokens, _, _ = self.encoder(images)
        return self._pooled(len(images), tokens)

    def encode_text(self, token_ids: Tensor, segments: Segments) -> CocaText:
        """Captions -> unimodal states of their words and contrastive features from their CLS rows."""
        _, words, pooled = self.encoder(None, token_ids, segments)
        return self._text_output(segments, words, pooled)

    def encode(self, images: Tensor, token_ids: Tensor, segments: Segments) -> tuple[CocaImage, CocaText]:
        """Images and captions, of which there need not be equally many, in one forward; neither sees the other."""
        tokens, words, pooled = self.encoder(images, token_ids, segments)
        return self._pooled(len(images), tokens), self._text_output(segments, words, pooled)

    def _pooled(self, batch: int, tokens: Tensor) -> CocaImage:
        return self._image_output(batch, *self.poolers.pool(tokens, self.encoder.image_lengths(batch)))
