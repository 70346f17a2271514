"""Salesforce's ALBEF: ALBEF.pth and what its pretraining script saves, with one BERT whose upper layers have cross-attention.

The momentum copies and the queues of a pretraining file are left out; `vlp_fast.training.salesforce_albef` loads and saves them too.
Heads are 64 wide in the published files: nothing need be given to load them. Positions are interpolated where ``image_size=`` names
another size than the file has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from vlp_fast.models.albef import Albef, AlbefConfig
from vlp_fast.models.checkpoints._format import Format
from vlp_fast.models.checkpoints._med import HEAD_DIM, KINDS, _cross_rules, experts, image_rules, linear
from vlp_fast.models.checkpoints._rules import CheckpointError, Rule, same, unused
from vlp_fast.models.checkpoints.salesforce_blip import IMAGES

__all__ = ["FORMAT", "encoder_rules", "model_rules"]

QUEUES = ("image_queue", "text_queue", "queue_ptr")


def _config(state: Mapping[str, Tensor], **fields: Any) -> AlbefConfig:
    """Sizes from shapes. Heads show in none: those of the published weights are 64 wide; give others in `fields`."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise CheckpointError(f"this is no pretraining checkpoint of ALBEF: {name} is missing.")
        return tuple(state[name].shape)

    def layers(prefix: str, part: str = "") -> set[int]:
        names = (name[len(prefix) :].partition(".") for name in state if name.startswith(prefix))
        return {int(number) for number, _, rest in names if rest.startswith(part)}

    embeddings, text = "text_encoder.bert.embeddings.", "text_encoder.bert.encoder.layer."
    vision_dim, _, patch_size, _ = shape("visual_encoder.patch_embed.proj.weight")
    vocab_size, dim = shape(embeddings + "word_embeddings.weight")
    patches = shape("visual_encoder.pos_embed")[1] - 1
    read = {
        "image_size": patch_size * round(patches**0.5),
        "patch_size": patch_size,
        "vision_dim": vision_dim,
        "vision_depth": len(layers("visual_encoder.blocks.")),
        "dim": dim,
        "depth": len(layers(text)),
        "fusion_layer": min(layers(text, "crossattention."), default=0),
        "hidden_dim": shape(text + "0.intermediate.dense.weight")[0],
        "vocab_size": vocab_size,
        "max_positions": shape(embeddings + "position_embeddings.weight")[0],
        "token_types": shape(embeddings + "token_type_embeddings.weight")[0],
        "embed_dim": shape("vision_proj.weight")[0],
    }
    if "image_queue" in state:
        read["queue_size"] = shape("image_queue")[1]
    for heads, width in (("vision_heads", vision_dim), ("num_heads", dim)):
        if heads not in fields and width % HEAD_DIM:
            raise CheckpointError(
                f"{heads} must be given: no shape shows it, and the width {width} is no multiple of {HEAD_DIM}."
            )
        read[heads] = width // HEAD_DIM
    return AlbefConfig(**{**read, **fields})


def _rules(config: AlbefConfig) -> list[Rule]:
    """Of a file that holds momentum copies and queues too, these are left out."""
    copies = (unused(*rule.theirs, *rule.tied) for rule in encoder_rules(config, "_m"))
    return [*model_rules(config), *copies, unused(*QUEUES)]


def model_rules(config: AlbefConfig) -> Iterator[Rule]:
    """All of an `Albef`."""
    yield from encoder_rules(config, "")
    yield from linear("itm_head", "itm_head")
    yield same("temperature", "temp")


def encoder_rules(config: AlbefConfig, copy: str) -> Iterator[Rule]:
    """The encoders, projections and word head; `copy` is "_m" for the names of the momentum copies."""
    text, head = f"text_encoder{copy}.bert", f"text_encoder{copy}.cls.predictions"
    yield from image_rules("image_encoder", IMAGES.under("visual_encoder", f"visual_encoder{copy}"), config)
    yield from linear("image_projection", f"vision_proj{copy}")
    # the words that are predicted are those of the input
    words = f"{text}.embeddings.word_embeddings.weight"
    yield same("text_encoder.embedding.word.weight", words, tied=[f"{head}.decoder.weight"])
    for name in ("position", "token_type"):
        yield same(f"text_encoder.embedding.{name}.weight", f"{text}.embeddings.{name}_embeddings.weight")
    yield from linear("text_encoder.embedding.norm", f"{text}.embeddings.LayerNorm")
    for i in range(config.depth):
        theirs = f"{text}.encoder.layer.{i}"
        if i < config.fusion_layer:
            yield from _text_layer(f"text_encoder.blocks.{i}", theirs)
        else:
            ours = f"fusion_encoder.blocks.{i - config.fusion_layer}"
            yield from _text_layer(ours, theirs)
            yield from _cross_rules(ours, [theirs])
    yield from linear("text_projection", f"text_proj{copy}")
    yield from linear("word_head.transform", f"{head}.transform.dense")
    yield from linear("word_head.norm", f"{head}.transform.LayerNorm")
    yield same("word_head.bias", f"{head}.bias", tied=[f"{head}.decoder.bias"])
    yield unused(f"{text}.embeddings.position_ids")


def _text_layer(ours: str, theirs: str) -> Iterator[Rule]:
    """A layer of BERT without cross-attention; its self-attention is the only one of its experts."""
    for kind in KINDS:
        parts = [f"{theirs}.attention.self.{part}.{kind}" for part in ("query", "key", "value")]
        yield experts(f"{ours}.attention.qkv.{kind}", [parts])
        yield experts(f"{ours}.attention.proj.{kind}", [[f"{theirs}.attention.output.dense.{kind}"]])
        yield experts(f"{ours}.attention_norm.{kind}", [[f"{theirs}.attention.output.LayerNorm.{kind}"]])
    for mine, their in (("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"), ("mlp_norm", "output.LayerNorm")):
        yield from linear(f"{ours}.{mine}", f"{theirs}.{their}")


FORMAT = Format(
    name="albef",
    title="salesforce ALBEF",
    model=Albef,
    config=_config,
    rules=_rules,
)
