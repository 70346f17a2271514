"""open_clip's CoCa: ``open_clip_pytorch_model.bin`` of coca_ViT-B-32, coca_ViT-L-14, and any other with a pooler and text tower of its own.

Read with the legacy class mask, the only one that open_clip's configurations can have (see `vlp_fast.models.coca_open_clip`); weights
that were trained with the correct one take ``legacy_class_mask=False``. At another image size than the checkpoint's,
``image_size=...``, positions are interpolated as open_clip does it. Word 0 is padding to open_clip and the "!" that more characters
follow: inside a caption it is a word like any other here, while open_clip hides keys because of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlp_fast.models.checkpoints._format import Format
from vlp_fast.models.checkpoints._positions import resize_positions
from vlp_fast.models.checkpoints._rules import CheckpointError, Rule, reshaped, same, split, transposed
from vlp_fast.models.coca_open_clip import OpenClipCoca, OpenClipCocaConfig

__all__ = ["FORMAT"]

VISION, TEXT, DECODER = "visual.transformer.resblocks.", "text.transformer.resblocks.", "text_decoder.resblocks."
CROSS = "text_decoder.cross_attn."
HEAD_DIM = 64  # open_clip's image encoders have it unless told otherwise, and so have all published text towers


def _config(state: Mapping[str, Tensor], **fields: Any) -> OpenClipCocaConfig:
    """Sizes from shapes. Heads show in none: width / 64, the decoder's as the text's, 8 in the pooler, unless `fields` say otherwise."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise CheckpointError(f"this is no CoCa of open_clip with an attentional pooler: {name} is missing.")
        return tuple(state[name].shape)

    def depth(prefix: str) -> int:
        return len({name[len(prefix) :].partition(".")[0] for name in state if name.startswith(prefix)})

    vision_dim, _, patch_size, _ = shape("visual.conv1.weight")
    vocab_size, dim = shape("text.token_embedding.weight")
    patches = shape("visual.positional_embedding")[0] - 1
    read = {
        "image_size": patch_size * round(patches**0.5),
        "patch_size": patch_size,
        "vision_dim": vision_dim,
        "vision_depth": depth(VISION),
        "vision_heads": vision_dim // HEAD_DIM,
        "vision_hidden_dim": shape(VISION + "0.mlp.c_fc.weight")[0],
        "pooler_queries": shape("visual.attn_pool.query")[0],
        "dim": dim,
        "unimodal_depth": depth(TEXT),
        "num_heads": dim // HEAD_DIM,
        "hidden_dim": shape(TEXT + "0.mlp.c_fc.weight")[0],
        "multimodal_depth": depth(DECODER),
        "decoder_heads": fields.get("num_heads", dim // HEAD_DIM),
        "decoder_hidden_dim": shape(DECODER + "0.mlp.c_fc.weight")[0],
        "vocab_size": vocab_size,
        "context_length": shape("text.positional_embedding")[0] - 1,
        "legacy_class_mask": True,
    }
    return OpenClipCocaConfig(**{**read, **fields})


def _rules(config: OpenClipCocaConfig) -> list[Rule]:
    width, patch = config.vision_dim, config.patch_size
    grid = config.image_size // patch
    positions = Rule(
        "image_encoder.position_embedding",
        ("visual.positional_embedding",),
        lambda tensors: resize_positions(tensors[0], grid, antialias=True),
    )
    rules = [
        same("image_encoder.class_token", "visual.class_embedding"),
        positions,
        reshaped("image_encoder.patch_embedding.proj.weight", "visual.conv1.weight", (width, -1), (width, 3, patch, patch)),
        *_both("image_encoder.norm_pre", "visual.ln_pre"),
        same("image_encoder.pooler.query", "visual.attn_pool.query"),
        *_both("image_encoder.pooler.ln_q", "visual.attn_pool.ln_q"),
        *_both("image_encoder.pooler.ln_k", "visual.attn_pool.ln_k"),
        *(same(f"image_encoder.pooler.attn.{name}", f"visual.attn_pool.attn.{name}") for name in _pooler_weights(config)),
        *_both("image_encoder.pooler.attn.out_proj", "visual.attn_pool.attn.out_proj"),
        *_both("image_encoder.norm", "visual.ln_post"),
        transposed("image_projection.weight", "visual.proj"),
        same("text_encoder.word.weight", "text.token_embedding.weight"),
        same("text_encoder.class_token", "text.cls_emb"),
        same("text_encoder.position", "text.positional_embedding"),
        *_both("text_encoder.norm", "text.ln_final"),
        transposed("text_projection.weight", "text.text_projection"),
        *_both("text_decoder.norm", "text_decoder.ln_final"),
        transposed("text_decoder.words.weight", "text_decoder.text_projection"),
        reshaped("logit_scale", "logit_scale", (), ()),  # some have it as [1]
    ]
    for i in range(config.vision_depth):
        rules += _block(f"image_encoder.blocks.{i}", f"{VISION}{i}")
    for i in range(config.unimodal_depth):
        rules += _block(f"text_encoder.blocks.{i}", f"{TEXT}{i}")
    for i in range(config.multimodal_depth):
        rules += _block(f"text_decoder.blocks.{i}", f"{DECODER}{i}")
        rules += _cross_block(f"text_decoder.cross_blocks.{i}", f"{CROSS}{i}", config.dim)
    return rules


def _both(ours: str, theirs: str) -> list[Rule]:
    return [same(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias")]


def _pooler_weights(config: OpenClipCocaConfig) -> list[str]:
    """PyTorch keeps the three projections as one tensor where queries and keys are equally wide."""
    if config.dim == config.vision_dim:
        return ["in_proj_weight", "in_proj_bias"]
    return ["q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"]


def _block(ours: str, theirs: str) -> list[Rule]:
    return [
        *_around_attention(ours, theirs),
        same(f"{ours}.attention.qkv.weight", f"{theirs}.attn.in_proj_weight"),
        same(f"{ours}.attention.qkv.bias", f"{theirs}.attn.in_proj_bias"),
        *_both(f"{ours}.attention.proj", f"{theirs}.attn.out_proj"),
    ]


def _cross_block(ours: str, theirs: str, dim: int) -> list[Rule]:
    attention = f"{ours}.cross_attention"
    rules = [
        *_around_attention(ours, theirs),
        *_both(f"{ours}.context_norm", f"{theirs}.ln_1_kv"),
        *_both(f"{attention}.proj", f"{theirs}.attn.out_proj"),
    ]
    for kind in ("weight", "bias"):
        parts = {f"{attention}.query.{kind}": dim, f"{attention}.key_value.{kind}": 2 * dim}
        rules += split(f"{theirs}.attn.in_proj_{kind}", parts)
    return rules


def _around_attention(ours: str, theirs: str) -> list[Rule]:
    """The norms and the MLP, which both kinds of block have."""
    names = {"norm1": "ln_1", "norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    return [rule for mine, yours in names.items() for rule in _both(f"{ours}.{mine}", f"{theirs}.{yours}")]


FORMAT = Format(
    name="open-clip-coca",
    title="open_clip CoCa",
    model=OpenClipCoca,
    config=_config,
    rules=_rules,
)
