"""What the pretraining steps of all models have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlp_fast.data.batches import Batch
from vlp_fast.ops import attention_only

__all__ = ["SCHEDULES", "PretrainingObjective"]

SCHEDULES = ("published",)  # the forwards of the original code, one group of passes each


class PretrainingObjective(nn.Module):
    """A model with what its pretraining needs; `forward` makes every loss of one step in one call (so wrap this one in DDP).

    Args:
        schedule: how passes are grouped into forwards: "published".

    Attributes:
        loss_weights: weight of each named loss in `total`.
    """

    loss_weights: ClassVar[Mapping[str, float]] = {}
    model: Any  # the model, with its `config`

    def __init__(self, schedule: str) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; received {schedule!r}.")
        self.schedule = schedule

    @property
    def backend(self) -> str | None:
        """Backend of the losses: the model's, where that has more than attention."""
        backend = self.model.config.backend
        return None if attention_only(backend) else backend

    def prepare(self, batch: Batch, generator: torch.Generator | None = None) -> Any:
        """What `forward` takes, made on the host from a batch of pairs (masking draws from `generator`)."""
        return batch

    def towers(self) -> dict[str, nn.Module]:
        """The modules whose calls a profile counts."""
        raise NotImplementedError

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum that a step minimises."""
        return torch.stack([self.loss_weights[name] * loss for name, loss in losses.items()]).sum()
