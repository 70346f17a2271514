"""What suite "steps" compares: a step of ours and the rival's, with the same weights, images and captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_fast.benchmarks import step_rivals
from vlp_fast.benchmarks.registry import NotHere, Options
from vlp_fast.benchmarks.step_rivals import (
    BEIT3_WORDS,
    BOS,
    CLS,
    COCA_WORDS,
    CODES,
    DEC,
    ENC,
    END,
    EOS,
    MASK,
    PAD,
    SEP,
    START,
)
from vlp_fast.data.batches import Batch
from vlp_fast.models import beit3_preset, blip_preset, open_clip_coca_preset
from vlp_fast.models.checkpoints import open_clip_coca
from vlp_fast.models.checkpoints.beit3 import format_of
from vlp_fast.profile_peers import torchvision_names
from vlp_fast.training import Beit3Pretraining, BlipPretraining, CocaPretraining, GraphedStep, caption_lengths, salesforce_blip
from vlp_fast.training.beit3 import Beit3Inputs, MaskedImages, MaskedTexts

__all__ = ["SHAPES", "Steps", "build"]

PADDED = {"blip": 30, "coca": 76, "beit3": 64}
SHAPES = {
    "tiny": {"image_size": 64, "depth": 2, "width": 128, "heads": 2, "hidden": 256},
    "small": {"image_size": 224, "depth": 6, "width": 384, "heads": 6, "hidden": 1536},
    "base": {"image_size": 224, "depth": 12, "width": 768, "heads": 12, "hidden": 3072},
}


@dataclass
class Steps:
    """What is compared. own: our objective. inputs: what its step takes, for one caption an image (1) and, where it may have more, two.

    weights: of the losses. rival: the published code's model with the same weights, and its step -> losses by name; None where it is not
    here, for the reason in `absent`. negatives: given to our step in evaluation: those that the rival drew.
    """

    own: nn.Module
    inputs: dict[int, Any]
    weights: dict[str, float]
    rival: nn.Module | None = None
    rival_step: Callable[[], dict[str, Tensor]] | None = None
    negatives: Callable[[], tuple[Tensor, Tensor]] | None = None
    absent: str = ""

    def own_step(self, provider: str) -> dict[str, Tensor]:
        """Our losses: provider is a schedule, and how many captions an image has."""
        schedule, _, captions = provider.partition(", ")
        self.own.schedule = schedule
        given = {} if self.own.training or self.negatives is None else {"negatives": self.negatives()}
        return self.own(self.inputs[2 if captions else 1], **given)

    def graphed(self, autocast: torch.dtype | None) -> GraphedStep:
        """Our packed step as a CUDA graph, in the mode that our objective is in; its negatives are given."""
        self.own.schedule = "packed"
        given = {} if self.negatives is None else {"negatives": self.negatives()}
        return GraphedStep(self.own, self.inputs[1], autocast=autocast, **given)


def build(options: Options, model: str) -> Steps:
    """The steps of "blip", "coca" or "beit3" at the options' size."""
    return {"blip": _blip, "coca": _coca, "beit3": _beit3}[model](options, SHAPES[options.size])


def _captions(lengths: list[int], padded: int, first: int, last: int, pad: int, words: range) -> tuple[Tensor, Tensor]:
    """Token ids ``[captions, padded]`` and which of them are there."""
    there = torch.arange(padded) < torch.tensor(lengths)[:, None]
    ids = torch.randint(words.start, words.stop, there.shape)
    ids[:, 0] = first
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = last
    return ids.masked_fill(~there, pad), there


def _lengths(batch: int, most: int) -> list[int]:
    lengths = torch.tensor(caption_lengths(batch)).clamp(max=most)
    return lengths[torch.randperm(batch)].tolist()


def _twice(batch: Batch) -> Batch:
    """Every image with a second caption of the same length."""
    ids = batch.token_ids
    described = tuple(range(batch.batch_size))
    return replace(
        batch, token_ids=torch.cat([ids, ids]), text_lengths=2 * batch.text_lengths, captions=2 * batch.captions,
        image_index=2 * described,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------- BLIP


def _blip(options: Options, sizes: dict[str, int]) -> Steps:
    rival, absent = None, ""
    try:
        rival = step_rivals.salesforce_blip(options.blip_source, sizes).to(options.device)
        fields = {"num_heads": sizes["heads"], "vision_heads": sizes["heads"], "dec_id": DEC, "enc_id": ENC}
        own: Any = salesforce_blip.FORMAT.load(rival.state_dict(), dropout_p=0.1, **fields)
    except (NotHere, ImportError) as error:
        absent = str(error)
        config = blip_preset(
            "base", image_size=sizes["image_size"], vision_dim=sizes["width"], vision_depth=sizes["depth"],
            vision_heads=sizes["heads"], dim=sizes["width"], depth=sizes["depth"], num_heads=sizes["heads"],
            hidden_dim=sizes["hidden"],
        )  # fmt: skip
        own = BlipPretraining(config)
    lengths = _lengths(options.batch, PADDED["blip"])
    ids, there = (t.to(options.device) for t in _captions(lengths, PADDED["blip"], CLS, SEP, 0, range(1000, 30000)))
    images = torch.randn(len(lengths), 3, sizes["image_size"], sizes["image_size"]).to(options.device)
    batch = Batch(images, ids[there], tuple(lengths), ("",) * len(lengths))
    # where no rival draws them, each pair's neighbour
    drawn = 2 * [(i + 1) % len(lengths) for i in range(len(lengths))]
    draw = torch.multinomial

    def recorded(weights: Tensor, count: int, *rest: Any, **options: Any) -> Tensor:
        found = draw(weights, count, *rest, **options)
        drawn.append(int(found[0]))
        return found

    def rival_step() -> dict[str, Tensor]:
        assert rival is not None
        if rival.training:
            return dict(zip(("itc", "itm", "lm"), rival(images, (ids, there.long()), 0.4), strict=True))
        drawn.clear()
        torch.multinomial = recorded
        try:
            return dict(zip(("itc", "itm", "lm"), rival(images, (ids, there.long()), 0.4), strict=True))
        finally:
            torch.multinomial = draw

    def negatives() -> tuple[Tensor, Tensor]:
        return torch.tensor(drawn[: len(lengths)]), torch.tensor(drawn[len(lengths) :])

    weights = {"itc": 1.0, "itm": 1.0, "lm": 1.0}
    inputs = {1: batch, 2: _twice(batch)}
    step = None if rival is None else rival_step
    return Steps(own.to(options.device), inputs, weights, rival, step, negatives, absent)


# --------------------------------------------------------------------------------------------------------------------- CoCa


def _coca(options: Options, sizes: dict[str, int]) -> Steps:
    rival, absent = None, ""
    try:
        rival = step_rivals.open_clip_coca(
            image_size=sizes["image_size"], width=sizes["width"], depth=sizes["depth"], head_dim=sizes["width"] // sizes["heads"],
            pooler_queries=256, pooler_heads=8, vocab_size=COCA_WORDS, length=PADDED["coca"],
        )  # fmt: skip
        from open_clip.loss import CoCaLoss

        loss = CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=1.0)
        loaded = open_clip_coca.FORMAT.load(rival.state_dict())
        own = CocaPretraining(loaded.config)
        own.model = loaded
        rival = rival.to(options.device)
    except ImportError as error:
        absent = str(error)
        hidden = 4 * sizes["width"]
        config = open_clip_coca_preset(
            "ViT-B-32", patch_size=16, image_size=sizes["image_size"], vision_dim=sizes["width"], vision_depth=sizes["depth"],
            vision_heads=sizes["heads"], vision_hidden_dim=hidden, dim=sizes["width"], unimodal_depth=sizes["depth"],
            num_heads=sizes["heads"], hidden_dim=hidden, multimodal_depth=sizes["depth"], decoder_heads=sizes["heads"],
            decoder_hidden_dim=hidden,
        )  # fmt: skip
        own = CocaPretraining(config)
    lengths = _lengths(options.batch, PADDED["coca"])
    ids, there = (t.to(options.device) for t in _captions(lengths, PADDED["coca"], START, END, 0, range(1, 49000)))
    images = torch.randn(len(lengths), 3, sizes["image_size"], sizes["image_size"]).to(options.device)
    batch = Batch(images, ids[there], tuple(lengths), ("",) * len(lengths))

    def rival_step() -> dict[str, Tensor]:
        assert rival is not None
        return dict(zip(("contrastive", "caption"), loss(**rival(images, ids)), strict=True))

    weights, inputs = {"contrastive": 1.0, "caption": 2.0}, {1: batch, 2: _twice(batch)}
    return Steps(own.to(options.device), inputs, weights, rival, None if rival is None else rival_step, absent=absent)


# ------------------------------------------------------------------------------------------------------------------- BEiT-3


class _Codes:
    """Stands where a visual tokenizer does: its ids are drawn."""

    num_codes = CODES

    def encode(self, images: Tensor) -> Tensor:
        raise NotImplementedError("targets are drawn")


def _beit3(options: Options, sizes: dict[str, int]) -> Steps:
    _beit3.library = torchvision_names()
    rival, absent, positions = None, "", 1022
    try:
        rival = step_rivals.Torchscale(sizes)
        state = {name: t for name, t in rival.state_dict().items() if name.startswith("beit3.")}
        trunk = format_of(state).load(state, num_heads=sizes["heads"])
        positions = trunk.config.max_positions
    except ImportError as error:
        absent = str(error)
    config = beit3_preset(
        "base", image_size=sizes["image_size"], dim=sizes["width"], depth=sizes["depth"], num_heads=sizes["heads"],
        hidden_dim=sizes["hidden"], vocab_size=BEIT3_WORDS, visual_vocab_size=CODES, max_positions=positions,
    )  # fmt: skip
    own = Beit3Pretraining(config, _Codes(), mask_id=MASK, special_ids=(BOS, PAD, EOS))
    if rival is not None:
        own.model.load_trunk(trunk)
        own.model.word_head.load_state_dict(rival.words.state_dict())
        own.model.visual_head.load_state_dict(rival.codes.state_dict())
        rival = rival.to(options.device)
    patches, size = (sizes["image_size"] // 16) ** 2, options.batch
    kinds = [(_masked_images(size, patches, sizes), _masked_texts(size, share)) for share in (0.15, 0.5)]
    (alone, (text, padded)), (pair_image, (pair_text, pair_padded)) = kinds
    inputs = Beit3Inputs(alone, text, pair_image, pair_text).to(options.device)
    alone, text, pair_image, pair_text = inputs.parts()
    padded, pair_padded = (tuple(t.to(options.device) for t in tensors) for tensors in (padded, pair_padded))

    def rival_step() -> dict[str, Tensor]:
        assert rival is not None
        encode, kept = rival.beit3, lambda rows, mask: rows[:, 1:][mask]
        out = encode(visual_tokens=alone.images, vision_masked_position=alone.mask)["encoder_out"]
        mim = F.cross_entropy(rival.codes(kept(out, alone.mask)), alone.targets)
        out = encode(textual_tokens=padded[0], text_padding_position=padded[1])["encoder_out"]
        mlm = F.cross_entropy(rival.words(out[padded[2]]), text.targets)
        found = encode(pair_padded[0], pair_image.images, pair_padded[1], vision_masked_position=pair_image.mask)
        out, split = found["encoder_out"], found["multiway_split_position"]
        mvlm = F.cross_entropy(rival.codes(kept(out[:, :split], pair_image.mask)), pair_image.targets)
        mvlm = mvlm + F.cross_entropy(rival.words(out[:, split:][pair_padded[2]]), pair_text.targets)
        return {"mim": mim, "mlm": mlm, "mvlm": mvlm}

    weights = {"mim": 1.0, "mlm": 1.0, "mvlm": 1.0}
    return Steps(own.to(options.device), {1: inputs}, weights, rival, None if rival is None else rival_step, absent=absent)


def _masked_images(batch: int, patches: int, sizes: dict[str, int]) -> MaskedImages:
    hidden = int(0.4 * patches)
    mask = torch.zeros(batch, patches, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(patches)[:hidden]] = True
    image, patch = mask.nonzero(as_tuple=True)
    rows = image * (patches + 1) + 1 + patch
    images = torch.randn(batch, 3, sizes["image_size"], sizes["image_size"])
    return MaskedImages(images, mask, rows, torch.randint(CODES, (len(rows),)), (hidden,) * batch)


def _masked_texts(batch: int, share: float) -> tuple[MaskedTexts, tuple[Tensor, Tensor, Tensor]]:
    """Ours; and padded ids, where they are padding, and where they are hidden."""
    lengths = _lengths(batch, PADDED["beit3"])
    ids, there = _captions(lengths, PADDED["beit3"], BOS, EOS, PAD, range(3, 64000))
    hidden = (torch.rand(ids.shape) < share) & there
    hidden[:, 0], hidden[:, 1] = False, True
    masked = ids.masked_fill(hidden, MASK)
    rows = hidden[there].nonzero()[:, 0]
    own = MaskedTexts(masked[there], tuple(lengths), rows, ids[hidden], tuple(hidden.sum(1).tolist()))
    return own, (masked, ~there, hidden)
