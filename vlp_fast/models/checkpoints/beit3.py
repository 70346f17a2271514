"""BEiT-3 of microsoft/unilm (folder beit3, over torchscale): pretrained, intermediate and fine-tuned checkpoints.

Expert A is vision, B is text. Both tables of positions begin with two rows that nobody reads, as fairseq counts. The heads in a file
say which model of ours it becomes: none `Beit3`; mim_head and mlm_head `Beit3MaskedModel`; mlm_head alone `Beit3Captioner`;
vision_head, language_head and logit_scale `Beit3Retrieval`; pooler and head `Beit3QuestionAnswering`; a head of two layers
`Beit3Reasoning`; fc_norm and head `Beit3Classifier`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlp_fast.models.beit3 import Beit3, Beit3Config, Beit3MaskedModel
from vlp_fast.models.beit3_tasks import (
    Beit3Captioner,
    Beit3Classifier,
    Beit3ClassifierConfig,
    Beit3QuestionAnswering,
    Beit3Reasoning,
    Beit3Retrieval,
)
from vlp_fast.models.checkpoints._format import Format
from vlp_fast.models.checkpoints._positions import resize_positions
from vlp_fast.models.checkpoints._rules import CheckpointError, Rule, cut_rows, reshaped, same, stacked

__all__ = ["FORMATS", "format_of"]

TRUNK = "beit3."
LAYERS = TRUNK + "encoder.layers."
IMAGE_POSITIONS = TRUNK + "encoder.embed_positions.A.weight"
TEXT_POSITIONS = TRUNK + "encoder.embed_positions.B.weight"
UNREAD = 2  # rows before the first position
HEAD_DIM = 64  # of all released models
EXPERTS = ("A", "B")


def _read_config(state: Mapping[str, Tensor], **fields: Any) -> dict[str, Any]:
    """Fields of `Beit3Config`; image_size may be another than the file's, whose positions are interpolated then."""
    needed = [TRUNK + "vision_embed.proj.weight", TRUNK + "text_embed.weight", IMAGE_POSITIONS, TEXT_POSITIONS]
    needed.append(LAYERS + "0.ffn.A.fc1.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise CheckpointError(f"a BEiT-3 checkpoint has {missing[0]}; this one, of {len(state)} tensors, has not.")
    vocab_size, dim = state[TRUNK + "text_embed.weight"].shape
    patch_size = state[TRUNK + "vision_embed.proj.weight"].shape[-1]
    if "num_heads" not in fields and dim % HEAD_DIM:
        raise CheckpointError(f"num_heads must be given where the width is no multiple of {HEAD_DIM}; received width {dim}.")
    grid = round((len(state[IMAGE_POSITIONS]) - UNREAD - 1) ** 0.5)
    found = {
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "dim": dim,
        "depth": len({name[len(LAYERS) :].partition(".")[0] for name in state if name.startswith(LAYERS)}),
        "num_heads": dim // HEAD_DIM,
        "hidden_dim": len(state[LAYERS + "0.ffn.A.fc1.weight"]),
        "vocab_size": vocab_size,
        "max_positions": len(state[TEXT_POSITIONS]) - UNREAD,
        "normalize_output": TRUNK + "encoder.layer_norm.A.weight" in state,
    }
    return {**found, **fields}


def _trunk_config(state: Mapping[str, Tensor], **fields: Any) -> Beit3Config:
    return Beit3Config(**_read_config(state, **fields))


def _masked_config(state: Mapping[str, Tensor], **fields: Any) -> Beit3Config:
    if "mim_head.bias" in state:
        fields = {"visual_vocab_size": len(state["mim_head.bias"]), **fields}
    return _trunk_config(state, **fields)


def _classifier_config(last: str) -> Callable[..., Beit3ClassifierConfig]:
    """Reads the config of a model whose classes are the rows of the tensor `last`."""

    def read(state: Mapping[str, Tensor], **fields: Any) -> Beit3ClassifierConfig:
        if last in state:
            fields = {"num_classes": len(state[last]), **fields}
        return Beit3ClassifierConfig(**_read_config(state, **fields))

    return read


# ------------------------------------------------------------------------------------------------------------------- tables


def _layer(name: str) -> list[tuple[str, str]]:
    """A linear or a norm of one name: its weight and its bias."""
    return [(f"{name}.{part}", part) for part in ("weight", "bias")]


def _experts(ours: str, theirs: str) -> list[Rule]:
    """A Multiway sub-layer: both experts in one tensor."""
    return [stacked(name, [theirs.format(e) + "." + part for e in EXPERTS]) for name, part in _layer(ours)]


def _projections(ours: str, theirs: str) -> list[Rule]:
    """Queries, keys and values of both experts in one tensor, ``[experts, 3 * dim, ...]``."""
    rules = []
    for name, part in _layer(ours):
        names = tuple(f"{theirs}.{which}_proj.{e}.{part}" for e in EXPERTS for which in "qkv")
        rules.append(
            Rule(
                name,
                names,
                lambda t: torch.stack([torch.cat(list(t[:3])), torch.cat(list(t[3:]))]),
                lambda t: [x for expert in t.unbind() for x in expert.chunk(3)],
            )
        )
    return rules


def _image_positions(config: Beit3Config) -> Rule:
    """The class token's position and the patches', at the size of the config."""
    grid = config.image_size // config.patch_size
    cut = cut_rows("image_position", IMAGE_POSITIONS, UNREAD)
    return Rule(cut.ours, cut.theirs, lambda t: resize_positions(cut.load(t), grid), cut.save)


def _trunk_rules(config: Beit3Config) -> list[Rule]:
    if config.share_attention or config.vl_experts_from_layer is not None:
        raise CheckpointError("the released BEiT-3 has no shared attention and no vision-language experts; this model has.")
    dim, patch = config.dim, config.patch_size
    rules = [
        reshaped("patch_embedding.proj.weight", TRUNK + "vision_embed.proj.weight", (dim, -1), (dim, 3, patch, patch)),
        same("patch_embedding.proj.bias", TRUNK + "vision_embed.proj.bias"),
        reshaped("class_token", TRUNK + "vision_embed.cls_token", (dim,), (1, 1, dim)),
        reshaped("mask_token", TRUNK + "vision_embed.mask_token", (dim,), (1, 1, dim)),
        _image_positions(config),
        same("word.weight", TRUNK + "text_embed.weight"),
        cut_rows("text_position.weight", TEXT_POSITIONS, UNREAD),
    ]
    for i in range(config.depth):
        ours, theirs = f"encoder.layers.{i}", f"{LAYERS}{i}"
        rules += _experts(f"{ours}.attention_norm", f"{theirs}.self_attn_layer_norm.{{}}")
        rules += _projections(f"{ours}.attention.qkv", f"{theirs}.self_attn")
        rules += _experts(f"{ours}.attention.inner_norm", f"{theirs}.self_attn.inner_attn_ln.{{}}")
        rules += _experts(f"{ours}.attention.proj", f"{theirs}.self_attn.out_proj.{{}}")
        rules += _experts(f"{ours}.ffn_norm", f"{theirs}.final_layer_norm.{{}}")
        rules += _experts(f"{ours}.ffn.fc1", f"{theirs}.ffn.{{}}.fc1")
        rules += _experts(f"{ours}.ffn.norm", f"{theirs}.ffn.{{}}.ffn_layernorm")
        rules += _experts(f"{ours}.ffn.fc2", f"{theirs}.ffn.{{}}.fc2")
    if config.normalize_output:
        rules += _experts("encoder.norm", f"{TRUNK}encoder.layer_norm.{{}}")
    return rules


def _head(**names: str) -> list[Rule]:
    """Weight and bias of each layer of a head: theirs = ours, with "__" for the dots of theirs."""
    pairs = [(ours, theirs.replace("__", ".")) for theirs, ours in names.items()]
    return [same(name, f"{theirs}.{part}") for ours, theirs in pairs for name, part in _layer(ours)]


# ------------------------------------------------------------------------------------------------------------------ formats


HEADS: dict[type[nn.Module], tuple[Callable[..., Beit3Config], list[Rule]]] = {
    Beit3: (_trunk_config, []),
    Beit3MaskedModel: (_masked_config, _head(mim_head="visual_head", mlm_head="word_head")),
    Beit3Captioner: (_trunk_config, _head(mlm_head="word_head")),
    Beit3Retrieval: (
        _trunk_config,
        [same(name, name) for name in ("vision_head.weight", "language_head.weight", "logit_scale")],
    ),
    Beit3QuestionAnswering: (
        _classifier_config("head.3.bias"),
        _head(pooler__norm="pooler.0", pooler__dense="pooler.1", head__0="head.0", head__1="head.1", head__3="head.3"),
    ),
    Beit3Reasoning: (
        _classifier_config("head.dense2.bias"),
        _head(head__norm1="head.0", head__dense1="head.1", head__norm2="head.2", head__dense2="head.4"),
    ),
    Beit3Classifier: (_classifier_config("head.bias"), _head(fc_norm="head_norm", head="head")),
}


def _format(model: type[nn.Module]) -> Format:
    config, head = HEADS[model]
    return Format("beit3", "BEiT-3", model, config, lambda config: [*_trunk_rules(config), *head])


FORMATS = tuple(_format(model) for model in HEADS)


def format_of(state: Mapping[str, Tensor]) -> Format:
    """The format of a checkpoint, by its head; where none fits, the one that comes nearest, which then lists what is wrong."""
    names = {name for name in state if not name.startswith(TRUNK)}

    def difference(form: Format) -> int:
        return len(names ^ {name for rule in HEADS[form.model][1] for name in rule.theirs})

    return min(FORMATS, key=difference)
