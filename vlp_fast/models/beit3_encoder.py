"""BEiT-3's sizes and its layers: rows of images and of texts through attention and feed-forward of their modality's experts.

Paper: Wang et al., Image as a Foreign Language (2022), figure 2; sub-LN: Wang et al., Magneto (2022). What embeds patches and words
is in `vlp_fast.models.beit3`.

Dimensions: samples, rows, dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.models._config import check_positive
from vlp_fast.modules import DropPath, MultiwayAttention, MultiwayFFN, MultiwayLayerNorm
from vlp_fast.passes import Parts, PassInfo, ReadRows
from vlp_fast.segments import Segments

__all__ = ["Beit3Config", "Beit3Encoder", "Beit3Layer", "Beit3Read"]


@dataclass(frozen=True, kw_only=True)
class Beit3Config:
    """Sizes of BEiT-3; the defaults are the base model at 224 pixels.

    patch_drop: part of an image's visible patches left out while training (FLIP); masked ones, whose codes are predicted, all stay.
    visual_vocab_size: codes of the visual tokenizer whose ids masked patches predict. normalize_output: the encoder's last norm.
    share_attention: one attention, with its norms, for rows of both modalities. vl_experts_from_layer: from this layer on, counted
    from 0, rows of pairs have a feed-forward expert of their own, with its norms; None: nowhere.
    """

    image_size: int = 224
    patch_size: int = 16
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    hidden_dim: int = 3072
    eps: float = 1e-5
    drop_path: float = 0.0
    patch_drop: float = 0.0
    vocab_size: int = 64010
    visual_vocab_size: int = 8192
    max_positions: int = 1022
    normalize_output: bool = True
    share_attention: bool = False
    vl_experts_from_layer: int | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        check_positive(self, "image_size", "patch_size", "dim", "depth", "num_heads", "vocab_size", "visual_vocab_size")
        first = self.vl_experts_from_layer
        if first is not None and not 0 <= first < self.depth:
            raise ValueError(
                f"vl_experts_from_layer must name one of {self.depth} layers, from 0, or be None; received {first}."
            )


class Beit3ReadRows(NamedTuple):
    """What the last layer computes where not all rows are read afterwards.

    rows: int64, of the packed rows. plan: these as queries. expert_offsets: as `Beit3Layer` takes them, of these rows.
    """

    rows: Tensor
    plan: AttentionPlan
    expert_offsets: dict[int, tuple[int, ...]]


class Beit3Read(NamedTuple):
    """Rows that are read afterwards: int64 numbers of image rows and of text rows, rising, and how many of them each sample has.

    For `Beit3.encode_mixed` image rows are numbered as if no patch was left out, and must be of those that stay, as masked patches are.
    """

    image: Tensor
    image_counts: Sequence[int]
    text: Tensor
    text_counts: Sequence[int]


class Beit3Layer(nn.Module):
    """x + attention(norm(x)), x + FFN(norm(x)), each with sub-LN inside and the weights of the row's expert.

    `expert_offsets` has the runs of rows for each number of experts: one for all rows, one of each modality, and where rows of pairs
    have their own, vision, vision-language, language. Attention and feed-forward may differ in it.
    """

    def __init__(self, config: Beit3Config, drop_path: float, index: int = 0) -> None:
        super().__init__()
        dim, eps, first = config.dim, config.eps, config.vl_experts_from_layer
        self.attention_experts = 1 if config.share_attention else 2
        self.ffn_experts = 2 if first is None or index < first else 3
        self.attention_norm = MultiwayLayerNorm(
            dim, self.attention_experts, eps=eps, before_linear=True, backend=config.backend
        )
        self.attention = MultiwayAttention(dim, config.num_heads, self.attention_experts, inner_eps=eps, backend=config.backend)
        self.ffn_norm = MultiwayLayerNorm(dim, self.ffn_experts, eps=eps, before_linear=True, backend=config.backend)
        self.ffn = MultiwayFFN(dim, config.hidden_dim, self.ffn_experts, eps=eps, backend=config.backend)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        plan: AttentionPlan,
        expert_offsets: Mapping[int, Sequence[int]],
        samples: Tensor | None,
        num_samples: int,
        read: Beit3ReadRows | None = None,
    ) -> Tensor:
        """All rows, or with `read` those that are read afterwards."""
        attending, own = expert_offsets[self.attention_experts], None
        normal = self.attention_norm(x, attending)
        if read is not None:
            expert_offsets = read.expert_offsets
            own = ReadRows(read.rows, read.plan, None, expert_offsets[self.attention_experts])
            x, samples = x[read.rows], None if samples is None else samples[read.rows]
        feeding = expert_offsets[self.ffn_experts]
        x = self._plus(x, lambda residual: self.attention(normal, plan, attending, residual, own), samples, num_samples)
        return self._plus(x, lambda residual: self.ffn(self.ffn_norm(x, feeding), feeding, residual), samples, num_samples)

    def _plus(self, x: Tensor, branch: Callable[[Tensor | None], Tensor], samples: Tensor | None, num_samples: int) -> Tensor:
        """x plus the branch. Where no path is dropped nothing comes between, and the last product of the branch adds x."""
        if self.training and self.drop_path.p > 0.0:
            return x + self.drop_path(branch(None), samples, num_samples)
        return branch(x)


class Beit3Encoder(nn.Module):
    """The layers, over samples of an image part and a text part of which either may be empty.

    Shape: image ``[image rows, dim]``, text ``[text rows, dim]``, with the lengths of both parts of every sample -> the same shapes.
    causal_text: images read themselves only, and a text its image and, causally, itself; else all rows of a sample read all.
    read: the last layer computes these rows only, which are returned; not with causal_text. parts: what each loss has of this call.
    Raises: ValueError with vision-language experts, if samples are not ordered: images alone, pairs, texts alone.
    """

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.layers = nn.ModuleList(Beit3Layer(config, rate, index) for index, rate in enumerate(rates))
        self.norm = MultiwayLayerNorm(config.dim, eps=config.eps, backend=config.backend) if config.normalize_output else None

    def describe(
        self,
        image: Tensor,
        image_lengths: Sequence[int],
        text: Tensor,
        text_lengths: Sequence[int],
        causal_text: bool = False,
        *,
        read: Beit3Read | None = None,
        parts: Parts = (),
    ) -> PassInfo:
        """What a call processed, for a profile."""
        rows = sum(image_lengths) + sum(text_lengths)
        kind = "pair_encoder" if image.shape[0] and text.shape[0] else "image_encoder" if image.shape[0] else "text_encoder"
        return PassInfo(kind, len(image_lengths), rows, rows, parts)

    def forward(
        self,
        image: Tensor,
        image_lengths: Sequence[int],
        text: Tensor,
        text_lengths: Sequence[int],
        causal_text: bool = False,
        *,
        read: Beit3Read | None = None,
        parts: Parts = (),
    ) -> tuple[Tensor, Tensor]:
        if read is not None and causal_text:
            raise ValueError("read chooses rows that read their whole sample; it does not go with causal_text.")
        make_plan = AttentionPlan.prefix_causal if causal_text else AttentionPlan.joint
        plan = make_plan(image_lengths, text_lengths, image.device)
        split = image.shape[0]
        x = torch.cat([image, text]) if split and text.shape[0] else image if split else text
        offsets = self._offsets(image_lengths, text_lengths, image_lengths, text_lengths)
        samples = plan.query.segment_of_rows() % max(len(image_lengths), 1) if self.training else None
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, plan, offsets, samples, len(image_lengths))
        wanted = None
        if read is not None:
            runs = self._offsets(read.image_counts, read.text_counts, image_lengths, text_lengths)
            queries = Segments([*read.image_counts, *read.text_counts], x.device)
            assert plan.host_edges is not None
            chosen = AttentionPlan.from_edges(queries, plan.key, plan.host_edges)
            wanted = Beit3ReadRows(torch.cat([read.image, split + read.text]), chosen, runs)
        x = last(x, plan, offsets, samples, len(image_lengths), wanted)
        if wanted is not None and read is not None:
            split, offsets = len(read.image), wanted.expert_offsets
        if self.norm is not None:
            x = self.norm(x, offsets[2])
        return x[:split], x[split:]

    def _offsets(
        self, image_counts: Sequence[int], text_counts: Sequence[int], image_lengths: Sequence[int], text_lengths: Sequence[int]
    ) -> dict[int, tuple[int, ...]]:
        """Runs of each expert, for every number of experts, of `counts` rows of samples whose parts have `lengths` rows."""
        split, rows = sum(image_counts), sum(image_counts) + sum(text_counts)
        offsets: dict[int, tuple[int, ...]] = {1: (0, rows), 2: (0, split, rows)}
        if any(layer.ffn_experts == 3 for layer in self.layers):
            offsets[3] = _pair_offsets(image_counts, text_counts, image_lengths, text_lengths)
        return offsets


def _pair_offsets(
    image_counts: Sequence[int], text_counts: Sequence[int], image_lengths: Sequence[int], text_lengths: Sequence[int]
) -> tuple[int, int, int, int]:
    """Runs of the vision, the vision-language and the language expert: rows of samples with both parts lie in the middle."""
    kinds = [int(not image) - int(not text) for image, text in zip(image_lengths, text_lengths, strict=True) if image or text]
    if kinds != sorted(kinds):
        raise ValueError(
            "with vision-language experts samples must be ordered: images alone, then pairs, then texts alone; received "
            f"image parts of {list(image_lengths)} and text parts of {list(text_lengths)} rows."
        )
    rows = sum(image_counts) + sum(text_counts)
    first = sum(count for count, text in zip(image_counts, text_lengths, strict=True) if not text)
    last = sum(count for count, image in zip(text_counts, image_lengths, strict=True) if not image)
    return 0, first, rows - last, rows
