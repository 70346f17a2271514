"""BLIP: an image encoder and one text tower that encodes, matches and captions.

Paper: Li et al., BLIP: Bootstrapping Language-Image Pre-training (2022), figure 2. A pre-norm ViT; a BERT-base tower in post-norm
order whose two sets of self-attention weights (encoder, decoder) share embeddings, cross-attention and MLPs; heads for contrast,
matching and language modelling. `Blip` has all of it; `BlipRetriever` and `BlipCaptioner` are what fine-tuning for one task leaves.
The momentum encoders and the queue belong to pretraining (`vlp_fast.training.BlipPretraining`), two further tasks to `blip_tasks`.

Dimensions: batch images, captions packed as rows, N = image tokens (class token first), dim = text width, vision_dim, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_fast.models._config import check_positive, make_preset
from vlp_fast.modules import Linear, PostNormBlock, TextEmbedding, VisionTransformer, init_transformer, unit_features
from vlp_fast.ops import linear
from vlp_fast.passes import PassInfo, TextPass, describe_passes, pack_passes, with_first_token
from vlp_fast.segments import Segments

__all__ = [
    "BLIP_PRESETS",
    "DECODER",
    "ENCODER",
    "Blip",
    "BlipCaptioner",
    "BlipConfig",
    "BlipRetriever",
    "BlipTextTower",
    "ImageOutput",
    "ImageRows",
    "blip_preset",
]

Part = TypeVar("Part", bound=nn.Module)
ENCODER, DECODER = 0, 1  # experts of the text tower's self-attention


@dataclass(frozen=True, kw_only=True)
class BlipConfig:
    """Sizes and constants of BLIP; the defaults are the base model at 224 pixels.

    `vocab_size` counts bert-base-uncased's 30,522 words and the two that follow: [DEC] (`dec_id`) and [ENC] (`enc_id`).
    `vision_hidden_dim` is the width inside the image encoder's MLPs; None is 4 times `vision_dim`. `patch_drop` is the part of an
    image's patches left out while training (FLIP), by the momentum encoder too, which draws others.
    """

    image_size: int = 224
    patch_size: int = 16
    vision_dim: int = 768
    vision_depth: int = 12
    vision_heads: int = 12
    vision_hidden_dim: int | None = None
    vision_eps: float = 1e-6
    drop_path: float = 0.0
    patch_drop: float = 0.0
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    hidden_dim: int = 3072
    text_eps: float = 1e-12
    dropout_p: float = 0.1
    vocab_size: int = 30524
    max_positions: int = 512
    pad_id: int = 0
    dec_id: int = 30522
    enc_id: int = 30523
    embed_dim: int = 256
    queue_size: int = 57600
    momentum: float = 0.995
    backend: str | None = None

    def __post_init__(self) -> None:
        check_positive(
            self, "image_size", "patch_size", "vision_dim", "vision_depth", "dim", "depth", "embed_dim", "queue_size"
        )
        for name in ("pad_id", "dec_id", "enc_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name} must be a word of the vocabulary of {self.vocab_size}; received {getattr(self, name)}."
                )


BLIP_PRESETS = {
    # for tests and first steps: seconds on a CPU
    "tiny": {
        "image_size": 64, "vision_dim": 64, "vision_depth": 2, "vision_heads": 4, "dim": 64, "depth": 2, "num_heads": 4,
        "hidden_dim": 256, "embed_dim": 32, "queue_size": 256, "dropout_p": 0.0, "max_positions": 64,
    },
    # BLIP w/ ViT-B/16: section 4.1
    "base": {},
    # BLIP w/ ViT-L/16: the text tower stays BERT-base; stochastic depth 0.1 in the released code
    "large": {"vision_dim": 1024, "vision_depth": 24, "vision_heads": 16, "drop_path": 0.1},
}  # fmt: skip


def blip_preset(size: str, **changes: object) -> BlipConfig:
    """The named preset with some fields changed, such as ``blip_preset("base", image_size=384)``."""
    return make_preset(BlipConfig, BLIP_PRESETS, size, changes)


class ImageRows(NamedTuple):
    """rows: ``[batch * N, vision_dim]`` packed. segments: one image each."""

    rows: Tensor
    segments: Segments


class ImageOutput(NamedTuple):
    """rows: ``[batch * N, vision_dim]`` packed. segments: one image each. features: ``[batch, embed_dim]``, L2-normalised."""

    rows: Tensor
    segments: Segments
    features: Tensor


class BlipImageEncoder(VisionTransformer):
    """BLIP's ViT. Shape: images ``[batch, 3, image_size, image_size]`` -> ``[batch * N, vision_dim]``."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(
            image_size=config.image_size,
            patch_size=config.patch_size,
            dim=config.vision_dim,
            depth=config.vision_depth,
            num_heads=config.vision_heads,
            hidden_dim=4 * config.vision_dim if config.vision_hidden_dim is None else config.vision_hidden_dim,
            eps=config.vision_eps,
            class_token=True,
            drop_path=config.drop_path,
            patch_drop=config.patch_drop,
            backend=config.backend,
        )


class BlipTextTower(nn.Module):
    """The mixture of encoder-decoder (MED): BERT layers with experts in self-attention and shared cross-attention.

    Args:
        config: sizes. num_experts: 2 (encoder, decoder), or 1 for a tower that does one of both. context_dim: width of the rows that
            cross-attention reads, images or (in visual question answering) questions; None: the tower has no cross-attention.

    Shape: passes -> one ``[rows, dim]`` per pass, or ``[captions, dim]`` where only first rows are read. Passes given together run as one
    packed forward, whose last layer computes what is read afterwards; with `whole`, as the published code, all rows.
    """

    def __init__(self, config: BlipConfig, *, num_experts: int = 2, context_dim: int | None) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.embedding = TextEmbedding(
            config.vocab_size,
            config.max_positions,
            config.dim,
            eps=config.text_eps,
            dropout_p=config.dropout_p,
            padding_idx=config.pad_id,
        )
        self.blocks = nn.ModuleList(
            PostNormBlock(
                config.dim,
                config.num_heads,
                config.hidden_dim,
                eps=config.text_eps,
                context_dim=context_dim,
                num_experts=num_experts,
                dropout_p=config.dropout_p,
                backend=config.backend,
            )
            for _ in range(config.depth)
        )
        self.apply(init_transformer)

    def forward(
        self,
        passes: Sequence[TextPass],
        image_rows: Tensor | None = None,
        image_segments: Segments | None = None,
        *,
        whole: bool = False,
    ) -> list[Tensor]:
        packed = pack_passes(passes, self.num_experts, image_segments, whole=whole)
        context = image_rows if packed.cross_plan is not None else None
        x = self.embedding(packed.token_ids, packed.positions)
        for i, block in enumerate(self.blocks, 1):
            read = packed.read if i == len(self.blocks) else None
            x = block(x, packed.plan, packed.expert_offsets, context, packed.cross_plan, read=read)
        return packed.split(x)

    def describe(self, passes: Sequence[TextPass], *images: object, whole: bool = False) -> PassInfo:
        """What a call processed, for a profile."""
        roles = {"text_decoder" if p.causal else "text_encoder" for p in passes}
        return describe_passes("+".join(sorted(roles)), passes)


class Matching(nn.Module):
    """What a model with BLIP's text encoder can do: features of images and captions, and whether they match."""

    config: BlipConfig
    image_encoder: BlipImageEncoder
    text_tower: BlipTextTower
    image_projection: Linear
    text_projection: Linear
    itm_head: Linear

    def encode_image(self, images: Tensor) -> ImageOutput:
        """Images ``[batch, 3, image_size, image_size]`` -> rows, their segments, and contrastive features."""
        rows = self.image_encoder(images)
        segments = self.image_encoder.segments(len(images), rows.device)
        return ImageOutput(rows, segments, project(rows, segments, self.image_projection))

    def encode_text(self, token_ids: Tensor, segments: Segments, *, whole: bool = False) -> Tensor:
        """Captions, without looking at an image -> contrastive features ``[captions, embed_dim]``, L2-normalised.

        whole: as in `BlipTextTower`.
        """
        (rows,) = self.text_tower([TextPass("itc", token_ids, segments, first_row_only=True)], whole=whole)
        return unit_features(self.text_projection(rows))

    def matching_pass(self, name: str, token_ids: Tensor, segments: Segments, images: Sequence[int] | Tensor) -> TextPass:
        """The pass that asks whether caption i describes image ``images[i]``: [ENC] first, every row sees the whole caption, and the
        first one is read."""
        ids = with_first_token(token_ids, segments, self.config.enc_id)
        return TextPass(name, ids, segments, expert=ENCODER, images=images, first_row_only=True, loss="itm")

    def matching_logits(self, rows: Tensor) -> Tensor:
        """What a matching pass returns, ``[captions, dim]`` -> ``[captions, 2]``; class 1 is "matches"."""
        return self.itm_head(rows)


class Captioning(nn.Module):
    """What a model with BLIP's text decoder can do: predict the next word of a caption. `decoder` is its expert in the text tower."""

    decoder: ClassVar[int] = 0
    config: BlipConfig
    text_tower: BlipTextTower

    def _make_word_head(self) -> None:
        config = self.config
        self.lm_transform = Linear(config.dim, config.dim)
        self.lm_norm = nn.LayerNorm(config.dim, config.text_eps)
        self.lm_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def captioning_pass(self, token_ids: Tensor, segments: Segments, images: Sequence[int] | Tensor) -> TextPass:
        """The pass that predicts caption i of image ``images[i]`` word by word: [DEC] first, causal."""
        ids = with_first_token(token_ids, segments, self.config.dec_id)
        return TextPass("lm", ids, segments, expert=self.decoder, causal=True, images=images, loss="lm")

    def word_hidden(self, rows: Tensor) -> Tensor:
        """Rows of a captioning pass -> ``[rows, dim]``, which the words meet."""
        return self.lm_norm(F.gelu(self.lm_transform(rows)))

    def word_weights(self) -> tuple[Tensor, Tensor]:
        """Weight ``[vocab_size, dim]`` and bias of the words: the weight is that of the input embeddings."""
        return self.text_tower.embedding.word.head_weight(), self.lm_bias

    def word_logits(self, rows: Tensor) -> Tensor:
        """Rows of a captioning pass -> ``[rows, vocab_size]``."""
        return linear(self.word_hidden(rows), *self.word_weights())


class Blip(Matching, Captioning):
    """BLIP's towers and heads.

    Captions enter as packed token ids and `Segments`: [CLS] words [SEP], no padding.
    """

    decoder = DECODER

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = BlipImageEncoder(config)
        self.text_tower = BlipTextTower(config, context_dim=config.vision_dim)
        self.image_projection = Linear(config.vision_dim, config.embed_dim)
        self.text_projection = Linear(config.dim, config.embed_dim)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.itm_head = Linear(config.dim, 2)
        self._make_word_head()
        for head in (self.image_projection, self.text_projection, self.itm_head, self.lm_transform):
            init_transformer(head)

    def retriever(self) -> BlipRetriever:
        """A model of its own with copies of the weights that retrieval needs."""
        return _part(self, BlipRetriever(self.config), ENCODER)

    def captioner(self) -> BlipCaptioner:
        """A model of its own with copies of the weights that captioning needs."""
        return _part(self, BlipCaptioner(self.config), DECODER)


class BlipRetriever(Matching):
    """BLIP without its decoder: what checkpoints fine-tuned for retrieval hold. Scores are cosines and matching logits."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = BlipImageEncoder(config)
        self.text_tower = BlipTextTower(config, num_experts=1, context_dim=config.vision_dim)
        self.image_projection = Linear(config.vision_dim, config.embed_dim)
        self.text_projection = Linear(config.dim, config.embed_dim)
        self.itm_head = Linear(config.dim, 2)
        for head in (self.image_projection, self.text_projection, self.itm_head):
            init_transformer(head)


class BlipCaptioner(Captioning):
    """BLIP's image encoder and decoder: what checkpoints fine-tuned for captioning hold."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = BlipImageEncoder(config)
        self.text_tower = BlipTextTower(config, num_experts=1, context_dim=config.vision_dim)
        self._make_word_head()
        init_transformer(self.lm_transform)

    def encode_image(self, images: Tensor) -> ImageRows:
        """Images ``[batch, 3, image_size, image_size]`` -> rows and their segments."""
        rows = self.image_encoder(images)
        return ImageRows(rows, self.image_encoder.segments(len(images), rows.device))


def _part(whole: Blip, part: Part, expert: int) -> Part:
    """`part` with the weights that it shares with the whole; where the whole has two experts, those of one."""
    weights = whole.state_dict()
    part.to(whole.lm_bias.device, whole.lm_bias.dtype)
    part.load_state_dict(
        {name: t if (t := weights[name]).shape == own.shape else t[[expert]] for name, own in part.state_dict().items()}
    )
    return part.train(whole.training)


def project(rows: Tensor, segments: Segments, projection: nn.Linear) -> Tensor:
    """The first row of each segment, projected and L2-normalised: ``[segments, embed_dim]``."""
    return unit_features(projection(rows[segments.first_rows()]))
