"""How the cost of a pretraining step grows: forward, losses and backward against batch, lengths, captions, losses and sizes.

Each axis is a sweep with all else at a base point. Captions have the lengths of `caption_lengths`, scaled so that the cut at 40 tokens
falls on the axis's caption length, to which peers pad. An image with several captions is encoded once by ours (`Batch.image_index`);
peers get it once for each caption. Peers run from their installed code: open_clip's CoCa with its CoCaLoss (ClipLoss where the caption
loss is left out), and transformers' BLIP towers, tied and called as BLIP_Pretrain does it, with momentum encoders and queue. CoCa's
schedules are the same forwards, so it has one. Weights are random and each side's own. Negatives are given, so that every call does
the same work; dropout is off.

Before anything is timed: losses of ours in both schedules agree within 2e-4, or ours is wrong; and the trained parameters of a peer are
as many as ours within 1 %, or the peer is wrong.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_fast.benchmarks.registry import DTYPES, OURS, Case, Entry, Options
from vlp_fast.benchmarks.script import run_as_script
from vlp_fast.benchmarks.step_rivals import open_clip_coca
from vlp_fast.data.batches import Batch
from vlp_fast.models import blip_preset
from vlp_fast.models.coca_open_clip import OpenClipCocaConfig
from vlp_fast.profile_peers import torchvision_names
from vlp_fast.training import BlipPretraining, CocaPretraining, PretrainingObjective, caption_lengths

__all__ = ["AXES", "Point", "cases", "finish", "fits"]

LOSSES = {"BLIP": ("itc", "itm", "lm"), "CoCa": ("contrastive", "caption")}
PEERS = {"BLIP": "transformers", "CoCa": "open_clip"}
# what a line's slope is of; and, where cost is a power, of what
AXES = {
    "batch": ("a pair", None),
    "caption length": ("a token", None),
    "captions an image": ("a caption of each image", None),
    "losses": ("a loss", None),
    "image size": ("a pixel of the side", "side"),
    "width": ("a column", "width"),
    "depth": ("a layer", None),
}
LONGEST = 40  # what `caption_lengths` cuts at
PATCH, ALPHA, SMOOTHING = 16, 0.4, 0.1


@dataclass(frozen=True, kw_only=True)
class Point:
    """One step: how many images, captions of each and tokens of the longest caption; which losses; and sizes of the model."""

    batch: int
    length: int
    image_size: int
    width: int
    depth: int
    head_dim: int
    vocab_size: int
    pooler_queries: int
    queue_size: int
    losses: tuple[str, ...] = ()
    captions: int = 1

    def lengths(self) -> list[int]:
        """Tokens of each caption, those of one image beside each other."""
        count = self.batch * self.captions
        return [max(round(n * self.length / LONGEST), 3) for n in caption_lengths(count)]


BASE: dict[str, dict[str, int]] = {
    "tiny": {
        "image_size": 64, "width": 64, "depth": 2, "head_dim": 32, "vocab_size": 1000, "pooler_queries": 17, "queue_size": 256,
    },
    "small": {
        "image_size": 64, "width": 256, "depth": 4, "head_dim": 64, "vocab_size": 8192, "pooler_queries": 65,
        "queue_size": 1024,
    },
    "base": {
        "image_size": 224, "width": 768, "depth": 12, "head_dim": 64, "vocab_size": 30524, "pooler_queries": 256,
        "queue_size": 57600,
    },
}  # fmt: skip
SWEEPS: dict[str, dict[str, tuple[int, ...]]] = {
    "tiny": {"image_size": (32, 64, 96, 128), "width": (64, 96, 128, 192), "depth": (1, 2, 4)},
    "small": {"image_size": (64, 112, 160, 224), "width": (192, 256, 384, 512), "depth": (2, 4, 6)},
    "base": {"image_size": (112, 160, 224, 384), "width": (384, 512, 768, 1024), "depth": (6, 12, 18)},
}


def cases(options: Options) -> Iterator[Entry]:
    """A case for each model, axis and value; `options.batch` is the base point's."""
    size = options.size or "small"
    for model in LOSSES:
        base = Point(batch=options.batch, length=32, losses=LOSSES[model], **BASE[size])
        for axis, value, point in _sweep(base, size):
            shown = "+".join(point.losses) if axis == "losses" else value

            def build(model: str = model, axis: str = axis, value: int = value, point: Point = point) -> Case:
                return _case(options, model, point, {"axis": axis, "value": value, "model": model})

            yield Entry(f"{model} {axis} {shown}", build)


def _sweep(base: Point, size: str) -> Iterator[tuple[str, int, Point]]:
    for batch in sorted({max(base.batch * part // 4, 2) for part in (1, 2, 4, 8)}):
        yield "batch", batch, replace(base, batch=batch)
    for length in (8, 16, 32, 64):
        yield "caption length", length, replace(base, length=length)
    for captions in (1, 2, 4):
        yield "captions an image", captions, replace(base, batch=max(base.batch // 2, 2), captions=captions)
    for count in range(1, len(base.losses) + 1):
        yield "losses", count, replace(base, losses=base.losses[:count])
    for field, values in SWEEPS[size].items():
        for value in values:
            changed: dict[str, Any] = {field: value}
            yield field.replace("_", " "), value, replace(base, **changed)


def _case(options: Options, model: str, point: Point, facts: dict[str, Any]) -> Case:
    torch.manual_seed(options.seed)
    batch = _batch(point).to(options.device)
    negatives = tuple(torch.arange(batch.batch_size).roll(1) for _ in range(2))
    given = {"negatives": negatives} if model == "BLIP" else {}
    parts: dict[str, Any] = {OURS: _own(model, point).to(options.device)}
    calls: dict[str, Callable[[], object]] = {}
    for schedule in ("packed", "published") if model == "BLIP" else ("packed",):

        def own_step(schedule: str = schedule) -> dict[str, Tensor]:
            parts[OURS].schedule = schedule
            return parts[OURS](batch, **given)

        calls[f"{OURS} {schedule}"] = _training(lambda: parts[OURS], own_step, options)
    peer, absent = PEERS[model], {}
    try:
        parts[peer] = (_TransformersBlip if model == "BLIP" else _OpenClipCoca)(point).to(options.device)
        images = batch.of_captions(batch.images)
        ids, there = _padded(batch, point.length)
        calls[peer] = _training(lambda: parts[peer], lambda: parts[peer](images, ids, there), options)
    except ImportError as error:
        absent[peer] = f"{error}: pip install 'vlp_fast[test-peers]'"

    def wrong() -> dict[str, str]:
        return _wrong(parts[OURS], parts.get(peer), peer, batch, given)

    def release(provider: str) -> None:
        parts.pop(peer if provider.startswith(OURS) else OURS, None)

    return Case(
        calls, wrong, absent, peer if peer in calls else "", batch.batch_size, "pairs", facts=facts, release=release
    )  # fmt: skip


def _batch(point: Point) -> Batch:
    lengths = point.lengths()
    images = torch.randn(point.batch, 3, point.image_size, point.image_size)
    ids = torch.randint(3, point.vocab_size - 3, (sum(lengths),))
    index = None if point.captions == 1 else tuple(i for _ in range(point.captions) for i in range(point.batch))
    return Batch(images, ids, tuple(lengths), ("",) * len(lengths), index)


def _padded(batch: Batch, columns: int) -> tuple[Tensor, Tensor]:
    """Token ids ``[captions, columns]``, padded with 0, and which of them are there."""
    device = batch.token_ids.device
    there = torch.arange(columns, device=device) < torch.tensor(batch.text_lengths, device=device)[:, None]
    ids = batch.token_ids.new_zeros(there.shape)
    ids[there] = batch.token_ids
    return ids, there


def _own(model: str, point: Point) -> PretrainingObjective:
    heads, hidden = point.width // point.head_dim, 4 * point.width
    if model == "BLIP":
        config = blip_preset(
            "base", image_size=point.image_size, vision_dim=point.width, vision_depth=point.depth, vision_heads=heads,
            dim=point.width, depth=point.depth, num_heads=heads, hidden_dim=hidden, embed_dim=point.width // 2,
            vocab_size=point.vocab_size, dec_id=point.vocab_size - 2, enc_id=point.vocab_size - 1, dropout_p=0.0,
            queue_size=point.queue_size,
        )  # fmt: skip
        return BlipPretraining(config, losses=point.losses)
    coca = OpenClipCocaConfig(
        image_size=point.image_size, patch_size=PATCH, vision_dim=point.width, vision_depth=point.depth, vision_heads=heads,
        vision_hidden_dim=hidden, pooler_queries=point.pooler_queries, pooler_heads=heads, dim=point.width,
        unimodal_depth=point.depth, num_heads=heads, hidden_dim=hidden, multimodal_depth=point.depth, decoder_heads=heads,
        decoder_hidden_dim=hidden, vocab_size=point.vocab_size, context_length=point.length, legacy_class_mask=True,
    )  # fmt: skip
    return CocaPretraining(coca, losses=point.losses)


def _training(module: Callable[[], nn.Module], step: Callable[[], dict[str, Tensor]], options: Options) -> Callable[[], None]:
    """Forward, losses and backward of one step."""

    def call() -> None:
        module().zero_grad(set_to_none=True)
        with torch.autocast(options.device, DTYPES[options.dtype], enabled=options.dtype != "fp32"):
            total = torch.stack(list(step().values())).sum()
        total.backward()

    return call


def _wrong(
    own: PretrainingObjective, rival: nn.Module | None, peer: str, batch: Batch, given: Mapping[str, Any]
) -> dict[str, str]:
    """The gate of this file's first lines; buffers are as before."""
    found, buffers = {}, {name: tensor.clone() for name, tensor in own.named_buffers()}
    for schedule in ("packed", "published"):
        own.schedule = schedule
        with torch.no_grad():
            found[schedule] = own(batch, **given)
            for name, tensor in own.named_buffers():  # queues have moved on
                tensor.copy_(buffers[name])
    wrong = {}
    for name, loss in found["published"].items():
        if not abs(float(found["packed"][name]) - float(loss)) <= 2e-4 * abs(float(loss)):
            said = f"{name} is {float(found['packed'][name]):.6g} packed and {float(loss):.6g} published"
            wrong |= {f"{OURS} {schedule}": said for schedule in found}
    if rival is not None:
        ours, theirs = _trained(own.model), _trained(rival)
        if abs(theirs - ours) > 0.01 * ours:
            wrong[peer] = f"it trains {theirs:,} parameters and ours {ours:,}: more than 1 % apart"
    return wrong


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------------------------------- peers


class _OpenClipCoca(nn.Module):
    """open_clip's CoCa of a point's sizes; images ``[captions, ...]``, ids and which of them are there -> losses."""

    def __init__(self, point: Point) -> None:
        super().__init__()
        self.model = open_clip_coca(
            image_size=point.image_size, width=point.width, depth=point.depth, head_dim=point.head_dim,
            pooler_queries=point.pooler_queries, pooler_heads=point.width // point.head_dim, vocab_size=point.vocab_size,
            length=point.length,
        )  # fmt: skip
        from open_clip.loss import ClipLoss, CoCaLoss

        both = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
        self.objectives, self.losses = (both, ClipLoss()), point.losses

    def forward(self, images: Tensor, ids: Tensor, there: Tensor) -> dict[str, Tensor]:
        both, contrast = self.objectives
        if self.losses == ("contrastive",):
            features = self.model.encode_image(images), self.model.encode_text(ids)
            return {"contrastive": contrast(*features, self.model.logit_scale.exp())}
        return dict(zip(("contrastive", "caption"), both(**self.model(images, ids)), strict=True))


class _TransformersBlip(nn.Module):
    """BLIP_Pretrain's step on transformers' BLIP towers: each image encoded once, and an encoder and a decoder that share all but
    self-attention."""

    def __init__(self, point: Point) -> None:
        super().__init__()
        self.library = torchvision_names()
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

        heads, width = point.width // point.head_dim, point.width
        shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": point.depth}
        shape |= {"num_attention_heads": heads}
        text = BlipTextConfig(
            **shape, vocab_size=point.vocab_size, encoder_hidden_size=width, label_smoothing=SMOOTHING, bos_token_id=0,
            eos_token_id=1, sep_token_id=1, use_cache=False,
        )  # fmt: skip
        self.image_encoder = BlipVisionModel(BlipVisionConfig(**shape, image_size=point.image_size, patch_size=PATCH))
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        self.text_decoder = BlipTextLMHeadModel(text)
        self._share()
        self.image_projection, self.text_projection = nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        self.itm_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.towers = ("image_encoder", "text_encoder", "image_projection", "text_projection")
        self.momentum = nn.ModuleDict({name: copy.deepcopy(getattr(self, name)) for name in self.towers}).requires_grad_(False)
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, F.normalize(torch.randn(point.queue_size, width // 2), dim=1))
        self.losses, self.words = point.losses, (point.vocab_size - 2, point.vocab_size - 1)

    def _share(self) -> None:
        encoder, decoder, head = self.text_encoder, self.text_decoder.bert, self.text_decoder.cls.predictions
        decoder.embeddings = encoder.embeddings
        head.decoder.weight, head.decoder.bias = encoder.embeddings.word_embeddings.weight, head.bias
        for one, other in zip(encoder.encoder.layer, decoder.encoder.layer, strict=True):
            other.crossattention, other.intermediate, other.output = one.crossattention, one.intermediate, one.output

    def forward(self, images: Tensor, ids: Tensor, there: Tensor) -> dict[str, Tensor]:
        made, (dec, enc) = {}, self.words
        rows = self.image_encoder(images).last_hidden_state
        if "itc" in self.losses:
            made["itc"] = self._contrast(images, rows, ids, there)
        first = torch.zeros_like(there)
        first[:, 0] = True
        if "itm" in self.losses:
            texts, others = ids.masked_fill(first, enc), torch.arange(len(ids), device=ids.device).roll(1)
            positive = self._first(texts, there, rows)
            negative = self._first(
                torch.cat([texts, texts[others]]), torch.cat([there, there[others]]), torch.cat([rows[others], rows])
            )
            logits = self.itm_head(torch.cat([positive, negative]))
            made["itm"] = F.cross_entropy(logits, (torch.arange(len(logits), device=ids.device) < len(ids)).long())
        if "lm" in self.losses:
            made["lm"] = self.text_decoder(
                ids.masked_fill(first, dec), there.long(), encoder_hidden_states=rows, labels=ids.masked_fill(~there, -100)
            ).loss  # fmt: skip
        return made

    def _first(self, ids: Tensor, there: Tensor, rows: Tensor | None = None, tower: Any = None) -> Tensor:
        found = (tower or self.text_encoder)(ids, there.long(), encoder_hidden_states=rows)
        return found.last_hidden_state[:, 0]

    def _contrast(self, images: Tensor, rows: Tensor, ids: Tensor, there: Tensor) -> Tensor:
        image = F.normalize(self.image_projection(rows[:, 0]), dim=1)
        text = F.normalize(self.text_projection(self._first(ids, there)), dim=1)
        slow = self.momentum
        with torch.no_grad():
            for name in self.towers:
                pairs = zip(slow[name].parameters(), getattr(self, name).parameters(), strict=True)
                own, online = (list(group) for group in zip(*pairs, strict=True))
                torch._foreach_lerp_(own, online, 0.005)
            found = slow["image_projection"](slow["image_encoder"](images).last_hidden_state[:, 0])
            image_keys = torch.cat([F.normalize(found, dim=1), self.image_queue])
            found = slow["text_projection"](self._first(ids, there, tower=slow["text_encoder"]))
            text_keys = torch.cat([F.normalize(found, dim=1), self.text_queue])
        own = slice(0, len(ids))
        ways = ((image, image_keys[own], text_keys), (text, text_keys[own], image_keys))
        total = sum(self._distilled(*way) for way in ways)
        for queue, keys in ((self.image_queue, image_keys), (self.text_queue, text_keys)):
            queue.copy_(keys[: len(queue)])
        return total / 2

    def _distilled(self, features: Tensor, slow_features: Tensor, keys: Tensor) -> Tensor:
        with torch.no_grad():
            hard = torch.eye(len(features), len(keys), device=keys.device)
            targets = ALPHA * (slow_features @ keys.t() / self.temperature).softmax(1) + (1 - ALPHA) * hard
        return F.cross_entropy(features @ keys.t() / self.temperature, targets)


# -------------------------------------------------------------------------------------------------------------------- fits


def finish(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the runner adds to the report: `fits`."""
    return {"fits": fits(report)}


def fits(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How medians grow along each axis, for each model and provider that has two values at least.

    Returns: of plain values, {axis, model, provider, points, a_ms, b_ms: ms = a + b * value by least squares; r2: of that line; exponent:
        of ms ~ value ^ exponent, by least squares of logarithms; r2_power: of that line; words}. R^2 of two points is None.
    """
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in report["rows"]:
        groups[row["axis"], row["model"], row["provider"]].append((float(row["value"]), row["ms_median"]))
    found = []
    for (axis, model, provider), points in groups.items():
        if len(points) < 2:
            continue
        values, ms = zip(*sorted(points), strict=True)
        a, b, r2 = _line(values, ms)
        _, exponent, r2_power = _line([math.log(v) for v in values], [math.log(m) for m in ms])
        of, power = AXES[axis]
        words = f"{axis}: {a:.3g} ms + {b:.3g} ms {of}" if power is None else f"{axis}: ms ~ {power}^{exponent:.2g}"
        quality = r2 if power is None else r2_power
        words += "" if quality is None else f" (R^2 {quality:.3f})"
        found.append(
            {
                "axis": axis, "model": model, "provider": provider, "points": len(points), "a_ms": a, "b_ms": b, "r2": r2,
                "exponent": exponent, "r2_power": r2_power, "words": words,
            }
        )  # fmt: skip
    return found


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float | None]:
    """Intercept and slope of least squares, and R^2."""
    b, a = (float(v) for v in np.polyfit(x, y, 1))
    left = float(np.sum((np.asarray(y) - a - b * np.asarray(x)) ** 2))
    whole = float(np.sum((np.asarray(y) - np.mean(y)) ** 2))
    return a, b, 1.0 - left / whole if len(x) > 2 and whole > 0.0 else None


if __name__ == "__main__":
    raise SystemExit(run_as_script("scaling"))
