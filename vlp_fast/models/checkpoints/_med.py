"""BLIP's towers under the names that salesforce's code and transformers give them: the same for text, two spellings for images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlp_fast.models.albef import AlbefConfig
from vlp_fast.models.blip import BlipConfig
from vlp_fast.models.checkpoints._positions import resize_positions
from vlp_fast.models.checkpoints._rules import CheckpointError, Rule, joined, reshaped, same, unused

__all__ = ["ImageNames", "experts", "head_rules", "image_rules", "linear", "read_config", "text_rules", "word_rules"]

HEAD_DIM = 64  # of every published BLIP, for images and for text
KINDS = ("weight", "bias")


@dataclass(frozen=True)
class ImageNames:
    """How a code base spells the vision transformer; names of a block follow ``blocks.<i>``."""

    class_token: str
    positions: str
    patches: str
    blocks: str
    norm: str
    block: Mapping[str, str]  # ours -> theirs

    def under(self, old: str, new: str) -> ImageNames:
        """The same names under another prefix, such as a momentum copy's."""

        def moved(name: str) -> str:
            return name.replace(old, new, 1)

        return ImageNames(
            class_token=moved(self.class_token),
            positions=moved(self.positions),
            patches=moved(self.patches),
            blocks=moved(self.blocks),
            norm=moved(self.norm),
            block=self.block,
        )


def linear(ours: str, theirs: str, *, tied: Sequence[str] = ()) -> list[Rule]:
    """Weight and bias of a layer (linear or norm) that is the same on both sides."""
    return [same(f"{ours}.{kind}", f"{theirs}.{kind}", tied=[f"{name}.{kind}" for name in tied]) for kind in KINDS]


def experts(ours: str, groups: Sequence[Sequence[str]]) -> Rule:
    """Ours is ``[len(groups), ...]``: expert e holds the tensors of ``groups[e]``, one after the other along its first dimension."""
    size = len(groups[0])

    def load(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([torch.cat(list(tensors[i : i + size])) for i in range(0, len(tensors), size)])

    def save(tensor: Tensor) -> Sequence[Tensor]:
        return [part for expert in tensor for part in expert.chunk(size)]

    return Rule(ours, tuple(name for group in groups for name in group), load, save)


def image_rules(ours: str, names: ImageNames, config: BlipConfig | AlbefConfig) -> Iterator[Rule]:
    """The image encoder `ours`; positions of another image size are interpolated."""
    p, grid = config.patch_size, config.image_size // config.patch_size
    yield reshaped(f"{ours}.class_token", names.class_token, (-1,), (1, 1, -1))
    yield Rule(f"{ours}.position_embedding", (names.positions,), lambda t: resize_positions(t[0][0], grid), lambda t: [t[None]])
    shape = (config.vision_dim, 3, p, p)
    yield reshaped(f"{ours}.patch_embedding.proj.weight", f"{names.patches}.weight", (shape[0], 3 * p * p), shape)
    yield same(f"{ours}.patch_embedding.proj.bias", f"{names.patches}.bias")
    for i in range(config.vision_depth):
        for mine, their in names.block.items():
            yield from linear(f"{ours}.blocks.{i}.{mine}", f"{names.blocks}.{i}.{their}")
    yield from linear(f"{ours}.norm", names.norm)


def text_rules(ours: str, towers: Sequence[str], depth: int, *, cross: bool = True, head: str | None = None) -> Iterator[Rule]:
    """The text tower `ours`, whose experts are the self-attentions of `towers`; the rest of these is tied.

    Args:
        towers: prefixes of BERT models. cross: whether the tower of ours reads images; theirs always can. head: prefix of the head
            whose matrix is the word embeddings, for `word_rules`.
    """
    first, rest = towers[0], towers[1:]
    matrix = [f"{head}.cls.predictions.decoder.weight"] if head else []
    for mine, their, tied in (("word", "word_embeddings", matrix), ("position", "position_embeddings", [])):
        name = f"embeddings.{their}.weight"
        yield same(f"{ours}.embedding.{mine}.weight", f"{first}.{name}", tied=[*(f"{tower}.{name}" for tower in rest), *tied])
    yield from linear(
        f"{ours}.embedding.norm", f"{first}.embeddings.LayerNorm", tied=[f"{t}.embeddings.LayerNorm" for t in rest]
    )
    yield unused(*(f"{tower}.embeddings.position_ids" for tower in towers))
    for i in range(depth):
        block, layers = f"{ours}.blocks.{i}", [f"{tower}.encoder.layer.{i}" for tower in towers]
        for kind in KINDS:
            parts = ("query", "key", "value")
            yield experts(
                f"{block}.attention.qkv.{kind}", [[f"{x}.attention.self.{part}.{kind}" for part in parts] for x in layers]
            )
            yield experts(f"{block}.attention.proj.{kind}", [[f"{x}.attention.output.dense.{kind}"] for x in layers])
            yield experts(f"{block}.attention_norm.{kind}", [[f"{x}.attention.output.LayerNorm.{kind}"] for x in layers])
        yield from _cross_rules(block, layers) if cross else [unused(*_cross_names(layers))]
        for mine, their in (("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"), ("mlp_norm", "output.LayerNorm")):
            yield from linear(f"{block}.{mine}", f"{layers[0]}.{their}", tied=[f"{x}.{their}" for x in layers[1:]])


def _cross_rules(block: str, layers: Sequence[str]) -> Iterator[Rule]:
    for mine, their in (("query", "self.query"), ("proj", "output.dense")):
        names = [f"{x}.crossattention.{their}" for x in layers]
        yield from linear(f"{block}.cross_attention.{mine}", names[0], tied=names[1:])
    for kind in KINDS:
        names = [f"{x}.crossattention.self.{part}.{kind}" for x in layers for part in ("key", "value")]
        yield joined(f"{block}.cross_attention.key_value.{kind}", names[:2], tied=names[2:])
    names = [f"{x}.crossattention.output.LayerNorm" for x in layers]
    yield from linear(f"{block}.cross_norm", names[0], tied=names[1:])


def _cross_names(layers: Sequence[str]) -> Iterator[str]:
    for name in ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm"):
        yield from (f"{x}.crossattention.{name}.{kind}" for x in layers for kind in KINDS)


def word_rules(ours: str, decoder: str) -> Iterator[Rule]:
    """The head that predicts words; its matrix is the word embeddings, its bias has two names there."""
    head = f"{decoder}.cls.predictions"
    yield from linear(f"{ours}lm_transform", f"{head}.transform.dense")
    yield from linear(f"{ours}lm_norm", f"{head}.transform.LayerNorm")
    yield same(f"{ours}lm_bias", f"{head}.bias", tied=[f"{head}.decoder.bias"])


def head_rules(ours: str, heads: Mapping[str, str]) -> Iterator[Rule]:
    """Heads of one layer each: ours -> theirs."""
    for mine, their in heads.items():
        yield from linear(f"{ours}{mine}", their)


def read_config(state: Mapping[str, Tensor], names: ImageNames, text: str, **given: Any) -> BlipConfig:
    """The sizes that the tensors show, and `given` for the rest; it wins.

    Args:
        text: prefix of a BERT model. given: fields of `BlipConfig`. Heads that are not given are 64 wide.
    """
    patches, positions = _shape(state, f"{names.patches}.weight", 4), _shape(state, names.positions, 3)
    words, hidden = (
        _shape(state, f"{text}.embeddings.word_embeddings.weight", 2),
        f"{text}.encoder.layer.0.intermediate.dense.weight",
    )
    found: dict[str, Any] = {
        "image_size": round((positions[1] - 1) ** 0.5) * patches[-1],
        "patch_size": patches[-1],
        "vision_dim": patches[0],
        "vision_depth": _count(state, f"{names.blocks}."),
        "vision_hidden_dim": _shape(state, f"{names.blocks}.0.{names.block['mlp.fc1']}.weight", 2)[0],
        "dim": words[1],
        "depth": _count(state, f"{text}.encoder.layer."),
        "hidden_dim": _shape(state, hidden, 2)[0],
        "vocab_size": words[0],
        "max_positions": _shape(state, f"{text}.embeddings.position_embeddings.weight", 2)[0],
    }
    if "vision_proj.weight" in state:
        found["embed_dim"] = _shape(state, "vision_proj.weight", 2)[0]
    if "image_queue" in state:
        found["queue_size"] = _shape(state, "image_queue", 2)[1]
    for heads, width in (("vision_heads", "vision_dim"), ("num_heads", "dim")):
        if heads not in given:
            if found[width] % HEAD_DIM:
                raise CheckpointError(
                    f"{heads} must be given: no shape shows it, and {width} {found[width]} is no multiple of the {HEAD_DIM} that a "
                    "head of the published models has."
                )
            found[heads] = found[width] // HEAD_DIM
    return BlipConfig(**{**found, **given})


def _shape(state: Mapping[str, Tensor], name: str, dims: int) -> Sequence[int]:
    if name not in state:
        raise CheckpointError(
            f"{name} is missing, from which sizes are read. Likely cause: a checkpoint of another task or code base."
        )
    if state[name].dim() != dims:
        raise CheckpointError(f"{name} must have {dims} dimensions; received shape {list(state[name].shape)}.")
    return state[name].shape


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Layers numbered after `prefix`."""
    return len({name[len(prefix) :].partition(".")[0] for name in state if name.startswith(prefix)})
