"""ALBEF's pretraining step: image-text contrast, image-text matching and masked words (section 3.2 of the paper).

The passes are those of the published code: one image forward and its momentum twin; captions read alone, as they are and with words
masked, each with its momentum twin; captions fused with their own image, with hard negatives of both kinds, and masked. The fusion of
whole captions starts from the rows that the contrast has made. Captions are packed: no padding exists anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlp_fast import losses
from vlp_fast.data.batches import Batch
from vlp_fast.data.masking import mask_tokens
from vlp_fast.distributed import gather_features
from vlp_fast.models.albef import Albef, AlbefConfig, AlbefEncoders
from vlp_fast.passes import loss_scope
from vlp_fast.segments import Segments
from vlp_fast.training._momentum import Momentum
from vlp_fast.training.objective import PretrainingObjective

__all__ = ["AlbefInputs", "AlbefMomentum", "AlbefPretraining"]

TEMPERATURE_RANGE = (0.001, 0.5)
MASK_RATIO = 0.15  # section 3.2


@dataclass(frozen=True, eq=False)
class AlbefInputs:
    """One step's pairs, and their captions with some words hidden: as `AlbefPretraining.prepare` masks them, or in any other way.

    Attributes:
        pairs: images and captions as they are. masked_ids: int64 ``[rows]``, the tokens of the captions with some exchanged.
        masked_rows: int64, the rows whose word is to be predicted.
    """

    pairs: Batch
    masked_ids: Tensor
    masked_rows: Tensor

    def to(self, device: torch.device | str) -> AlbefInputs:
        """The inputs on `device`."""
        return AlbefInputs(self.pairs.to(device), self.masked_ids.to(device), self.masked_rows.to(device))


class AlbefMomentum(AlbefEncoders, Momentum):
    """Slow copies of ALBEF's encoders, projections and word head, and the queues of their features."""

    def __init__(self, model: Albef) -> None:
        super().__init__(model.config)
        self._start(model)


class AlbefPretraining(PretrainingObjective):
    """ITC with momentum encoders, queue and soft targets; ITM with hard negatives; MLM with the momentum model's words as soft targets.

    In a process group every process contrasts its own pairs with its own keys and the queue, which takes the keys of all.

    Args:
        config: of the model. schedule: "published".

    Example: ``losses = step(step.prepare(batch)); step.total(losses).backward()``
    """

    loss_weights: ClassVar[dict[str, float]] = {"itc": 1.0, "itm": 1.0, "mlm": 1.0}

    def __init__(self, config: AlbefConfig, schedule: str = "published") -> None:
        super().__init__(schedule)
        self.model = Albef(config)
        self.momentum = AlbefMomentum(self.model)

    @property
    def config(self) -> AlbefConfig:
        """The model's."""
        return self.model.config

    def towers(self) -> dict[str, nn.Module]:
        names = ("image_encoder", "text_encoder", "fusion_encoder")
        return {
            **{name: getattr(self.model, name) for name in names},
            **{f"momentum_{name}": getattr(self.momentum, name) for name in names},
        }

    def prepare(self, batch: Batch, generator: torch.Generator | None = None) -> AlbefInputs:
        """Hides 15 % of the tokens of each caption, at least one, by BERT's rule: 80 % become [MASK], 10 % another word, 10 % stay.

        [CLS] stays, [SEP] may be hidden. The published code tosses a coin for each token instead, so that the number varies and can be 0.
        """
        config = self.config
        masked = mask_tokens(
            batch.token_ids,
            batch.text_lengths,
            MASK_RATIO,
            config.mask_id,
            (config.pad_id, config.cls_id),
            generator,
            vocab_size=config.vocab_size,
        )
        return AlbefInputs(batch, masked.input_ids, masked.masked_rows)

    def forward(
        self, inputs: AlbefInputs, *, alpha: float = 0.4, negatives: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The three losses of one step; updates the momentum encoders and the queue.

        Args:
            inputs: of `prepare`: images and packed captions ([CLS] words [SEP]), caption i describes image i, at least 2 pairs.
            alpha: share of the momentum model's soft targets (ALBEF: 0.4, reached linearly over the first epoch).
            negatives: (image for caption i, caption for image i), int64 ``[batch]`` each; default: drawn by similarity. The second is
                read on the host, the one place where a step waits for the device: captions differ in length.

        Returns: scalars "itc", "itm", "mlm".
        """
        model, momentum, pairs = self.model, self.momentum, inputs.pairs
        captions, size = pairs.segments(), len(pairs.images)
        with torch.no_grad():
            model.temperature.clamp_(*TEMPERATURE_RANGE)
        with loss_scope("itc"):
            image = model.encode_image(pairs.images)
            text = model.text_encoder(pairs.token_ids, captions)
            text_features = model.text_features(text, captions)
            with torch.no_grad():
                momentum.update(model)
                slow_image = momentum.encode_image(pairs.images)
                slow_text_features = momentum.encode_text(pairs.token_ids, captions)
                image_keys, text_keys = momentum.keys(slow_image.features, slow_text_features)
            scale, own = 1.0 / model.temperature, slice(0, size)
            i2t = losses.distilled_contrastive_loss(
                image.features, image_keys[own], text_keys, scale, alpha, backend=self.backend
            )
            t2i = losses.distilled_contrastive_loss(
                text_features, text_keys[own], image_keys, scale, alpha, backend=self.backend
            )
            itc = (i2t + t2i) / 2
            momentum.enqueue(gather_features(image_keys[own]), gather_features(text_keys[own]))

        with loss_scope("itm"):
            if negatives is None:
                negatives = (
                    losses.hard_negatives(text_features, image_keys[own], scale, floor=0.0, backend=self.backend),
                    losses.hard_negatives(image.features, text_keys[own], scale, floor=0.0, backend=self.backend),
                )
            image_index, text_index = negatives
            rows, other_captions = captions.take(text_index.tolist())  # lengths change here: the step's one host sync
            paired = torch.arange(size, device=image_index.device)
            positive = model.fuse(text, captions, image, range(size))
            both = Segments([*captions.lengths, *other_captions.lengths], text.device)
            negative = model.fuse(torch.cat([text, text[rows]]), both, image, torch.cat([image_index, paired]))
            logits = [model.matching_logits(positive, captions), model.matching_logits(negative, both)]
            itm = losses.matching_loss(torch.cat(logits), num_positive=size)

        with loss_scope("mlm"):
            with torch.no_grad():
                slow_text = momentum.text_encoder(inputs.masked_ids, captions)
                slow_fused = momentum.fuse(slow_text, captions, slow_image, range(size))
                teacher = momentum.word_logits(slow_fused[inputs.masked_rows])
            masked_text = model.text_encoder(inputs.masked_ids, captions)
            fused = model.fuse(masked_text, captions, image, range(size))
            words = model.word_logits(fused[inputs.masked_rows])
            mlm = losses.distilled_cross_entropy(words, teacher, pairs.token_ids[inputs.masked_rows], alpha)
        return {"itc": itc, "itm": itm, "mlm": mlm}
