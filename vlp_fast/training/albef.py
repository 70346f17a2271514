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
        losses: some of "itc", "itm", "mlm"; None: all. What serves only losses left out does not run (the momentum encoders serve "itc"
            and "mlm", the queue "itc") and gets no gradient.

    Example: ``losses = step(step.prepare(batch)); step.total(losses).backward()``
    """

    loss_weights: ClassVar[dict[str, float]] = {"itc": 1.0, "itm": 1.0, "mlm": 1.0}

    def __init__(self, config: AlbefConfig, schedule: str = "packed", losses: Sequence[str] | None = None) -> None:
        super().__init__(schedule, losses)
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

        Returns: scalars "itc", "itm", "mlm", or those of them that `losses` names.
        Raises: ValueError for "itm" without "itc", whose similarities say which negatives are hard, and without `negatives`.
        """
        self.check_negatives(negatives)
        model, momentum, pairs = self.model, self.momentum, inputs.pairs
        captions, image_of = pairs.segments(), pairs.image_of()
        itc, itm, mlm = (name in self.losses for name in self.loss_weights)
        made: dict[str, Tensor] = {}
        with torch.no_grad():
            model.temperature.clamp_(*TEMPERATURE_RANGE)
        plain = TextPass("plain", pairs.token_ids, captions, first_row_only=not itm, loss=self.losses[0])
        hidden = TextPass("masked", inputs.masked_ids, captions, loss="mlm")
        with loss_scope(self.losses[0]):
            image = model.encode_image(pairs.images)
        captioned = [p for p, needed in ((plain, itc or itm), (hidden, mlm)) if needed]
        text = self._forwards(model.text_encoder, captioned)
        if itc or mlm:
            with torch.no_grad():
                with loss_scope("itc" if itc else "mlm"):
                    momentum.update(model)
                    slow_image = momentum.encode_image(pairs.images)
                slow_plain = replace(plain, first_row_only=True)
                captioned = [p for p, needed in ((slow_plain, itc), (hidden, mlm)) if needed]
                slow_text = self._forwards(momentum.text_encoder, captioned)
        if itc:
            with loss_scope("itc"):
                first = text["plain"][captions.first_rows()] if itm else text["plain"]
                text_features = unit_features(model.text_projection(first))
                slow_text_features = unit_features(momentum.text_projection(slow_text["plain"]))
                keys = momentum.keys(pairs.of_captions(slow_image.features), slow_text_features)
                features, draw = pairs.of_captions(image.features), itm and negatives is None
                made["itc"], drawn = self._contrast(features, text_features, *keys, alpha, draw)
                negatives = negatives or drawn

        passes: list[TextPass] = []
        if itm:
            assert negatives is not None
            # the step's one host sync: captions differ in length, so which are negatives decides how many rows follow
            other_image, other_caption = torch.stack(negatives).tolist()
            rows, other_captions = captions.take(other_caption)
            words, both = text["plain"], Segments([*captions.lengths, *other_captions.lengths], image.rows.device)
            wrong = [*(image_of[i] for i in other_image), *image_of]
            passes += [
                TextPass("itm_positive", words, captions, images=image_of, first_row_only=True, loss="itm"),
                TextPass("itm_negative", torch.cat([words, words[rows]]), both, images=wrong, first_row_only=True, loss="itm"),
            ]
        if mlm:
            passes.append(TextPass("mlm", text["masked"], captions, images=image_of, loss="mlm"))
        fused = self._forwards(model.fusion_encoder, passes, image.rows, image.segments)
        if itm:
            with loss_scope("itm"):
                matched = torch.cat([fused["itm_positive"], fused["itm_negative"]])
                made["itm"] = losses.matching_loss(model.matching_logits(matched), num_positive=pairs.batch_size)
        if mlm:
            with loss_scope("mlm"):
                with torch.no_grad():
                    slow_pass = TextPass("mlm", slow_text["masked"], captions, images=image_of, loss="mlm")
                    (slow_fused,) = momentum.fusion_encoder([slow_pass], slow_image.rows, slow_image.segments)
                    teacher = momentum.word_logits(slow_fused[inputs.masked_rows])
                words = model.word_logits(fused["mlm"][inputs.masked_rows])
                made["mlm"] = losses.distilled_cross_entropy(words, teacher, pairs.token_ids[inputs.masked_rows], alpha)
        return made

    def _contrast(
        self, image: Tensor, text: Tensor, image_keys: Tensor, text_keys: Tensor, alpha: float, draw: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The contrastive loss, after which the queue has moved on; and, with `draw`, hard negatives of both kinds."""
        scale, own, backend = 1.0 / self.model.temperature, slice(0, len(text)), self.backend
        i2t = losses.distilled_contrastive_loss(image, image_keys[own], text_keys, scale, alpha, backend=backend)
        t2i = losses.distilled_contrastive_loss(text, text_keys[own], image_keys, scale, alpha, backend=backend)
        self.momentum.enqueue(gather_features(image_keys[own]), gather_features(text_keys[own]))
        negatives = None
        if draw:
            negatives = (
                losses.hard_negatives(text, image_keys[own], scale, floor=0.0, backend=backend),
                losses.hard_negatives(image, text_keys[own], scale, floor=0.0, backend=backend),
            )
        return (i2t + t2i) / 2, negatives

    def _forwards(self, tower: nn.Module, passes: Sequence[TextPass], *images: object) -> dict[str, Tensor]:
        """What the tower makes of each pass, by its name."""
        found: list[Tensor] = []
        for group in self.grouped(passes) if passes else []:
            with loss_scope(str(group[0].loss)):
                found += tower(group, *images, whole=not self.packed)
        return dict(zip([p.name for p in passes], found, strict=True))
