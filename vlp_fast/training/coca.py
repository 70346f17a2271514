"""CoCa's pretraining step: contrast and captioning from one forward of each tower (equations 4 to 6 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from vlp_fast import losses
from vlp_fast.data.batches import Batch
from vlp_fast.models.coca import Coca, CocaConfig
from vlp_fast.models.coca_experts import CocaExperts
from vlp_fast.models.coca_open_clip import OpenClipCoca, OpenClipCocaConfig
from vlp_fast.ops import linear_cross_entropy
from vlp_fast.passes import loss_scope
from vlp_fast.training.objective import PretrainingObjective

__all__ = ["CocaPretraining"]


class CocaPretraining(PretrainingObjective):
    """Contrastive loss (weight 1) on pooled features and captioning loss (weight 2) on the multimodal decoder.

    In a process group every process contrasts its own pairs with those of all.

    Args:
        config: of the model, the paper's or open_clip's. schedule: "packed" or "published", which are the same here: each tower runs
            once, and what it gives serves both losses. losses: "contrastive", "caption" or None, both; without the second the decoder
            does not run, and its parameters get no gradient.
    """

    loss_weights: ClassVar[dict[str, float]] = {"contrastive": 1.0, "caption": 2.0}

    def __init__(
        self, config: CocaConfig | OpenClipCocaConfig, schedule: str = "packed", losses: Sequence[str] | None = None
    ) -> None:
        super().__init__(schedule, losses)
        if isinstance(config, OpenClipCocaConfig):
            self.model, self.ignored_word = OpenClipCoca(config), config.pad_id  # which is a word of its vocabulary too
        else:
            self.model, self.ignored_word = CocaExperts(config) if config.experts else Coca(config), -100

    def towers(self) -> dict[str, nn.Module]:
        model = self.model
        if isinstance(model, CocaExperts):
            return {"encoder": model.encoder, "text_decoder": model.text_decoder}
        return {"image_encoder": model.image_encoder, "text_encoder": model.text_encoder, "text_decoder": model.text_decoder}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The two losses of one step.

        Args:
            batch: images and packed captions (start, words, end). An image with several captions is encoded once and counts in the
                contrast as often as it has captions.

        Returns: scalars "contrastive", "caption", or the one that `losses` names.
        """
        model, captions = self.model, batch.segments()
        made: dict[str, Tensor] = {}
        with loss_scope("contrastive"):
            image, text = model.encode(batch.images, batch.token_ids, captions)
            if "contrastive" in self.losses:
                scale, features = model.logit_scale.exp(), batch.of_captions(image.features)
                made["contrastive"] = losses.contrastive_loss(features, text.features, scale, backend=self.backend)
        if "caption" in self.losses:
            with loss_scope("caption"):
                hidden, rows = model.word_hidden(text, image, batch.image_of())
                words = model.text_decoder.words.weight
                made["caption"] = linear_cross_entropy(
                    hidden, words, batch.token_ids[rows + 1], ignore_index=self.ignored_word, backend=self.backend
                )
        return made
