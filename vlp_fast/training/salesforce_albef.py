"""ALBEF's whole pretraining state under the names of its published code: the model, its momentum copies and its queues, both ways.

`vlp_fast.models.checkpoints.albef` has the format of the model alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vlp_fast.models.albef import AlbefConfig
from vlp_fast.models.checkpoints import Format
from vlp_fast.models.checkpoints._rules import Rule, reshaped, transposed
from vlp_fast.models.checkpoints.albef import FORMAT as MODEL
from vlp_fast.models.checkpoints.albef import encoder_rules, model_rules
from vlp_fast.training.albef import AlbefPretraining

__all__ = ["FORMAT"]


def _config(state: Mapping[str, Tensor], **fields: Any) -> AlbefConfig:
    return MODEL.config(state, **fields)


def _rules(config: AlbefConfig) -> list[Rule]:
    return [
        *(_under("model", rule) for rule in model_rules(config)),
        *(_under("momentum", rule) for rule in encoder_rules(config, "_m")),
        *(transposed(f"momentum.{name}", name) for name in ("image_queue", "text_queue")),  # theirs hold a feature per column
        reshaped("momentum.queue_position", "queue_ptr", (), (1,)),
    ]


def _under(part: str, rule: Rule) -> Rule:
    return rule if rule.ours is None else replace(rule, ours=f"{part}.{rule.ours}")


FORMAT = Format(
    name="albef-pretraining",
    title="salesforce ALBEF pretraining",
    model=AlbefPretraining,
    config=_config,
    rules=_rules,
)
