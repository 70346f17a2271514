"""Checkpoints of lucidrains' CoCa-pytorch (0.1.0): ``CoCa.state_dict()``, in which the image encoder is whatever its user built.

No layer there has a bias; every norm writes one all the same, a buffer of zeros, and every layer its rotary frequencies. They are
compared when loading and written again when saving.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlp_fast.models.checkpoints._format import Format
from vlp_fast.models.checkpoints._rules import Rule, from_ours, reshaped, same, to_ours
from vlp_fast.models.coca_palm import CocaPalm, CocaPalmConfig

__all__ = ["FORMAT"]

_OURS, _THEIRS = "image_encoder.encoder.", "img_encoder."


def _read_config(state: Mapping[str, Tensor], **fields: Any) -> CocaPalmConfig:
    """Everything of text, decoder and pooler from shapes. An image encoder of ours is known by its names; its `vision_heads` and
    where CLS stands (`class_position`) no shape shows.
    """
    read: dict[str, Any] = {"image_encoder": "given"}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if "token_emb.weight" in shapes:
        read["vocab_size"], read["dim"] = shapes["token_emb.weight"]
    if "img_queries" in shapes:
        read["caption_queries"] = shapes["img_queries"][0] - 1
    if "img_attn_pool.to_kv.weight" in shapes and "img_attn_pool.to_q.weight" in shapes:
        rows, read["vision_dim"] = shapes["img_attn_pool.to_kv.weight"]
        read["head_dim"] = rows // 2
        read["num_heads"] = shapes["img_attn_pool.to_q.weight"][0] // read["head_dim"]
    if "unimodal_layers.0.fn.ff_out.1.weight" in shapes:
        read["hidden_dim"] = shapes["unimodal_layers.0.fn.ff_out.1.weight"][1]
    if "img_to_latents.to_latents.weight" in shapes:
        read["embed_dim"] = shapes["img_to_latents.to_latents.weight"][0]
    for name in ("unimodal", "multimodal"):
        layers = {key.split(".")[1] for key in shapes if key.startswith(f"{name}_layers.")}
        if layers:
            read[f"{name}_depth"] = len(layers)
    if _THEIRS + "patch_embedding.proj.weight" in shapes and _THEIRS + "position_embedding" in shapes:
        pixels = shapes[_THEIRS + "patch_embedding.proj.weight"][1] // 3
        patch_size, grid = round(pixels**0.5), round(shapes[_THEIRS + "position_embedding"][0] ** 0.5)
        blocks = {key.split(".")[2] for key in shapes if key.startswith(_THEIRS + "blocks.")}
        read |= {"image_encoder": "vit", "patch_size": patch_size, "image_size": grid * patch_size, "vision_depth": len(blocks)}
    return CocaPalmConfig(**{**read, **fields})


def _norm(ours: str, theirs: str) -> Rule:
    """A norm without bias that writes zeros as one."""

    def load(tensors: Sequence[Tensor]) -> Tensor:
        if tensors[1].any():
            raise ValueError("beta, which is no weight there, must be zero")
        return tensors[0]

    return Rule(ours, (f"{theirs}.gamma", f"{theirs}.beta"), load, lambda t: [t, torch.zeros_like(t)])


def _fused_with_rotary(ours: str, theirs: str, head_dim: int) -> Rule:
    """The first projection of a block and, beside it, the frequencies of its rotary positions, which we form anew."""

    def frequencies(like: Tensor) -> Tensor:
        exponents = torch.arange(0, head_dim, 2, device=like.device).float() / head_dim
        return (1.0 / 10000.0**exponents).to(like.dtype)

    def load(tensors: Sequence[Tensor]) -> Tensor:
        weight, found = tensors
        expected = frequencies(found)
        if found.shape != expected.shape or not torch.allclose(
            found, expected, rtol=4 * torch.finfo(found.dtype).eps, atol=0.0
        ):
            raise ValueError(f"inv_freq must be those of heads of {head_dim} with base 10000")
        return weight

    names = (f"{theirs}.fused_attn_ff_proj.weight", f"{theirs}.rotary_emb.inv_freq")
    return Rule(ours, names, load, lambda t: [t, frequencies(t)])


def _joined_unequal(ours: str, theirs: Sequence[str], first: int) -> Rule:
    """Ours is theirs, one after the other along dim 0, the first of them with `first` rows."""
    return Rule(ours, tuple(theirs), lambda t: torch.cat(list(t)), lambda t: [t[:first], t[first:]])


def _block(ours: str, theirs: str, config: CocaPalmConfig) -> list[Rule]:
    return [
        _norm(f"{ours}.norm.weight", f"{theirs}.norm"),
        _fused_with_rotary(f"{ours}.fused.weight", theirs, config.head_dim),
        same(f"{ours}.proj.weight", f"{theirs}.attn_out.weight"),
        same(f"{ours}.fc2.weight", f"{theirs}.ff_out.1.weight"),
    ]


def _cross_block(ours: str, theirs: str, config: CocaPalmConfig) -> list[Rule]:
    heads = config.num_heads * config.head_dim
    return [
        _norm(f"{ours}.norm.weight", f"{theirs}.norm"),
        _joined_unequal(f"{ours}.fused.weight", [f"{theirs}.to_q.weight", f"{theirs}.ff.0.weight"], heads),
        same(f"{ours}.key_value.weight", f"{theirs}.to_kv.weight"),
        same(f"{ours}.proj.weight", f"{theirs}.to_out.weight"),
        same(f"{ours}.fc2.weight", f"{theirs}.ff.2.weight"),
    ]


def _rules(config: CocaPalmConfig) -> list[Rule]:
    rules = [
        same("text_decoder.words.weight", "token_emb.weight", tied=["to_logits.1.weight"]),
        same("text_encoder.class_token", "text_cls_token"),
        same("image_encoder.pooler.queries", "img_queries"),
        _norm("image_encoder.pooler.norm.weight", "img_attn_pool.norm"),
        _norm("image_encoder.pooler.context_norm.weight", "img_attn_pool.context_norm"),
        same("image_encoder.pooler.query.weight", "img_attn_pool.to_q.weight"),
        same("image_encoder.pooler.key_value.weight", "img_attn_pool.to_kv.weight"),
        same("image_encoder.pooler.proj.weight", "img_attn_pool.to_out.weight"),
        _norm("image_encoder.norm.weight", "img_attn_pool_norm"),
        _norm("text_encoder.norm.weight", "text_cls_norm"),
        same("image_projection.weight", "img_to_latents.to_latents.weight"),
        same("text_projection.weight", "text_to_latents.to_latents.weight"),
        reshaped("logit_scale", "temperature", (), (1,)),
        _norm("text_decoder.norm.weight", "to_logits.0"),
    ]
    for i in range(config.unimodal_depth):
        rules += _block(f"text_encoder.blocks.{i}", f"unimodal_layers.{i}.fn", config)
    for i in range(config.multimodal_depth):
        rules += _block(f"text_decoder.blocks.{i}", f"multimodal_layers.{i}.0.fn", config)
        rules += _cross_block(f"text_decoder.cross_blocks.{i}", f"multimodal_layers.{i}.1.fn", config)
    return rules


def _encoder_rules(model: CocaPalm) -> list[Rule]:
    """The image encoder is one module for both: its names differ in the prefix only."""
    return [same(_OURS + name, _THEIRS + name) for name in model.image_encoder.encoder.state_dict()]


@dataclass(frozen=True)
class _LucidrainsCoca(Format):
    """The format whose model may hold a module of its user's."""

    def load(self, state: Mapping[str, Tensor], *, image_encoder: nn.Module | None = None, **fields: Any) -> nn.Module:
        """Our model with the weights of a checkpoint.

        Args:
            image_encoder: a module like the one that the checkpoint was saved with, whose weights are loaded too; default: a
                `VisionTransformer` of ours where the checkpoint holds one, else none (image tokens take the place of images).
            fields: of the config that no shape shows, such as ``class_position``.

        Raises:
            CheckpointError: names or shapes that do not fit, all listed; nothing is loaded then.
        """
        if image_encoder is not None:
            fields = {**fields, "image_encoder": "given"}
        config = self.config(state, **fields)
        model = CocaPalm(config, image_encoder)
        rules = [*self.rules(config), *_encoder_rules(model)]
        found = to_ours(state, rules, what=f"the {self.title} checkpoint", shapes=model.state_dict())
        model.load_state_dict(found, strict=True)
        return model

    def save(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights of our model, image encoder included, under the names of this format."""
        assert isinstance(model, CocaPalm)
        return from_ours(model.state_dict(), [*self.rules(model.config), *_encoder_rules(model)], what="this CocaPalm")


FORMAT = _LucidrainsCoca(
    name="lucidrains-coca",
    title="lucidrains CoCa-pytorch",
    model=CocaPalm,
    config=_read_config,
    rules=_rules,
)
