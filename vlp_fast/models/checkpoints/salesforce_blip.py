"""BLIP's published code (.pth files of salesforce/BLIP): pretraining, captioning, retrieval, question answering, NLVR2: a format each.

A pretraining file holds the parameters that its encoder and decoder share twice; they must be equal and are kept once. Its momentum
copies and queues belong to pretraining: these formats leave them out, `vlp_fast.training.salesforce_blip` loads and saves them too.
Retrieval files hold such copies, a queue and a temperature as well, which serve its training only and are left out.

Heads are 64 wide in all published files, and layer norms have the default eps of our config: nothing need be given to load them.
Positions are interpolated where ``image_size=`` names another size than the file has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from vlp_fast.models.blip import Blip, BlipCaptioner, BlipConfig, BlipRetriever
from vlp_fast.models.blip_tasks import FIRST_MERGED_LAYER, BlipNlvr2, BlipVqa
from vlp_fast.models.checkpoints._format import Format
from vlp_fast.models.checkpoints._med import (
    KINDS,
    ImageNames,
    head_rules,
    image_rules,
    linear,
    read_config,
    text_rules,
    word_rules,
)
from vlp_fast.models.checkpoints._rules import Rule, joined, same, unused

__all__ = [
    "CAPTIONING",
    "FORMATS",
    "NLVR2",
    "PRETRAINING",
    "QUESTION_ANSWERING",
    "RETRIEVAL",
    "blip_rules",
    "format_of",
    "momentum_rules",
]

IMAGES = ImageNames(
    class_token="visual_encoder.cls_token",
    positions="visual_encoder.pos_embed",
    patches="visual_encoder.patch_embed.proj",
    blocks="visual_encoder.blocks",
    norm="visual_encoder.norm",
    block={
        "norm1": "norm1",
        "attention.qkv": "attn.qkv",
        "attention.proj": "attn.proj",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
)
MOMENTUM_IMAGES = IMAGES.under("visual_encoder", "visual_encoder_m")
HEADS = {"image_projection": "vision_proj", "text_projection": "text_proj", "itm_head": "itm_head"}
ENCODER, DECODER = "text_encoder", "text_decoder.bert"
QUEUES = ("image_queue", "text_queue", "queue_ptr", "idx_queue", "ptr_queue")


def blip_rules(ours: str, config: BlipConfig) -> Iterator[Rule]:
    """All of a `Blip` whose names begin with `ours`."""
    yield from image_rules(f"{ours}image_encoder", IMAGES, config)
    yield from text_rules(f"{ours}text_tower", [ENCODER, DECODER], config.depth, head="text_decoder")
    yield from head_rules(ours, HEADS)
    yield same(f"{ours}temperature", "temp")
    yield from word_rules(ours, "text_decoder")


def momentum_rules(ours: str, config: BlipConfig) -> Iterator[Rule]:
    """The slow copies; their cross-attention, which nothing reads, is left out."""
    yield from image_rules(f"{ours}image_encoder", MOMENTUM_IMAGES, config)
    yield from text_rules(f"{ours}text_tower", ["text_encoder_m"], config.depth, cross=False)
    yield from linear(f"{ours}image_projection", "vision_proj_m")
    yield from linear(f"{ours}text_projection", "text_proj_m")


def _left_out(config: BlipConfig) -> list[Rule]:
    """Momentum copies and queues, where only the model is wanted."""
    return [*(unused(*rule.theirs) for rule in momentum_rules("", config)), unused(*QUEUES)]


def _config_of(text: str) -> Callable[..., BlipConfig]:
    def config(state: Mapping[str, Tensor], **fields: Any) -> BlipConfig:
        return read_config(state, IMAGES, text, **fields)

    return config


def _pretraining_rules(config: BlipConfig) -> list[Rule]:
    return [*blip_rules("", config), *_left_out(config)]


def _captioning_rules(config: BlipConfig) -> list[Rule]:
    text = text_rules("text_tower", [DECODER], config.depth, head="text_decoder")
    return [*image_rules("image_encoder", IMAGES, config), *text, *word_rules("", "text_decoder")]


def _retrieval_rules(config: BlipConfig) -> list[Rule]:
    text = text_rules("text_tower", [ENCODER], config.depth)
    return [
        *image_rules("image_encoder", IMAGES, config),
        *text,
        *head_rules("", HEADS),
        unused("temp"),
        *_left_out(config),
    ]


def _vqa_rules(config: BlipConfig) -> list[Rule]:
    return [*_captioning_rules(config), *text_rules("question_tower", [ENCODER], config.depth)]


def _nlvr2_rules(config: BlipConfig) -> list[Rule]:
    rules = [*image_rules("image_encoder", IMAGES, config), unused(f"{ENCODER}.embeddings.position_ids")]
    rules += [
        same(f"text_encoder.embedding.{mine}.weight", f"{ENCODER}.embeddings.{their}.weight")
        for mine, their in (("word", "word_embeddings"), ("position", "position_embeddings"))
    ]
    rules += linear("text_encoder.embedding.norm", f"{ENCODER}.embeddings.LayerNorm")
    for i in range(config.depth):
        rules += _nlvr2_block(f"text_encoder.blocks.{i}", f"{ENCODER}.encoder.layer.{i}", merge=i >= FIRST_MERGED_LAYER)
    return [*rules, *linear("head.fc1", "cls_head.0"), *linear("head.fc2", "cls_head.2")]


def _nlvr2_block(ours: str, theirs: str, *, merge: bool) -> Iterator[Rule]:
    names = {
        "attention.proj": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "cross_norm": "crossattention.output.LayerNorm",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }
    if merge:
        names["merge"] = "crossattention.output.merge_layer"
    for kind in KINDS:
        yield joined(f"{ours}.attention.qkv.{kind}", [f"{theirs}.attention.self.{x}.{kind}" for x in ("query", "key", "value")])
        for i in range(2):
            yield joined(
                f"{ours}.cross_attention.{i}.key_value.{kind}",
                [f"{theirs}.crossattention.self{i}.{x}.{kind}" for x in ("key", "value")],
            )
    for i in range(2):
        names[f"cross_attention.{i}.query"] = f"crossattention.self{i}.query"
        names[f"cross_attention.{i}.proj"] = f"crossattention.output.dense{i}"
    for mine, their in names.items():
        yield from linear(f"{ours}.{mine}", f"{theirs}.{their}")


PRETRAINING = Format(
    name="salesforce-blip",
    title="salesforce BLIP pretraining",
    model=Blip,
    config=_config_of(ENCODER),
    rules=_pretraining_rules,
)
CAPTIONING = Format(
    name="salesforce-blip-captioning",
    title="salesforce BLIP captioning",
    model=BlipCaptioner,
    config=_config_of(DECODER),
    rules=_captioning_rules,
)
RETRIEVAL = Format(
    name="salesforce-blip-retrieval",
    title="salesforce BLIP retrieval",
    model=BlipRetriever,
    config=_config_of(ENCODER),
    rules=_retrieval_rules,
)
QUESTION_ANSWERING = Format(
    name="salesforce-blip-vqa",
    title="salesforce BLIP question answering",
    model=BlipVqa,
    config=_config_of(DECODER),
    rules=_vqa_rules,
)
NLVR2 = Format(
    name="salesforce-blip-nlvr2",
    title="salesforce BLIP NLVR2",
    model=BlipNlvr2,
    config=_config_of(ENCODER),
    rules=_nlvr2_rules,
)
FORMATS = (PRETRAINING, CAPTIONING, RETRIEVAL, QUESTION_ANSWERING, NLVR2)


def format_of(state: Mapping[str, Tensor]) -> Format:
    """The format of a checkpoint, by the towers and heads that it holds."""
    encoder, decoder = (any(name.startswith(f"{tower}.") for name in state) for tower in (ENCODER, DECODER))
    if not decoder:
        return NLVR2 if "cls_head.0.weight" in state else RETRIEVAL
    if not encoder:
        return CAPTIONING
    return PRETRAINING if "itm_head.weight" in state else QUESTION_ANSWERING
