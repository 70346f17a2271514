"""BEiT-3: one encoder for images, texts and pairs, every sub-layer with a vision and a language expert.

Paper: Wang et al., Image as a Foreign Language: BEiT Pretraining for All Vision and Vision-Language Tasks (2022), figure 2. The
default is the released, decoupled form: attention projections, norms and feed-forward of a row belong to its modality, and modalities
meet only in attention. The form of the paper shares attention and has vision-language experts in the top layers (`Beit3Config`).
Pre-norm with sub-LN (Magneto), LayerNorm eps 1e-5, exact GELU in fp32. Rows are all images, then all texts.

Here is the model without any head, and with the two of pretraining; sizes and layers are in `vlp_fast.models.beit3_encoder`, the heads
of fine-tuning in `vlp_fast.models.beit3_tasks`.

Dimensions: samples, N = image tokens (class token first), dim, V words, C visual codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlp_fast.models._config import make_preset
from vlp_fast.models.beit3_encoder import Beit3Config, Beit3Encoder, Beit3Layer, Beit3Read
from vlp_fast.modules import Linear, PatchDrop, PatchEmbedding, WordEmbedding, init_transformer
from vlp_fast.passes import Parts
from vlp_fast.segments import Segments

__all__ = [
    "BEIT3_PRESETS",
    "Beit3",
    "Beit3Config",
    "Beit3MaskedModel",
    "Beit3Output",
    "Beit3Read",
    "beit3_preset",
]

BEIT3_PRESETS = {
    # for tests and first steps: seconds on a CPU
    "tiny": {
        "image_size": 64, "dim": 64, "depth": 2, "num_heads": 4, "hidden_dim": 256, "vocab_size": 1000,
        "visual_vocab_size": 64, "max_positions": 64,
    },
    # beit3_base_patch16_224 of the released code
    "base": {},
    # beit3_large_patch16_224 of the released code
    "large": {"dim": 1024, "depth": 24, "num_heads": 16, "hidden_dim": 4096},
    # the model of the paper, table 2, which was not released
    "giant": {
        "patch_size": 14, "dim": 1408, "depth": 40, "num_heads": 16, "hidden_dim": 6144, "share_attention": True,
        "vl_experts_from_layer": 37,
    },
}  # fmt: skip


def beit3_preset(size: str, **changes: object) -> Beit3Config:
    """The named preset with some fields changed, such as ``beit3_preset("base", image_size=384)``."""
    return make_preset(Beit3Config, BEIT3_PRESETS, size, changes)


class Beit3Output(NamedTuple):
    """image: ``[image rows, dim]`` with its segments. text: ``[text rows, dim]`` with its segments. One segment per sample in both.

    image_tokens: int64 ``[image rows]``, rising: which of all tokens, N of every image, the rows are; None: all.
    """

    image: Tensor
    image_segments: Segments
    text: Tensor
    text_segments: Segments
    image_tokens: Tensor | None = None

    def image_at(self, tokens: Tensor) -> Tensor:
        """Image rows by their number among all tokens, N of every image; they must be of those that stay, as masked patches are."""
        return self.image[_rows_of(tokens, self.image_tokens)]


class Beit3(nn.Module):
    """BEiT-3 without a head. Captions enter as packed token ids (bos, words, eos; no padding) and `Segments`.

    With `patch_drop` training leaves out patches, of those that no mask hides: an image keeps its class token, its masked patches and
    ``round((1 - patch_drop) * visible)`` of the visible ones, one at least where there are any. Methods that take a mask take the
    number of masked patches of each image too, `mask_counts`, on the host: without it training reads them from the mask, which waits
    for the device.
    """

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = PatchEmbedding(config.image_size, config.patch_size, config.dim)
        self.num_image_tokens = self.patch_embedding.num_patches + 1
        self.patch_drop = PatchDrop(self.patch_embedding.num_patches, config.patch_drop, class_token=True)
        self.class_token = nn.Parameter(torch.zeros(config.dim))
        self.mask_token = nn.Parameter(torch.zeros(config.dim))
        self.image_position = nn.Parameter(torch.zeros(self.num_image_tokens, config.dim))
        self.word = WordEmbedding(config.vocab_size, config.dim)
        self.text_position = nn.Embedding(config.max_positions, config.dim)
        self.encoder = Beit3Encoder(config)
        self.apply(init_transformer)
        for parameter in (self.class_token, self.mask_token, self.image_position):
            nn.init.trunc_normal_(parameter, std=0.02)
        _scale_sub_layers(self.encoder, math.sqrt(math.log(2 * config.depth)))

    def load_trunk(self, other: Beit3) -> None:
        """Takes over the weights of a BEiT-3 that may have other heads, as fine-tuning does; this model's own heads stay as they are.

        Raises: ValueError where a weight of this model without its heads is missing there, or has another shape.
        """
        own = {name: tensor for name, tensor in self.state_dict().items() if name.partition(".")[0] in _TRUNK}
        given = other.state_dict()
        for name, tensor in own.items():
            if name not in given or given[name].shape != tensor.shape:
                received = list(given[name].shape) if name in given else "none"
                raise ValueError(f"load_trunk needs {name} of shape {list(tensor.shape)}; the other model has {received}.")
        self.load_state_dict({name: given[name] for name in own}, strict=False)

    def embed_images(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images ``[batch, 3, S, S]`` -> ``[batch * N, dim]``, all patches; those where `mask` (bool ``[batch, patches]``) is True are
        hidden."""
        x = self.patch_embedding(images)
        if mask is not None:
            if mask.shape != x.shape[:2]:
                raise ValueError(f"mask must be [batch, patches] = {list(x.shape[:2])}; received {list(mask.shape)}.")
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.class_token.to(x.dtype).expand(len(images), 1, -1), x], 1)
        return (x + self.image_position).flatten(0, 1)

    def embed_text(self, token_ids: Tensor, segments: Segments) -> Tensor:
        """Packed token ids -> ``[rows, dim]``; positions start anew in every caption."""
        if segments.max_length > self.config.max_positions:
            raise ValueError(
                f"captions must have at most {self.config.max_positions} tokens; received one of {segments.max_length}."
            )
        return self.word(token_ids) + self.text_position(segments.positions())

    def image_lengths(self, mask_counts: Sequence[int]) -> list[int]:
        """Rows of images of which so many patches are masked, as the model stands: fewer in training with `patch_drop`."""
        return self.patch_drop.kept_lengths(mask_counts)

    def encode_image(self, images: Tensor, mask: Tensor | None = None, mask_counts: Sequence[int] | None = None) -> Beit3Output:
        """Images alone: only the vision experts run."""
        image, lengths, tokens = self._image_rows(images, mask, mask_counts)
        return self._encode(image, lengths, tokens, image.new_zeros(0, image.shape[1]), [0] * len(images))

    def encode_text(self, token_ids: Tensor, segments: Segments) -> Beit3Output:
        """Texts alone: only the language experts run."""
        text = self.embed_text(token_ids, segments)
        return self._encode(text.new_zeros(0, text.shape[1]), [0] * len(segments), None, text, segments.lengths)

    def encode_pairs(
        self,
        images: Tensor,
        token_ids: Tensor,
        segments: Segments,
        mask: Tensor | None = None,
        mask_counts: Sequence[int] | None = None,
    ) -> Beit3Output:
        """Pairs: caption i and image i attend to each other.

        Raises: ValueError if there is not one caption per image.
        """
        return self._encode_pairs(images, token_ids, segments, mask, mask_counts, causal_text=False)

    def encode_mixed(
        self,
        images: Tensor,
        image_mask: Tensor | None,
        token_ids: Tensor,
        segments: Segments,
        num_pairs: int,
        read: Beit3Read | None = None,
        parts: Parts = (),
        *,
        mask_counts: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Images alone, pairs and texts alone as one batch, one forward of the encoder.

        Args:
            images: those alone, then those of the pairs. image_mask, mask_counts: of all, or None. token_ids, segments: captions of the
                pairs, then those alone. read: rows that are read afterwards; default: all. parts: for a profile, (loss, samples, rows) of
                each loss.

        Returns: image rows and text rows of the encoder, ``[rows, dim]`` each; of `read` those alone.
        Raises: ValueError for fewer images or captions than pairs.
        """
        alone, texts = len(images) - num_pairs, len(segments) - num_pairs
        if num_pairs < 0 or alone < 0 or texts < 0:
            raise ValueError(
                f"num_pairs must be from 0 to the number of images and of captions; received {num_pairs} for {len(images)} images and "
                f"{len(segments)} captions."
            )
        image, lengths, tokens = self._image_rows(images, image_mask, mask_counts)
        image_lengths, text_lengths = [*lengths, *[0] * texts], [*[0] * alone, *segments.lengths]
        if read is not None:
            read = read._replace(image=_rows_of(read.image, tokens))
        return self.encoder(image, image_lengths, self.embed_text(token_ids, segments), text_lengths, read=read, parts=parts)

    def encode_captioned(self, images: Tensor, token_ids: Tensor, segments: Segments) -> Beit3Output:
        """Pairs, for captioning: caption i reads image i and, causally, itself; an image reads itself only.

        Raises: ValueError if there is not one caption per image.
        """
        return self._encode_pairs(images, token_ids, segments, None, None, causal_text=True)

    def _encode_pairs(
        self,
        images: Tensor,
        token_ids: Tensor,
        segments: Segments,
        mask: Tensor | None,
        mask_counts: Sequence[int] | None,
        causal_text: bool,
    ) -> Beit3Output:
        if len(images) != len(segments):
            raise ValueError(f"pairs need one caption per image; received {len(segments)} captions for {len(images)} images.")
        image, lengths, tokens = self._image_rows(images, mask, mask_counts)
        return self._encode(image, lengths, tokens, self.embed_text(token_ids, segments), segments.lengths, causal_text)

    def _image_rows(
        self, images: Tensor, mask: Tensor | None, mask_counts: Sequence[int] | None
    ) -> tuple[Tensor, list[int], Tensor | None]:
        """What stays of images, embedded; rows of each; which of all tokens they are, None: all."""
        image, patches = self.embed_images(images, mask), self.patch_embedding.num_patches
        if mask_counts is None:
            drops = self.training and self.patch_drop.share > 0.0
            mask_counts = mask.sum(1).tolist() if drops and mask is not None else [0] * len(images)
        if len(mask_counts) != len(images) or not all(0 <= n <= patches for n in mask_counts):
            raise ValueError(
                f"mask_counts must be a number from 0 to {patches} for each of {len(images)} images; received {list(mask_counts)}."
            )
        lengths = self.image_lengths(mask_counts)
        if sum(lengths) == len(image):
            return image, lengths, None
        hidden = torch.zeros(len(images), patches, dtype=torch.bool, device=image.device) if mask is None else mask
        tokens = self.patch_drop.draw_masked(hidden, lengths)
        return image[tokens], lengths, tokens

    def _encode(
        self,
        image: Tensor,
        image_lengths: Sequence[int],
        image_tokens: Tensor | None,
        text: Tensor,
        text_lengths: Sequence[int],
        causal_text: bool = False,
    ) -> Beit3Output:
        image, text = self.encoder(image, image_lengths, text, text_lengths, causal_text)
        device = image.device
        return Beit3Output(image, Segments(image_lengths, device), text, Segments(text_lengths, device), image_tokens)


def _rows_of(tokens: Tensor, stay: Tensor | None) -> Tensor:
    """Where `tokens` are among those that stay; None: all do."""
    return tokens if stay is None else torch.searchsorted(stay, tokens)


# parts of `Beit3`; what else a model has is its head
_TRUNK = frozenset({"patch_embedding", "class_token", "mask_token", "image_position", "word", "text_position", "encoder"})


class Beit3MaskedModel(Beit3):
    """BEiT-3 with the two heads of pretraining: the codes of hidden patches, and hidden words."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__(config)
        self.visual_head = Linear(config.dim, config.visual_vocab_size)
        self.word_head = Linear(config.dim, config.vocab_size)
        for head in (self.visual_head, self.word_head):
            head.apply(init_transformer)


@torch.no_grad()
def _scale_sub_layers(encoder: Beit3Encoder, gain: float) -> None:
    """Sub-LN's initial gain on v, the output projection and the feed-forward (Wang et al., Magneto, 2022, section 3.2)."""
    for layer in encoder.layers:
        assert isinstance(layer, Beit3Layer)
        value = layer.attention.qkv.weight.shape[1] // 3
        layer.attention.qkv.weight[:, 2 * value :].mul_(gain)
        for linear in (layer.attention.proj, layer.ffn.fc1, layer.ffn.fc2):
            linear.weight.mul_(gain)
