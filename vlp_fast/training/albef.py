"""ALBEF's pretraining step: image-text contrast, image-text matching and masked words (section 3.2 of the paper).

The passes are those of the published code: one image forward and its momentum twin; captions read alone, as they are and with words
masked, each with its momentum twin; captions fused with their own image, with hard negatives of both kinds, and masked. The fusion of
whole captions starts from the rows that the contrast has made. Captions are packed: no padding exists anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlp_fast import losses
from vlp_fast.data.batches import Batch
from vlp_fast.data.masking import mask_tokens
from vlp_fast.distributed import gather_features
from vlp_fast.models.albef import Albef, AlbefConfig, AlbefEncoders
from vlp_fast.modules import unit_features
from vlp_fast.passes import TextPass, loss_scope
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
        config: of the model. schedule: "packed": captions as they are and masked are one forward of the text encoder, and all that is
            fused with images one of the fusion encoder; or "published", one forward each.

    Example: ``losses = step(step.prepare(batch)); step.total(losses).backward()``
    """

    loss_weights: ClassVar[dict[str, float]] = {"itc": 1.0, "itm": 1.0, "mlm": 1.0}

    def __init__(self, config: AlbefConfig, schedule: str = "packed") -> None:
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
            inputs: of `prepare`: images and packed captions ([CLS] words [SEP]), at least 2 pairs. An image with several captions is
                encoded once and counts as often as it has captions, in the queue too.
            alpha: share of the momentum model's soft targets (ALBEF: 0.4, reached linearly over the first epoch).
            negatives: of pair i, the pair whose image is wrong for its caption and the pair whose caption is wrong for its image, int64
                ``[captions]`` each; default: drawn by similarity. They are read on the host, the one place where a step waits for the
                device: captions differ in length.

        Returns: scalars "itc", "itm", "mlm".
        """
        model, momentum, pairs = self.model, self.momentum, inputs.pairs
        captions, size, image_of, whole = pairs.segments(), pairs.batch_size, pairs.image_of(), not self.packed
        with torch.no_grad():
            model.temperature.clamp_(*TEMPERATURE_RANGE)
        plain = TextPass("itc", pairs.token_ids, captions, loss="itc")
        hidden = TextPass("mlm", inputs.masked_ids, captions, loss="mlm")
        with loss_scope("itc"):
            image = model.encode_image(pairs.images)
        text, masked_text = self._forwards(model.text_encoder, [plain, hidden], whole=whole)
        with loss_scope("itc"):
            image_features, text_features = pairs.of_captions(image.features), model.text_features(text, captions)
            with torch.no_grad():
                momentum.update(model)
                slow_image = momentum.encode_image(pairs.images)
        with torch.no_grad():
            first = replace(plain, first_row_only=True)
            slow_first, slow_masked = self._forwards(momentum.text_encoder, [first, hidden], whole=whole)
        with loss_scope("itc"):
            slow_text_features = unit_features(momentum.text_projection(slow_first))
            image_keys, text_keys = momentum.keys(pairs.of_captions(slow_image.features), slow_text_features)
            scale, own = 1.0 / model.temperature, slice(0, size)
            i2t = losses.distilled_contrastive_loss(
                image_features, image_keys[own], text_keys, scale, alpha, backend=self.backend
            )
            t2i = losses.distilled_contrastive_loss(
                text_features, text_keys[own], image_keys, scale, alpha, backend=self.backend
            )
            itc = (i2t + t2i) / 2
            momentum.enqueue(gather_features(image_keys[own]), gather_features(text_keys[own]))
            if negatives is None:
                negatives = (
                    losses.hard_negatives(text_features, image_keys[own], scale, floor=0.0, backend=self.backend),
                    losses.hard_negatives(image_features, text_keys[own], scale, floor=0.0, backend=self.backend),
                )
            # the step's one host sync: captions differ in length, so which are negatives decides how many rows follow
            other_image, other_caption = torch.stack(negatives).tolist()

        rows, other_captions = captions.take(other_caption)
        both = Segments([*captions.lengths, *other_captions.lengths], text.device)
        wrong = [*(image_of[i] for i in other_image), *image_of]
        fused = self._forwards(
            model.fusion_encoder,
            [
                TextPass("itm_positive", text, captions, images=image_of, first_row_only=True, loss="itm"),
                TextPass("itm_negative", torch.cat([text, text[rows]]), both, images=wrong, first_row_only=True, loss="itm"),
                TextPass("mlm", masked_text, captions, images=image_of, loss="mlm"),
            ],
            image.rows,
            image.segments,
            whole=whole,
        )
        with loss_scope("itm"):
            itm = losses.matching_loss(model.matching_logits(torch.cat(fused[:2])), num_positive=size)
        with loss_scope("mlm"):
            with torch.no_grad():
                slow_pass = TextPass("mlm", slow_masked, captions, images=image_of, loss="mlm")
                (slow_fused,) = momentum.fusion_encoder([slow_pass], slow_image.rows, slow_image.segments)
                teacher = momentum.word_logits(slow_fused[inputs.masked_rows])
            words = model.word_logits(fused[2][inputs.masked_rows])
            mlm = losses.distilled_cross_entropy(words, teacher, pairs.token_ids[inputs.masked_rows], alpha)
        return {"itc": itc, "itm": itm, "mlm": mlm}

    def _forwards(self, tower: nn.Module, passes: Sequence[TextPass], *images: object, whole: bool) -> list[Tensor]:
        found: list[Tensor] = []
        for group in self.grouped(passes):
            with loss_scope(str(group[0].loss)):
                found += tower(group, *images, whole=whole)
        return found
