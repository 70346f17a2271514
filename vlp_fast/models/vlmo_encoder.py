"""VLMo's sizes and its layers: rows of texts and of images through shared attention and the experts of their modalities.

Paper: Bao et al., VLMo: Unified Vision-Language Pre-Training with Mixture-of-Modality-Experts (2021), section 3.1 and figure 1. What
embeds words and patches and the heads of pretraining are in `vlp_fast.models.vlmo`.

Dimensions: samples, rows, dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.models._config import check_positive
from vlp_fast.modules import DropPath, Linear, MultiwayLayerNorm, MultiwayLinear
from vlp_fast.modules.multiway import multiway_mlp_of
from vlp_fast.modules.relative_bias import biased_attention, pair_buckets, relative_buckets
from vlp_fast.ops import attention, linear
from vlp_fast.passes import Parts, PassInfo, leading_rows
from vlp_fast.segments import Segments

__all__ = ["VlmoConfig", "VlmoEncoder"]


@dataclass(frozen=True, kw_only=True)
class VlmoConfig:
    """Sizes of VLMo; the defaults are the base model at 224 pixels.

    vl_start: the first layer with a vision-language expert (`depth`: none has one). layer_scale: start of the branches' scales, None
    for none. relative: positions are a bias on attention scores, else embeddings; with a bias, attention is PyTorch's on every device
    (`modules.biased_attention`). relative_text_length: the text length whose distances the bias has entries for. drop_path: stochastic
    depth, rising over the depth; the published code also takes it as the dropout after the text embedding. patch_drop: part of an
    image's patches left out while training (FLIP); each sample draws others, also where samples have the same image, for each is
    encoded on its own (the bias is then gathered for each, where images alone would share it). backend: of all else.
    """

    image_size: int = 224
    patch_size: int = 16
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    hidden_dim: int = 3072
    vl_start: int = 10
    eps: float = 1e-6
    layer_scale: float | None = 0.1
    relative: bool = True
    relative_text_length: int = 196
    drop_path: float = 0.1
    patch_drop: float = 0.0
    vocab_size: int = 30522
    max_positions: int = 40
    backend: str | None = None

    def __post_init__(self) -> None:
        check_positive(
            self, "image_size", "patch_size", "dim", "depth", "num_heads", "hidden_dim", "vocab_size", "max_positions"
        )
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim; received num_heads={self.num_heads} for dim={self.dim}.")
        if not 1 <= self.vl_start <= self.depth:
            raise ValueError(f"vl_start must be a layer from 1 to depth {self.depth}; received {self.vl_start}.")
        if self.relative and self.max_positions > self.relative_text_length:
            raise ValueError(
                f"max_positions must be at most relative_text_length {self.relative_text_length}; received {self.max_positions}."
            )


class VlmoRead(NamedTuple):
    """The rows that the last layer computes, int64; who reads whom with these as queries; entries of the bias table; their experts."""

    rows: Tensor
    plan: AttentionPlan
    pairs: list[Tensor]
    offsets: tuple[int, ...]


class VlmoStage(NamedTuple):
    """What layers with the same rows share.

    plan: who reads whom. positions: int64 ``[rows]``, what the bias depends on. pairs: entries of its table; both empty without one.
    offsets: rows of each expert. samples, parts: int64 ``[rows]``, what stochastic depth drops together in attention and in the FFN,
    `drops` of them at most; None while it does not drop. read: what the last layer computes; None: all rows.
    """

    plan: AttentionPlan
    positions: Tensor | None
    pairs: list[Tensor]
    offsets: tuple[int, ...]
    samples: Tensor | None
    parts: Tensor | None
    drops: int
    read: VlmoRead | None = None


class VlmoAttention(nn.Module):
    """Self-attention, the same for all modalities; queries and values have a bias, keys have none."""

    def __init__(self, config: VlmoConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads, self.backend = config.num_heads, config.backend
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, reads: VlmoStage | VlmoRead, table: Tensor | None) -> Tensor:
        """Of all rows, or of those that are read."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = linear(x, self.qkv.weight, bias).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        if isinstance(reads, VlmoRead):
            q = q[reads.rows]
        if table is None:
            out = attention(q, k, v, reads.plan, backend=self.backend)
        else:
            out = biased_attention(q, k, v, reads.plan, table, reads.pairs)
        return self.proj(out.flatten(1))


class VlmoLayer(nn.Module):
    """x + gamma * attention(norm(x)), then x + gamma * FFN(norm(x)) with norm and FFN of the row's expert.

    Experts: 0 text, 1 image, and in the top layers 2 vision-language.
    """

    def __init__(self, config: VlmoConfig, num_experts: int, drop_path: float) -> None:
        super().__init__()
        dim, eps, backend = config.dim, config.eps, config.backend
        self.num_experts = num_experts
        self.attention_norm = nn.LayerNorm(dim, eps)
        self.attention = VlmoAttention(config)
        self.ffn_norm = MultiwayLayerNorm(dim, num_experts, eps=eps, before_linear=True, backend=backend)
        self.fc1 = MultiwayLinear(dim, config.hidden_dim, num_experts, activation="gelu", backend=backend)
        self.fc2 = MultiwayLinear(config.hidden_dim, dim, num_experts, backend=backend)
        self.attention_scale = _scale(dim, config.layer_scale)
        self.ffn_scale = _scale(dim, config.layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, stage: VlmoStage, table: Tensor | None, read: VlmoRead | None = None) -> Tensor:
        """All rows, or with `read` those that are read afterwards."""
        offsets, samples, parts = stage.offsets, stage.samples, stage.parts
        branch = _scaled(self.attention(self.attention_norm(x), read or stage, table), self.attention_scale)
        if read is not None:
            x, offsets = x[read.rows], read.offsets
            samples, parts = (None if t is None else t[read.rows] for t in (samples, parts))
        x = x + self.drop_path(branch, samples, stage.drops)
        branch = _scaled(multiway_mlp_of(self.fc1, self.fc2, self.ffn_norm(x, offsets), offsets), self.ffn_scale)
        return x + self.drop_path(branch, parts, stage.drops)


def _scale(dim: int, start: float | None) -> nn.Parameter | None:
    return None if start is None else nn.Parameter(torch.full((dim,), start))


def _scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    return branch if scale is None else branch * scale


class VlmoEncoder(nn.Module):
    """The layers, over samples of a text part and an image part of which either may be empty.

    Shape: rows ``[text rows + image rows, dim]``, all texts before all images -> the same, once for each entry of `vl`.
    """

    def __init__(self, config: VlmoConfig) -> None:
        super().__init__()
        self.max_positions, self.vl_start = config.max_positions, config.vl_start
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.layers = nn.ModuleList(VlmoLayer(config, 2 if i < config.vl_start else 3, rate) for i, rate in enumerate(rates))
        self.norm = nn.LayerNorm(config.dim, config.eps)
        self.relative_bias: nn.Parameter | None = None
        if config.relative:
            grid = config.image_size // config.patch_size
            buckets, entries = relative_buckets(grid, config.relative_text_length, config.max_positions)
            self.register_buffer("buckets", buckets, persistent=False)
            self.buckets: Tensor
            self.relative_bias = nn.Parameter(torch.zeros(entries, config.depth, config.num_heads))

    def describe(
        self,
        rows: Tensor,
        text_lengths: Sequence[int],
        image_lengths: Sequence[int],
        vl: Sequence[bool] = (),
        *,
        image_positions: Tensor | None = None,
        first_row_only: bool = False,
        num_pairs: int | None = None,
        parts: Parts = (),
    ) -> PassInfo:
        """What a call processed, for a profile."""
        kinds = {(True, True): "pair_encoder", (True, False): "text_encoder"}
        kind = kinds.get((any(text_lengths), any(image_lengths)), "image_encoder")
        samples = len(text_lengths) if num_pairs is None else len(text_lengths) + len(image_lengths) - num_pairs
        return PassInfo(kind, samples, len(rows), len(rows), parts)

    def forward(
        self,
        rows: Tensor,
        text_lengths: Sequence[int],
        image_lengths: Sequence[int],
        vl: Sequence[bool] = (),
        *,
        image_positions: Tensor | None = None,
        first_row_only: bool = False,
        num_pairs: int | None = None,
        parts: Parts = (),
    ) -> list[Tensor]:
        """The lower layers once; the top layers for each entry of `vl`, with their vision-language experts where it is True.

        image_positions: int64 ``[image rows]``, the token of its image that each row is; None: images have all tokens.
        first_row_only: ``[samples, dim]``, the first row of each sample's text; the last layer computes no other.
        num_pairs: not samples with two parts, but texts alone, so many pairs, images alone, and one entry returned: see `_mixed`.
        parts: for a profile, what each loss has of this call.
        """
        if num_pairs is not None:
            return self._mixed(rows, text_lengths, image_lengths, vl, image_positions, num_pairs)
        text, total = sum(text_lengths), len(rows)
        plan = AttentionPlan.joint(text_lengths, image_lengths, rows.device)
        alike = image_positions is None and len(set(zip(text_lengths, image_lengths, strict=True))) == 1
        by_part = self._dropped(plan)  # each expert's branch is dropped on its own
        samples = None if by_part is None else by_part % max(len(text_lengths), 1)
        positions = self._positions(plan, text, image_positions)
        pairs = self._pairs(plan, positions, alike=alike)
        lower = VlmoStage(plan, positions, pairs, (0, text, total), samples, by_part, 2 * len(text_lengths))
        kept = [*[1] * len(text_lengths), *[0] * len(text_lengths)] if first_row_only else None
        rows = self._run(rows, 0, self.vl_start, lower)
        outs = []
        for joint in vl:
            if joint:
                top = lower._replace(offsets=(0, 0, 0, total), parts=samples)
            else:
                top = lower._replace(offsets=(0, text, total, total))
            outs.append(self._top(rows, top if kept is None else self._reading(top, kept)))
        return outs

    def _mixed(
        self,
        rows: Tensor,
        text_lengths: Sequence[int],
        image_lengths: Sequence[int],
        vl: Sequence[bool],
        image_positions: Tensor | None,
        num_pairs: int,
    ) -> list[Tensor]:
        """Texts alone, pairs and images alone in one forward, whose top layers have the vision-language experts for pairs, and for all
        that is alone those of each entry of `vl`: with two entries its rows are there twice.

        Args:
            rows: of texts alone, of the pairs' texts, of the pairs' images, of images alone. text_lengths: of the former two.
                image_lengths, image_positions: of the latter two.

        Returns: first rows of texts alone, of images alone, both again from the vision-language experts; text rows of the pairs.
            What `vl` does not name is ``[0, dim]``.
        """
        texts, images = len(text_lengths) - num_pairs, len(image_lengths) - num_pairs
        alone_text, alone_image = sum(text_lengths[:texts]), sum(image_lengths[num_pairs:])
        samples, text, total = texts + num_pairs + images, sum(text_lengths), len(rows)
        plan = AttentionPlan.joint([*text_lengths, *[0] * images], [*[0] * texts, *image_lengths], rows.device)
        dropped = self._dropped(plan)
        positions = self._positions(plan, text, image_positions)
        by_sample = None if dropped is None else dropped % samples
        lower = VlmoStage(plan, positions, self._pairs(plan, positions), (0, text, total), by_sample, dropped, 2 * samples)
        rows = self._run(rows, 0, self.vl_start, lower)

        # what is alone goes to the experts of its modality in front of all rows, which go to those of both
        own_texts, own_images = (texts, images) if False in vl else (0, 0)
        vl_texts, vl_images = (texts, images) if True in vl else (0, 0)
        if True not in vl:
            plan = AttentionPlan.joint(text_lengths[texts:], image_lengths[:num_pairs], rows.device)
        split = total - alone_image

        def top_rows(x: Tensor) -> Tensor:
            front = [x[:alone_text], x[split:]] if False in vl else []
            return torch.cat([*front, x if True in vl else x[alone_text:split]])

        lengths = [*text_lengths[:own_texts], *image_lengths[len(image_lengths) - own_images :]]
        front, back = len(lengths), vl_texts + num_pairs + vl_images
        assert plan.host_edges is not None
        edges = [(i, i, False) for i in range(front)]
        edges += [(front + query, front + key, bool(causal)) for query, key, causal in plan.host_edges.tolist()]
        segments = Segments([*lengths, *plan.query.lengths], rows.device)
        both = AttentionPlan.from_edges(segments, segments, edges)
        groups = self._dropped(both)
        if groups is not None:
            groups = torch.where(groups < front, groups, front + (groups - front) % max(back, 1))
        if positions is not None:
            positions = top_rows(positions)
        offsets = (0, sum(text_lengths[:own_texts]), sum(lengths), segments.rows)
        top = VlmoStage(both, positions, self._pairs(both, positions), offsets, groups, groups, front + back)
        kept = [*[1] * (front + vl_texts), *text_lengths[texts:], *[0] * (vl_images + vl_texts + num_pairs), *[1] * vl_images]
        out = self._top(top_rows(rows), self._reading(top, kept))
        counts = [own_texts, own_images, vl_texts, sum(text_lengths[texts:]), vl_images]
        text_first, image_first, text_vl, pairs, image_vl = out.split(counts)
        return [text_first, image_first, text_vl, image_vl, pairs]

    def _run(self, x: Tensor, first: int, end: int, stage: VlmoStage) -> Tensor:
        for i in range(first, end):
            read = stage.read if i == len(self.layers) - 1 else None
            x = self.layers[i](x, stage, None if self.relative_bias is None else self.relative_bias[:, i], read)
        return x

    def _top(self, rows: Tensor, stage: VlmoStage) -> Tensor:
        if stage.read is not None and self.vl_start == len(self.layers):
            rows = rows[stage.read.rows]  # no layer is left that could compute these alone
        return self.norm(self._run(rows, self.vl_start, len(self.layers), stage))

    def _reading(self, stage: VlmoStage, kept: Sequence[int]) -> VlmoStage:
        """The stage whose last layer computes the first ``kept[i]`` rows of segment i."""
        read = leading_rows(stage.plan, kept, stage.offsets)
        queries = None if stage.positions is None else stage.positions[read.rows]
        pairs = self._pairs(read.plan, stage.positions, queries)
        return stage._replace(read=VlmoRead(read.rows, read.plan, pairs, read.expert_offsets))

    def _positions(self, plan: AttentionPlan, text: int, image_positions: Tensor | None) -> Tensor | None:
        """Positions in the bias table: those of texts come first, so those of an image begin behind the longest text."""
        if self.relative_bias is None:
            return None
        positions = plan.query.positions().clone()
        if image_positions is not None:
            positions[text:] = image_positions
        positions[text:] += self.max_positions
        return positions

    def _pairs(
        self, plan: AttentionPlan, positions: Tensor | None, queries: Tensor | None = None, *, alike: bool = False
    ) -> list[Tensor]:
        return [] if positions is None else pair_buckets(plan, positions, self.buckets, queries=queries, alike=alike)

    def _dropped(self, plan: AttentionPlan) -> Tensor | None:
        """The segment of each row, int64; None while nothing is dropped."""
        return plan.query.segment_of_rows() if self.training else None
