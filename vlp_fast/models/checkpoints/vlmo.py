"""VLMo of microsoft/unilm (folder vlmo): checkpoints of its pretraining, with all heads.

What shapes do not show: heads of a model with absolute positions (``num_heads=``, 16 in base plus), and the text length whose distances
the relative bias holds (``relative_text_length=``, 196 in all released files). At another image size than the checkpoint's,
``image_size=...``, positions are interpolated as VLMo does it; fewer ``max_positions=`` cut the text positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlp_fast.models.checkpoints._format import Format
from vlp_fast.models.checkpoints._positions import resize_positions
from vlp_fast.models.checkpoints._relative_bias import resize_relative_bias
from vlp_fast.models.checkpoints._rules import CheckpointError, Rule, reshaped, same, stacked, unused
from vlp_fast.models.vlmo import Vlmo, VlmoConfig

__all__ = ["FORMAT"]

BLOCKS = "transformer.blocks."
BIAS = "relative_position_bias_table"
IMAGE_POSITIONS = "transformer.pos_embed"
TEXT_POSITIONS = "text_embeddings.position_embeddings.weight"
# what older versions of the code saved, and tables that its forward does not read
BUFFERS = (
    "relative_position_index",
    "text_relative_position_index",
    "text_imag_relative_position_index",
    "text_embeddings.position_ids",
    "text_embeddings.token_type_ids",
)
EXPERTS = ("text", "imag", "vl")
HEAD_DIMS = {544: 34}  # of base plus; 64 in all others
OTHER_ENTRIES = 5  # of the bias table, beside offsets of patches and 2 for each unit of text length


def _config(state: Mapping[str, Tensor], **fields: Any) -> VlmoConfig:
    """Sizes from shapes."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise CheckpointError(f"this is no pretraining checkpoint of VLMo: {name} is missing.")
        return tuple(state[name].shape)

    dim, _, patch_size, _ = shape("transformer.patch_embed.proj.weight")
    numbers = {name[len(BLOCKS) :].partition(".")[0] for name in state if name.startswith(BLOCKS)}
    top = {int(number) for number in numbers if f"{BLOCKS}{number}.mlp_vl.fc1.weight" in state}
    depth, relative = len(numbers), BIAS in state
    read: dict[str, Any] = {
        "patch_size": patch_size,
        "dim": dim,
        "depth": depth,
        "hidden_dim": shape(BLOCKS + "0.mlp_text.fc1.weight")[0],
        "vl_start": min(top, default=depth),
        "layer_scale": VlmoConfig.layer_scale if BLOCKS + "0.gamma_1" in state else None,
        "relative": relative,
        "vocab_size": shape("text_embeddings.word_embeddings.weight")[0],
    }
    if TEXT_POSITIONS in state:
        read["max_positions"] = shape(TEXT_POSITIONS)[0]
    if relative:
        text_length = fields.get("relative_text_length", VlmoConfig.relative_text_length)
        read["num_heads"] = shape(BIAS)[1] // depth
        read["image_size"] = patch_size * _grid(shape(BIAS)[0], text_length)
    else:
        if "num_heads" not in fields and dim % HEAD_DIMS.get(dim, 64):
            raise CheckpointError(f"num_heads must be given: no shape shows it for a width of {dim}.")
        read["num_heads"] = dim // HEAD_DIMS.get(dim, 64)
        read["image_size"] = patch_size * round((shape(IMAGE_POSITIONS)[1] - 1) ** 0.5)
        read["backend"] = "torch" if dim in HEAD_DIMS else None
    return VlmoConfig(**{**read, **fields})


def _grid(entries: int, text_length: int) -> int:
    """Patches along a side of the images whose bias table has so many entries."""
    offsets = entries - 2 * text_length - OTHER_ENTRIES
    span = round(max(offsets, 0) ** 0.5)
    if span * span != offsets or span % 2 == 0:
        raise CheckpointError(
            f"{BIAS} must have an odd square of entries beside 2 * relative_text_length + {OTHER_ENTRIES}; received {entries} entries "
            f"for relative_text_length={text_length}: give the length that the checkpoint was made with."
        )
    return (span + 1) // 2


def _rules(config: VlmoConfig) -> list[Rule]:
    dim, patch = config.dim, config.patch_size
    rules = [
        reshaped("class_token", "transformer.cls_token", (-1,), (1, 1, -1)),
        reshaped(
            "patch_embedding.proj.weight", "transformer.patch_embed.proj.weight", (dim, 3 * patch**2), (dim, 3, patch, patch)
        ),
        same("patch_embedding.proj.bias", "transformer.patch_embed.proj.bias"),
        same("word.weight", "text_embeddings.word_embeddings.weight"),
        same("sentence_type", "text_embeddings.token_type_embeddings.weight"),
        *_both("text_norm", "text_embeddings.LayerNorm"),
        same("modality", "token_type_embeddings.weight"),
        *(rule for i in range(config.depth) for rule in _layer(config, i)),
        *_both("encoder.norm", "transformer.norm"),
        *_both("pooler", "pooler.dense"),
        *_both("matching_head", "itm_score.fc"),
        *_both("word_transform", "mlm_score.transform.dense"),
        *_both("word_norm", "mlm_score.transform.LayerNorm"),
        same("word_head.weight", "mlm_score.decoder.weight"),
        same("word_head.bias", "mlm_score.bias"),
        same("text_projection.weight", "itc_text_proj.fc.weight"),
        same("image_projection.weight", "itc_image_proj.fc.weight"),
        same("vl_text_projection.weight", "itc_vl_text_proj.fc.weight"),
        same("vl_image_projection.weight", "itc_vl_image_proj.fc.weight"),
        same("log_scale", "logit_scale"),
        same("log_vl_scale", "logit_vl_scale"),
        unused(*BUFFERS),
    ]
    if config.relative:
        # BERT's table of positions is in the file and not read by a model with a bias
        return [*rules, _bias(config), unused(TEXT_POSITIONS)]
    grid = config.image_size // patch
    return [
        *rules,
        Rule("image_position", (IMAGE_POSITIONS,), lambda t: resize_positions(t[0][0], grid), lambda t: [t[None]]),
        Rule("text_position.weight", (TEXT_POSITIONS,), lambda t: t[0][: config.max_positions]),
    ]


def _layer(config: VlmoConfig, number: int) -> list[Rule]:
    ours, theirs = f"encoder.layers.{number}.", f"{BLOCKS}{number}."
    experts = EXPERTS[: 2 if number < config.vl_start else 3]
    scales = [] if config.layer_scale is None else [("attention_scale", "gamma_1"), ("ffn_scale", "gamma_2")]
    return [
        *_both(ours + "attention_norm", theirs + "norm1"),
        same(ours + "attention.qkv.weight", theirs + "attn.qkv.weight"),
        same(ours + "attention.q_bias", theirs + "attn.q_bias"),
        same(ours + "attention.v_bias", theirs + "attn.v_bias"),
        *_both(ours + "attention.proj", theirs + "attn.proj"),
        *(same(ours + one, theirs + other) for one, other in scales),
        *_experts(ours + "ffn_norm", [f"{theirs}norm2_{expert}" for expert in experts]),
        *_experts(ours + "fc1", [f"{theirs}mlp_{expert}.fc1" for expert in experts]),
        *_experts(ours + "fc2", [f"{theirs}mlp_{expert}.fc2" for expert in experts]),
    ]


def _bias(config: VlmoConfig) -> Rule:
    """The one table of all layers and heads: theirs ``[entries, depth * heads]``, ours ``[entries, depth, heads]``."""
    other = 2 * config.relative_text_length + OTHER_ENTRIES
    grid = config.image_size // config.patch_size

    def load(tensors: Sequence[Tensor]) -> Tensor:
        offsets, rest = tensors[0][:-other], tensors[0][-other:]
        return torch.cat([resize_relative_bias(offsets, grid), rest]).unflatten(1, (config.depth, config.num_heads))

    return Rule("encoder.relative_bias", (BIAS,), load, lambda t: [t.flatten(1)])


def _both(ours: str, theirs: str) -> list[Rule]:
    return [same(f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias")]


def _experts(ours: str, theirs: Sequence[str]) -> list[Rule]:
    return [stacked(f"{ours}.{part}", [f"{name}.{part}" for name in theirs]) for part in ("weight", "bias")]


FORMAT = Format("vlmo", "VLMo", Vlmo, _config, _rules)
