"""The pretraining step of CoCa on PaLM's blocks: CoCa's step around another model, both losses at weight 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from vlp_fast.models.coca_palm import CocaPalm, CocaPalmConfig
from vlp_fast.training.coca import CocaPretraining
from vlp_fast.training.objective import PretrainingObjective

__all__ = ["CocaPalmPretraining"]


class CocaPalmPretraining(CocaPretraining):
    """Contrastive and captioning loss, each at weight 1, as CoCa-pytorch has them for one process.

    Their numbers are CoCa-pytorch's for captions padded to ``config.class_position + 1`` columns of which each leaves the last empty.
    In a process group every process contrasts its own pairs with those of all, where CoCa-pytorch 0.1.0 gathers the features but keeps
    the targets of one process.

    Args:
        config: of the model. image_encoder: as in `CocaPalm`. schedule: "published". losses: as in `CocaPretraining`.
    """

    loss_weights: ClassVar[dict[str, float]] = {"contrastive": 1.0, "caption": 1.0}

    def __init__(
        self,
        config: CocaPalmConfig,
        image_encoder: nn.Module | None = None,
        schedule: str = "published",
        losses: Sequence[str] | None = None,
    ) -> None:
        # not that of CocaPretraining, which builds a model of its own
        PretrainingObjective.__init__(self, schedule, losses)
        self.model, self.ignored_word = CocaPalm(config, image_encoder), -100
