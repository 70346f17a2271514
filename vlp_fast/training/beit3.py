"""BEiT-3's pretraining step: masked data modelling on images, on texts and on pairs (section 2.2 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from vlp_fast.data.batches import Batch
from vlp_fast.data.masking import blockwise_mask, mask_tokens
from vlp_fast.models.beit3 import Beit3Config, Beit3MaskedModel, Beit3Read
from vlp_fast.ops import linear_cross_entropy
from vlp_fast.passes import loss_scope
from vlp_fast.segments import Segments
from vlp_fast.training.objective import PretrainingObjective

__all__ = ["Beit3Inputs", "Beit3Pretraining", "MaskedImages", "MaskedTexts", "VisualTokenizer"]

IMAGE_RATIO, TEXT_RATIO, PAIR_TEXT_RATIO = 0.4, 0.15, 0.5  # sections 2.2 and 3.1


class VisualTokenizer(Protocol):
    """What turns images into the ids that masked patches predict: `vlp_fast.models.VqTokenizer`, which is trained before, the simpler
    `vlp_fast.data.PatchCodebook`, or your own, such as BEiT v2's VQ-KD."""

    @property
    def num_codes(self) -> int: ...

    def encode(self, images: Tensor) -> Tensor:
        """Images ``[batch, 3, S, S]`` -> int64 ``[batch, patches]``."""
        ...


@dataclass(frozen=True)
class MaskedImages:
    """images ``[batch, 3, S, S]``; mask bool ``[batch, patches]``; rows: masked rows of the encoder's output, were no patch left out;
    targets: their ids; counts: masked rows of each image, on the host."""

    images: Tensor
    mask: Tensor
    rows: Tensor
    targets: Tensor
    counts: tuple[int, ...]

    def none(self) -> MaskedImages:
        """No images."""
        return MaskedImages(self.images[:0], self.mask[:0], self.rows[:0], self.targets[:0], ())


@dataclass(frozen=True)
class MaskedTexts:
    """token_ids int64 ``[rows]`` with some hidden; lengths of the captions; rows that are hidden; targets: what they were; counts:
    hidden rows of each caption, on the host."""

    token_ids: Tensor
    lengths: tuple[int, ...]
    rows: Tensor
    targets: Tensor
    counts: tuple[int, ...]

    def segments(self) -> Segments:
        return Segments(self.lengths, self.token_ids.device)

    def none(self) -> MaskedTexts:
        """No captions."""
        return MaskedTexts(self.token_ids[:0], (), self.rows[:0], self.targets[:0], ())


@dataclass(frozen=True)
class Beit3Inputs:
    """One step's three kinds of samples, each masked on its own: images alone, texts alone, pairs."""

    images: MaskedImages
    texts: MaskedTexts
    pair_images: MaskedImages
    pair_texts: MaskedTexts

    def parts(self) -> tuple[MaskedImages, MaskedTexts, MaskedImages, MaskedTexts]:
        """images, texts, pair_images, pair_texts."""
        return self.images, self.texts, self.pair_images, self.pair_texts

    def only(self, losses: Sequence[str]) -> Beit3Inputs:
        """The inputs without the samples that none of `losses` needs."""
        return Beit3Inputs(
            self.images if "mim" in losses else self.images.none(),
            self.texts if "mlm" in losses else self.texts.none(),
            self.pair_images if "mvlm" in losses else self.pair_images.none(),
            self.pair_texts if "mvlm" in losses else self.pair_texts.none(),
        )

    def to(self, device: torch.device | str) -> Beit3Inputs:
        """The inputs on `device`."""

        def move(part: Any) -> Any:
            values = {f.name: getattr(part, f.name) for f in fields(part)}
            return replace(part, **{name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)})

        return Beit3Inputs(*map(move, self.parts()))


class Beit3Pretraining(PretrainingObjective):
    """Masked image ("mim"), text ("mlm") and pair ("mvlm") modelling; heads and losses run on masked rows only.

    With the configuration's `patch_drop` part of the visible patches is left out; every masked patch stays and is predicted.

    Args:
        config: of the model. visual_tokenizer: gives the ids of patches; its codes must fit ``config.visual_vocab_size``.
        mask_id, special_ids: of the text tokenizer; special tokens are never hidden. schedule: "packed", one forward of a mixed batch, or
            "published", three.
        losses: some of "mim", "mlm", "mvlm"; None: all. What serves only losses left out (samples, the visual tokenizer of their images)
            does not run and gets no gradient, or zeros where it shares a parameter with another expert.
    """

    loss_weights: ClassVar[dict[str, float]] = {"mim": 1.0, "mlm": 1.0, "mvlm": 1.0}
    visual_tokenizer: VisualTokenizer

    def __init__(
        self,
        config: Beit3Config,
        visual_tokenizer: VisualTokenizer,
        *,
        mask_id: int,
        special_ids: Sequence[int],
        schedule: str = "packed",
        losses: Sequence[str] | None = None,
    ) -> None:
        super().__init__(schedule, losses)
        if visual_tokenizer.num_codes > config.visual_vocab_size:
            raise ValueError(
                f"visual_vocab_size must hold the visual tokenizer's {visual_tokenizer.num_codes} codes; "
                f"received {config.visual_vocab_size}."
            )
        self.model = Beit3MaskedModel(config)
        # not as a part: where it is a module, its parameters are not this step's to train, move or save
        self.__dict__["visual_tokenizer"] = visual_tokenizer
        self.mask_id, self.special_ids = mask_id, tuple(special_ids)

    def towers(self) -> dict[str, nn.Module]:
        return {"encoder": self.model.encoder}

    def prepare(self, batch: Batch, generator: torch.Generator | None = None, unpaired: Batch | None = None) -> Beit3Inputs:
        """Masks a batch on the host: 40 % of image patches block-wise, 15 % of the words of texts, 50 % of those of pairs.

        Args:
            batch: pairs. generator: of the masks, which are the same whichever losses are left out. unpaired: whose images and captions
                stand alone; default: the pairs' own.
        """
        alone = batch if unpaired is None else unpaired
        return Beit3Inputs(
            self._mask_images(alone.images, generator, "mim"),
            self._mask_texts(alone, TEXT_RATIO, generator),
            self._mask_images(batch.images, generator, "mvlm"),
            self._mask_texts(batch, PAIR_TEXT_RATIO, generator),
        )

    def _mask_images(self, images: Tensor, generator: torch.Generator | None, loss: str) -> MaskedImages:
        grid = self.model.patch_embedding.grid
        mask = blockwise_mask(len(images), grid, grid, IMAGE_RATIO, generator)
        if loss not in self.losses:
            nothing = torch.zeros(0, dtype=torch.int64)
            return MaskedImages(images[:0], mask[:0], nothing, nothing, ())
        image, patch = mask.nonzero(as_tuple=True)
        rows = image * self.model.num_image_tokens + 1 + patch  # the class token comes first
        counts = tuple(mask.sum(1).tolist())
        return MaskedImages(images, mask, rows, self.visual_tokenizer.encode(images)[image, patch], counts)

    def _mask_texts(self, batch: Batch, ratio: float, generator: torch.Generator | None) -> MaskedTexts:
        masked = mask_tokens(batch.token_ids, batch.text_lengths, ratio, self.mask_id, self.special_ids, generator)
        rows = masked.masked_rows
        caption = torch.arange(batch.batch_size).repeat_interleave(torch.tensor(batch.text_lengths))
        counts = tuple(torch.bincount(caption[rows], minlength=batch.batch_size).tolist())
        return MaskedTexts(masked.input_ids, tuple(batch.text_lengths), rows, batch.token_ids[rows], counts)

    def forward(self, inputs: Beit3Inputs) -> dict[str, Tensor]:
        """The three losses of one step: scalars "mim", "mlm", "mvlm" (the pair's image and text losses added), or those of them that
        `losses` names."""
        return self._mixed(inputs) if self.packed else self._apart(inputs)

    def _mixed(self, inputs: Beit3Inputs) -> dict[str, Tensor]:
        """One forward of the encoder, whose last layer computes masked rows only."""
        model, (images, texts, pair_images, pair_texts) = self.model, inputs.only(self.losses).parts()
        counts = [*images.counts, *pair_images.counts]
        alone_rows, paired_rows = (sum(model.image_lengths(part.counts)) for part in (images, pair_images))
        read = Beit3Read(
            torch.cat([images.rows, len(images.images) * model.num_image_tokens + pair_images.rows]),
            [*counts, *[0] * len(texts.lengths)],
            torch.cat([pair_texts.rows, len(pair_texts.token_ids) + texts.rows]),
            [*[0] * len(images.images), *pair_texts.counts, *texts.counts],
        )
        parts = (
            ("mim", len(images.images), alone_rows),
            ("mlm", len(texts.lengths), len(texts.token_ids)),
            ("mvlm", len(pair_images.images), paired_rows + len(pair_texts.token_ids)),
        )
        with loss_scope(self.losses[0]):
            image, text = model.encode_mixed(
                torch.cat([images.images, pair_images.images]),
                torch.cat([images.mask, pair_images.mask]),
                torch.cat([pair_texts.token_ids, texts.token_ids]),
                Segments([*pair_texts.lengths, *texts.lengths], texts.token_ids.device),
                len(pair_images.images),
                read,
                tuple(part for part in parts if part[0] in self.losses),
                mask_counts=counts,
            )
        alone, paired = image.split([len(images.rows), len(pair_images.rows)])
        described, other = text.split([len(pair_texts.rows), len(texts.rows)])
        made: dict[str, Tensor] = {}
        if "mim" in self.losses:
            with loss_scope("mim"):
                made["mim"] = self._loss(alone, model.visual_head, images.targets)
        if "mlm" in self.losses:
            with loss_scope("mlm"):
                made["mlm"] = self._loss(other, model.word_head, texts.targets)
        if "mvlm" in self.losses:
            with loss_scope("mvlm"):
                of_images = self._loss(paired, model.visual_head, pair_images.targets)
                made["mvlm"] = of_images + self._loss(described, model.word_head, pair_texts.targets)
        return made

    def _apart(self, inputs: Beit3Inputs) -> dict[str, Tensor]:
        """A forward for each kind of sample."""
        model = self.model
        made: dict[str, Tensor] = {}
        if "mim" in self.losses:
            with loss_scope("mim"):
                image = inputs.images
                out = model.encode_image(image.images, image.mask, image.counts)
                made["mim"] = self._loss(out.image_at(image.rows), model.visual_head, image.targets)
        if "mlm" in self.losses:
            with loss_scope("mlm"):
                text = inputs.texts
                out = model.encode_text(text.token_ids, text.segments())
                made["mlm"] = self._loss(out.text[text.rows], model.word_head, text.targets)
        if "mvlm" in self.losses:
            with loss_scope("mvlm"):
                image, text = inputs.pair_images, inputs.pair_texts
                out = model.encode_pairs(image.images, text.token_ids, text.segments(), image.mask, image.counts)
                of_images = self._loss(out.image_at(image.rows), model.visual_head, image.targets)
                made["mvlm"] = of_images + self._loss(out.text[text.rows], model.word_head, text.targets)
        return made

    def _loss(self, rows: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
        """The loss of predicting what was hidden, from the hidden rows; 0 where nothing is hidden."""
        return linear_cross_entropy(rows, head.weight, targets, head.bias, backend=self.backend)
