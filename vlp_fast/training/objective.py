"""What the pretraining steps of all models have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from vlp_fast.data.batches import Batch
from vlp_fast.ops import attention_only
from vlp_fast.ops._autocast import parameters_shared

__all__ = ["SCHEDULES", "PretrainingObjective"]
T = TypeVar("T")

# as few forwards as the data allow, of which the last layers compute what is read afterwards; or the forwards of the original code
SCHEDULES = ("packed", "published")


class PretrainingObjective(nn.Module):
    """A model with what its pretraining needs; `forward` makes every loss of one step in one call (so wrap this one in DDP).

    Args:
        schedule: how passes are grouped into forwards: "packed" or "published". Losses and gradients are the same.
        losses: names of those to make; None: all. What is left out costs no forward pass.

    Attributes:
        losses: names of those made, in the order of `loss_weights`.
        loss_weights: weight of each named loss in `total`.
    """

    loss_weights: ClassVar[Mapping[str, float]] = {}
    model: Any  # the model, with its `config`

    def __init__(self, schedule: str, losses: Sequence[str] | None = None) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; received {schedule!r}.")
        unknown = sorted(set(losses or ()) - set(self.loss_weights))
        if unknown or (losses is not None and not losses):
            raise ValueError(f"losses must name some of {', '.join(self.loss_weights)}; received {list(losses or ())}.")
        self.schedule = schedule
        self.losses = tuple(name for name in self.loss_weights if losses is None or name in losses)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's; the forwards of this step share their casts of parameters and the gradients of a table of words."""
        with parameters_shared():
            return super().__call__(*args, **kwargs)

    @property
    def packed(self) -> bool:
        """Whether passes that need not wait for each other share a forward."""
        return self.schedule == "packed"

    def grouped(self, passes: Sequence[T]) -> list[list[T]]:
        """The passes of each forward: all in one, or one in each."""
        return [list(passes)] if self.packed else [[p] for p in passes]

    @property
    def backend(self) -> str | None:
        """Backend of the losses: the model's, where that has more than attention."""
        backend = self.model.config.backend
        return None if attention_only(backend) else backend

    def check_negatives(self, negatives: tuple[Tensor, Tensor] | None) -> None:
        """Raises: ValueError for "itm" without "itc", whose similarities say which negatives are hard, and without `negatives`."""
        if "itm" in self.losses and "itc" not in self.losses and negatives is None:
            raise ValueError("negatives must be given for itm without itc, which draws them; received None.")

    def prepare(self, batch: Batch, generator: torch.Generator | None = None) -> Any:
        """What `forward` takes, made on the host from a batch of pairs (masking draws from `generator`)."""
        return batch

    def towers(self) -> dict[str, nn.Module]:
        """The modules whose calls a profile counts."""
        raise NotImplementedError

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum that a step minimises."""
        return torch.stack([self.loss_weights[name] * loss for name, loss in losses.items()]).sum()
