"""Fine-tuning BEiT-3: the steps of retrieval and captioning, and the losses of answers and classes.

As the released code does it; section 3 of the paper. Where classes are given (`Beit3Reasoning`, `Beit3Classifier`) the loss is
PyTorch's cross-entropy of the model's logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_fast.data.batches import Batch
from vlp_fast.losses import contrastive_loss
from vlp_fast.models.beit3 import Beit3Config
from vlp_fast.models.beit3_tasks import Beit3Captioner, Beit3Retrieval
from vlp_fast.ops import linear_cross_entropy
from vlp_fast.passes import loss_scope
from vlp_fast.segments import Segments
from vlp_fast.training.objective import PretrainingObjective

__all__ = [
    "Beit3CaptionInputs",
    "Beit3Captioning",
    "Beit3Contrast",
    "answer_loss",
    "caption_loss",
    "mask_captions",
]

FIRST_WORD = 3  # ids below are bos, pad and eos


class Beit3Contrast(PretrainingObjective):
    """Intermediate and retrieval fine-tuning: images and captions as two towers, contrasted over all processes' pairs."""

    loss_weights: ClassVar[dict[str, float]] = {"contrastive": 1.0}

    def __init__(self, config: Beit3Config, *, schedule: str = "published") -> None:
        super().__init__(schedule)
        self.model = Beit3Retrieval(config)

    def towers(self) -> dict[str, nn.Module]:
        return {"encoder": self.model.encoder}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of one step: a scalar "contrastive"."""
        model, segments = self.model, Segments(batch.text_lengths, batch.token_ids.device)
        with loss_scope("contrastive"):
            image, text = model.image_features(batch.images), model.text_features(batch.token_ids, segments)
            return {"contrastive": contrastive_loss(image, text, model.logit_scale.exp(), backend=self.backend)}


@dataclass(frozen=True)
class Beit3CaptionInputs:
    """images ``[batch, 3, S, S]``; token_ids int64 ``[rows]`` with words hidden; lengths; rows hidden and what they were; the step."""

    images: Tensor
    token_ids: Tensor
    lengths: tuple[int, ...]
    rows: Tensor
    targets: Tensor
    step: int = 0

    def to(self, device: torch.device | str) -> Beit3CaptionInputs:
        """The inputs on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("images", "token_ids", "rows", "targets")}
        return replace(self, **moved)


class Beit3Captioning(PretrainingObjective):
    """Captioning: words hidden in place and predicted there, from the image and the words before (figure 3c).

    Args:
        config: of the model. mask_id: of the text tokenizer. ratio: part of a caption that is hidden. label_smoothing, drop_worst,
            drop_after: as in `caption_loss`; nothing is dropped up to step `drop_after`.
    """

    loss_weights: ClassVar[dict[str, float]] = {"caption": 1.0}

    def __init__(
        self,
        config: Beit3Config,
        *,
        mask_id: int,
        ratio: float = 0.7,
        label_smoothing: float = 0.1,
        drop_worst: float = 0.2,
        drop_after: int = 12000,
        schedule: str = "published",
    ) -> None:
        super().__init__(schedule)
        self.model = Beit3Captioner(config)
        self.mask_id, self.ratio, self.label_smoothing = mask_id, ratio, label_smoothing
        self.drop_worst, self.drop_after = drop_worst, drop_after

    def towers(self) -> dict[str, nn.Module]:
        return {"encoder": self.model.encoder}

    def prepare(self, batch: Batch, generator: torch.Generator | None = None, step: int = 0) -> Beit3CaptionInputs:
        """Hides words of a batch on the host; `step` counts the steps of the training so far."""
        vocab_size = self.model.config.vocab_size
        ids, rows = mask_captions(batch.token_ids, batch.text_lengths, self.ratio, self.mask_id, vocab_size, generator)
        return Beit3CaptionInputs(batch.images, ids, tuple(batch.text_lengths), rows, batch.token_ids[rows], step)

    def forward(self, inputs: Beit3CaptionInputs) -> dict[str, Tensor]:
        """The loss of one step: a scalar "caption"."""
        model = self.model
        with loss_scope("caption"):
            hidden = model.caption_rows(inputs.images, inputs.token_ids, Segments(inputs.lengths, inputs.token_ids.device))
            loss = caption_loss(
                hidden[inputs.rows],
                model.word_head.weight,
                model.word_head.bias,
                inputs.targets,
                label_smoothing=self.label_smoothing,
                drop_worst=self.drop_worst if inputs.step > self.drop_after else 0.0,
                backend=self.backend,
            )
        return {"caption": loss}


def caption_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.1,
    drop_worst: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """The divergence of predicted words from smoothed targets, averaged over the rows that are easiest to predict.

    Equivalent to: KL(q || softmax(hidden @ weight.T + bias)) with q = 1 - label_smoothing at the target and the rest spread over all
    *other* words, averaged over the ``int(rows * (1 - drop_worst))`` rows, at least one, where it is smallest; 0 without rows.

    Args:
        hidden: ``[rows, dim]``. weight: ``[vocab_size, dim]``. bias: ``[vocab_size]``. targets: int64 ``[rows]``.
        label_smoothing: in [0, 1 - 1 / vocab_size]. drop_worst: share of rows left out, in [0, 1). backend: "triton", "torch" or None.

    Raises: ValueError for a share outside its range.
    """
    words, rows = len(weight), len(targets)
    if not 0 <= label_smoothing <= 1 - 1 / words:
        raise ValueError(f"label_smoothing must lie in [0, {1 - 1 / words:.6g}]; received {label_smoothing}.")
    if not 0 <= drop_worst < 1:
        raise ValueError(f"drop_worst must lie in [0, 1); received {drop_worst}.")
    # PyTorch spreads its share over all words, the target among them
    spread = min(label_smoothing * words / (words - 1), 1.0) if words > 1 else 0.0
    kept = max(int(rows * (1 - drop_worst)), 1)
    reduction = "none" if kept < rows else "mean"
    loss = linear_cross_entropy(hidden, weight, targets, bias, label_smoothing=spread, reduction=reduction, backend=backend)
    if kept < rows:
        loss = loss.topk(kept, largest=False, sorted=False).values.mean()
    return loss + _negative_entropy(label_smoothing, words) if rows else loss


def _negative_entropy(smoothing: float, words: int) -> float:
    """Of the smoothed target: what cross-entropy has more than the divergence."""
    if smoothing == 0.0:
        return 0.0
    return smoothing * math.log(smoothing / (words - 1)) + (1 - smoothing) * math.log(1 - smoothing)


def answer_loss(logits: Tensor, scores: Tensor) -> Tensor:
    """Every answer as a question of its own: binary cross-entropy summed over answers, averaged over the batch.

    Args:
        logits: ``[batch, classes]``. scores: ``[batch, classes]`` in [0, 1], how right each answer is.
    """
    if logits.shape != scores.shape:
        raise ValueError(f"logits and scores must have one shape; received {list(logits.shape)} and {list(scores.shape)}.")
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.binary_cross_entropy_with_logits(logits.to(wide), scores.to(wide)) * logits.shape[1]


def mask_captions(
    token_ids: Tensor,
    lengths: tuple[int, ...] | list[int],
    ratio: float,
    mask_id: int,
    vocab_size: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Hides words of packed captions for captioning: any but the first token (bos), the last (eos) among them, on the host.

    Of a caption's n tokens ``ratio * n``, rounded, but 1 to n - 1 are hidden; of those 80 % become [MASK], 10 % a random word, 10 %
    stay as they are.

    Returns: (token ids with words hidden, int64 rows hidden, ascending).
    Raises: ValueError for a ratio outside [0, 1] or lengths that do not sum to the rows.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must lie in [0, 1]; received {ratio}.")
    if sum(lengths) != token_ids.numel():
        raise ValueError(f"lengths must sum to the {token_ids.numel()} rows of token_ids; they sum to {sum(lengths)}.")
    chosen, first = [torch.empty(0, dtype=torch.int64)], 0
    for length in lengths:
        count = min(max(int(length * ratio + 0.5), 1), length - 1)
        if count > 0:
            chosen.append(first + 1 + torch.randperm(length - 1, generator=generator)[:count].sort().values)
        first += length
    rows = torch.cat(chosen)
    kind = torch.rand(len(rows), generator=generator)
    drawn = torch.randint(FIRST_WORD, vocab_size, (len(rows),), generator=generator)
    hidden = token_ids.clone()
    hidden[rows] = torch.where(kind < 0.8, mask_id, torch.where(kind < 0.9, drawn, token_ids[rows]))
    return hidden, rows
