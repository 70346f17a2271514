"""Pretraining steps by name, as the command line and the benchmarks build them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from vlp_fast.data.batches import Batch
from vlp_fast.data.codebook import PatchCodebook
from vlp_fast.data.tokenizer import WordPieceTokenizer
from vlp_fast.models import albef_preset, beit3_preset, blip_preset, coca_preset
from vlp_fast.models.vlmo import VlmoConfig, vlmo_preset
from vlp_fast.training.albef import AlbefPretraining
from vlp_fast.training.beit3 import Beit3Pretraining, VisualTokenizer
from vlp_fast.training.blip import BlipPretraining
from vlp_fast.training.coca import CocaPretraining
from vlp_fast.training.objective import PretrainingObjective
from vlp_fast.training.vlmo import VlmoPretraining

__all__ = ["MODELS", "SIZES", "build_pretraining", "caption_lengths", "preset", "synthetic_batch"]

MODELS = ("blip", "coca", "beit3", "albef", "vlmo")
SIZES = ("tiny", "base", "large")
_PRESETS: dict[str, Callable[..., Any]] = {
    "blip": blip_preset,
    "coca": coca_preset,
    "beit3": beit3_preset,
    "albef": albef_preset,
    "vlmo": vlmo_preset,
}
# special tokens of the vocabularies the models were published with, where no tokenizer is given
_MASK_ID, _SPECIAL_IDS = 64001, (0, 1, 2)
_BERT_MASK_ID, _BERT_SPECIAL_IDS = 103, (0, 101, 102)


def preset(model: str, size: str, tokenizer: WordPieceTokenizer | None = None, **changes: Any) -> Any:
    """The model's config; a tokenizer brings its vocabulary size (a smaller one than the preset's shrinks only tiny models).

    Raises: ValueError for an unknown model, size or field.
    """
    if model not in _PRESETS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}; received {model!r}.")
    if tokenizer is not None:
        published = _PRESETS[model](size).vocab_size
        changes.setdefault("vocab_size", tokenizer.vocab_size if size == "tiny" else max(published, tokenizer.vocab_size))
        if model == "blip":
            changes.update(pad_id=tokenizer.pad_id, dec_id=tokenizer.dec_id, enc_id=tokenizer.enc_id)
        elif model == "albef":
            changes.update(pad_id=tokenizer.pad_id, cls_id=tokenizer.cls_id, mask_id=tokenizer.mask_id)
    elif model == "blip" and "vocab_size" in changes:
        changes.setdefault("dec_id", changes["vocab_size"] - 2)
        changes.setdefault("enc_id", changes["vocab_size"] - 1)
    elif model == "albef" and "vocab_size" in changes:
        changes.setdefault("cls_id", min(101, changes["vocab_size"] - 2))
        changes.setdefault("mask_id", min(103, changes["vocab_size"] - 1))
    return _PRESETS[model](size, **changes)


def build_pretraining(
    model: str,
    size: str = "base",
    *,
    schedule: str = "packed",
    losses: Sequence[str] | None = None,
    tokenizer: WordPieceTokenizer | None = None,
    visual_tokenizer: VisualTokenizer | None = None,
    **changes: Any,
) -> PretrainingObjective:
    """A model with its pretraining losses.

    Args:
        model: "blip", "coca", "beit3", "albef" or "vlmo". size: "tiny", "base" or "large" (ALBEF has no large). schedule: how passes are
            grouped, "packed" or "published". losses: names of those to make; None: all. What is left out costs no forward pass.
        tokenizer: gives special ids and vocabulary; default: those of the published models.
        visual_tokenizer: BEiT-3 only: gives the ids of patches; default: a `PatchCodebook` of random patches, which costs what a
            trained one costs and teaches nothing: for profiles and throughput.
        changes: fields of the model's config, such as ``image_size=384`` or ``backend="torch"``.

    Raises: ValueError for an unknown model, size, schedule, loss or field.
    """
    config = preset(model, size, tokenizer, **changes)
    if model == "blip":
        return BlipPretraining(config, schedule, losses)
    if model == "coca":
        return CocaPretraining(config, schedule, losses)
    if model == "albef":
        return AlbefPretraining(config, schedule, losses)
    if model == "vlmo":
        return _vlmo(config, schedule, losses, tokenizer)
    codebook = visual_tokenizer
    if codebook is None:
        with torch.device("cpu"):
            generator = torch.Generator().manual_seed(0)
            patches = torch.randn(2, 3, config.image_size, config.image_size, generator=generator)
            codes = min(config.visual_vocab_size, 2 * (config.image_size // config.patch_size) ** 2)
            codebook = PatchCodebook.fit(patches, config.patch_size, codes, iterations=1, generator=generator)
    if tokenizer is not None:
        mask_id, special = tokenizer.mask_id, (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id)
    else:
        mask_id, special = min(_MASK_ID, config.vocab_size - 1), _SPECIAL_IDS
    return Beit3Pretraining(config, codebook, mask_id=mask_id, special_ids=special, schedule=schedule, losses=losses)


def _vlmo(
    config: VlmoConfig, schedule: str, losses: Sequence[str] | None, tokenizer: WordPieceTokenizer | None
) -> VlmoPretraining:
    if tokenizer is None:
        last = config.vocab_size - 1
        special = [min(i, last) for i in _BERT_SPECIAL_IDS]
        return VlmoPretraining(config, mask_id=min(_BERT_MASK_ID, last), special_ids=special, schedule=schedule, losses=losses)
    special = [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id]
    continuations = [i for i, word in enumerate(tokenizer.vocab) if word.startswith("##")]
    return VlmoPretraining(
        config,
        mask_id=tokenizer.mask_id,
        special_ids=special,
        continuation_ids=continuations,
        schedule=schedule,
        losses=losses,
    )


def caption_lengths(batch: int) -> list[int]:
    """Caption lengths in tokens as web captions have them: 6 + gamma(2, 4.2), at most 40, at evenly spaced quantiles; mean about 14.

    The same for the same batch, and a small batch already has the mean and a realistic longest caption.
    """
    pool = np.sort(np.clip(np.round(6 + np.random.default_rng(0).gamma(2.0, 4.2, 20000)), 6, 40).astype(int))
    return [int(pool[int((i + 0.5) / batch * len(pool))]) for i in range(batch)]


def synthetic_batch(config: Any, lengths: Sequence[int], generator: torch.Generator | None = None) -> Batch:
    """Random images and captions of the given lengths for a model's config: for profiles, where only shapes matter."""
    images = torch.randn(len(lengths), 3, config.image_size, config.image_size, generator=generator)
    ids = torch.randint(3, config.vocab_size - 3, (sum(lengths),), generator=generator)
    return Batch(images, ids, tuple(lengths), ("",) * len(lengths))
