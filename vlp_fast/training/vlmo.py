"""VLMo's vision-language pretraining step: image-text contrast, image-text matching and masked words (section 3.2 of the paper).

The passes are those of the published code: images alone and captions alone, with their top layers a second time through the
vision-language experts; pairs with words masked; pairs matched, with another image, and with another caption. Captions are packed: no
padding exists anywhere. The text-only stage before it is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlp_fast import losses
from vlp_fast.data.batches import Batch
from vlp_fast.data.masking import mask_tokens
from vlp_fast.models.vlmo import Vlmo, VlmoConfig
from vlp_fast.ops import linear_cross_entropy
from vlp_fast.passes import loss_scope
from vlp_fast.segments import Segments
from vlp_fast.training.objective import PretrainingObjective

__all__ = ["VlmoInputs", "VlmoPretraining"]

MASK_RATIO = 0.15  # section 3.2


@dataclass(frozen=True, eq=False)
class VlmoInputs:
    """pairs: images and captions as they are. masked_ids: int64 ``[rows]``, the captions with some words hidden; masked_rows: int64,
    the rows to be predicted."""

    pairs: Batch
    masked_ids: Tensor
    masked_rows: Tensor

    def to(self, device: torch.device | str) -> VlmoInputs:
        """The inputs on `device`."""
        return VlmoInputs(self.pairs.to(device), self.masked_ids.to(device), self.masked_rows.to(device))


class VlmoPretraining(PretrainingObjective):
    """Contrast of features from both kinds of top layers ("itc", "itc_vl"), matching with hard negatives ("itm"), masked words ("mlm").

    In a process group every process contrasts its own pairs with those of all (the mean of the processes' gradients is that of the
    whole batch; in the published code it is smaller by the number of processes) and draws negatives from its own, where the published
    code draws from all and gathers their pixels.

    Args:
        config: of the model. mask_id, special_ids: of the tokenizer; special ids, [CLS], [SEP] and [PAD], are never hidden.
        continuation_ids: ids of word pieces that continue a word ("##..."): a word is hidden whole. schedule: "packed": what is contrasted
            and what is masked are one forward, and what is matched, whose negatives the contrast chooses, another; or "published", six.
        losses: some of "mlm", "itm", "itc", "itc_vl"; None: all. What serves only losses left out does not run (for "itc" and "itc_vl",
            their kind of top layers) and gets no gradient, or zeros where it shares a parameter with another expert.

    Example: ``losses = step(step.prepare(batch)); step.total(losses).backward()``
    """

    loss_weights: ClassVar[dict[str, float]] = {"mlm": 0.25, "itm": 1.0, "itc": 0.5, "itc_vl": 0.5}

    def __init__(
        self,
        config: VlmoConfig,
        *,
        mask_id: int,
        special_ids: Sequence[int],
        continuation_ids: Sequence[int] = (),
        schedule: str = "packed",
        losses: Sequence[str] | None = None,
    ) -> None:
        super().__init__(schedule, losses)
        self.model = Vlmo(config)
        self.mask_id, self.special_ids, self.continuation_ids = mask_id, tuple(special_ids), tuple(continuation_ids)

    def towers(self) -> dict[str, nn.Module]:
        return {"encoder": self.model.encoder}

    def prepare(self, batch: Batch, generator: torch.Generator | None = None) -> VlmoInputs:
        """Hides 15 % of the words of each caption, at least one, with all their pieces; of the pieces 80 % become [MASK], 10 % another
        word, 10 % stay."""
        ids, special = batch.token_ids, self.special_ids
        starts = ~torch.isin(ids, torch.tensor(self.continuation_ids, dtype=ids.dtype, device=ids.device))
        starts[batch.segments().first_rows()] = True
        words = [int(part.sum()) for part in starts.split(list(batch.text_lengths))]
        drawn = mask_tokens(ids[starts], words, MASK_RATIO, self.mask_id, special, generator).masked_rows
        rows = torch.isin(starts.cumsum(0) - 1, drawn).nonzero()[:, 0]
        vocab_size = self.model.config.vocab_size
        pieces = mask_tokens(ids[rows], [len(rows)], 1.0, self.mask_id, special, generator, vocab_size=vocab_size)
        return VlmoInputs(batch, ids.index_copy(0, rows, pieces.input_ids), rows)

    def forward(self, inputs: VlmoInputs, *, negatives: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """The four losses of one step.

        Args:
            inputs: of `prepare`: images and packed captions ([CLS] words [SEP]), at least 2 pairs. An image with several captions counts
                as often as it has captions.
            negatives: of pair i, the pair whose image is wrong for its caption and the pair whose caption is wrong for its image, int64
                ``[captions]`` each; default: drawn by similarity. They are read on the host, the one place where a step waits for the
                device: captions differ in length.

        Returns: scalars "mlm", "itm", "itc", "itc_vl", or those of them that `losses` names.
        Raises: ValueError for "itm" without "itc", whose similarities say which negatives are hard, and without `negatives`.
        """
        self.check_negatives(negatives)
        model, images, ids, captions = self.model, inputs.pairs.images, inputs.pairs.token_ids, inputs.pairs.segments()
        image_of, backend = inputs.pairs.image_of(), self.backend
        mlm, itm, itc, itc_vl = (name in self.losses for name in self.loss_weights)
        vl = [joint for joint, needed in ((False, itc), (True, itc_vl)) if needed]
        made: dict[str, Tensor] = {}
        if self.packed and (vl or mlm):
            with loss_scope("itc" if itc else "itc_vl" if itc_vl else "mlm"):
                image, caption, text = model.contrast_and_mask(
                    images, ids, captions, inputs.masked_ids if mlm else None, image_of, vl
                )
        elif not self.packed:
            if mlm:
                with loss_scope("mlm"):
                    text = model.encode_pairs(inputs.pairs.of_captions(images), inputs.masked_ids, captions).text
            if vl:
                with loss_scope("itc" if itc else "itc_vl"):
                    image, caption = model.contrast_image(images, vl), model.contrast_text(ids, captions, vl)
        if mlm:
            with loss_scope("mlm"):
                weight, bias, rows = model.word_head.weight, model.word_head.bias, inputs.masked_rows
                made["mlm"] = linear_cross_entropy(model.word_hidden(text[rows]), weight, ids[rows], bias, backend=backend)
        if itc:
            with loss_scope("itc"):
                features = inputs.pairs.of_captions(image.features)
                made["itc"] = losses.contrastive_loss(features, caption.features, model.log_scale.exp(), backend=backend)
        if itc_vl:
            with loss_scope("itc_vl"):
                vl_features, scale = inputs.pairs.of_captions(image.vl_features), model.log_vl_scale.exp()
                made["itc_vl"] = losses.contrastive_loss(vl_features, caption.vl_features, scale, backend=backend)
        if itm:
            with loss_scope("itm"):
                if negatives is None:
                    scale = model.log_scale.exp()
                    negatives = (
                        losses.hard_negatives(caption.features, features, scale, floor=0.0, backend=backend),
                        losses.hard_negatives(features, caption.features, scale, floor=0.0, backend=backend),
                    )
                made["itm"] = self._match(inputs.pairs, negatives)
        return made

    def _match(self, pairs: Batch, negatives: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of telling pairs from those with another image and from those with another caption."""
        model, images, ids, captions, image_of = self.model, pairs.images, pairs.token_ids, pairs.segments(), pairs.image_of()
        # the step's one host sync: captions differ in length, so which are negatives decides how many rows follow
        other_image, other_caption = torch.stack(negatives).tolist()
        rows, other_captions = captions.take(other_caption)
        wrong_image = [image_of[i] for i in other_image]
        kinds = [(ids, captions, image_of), (ids, captions, wrong_image), (ids[rows], other_captions, image_of)]
        if self.packed:
            segments = Segments([n for kind in kinds for n in kind[1].lengths], ids.device)
            index = [i for kind in kinds for i in kind[2]]
            pooled = model.pool_pairs(images, torch.cat([kind[0] for kind in kinds]), segments, index)
        else:
            pooled = torch.cat([model.encode_pairs(images[i], words, segments).pooled for words, segments, i in kinds])
        return losses.matching_loss(model.matching_logits(pooled), num_positive=len(captions))
