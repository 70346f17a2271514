"""BLIP's pretraining step: image-text contrast, image-text matching and captioning (section 3.2 of the paper).

The passes are those of the published code: one image forward and its momentum twin, captions read alone (and by the momentum tower),
against their own image, against hard negatives of both kinds, and causally. Captions are packed: no padding exists anywhere.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from vlp_fast import losses
from vlp_fast.data.batches import Batch
from vlp_fast.distributed import gather_features
from vlp_fast.models.blip import Blip, BlipConfig, BlipImageEncoder, BlipTextTower, project
from vlp_fast.modules import Linear
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
        config: of the model. schedule: "published".

    Example: ``losses = step(batch); step.total(losses).backward()``
    """

    loss_weights: ClassVar[dict[str, float]] = {"itc": 1.0, "itm": 1.0, "lm": 1.0}

    def __init__(self, config: BlipConfig, schedule: str = "published") -> None:
        super().__init__(schedule)
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
            batch: images and packed captions ([CLS] words [SEP]); caption i describes image i; at least 2 pairs.
            alpha: share of the momentum encoders' soft targets (BLIP: 0.4, reached linearly over the first two epochs).
            negatives: (image for caption i, caption for image i), int64 ``[batch]`` each; default: drawn by similarity. The second is
                read on the host, the one place where a step waits for the device: captions differ in length.

        Returns: scalars "itc", "itm", "lm".
        """
        model, ids, captions = self.model, batch.token_ids, batch.segments()
        if len(captions) != len(batch.images):
            raise ValueError(
                f"a step needs one caption per image; received {len(captions)} captions for {len(batch.images)} images."
            )
        with torch.no_grad():
            model.temperature.clamp_(*TEMPERATURE_RANGE)
        with loss_scope("itc"):
            image = model.encode_image(batch.images)
            text_features = model.encode_text(ids, captions)
            with torch.no_grad():
                self.momentum.update(model)
                image_keys, text_keys = self._keys(batch)
            own, scale = slice(0, len(captions)), 1.0 / model.temperature
            i2t = losses.distilled_contrastive_loss(
                image.features, image_keys[own], text_keys, scale, alpha, backend=self.backend
            )
            t2i = losses.distilled_contrastive_loss(
                text_features, text_keys[own], image_keys, scale, alpha, backend=self.backend
            )
            itc = (i2t + t2i) / 2
            self.momentum.enqueue(gather_features(image_keys[own]), gather_features(text_keys[own]))

        with loss_scope("itm"):
            size = len(captions)
            if negatives is None:
                negatives = (
                    losses.hard_negatives(text_features, image_keys[own], scale, backend=self.backend),
                    losses.hard_negatives(image.features, text_keys[own], scale, backend=self.backend),
                )
            image_index, text_index = negatives
            rows, other_captions = captions.take(text_index.tolist())  # lengths change here: the step's one host sync
            paired = torch.arange(size, device=image_index.device)
            positive = model.matching_pass("itm_positive", ids, captions, range(size))
            both_ids = torch.cat([ids, ids[rows]])
            both = Segments([*captions.lengths, *other_captions.lengths], ids.device)
            negative = model.matching_pass("itm_negative", both_ids, both, torch.cat([image_index, paired]))
            logits = [model.matching_logits(self._run(p, image.rows, image.segments), p.segments) for p in (positive, negative)]
            itm = losses.matching_loss(torch.cat(logits), num_positive=size)

        with loss_scope("lm"):
            captioning = model.captioning_pass(ids, captions, range(size))
            hidden = self._run(captioning, image.rows, image.segments)
            predicts = captions.rows_before_last(1)
            weight, bias = model.word_weights()
            lm = linear_cross_entropy(
                model.word_hidden(hidden[predicts]),
                weight,
                ids[predicts + 1],
                bias,
                label_smoothing=LABEL_SMOOTHING,
                backend=self.backend,
            )
        return {"itc": itc, "itm": itm, "lm": lm}

    def _run(self, text_pass: TextPass, image_rows: Tensor, image_segments: Segments) -> Tensor:
        (rows,) = self.model.text_tower([text_pass], image_rows, image_segments)
        return rows

    def _keys(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Momentum features of this batch, then the queue: ``[batch + queue, embed_dim]`` for images and for captions."""
        momentum, captions = self.momentum, batch.segments()
        rows = momentum.image_encoder(batch.images)
        segments = momentum.image_encoder.segments(len(batch.images), rows.device)
        image = project(rows, segments, momentum.image_projection)
        (text_rows,) = momentum.text_tower([TextPass("itc_momentum", batch.token_ids, captions)])
        text = project(text_rows, captions, momentum.text_projection)
        return momentum.keys(image, text)
