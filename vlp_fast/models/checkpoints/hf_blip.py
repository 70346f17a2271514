"""transformers' BLIP: `BlipForConditionalGeneration`, `BlipForImageTextRetrieval` and `BlipForQuestionAnswering`, a format each.

What no tensor shows stands in the checkpoint's config.json; `fields` reads it: ``CAPTIONING.load(state, **fields(config))``. Two of its
defaults are traps: layer norms of the image encoder have eps 1e-5 there, 1e-6 in the code that trained the weights, and the text tower
has 8 heads where the file does not say 12. To get the numbers of transformers, give what its configuration says.

transformers asks whether a caption matches with [CLS] in front, training did with [ENC]: for its numbers take
``TextPass("itm", ids, segments, images=...)`` instead of `matching_pass`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlp_fast.models.blip import BlipCaptioner, BlipConfig, BlipRetriever
from vlp_fast.models.blip_tasks import BlipVqa
from vlp_fast.models.checkpoints._format import Format
from vlp_fast.models.checkpoints._med import ImageNames, head_rules, image_rules, read_config, text_rules, word_rules
from vlp_fast.models.checkpoints._rules import CheckpointError, Rule

__all__ = ["CAPTIONING", "FORMATS", "QUESTION_ANSWERING", "RETRIEVAL", "fields", "format_of"]

IMAGES = ImageNames(
    class_token="vision_model.embeddings.class_embedding",
    positions="vision_model.embeddings.position_embedding",
    patches="vision_model.embeddings.patch_embedding",
    blocks="vision_model.encoder.layers",
    norm="vision_model.post_layernorm",
    block={
        "norm1": "layer_norm1",
        "attention.qkv": "self_attn.qkv",
        "attention.proj": "self_attn.projection",
        "norm2": "layer_norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
)
HEADS = {"image_projection": "vision_proj", "text_projection": "text_proj", "itm_head": "itm_head"}
ENCODER, DECODER = "text_encoder", "text_decoder.bert"


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of our config from a config.json of transformers' BLIP; what it leaves out has the default it has there.

    Raises:
        CheckpointError: a setting that our models do not have.
    """
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    dropout = text.get("hidden_dropout_prob", 0.0)
    for where, part, name, wanted in (
        ("vision_config", vision, "hidden_act", "gelu"),
        ("text_config", text, "hidden_act", "gelu"),
        ("vision_config", vision, "attention_dropout", 0.0),
        ("text_config", text, "attention_probs_dropout_prob", dropout),
    ):
        default = "gelu" if name == "hidden_act" else 0.0
        if part.get(name, default) != wanted:
            raise CheckpointError(f"{name} of {where} must be {wanted!r} for our BLIP; received {part.get(name, default)!r}.")
    return {
        "image_size": vision.get("image_size", 384),
        "vision_heads": vision.get("num_attention_heads", 12),
        "vision_eps": vision.get("layer_norm_eps", 1e-5),
        "num_heads": text.get("num_attention_heads", 8),
        "text_eps": text.get("layer_norm_eps", 1e-12),
        "dropout_p": dropout,
        "pad_id": text.get("pad_token_id", 0),
        "dec_id": text.get("bos_token_id", 30522),
    }


def _config(state: Mapping[str, Tensor], text: str, given: Mapping[str, Any]) -> BlipConfig:
    for name in ("vision_heads", "num_heads"):
        if name not in given:
            raise CheckpointError(
                f"{name} must be given: no shape shows it; hf_blip.fields reads it from the checkpoint's config.json."
            )
    return read_config(state, IMAGES, text, **{"vision_eps": 1e-5, **given})


def _captioning_config(state: Mapping[str, Tensor], **given: Any) -> BlipConfig:
    return _config(state, DECODER, given)


def _captioning_rules(config: BlipConfig) -> list[Rule]:
    text = text_rules("text_tower", [DECODER], config.depth, head="text_decoder")
    return [*image_rules("image_encoder", IMAGES, config), *text, *word_rules("", "text_decoder")]


def _retrieval_config(state: Mapping[str, Tensor], **given: Any) -> BlipConfig:
    return _config(state, ENCODER, given)


def _retrieval_rules(config: BlipConfig) -> list[Rule]:
    text = text_rules("text_tower", [ENCODER], config.depth)
    return [*image_rules("image_encoder", IMAGES, config), *text, *head_rules("", HEADS)]


def _vqa_rules(config: BlipConfig) -> list[Rule]:
    return [*_captioning_rules(config), *text_rules("question_tower", [ENCODER], config.depth)]


CAPTIONING = Format(
    name="hf-blip-captioning",
    title="transformers BlipForConditionalGeneration",
    model=BlipCaptioner,
    config=_captioning_config,
    rules=_captioning_rules,
)
RETRIEVAL = Format(
    name="hf-blip-retrieval",
    title="transformers BlipForImageTextRetrieval",
    model=BlipRetriever,
    config=_retrieval_config,
    rules=_retrieval_rules,
)
QUESTION_ANSWERING = Format(
    name="hf-blip-vqa",
    title="transformers BlipForQuestionAnswering",
    model=BlipVqa,
    config=_captioning_config,
    rules=_vqa_rules,
)
FORMATS = (CAPTIONING, RETRIEVAL, QUESTION_ANSWERING)


def format_of(state: Mapping[str, Tensor]) -> Format:
    """The format of a checkpoint, by the towers that it holds."""
    encoder, decoder = (any(name.startswith(f"{tower}.") for name in state) for tower in (ENCODER, DECODER))
    if not decoder:
        return RETRIEVAL
    return QUESTION_ANSWERING if encoder else CAPTIONING
