"""BLIP's whole pretraining state under the names of its published code: the model, its momentum copies and its queues, both ways.

`vlp_fast.models.checkpoints.salesforce_blip` has the formats of models alone. Of the momentum copies, the cross-attention is left out: it
follows the model's and nothing reads it. It is not written either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlp_fast.models.blip import BlipConfig
from vlp_fast.models.checkpoints import Format
from vlp_fast.models.checkpoints._rules import Rule, transposed
from vlp_fast.models.checkpoints.salesforce_blip import PRETRAINING, blip_rules, momentum_rules
from vlp_fast.training.blip import BlipPretraining

__all__ = ["FORMAT"]


def _config(state: Mapping[str, Tensor], **fields: Any) -> BlipConfig:
    return PRETRAINING.config(state, **fields)


def _rules(config: BlipConfig) -> list[Rule]:
    queues = [
        transposed(f"momentum.{name}", name) for name in ("image_queue", "text_queue")
    ]  # theirs hold a feature per column
    position = Rule("momentum.queue_position", ("queue_ptr",), lambda t: t[0].reshape(()), lambda t: [t.reshape(1)])
    return [*blip_rules("model.", config), *momentum_rules("momentum.", config), *queues, position]


FORMAT = Format(
    name="salesforce-blip-pretraining",
    title="salesforce BLIP pretraining",
    model=BlipPretraining,
    config=_config,
    rules=_rules,
)
