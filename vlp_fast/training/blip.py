"""BLIP's pretraining step: image-text contrast, image-text matching and captioning (section 3.2 of the paper).

The passes are those of the published code: one image forward and its momentum twin, captions read alone (and by the momentum tower),
against their own image, against hard negatives of both kinds, and causally; the last three may share a forward. Captions are packed: no
padding exists anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlp_fast import losses
from vlp_fast.data.batches import Batch
from vlp_fast.distributed import gather_features
from vlp_fast.models.blip import Blip, BlipConfig, BlipImageEncoder, BlipTextTower
from vlp_fast.modules import Linear, unit_features
from vlp_fast.ops import linear_cross_entropy
from vlp_fast.passes import TextPass, loss_scope
from vlp_fast.segments import Segments
from vlp_fast.training._momentum import Momentum
from vlp_fast.training.objective import PretrainingObjective

__all__ = ["BlipMomentum", "BlipPretraining"]

TEMPERATURE_RANGE = (0.001, 0.5)
LABEL_SMOOTHING = 0.1


class BlipMomentum(Momentum):
    """Slow copies of BLIP's image encoder and of its text encoder without cross-attention, and the queues of their features."""

    def __init__(self, model: Blip) -> None:
        super().__init__()
        config = model.config
        self.image_encoder = BlipImageEncoder(config)
        self.text_tower = BlipTextTower(config, num_experts=1, context_dim=None)
        self.image_projection = Linear(config.vision_dim, config.embed_dim)
        self.text_projection = Linear(config.dim, config.embed_dim)
        self._start(model)


class BlipPretraining(PretrainingObjective):
    """ITC with momentum encoders, queue and soft targets; ITM with hard negatives; LM with label smoothing 0.1.

    In a process group every process contrasts its own pairs with its own keys and the queue, which takes the keys of all.

    Args:
        config: of the model. schedule: "packed": the passes that match and caption are one forward, which projects each image to keys and
            values once per layer; or "published", one forward each.
        losses: some of "itc", "itm", "lm"; None: all. What serves only losses left out does not run (the momentum encoders serve "itc")
            and gets no gradient.

    Example: ``losses = step(batch); step.total(losses).backward()``
    """

    loss_weights: ClassVar[dict[str, float]] = {"itc": 1.0, "itm": 1.0, "lm": 1.0}

    def __init__(self, config: BlipConfig, schedule: str = "packed", losses: Sequence[str] | None = None) -> None:
        super().__init__(schedule, losses)
        self.model = Blip(config)
        self.momentum = BlipMomentum(self.model)

    @property
    def config(self) -> BlipConfig:
        """The model's."""
        return self.model.config

    def towers(self) -> dict[str, nn.Module]:
        return {
            "image_encoder": self.model.image_encoder,
            "text_tower": self.model.text_tower,
            "momentum_image_encoder": self.momentum.image_encoder,
            "momentum_text_tower": self.momentum.text_tower,
        }

    def forward(self, batch: Batch, *, alpha: float = 0.4, negatives: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """The three losses of one step; updates the momentum encoders and the queue.

        Args:
            batch: images and packed captions ([CLS] words [SEP]); at least 2 pairs. An image with several captions is encoded once and
                counts as often as it has captions, in the queue too.
            alpha: share of the momentum encoders' soft targets (BLIP: 0.4, reached linearly over the first two epochs).
            negatives: of pair i, the pair whose image is wrong for its caption and the pair whose caption is wrong for its image, int64
                ``[captions]`` each; default: drawn by similarity. They are read on the host, the one place where a step waits for the
                device: captions differ in length.

        Returns: scalars "itc", "itm", "lm", or those of them that `losses` names.
        Raises: ValueError for "itm" without "itc", whose similarities say which negatives are hard, and without `negatives`.
        """
        self.check_negatives(negatives)
        model, ids, captions, size = self.model, batch.token_ids, batch.segments(), batch.batch_size
        image_of = batch.image_of()
        made: dict[str, Tensor] = {}
        with torch.no_grad():
            model.temperature.clamp_(*TEMPERATURE_RANGE)
        with loss_scope(self.losses[0]):
            image = model.encode_image(batch.images)
        if "itc" in self.losses:
            with loss_scope("itc"):
                made["itc"], drawn = self._contrast(batch, image.features, alpha, negatives is None and "itm" in self.losses)
                negatives = negatives or drawn

        passes: list[TextPass] = []
        if "itm" in self.losses:
            assert negatives is not None
            # the step's one host sync: captions differ in length, so which are negatives decides how many rows follow
            other_image, other_caption = torch.stack(negatives).tolist()
            rows, other_captions = captions.take(other_caption)
            both_ids = torch.cat([ids, ids[rows]])
            both = Segments([*captions.lengths, *other_captions.lengths], ids.device)
            passes += [
                model.matching_pass("itm_positive", ids, captions, image_of),
                model.matching_pass("itm_negative", both_ids, both, [*(image_of[i] for i in other_image), *image_of]),
            ]
        # nothing reads the last row of a causal pass: its token is predicted only
        without_last = self.packed and min(captions.lengths) > 1
        if "lm" in self.losses:
            predicts, words, word_segments = captions.rows_before_last(1), ids, captions
            if without_last:
                words, word_segments = ids[predicts], Segments([n - 1 for n in captions.lengths], ids.device)
            passes.append(model.captioning_pass(words, word_segments, image_of))
        found: list[Tensor] = []
        for group in self.grouped(passes) if passes else []:
            with loss_scope(str(group[0].loss)):
                found += model.text_tower(group, image.rows, image.segments, whole=not self.packed)

        if "itm" in self.losses:
            with loss_scope("itm"):
                made["itm"] = losses.matching_loss(model.matching_logits(torch.cat(found[:2])), num_positive=size)
        if "lm" in self.losses:
            with loss_scope("lm"):
                weight, bias = model.word_weights()
                made["lm"] = linear_cross_entropy(
                    model.word_hidden(found[-1] if without_last else found[-1][predicts]),
                    weight,
                    ids[predicts + 1],
                    bias,
                    label_smoothing=LABEL_SMOOTHING,
                    backend=self.backend,
                )
        return made

    def _contrast(
        self, batch: Batch, features: Tensor, alpha: float, draw: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The contrastive loss, after which keys and queue have moved on; and, with `draw`, hard negatives of both kinds."""
        model, own, backend = self.model, slice(0, batch.batch_size), self.backend
        image_features, negatives = batch.of_captions(features), None
        text_features = model.encode_text(batch.token_ids, batch.segments(), whole=not self.packed)
        with torch.no_grad():
            self.momentum.update(model)
            image_keys, text_keys = self._keys(batch)
        scale = 1.0 / model.temperature
        i2t = losses.distilled_contrastive_loss(image_features, image_keys[own], text_keys, scale, alpha, backend=backend)
        t2i = losses.distilled_contrastive_loss(text_features, text_keys[own], image_keys, scale, alpha, backend=backend)
        self.momentum.enqueue(gather_features(image_keys[own]), gather_features(text_keys[own]))
        if draw:
            negatives = (
                losses.hard_negatives(text_features, image_keys[own], scale, backend=backend),
                losses.hard_negatives(image_features, text_keys[own], scale, backend=backend),
            )
        return (i2t + t2i) / 2, negatives

    def _keys(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Momentum features of this batch, then the queue: ``[captions + queue, embed_dim]`` for images and for captions."""
        momentum, captions = self.momentum, batch.segments()
        if self.packed:
            first = momentum.image_encoder(batch.images, first_row_only=True)
        else:
            rows = momentum.image_encoder(batch.images)
            first = rows[momentum.image_encoder.segments(len(batch.images), rows.device).first_rows()]
        image = unit_features(momentum.image_projection(first))
        text_pass = TextPass("itc_momentum", batch.token_ids, captions, first_row_only=True)
        (text_rows,) = momentum.text_tower([text_pass], whole=not self.packed)
        return momentum.keys(batch.of_captions(image), unit_features(momentum.text_projection(text_rows)))
