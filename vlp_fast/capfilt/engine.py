"""The two models of CapFilt and what they say of images and texts; nothing here knows files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlp_fast.data import ImageTransform, WordPieceTokenizer
from vlp_fast.generation import generate
from vlp_fast.models.blip import Blip, BlipCaptioner, BlipRetriever
from vlp_fast.segments import Segments

__all__ = ["CapFilt", "CapFiltSettings", "Score", "score_captions"]

MAX_TOKENS = 35  # of a caption that is scored: BLIP's in evaluation of retrieval


@dataclass(frozen=True, kw_only=True)
class CapFiltSettings:
    """How captions are written and which are kept; the defaults are BLIP's.

    Attributes:
        prompt: what a synthetic caption begins with; cut from it afterwards. captions: synthetic ones per image.
        top_p, repetition_penalty, min_length, max_length: as in `vlp_fast.generation.generate`; lengths count [DEC] and prompt.
        threshold: the least probability of "matches"; None: the matching head's own decision, the larger logit.
        cosine_threshold: the least cosine of the contrastive features, asked besides; None: any.
        seed: of the words drawn. batch: pairs worked on at once. shard_size: pairs of the data for each chunk of the output.
        limit: take the first so many pairs only.
    """

    prompt: str = "a picture of "
    captions: int = 1
    top_p: float = 0.9
    repetition_penalty: float = 1.1
    min_length: int = 5
    max_length: int = 20
    threshold: float | None = None
    cosine_threshold: float | None = None
    seed: int = 0
    batch: int = 16
    shard_size: int = 1000
    limit: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("captions", 1), ("batch", 1), ("shard_size", 1), ("limit", 1), ("seed", 0), ("min_length", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}; received {value}.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1; received {self.top_p}.")
        if not self.repetition_penalty > 0.0:
            raise ValueError(f"repetition_penalty must be above 0; received {self.repetition_penalty}.")
        if self.min_length > self.max_length:
            raise ValueError(f"min_length must be at most max_length, {self.max_length}; received {self.min_length}.")
        if self.threshold is not None and not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold must be a probability, from 0 to 1; received {self.threshold}.")
        if self.cosine_threshold is not None and not -1.0 <= self.cosine_threshold <= 1.0:
            raise ValueError(f"cosine_threshold must be from -1 to 1; received {self.cosine_threshold}.")


class Score(NamedTuple):
    """itm: probability of "matches". cosine: of the contrastive features. matches: whether that logit is the larger one."""

    itm: float
    cosine: float
    matches: bool


@torch.no_grad()
def score_captions(
    matcher: Blip | BlipRetriever, images: Tensor, token_ids: Tensor, segments: Segments, index: Sequence[int]
) -> list[Score]:
    """How well captions describe their images, in one packed pass for matching and one for the features; images are encoded once.

    Args:
        matcher: in eval mode. images: ``[batch, 3, image_size, image_size]``.
        token_ids, segments: the captions, packed: [CLS] words [SEP]. index: the image of each.
    """
    image = matcher.encode_image(images)
    matching = matcher.matching_pass("capfilt", token_ids, segments, index)
    (rows,) = matcher.text_tower([matching], image.rows, image.segments)
    logits = matcher.matching_logits(rows).float()
    of = torch.tensor(list(index), dtype=torch.long, device=image.features.device)
    cosines = (matcher.encode_text(token_ids, segments) * image.features[of]).sum(-1)
    matches = logits[:, 1] > logits[:, 0]
    return [Score(*found) for found in zip(logits.softmax(-1)[:, 1].tolist(), cosines.tolist(), matches.tolist(), strict=True)]


class CapFilt:
    """A captioner and a filter.

    Args:
        captioner: `Blip` or `BlipCaptioner`. matcher: the filter, `Blip` or `BlipRetriever`; a `Blip` may be both. Both in eval mode,
            on one device.
        tokenizer: with the vocabulary of both.

    Raises: TypeError: a model that cannot do its part. ValueError: one in training mode, another vocabulary, or lengths that do not fit.
    """

    def __init__(
        self,
        captioner: Blip | BlipCaptioner,
        matcher: Blip | BlipRetriever,
        tokenizer: WordPieceTokenizer,
        settings: CapFiltSettings,
    ) -> None:
        if not isinstance(captioner, Blip | BlipCaptioner):
            raise TypeError(f"captioner must be a Blip or a BlipCaptioner; received a {type(captioner).__name__}.")
        if not isinstance(matcher, Blip | BlipRetriever):
            raise TypeError(f"filter must be a Blip or a BlipRetriever; received a {type(matcher).__name__}.")
        for name, model, token in (("captioner", captioner, "dec_id"), ("filter", matcher, "enc_id")):
            if model.training:
                raise ValueError(f"{name} must be in eval mode; call its eval() first.")
            own, given = (
                (model.config.vocab_size, getattr(model.config, token)),
                (tokenizer.vocab_size, getattr(tokenizer, token)),
            )
            if own != given:
                raise ValueError(
                    f"the vocabulary must be that of the {name}, of {own[0]} words with {token} {own[1]}; received one of {given[0]} "
                    f"with {token} {given[1]}."
                )
        self.captioner, self.matcher, self.tokenizer, self.settings = captioner, matcher, tokenizer, settings
        self.device = next(captioner.parameters()).device
        # between [CLS] and [SEP]; `generate` puts [DEC] before it
        self.prompt = tokenizer.encode([settings.prompt], MAX_TOKENS)[0][1:-1]
        self._prompt_text = tokenizer.decode(self.prompt)
        most = captioner.config.max_positions
        if not len(self.prompt) + 1 < settings.max_length <= most:
            raise ValueError(
                f"max_length must leave room for a word after [DEC] and the prompt's {len(self.prompt)} tokens, and be at most the "
                f"captioner's {most}; received {settings.max_length}."
            )
        self.transforms = tuple(ImageTransform(model.config.image_size) for model in (captioner, matcher))

    def captions(self, images: Tensor, position: int) -> list[list[str]]:
        """Synthetic captions of each image, the prompt cut off; one may be empty.

        Args:
            images: ``[batch, 3, image_size, image_size]``, of the captioner's size.
            position: of the first image's pair in the data. With the seed it determines the words drawn for this batch.
        """
        s = self.settings
        state = np.random.SeedSequence([s.seed, position]).generate_state(2, np.uint32)
        generator = torch.Generator(self.device).manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)
        written = generate(
            self.captioner,
            self._placed(images, self.captioner),
            eos_id=self.tokenizer.sep_id,
            prompts=[self.prompt] * len(images),
            max_length=s.max_length,
            min_length=s.min_length,
            num_captions=s.captions,
            sample=True,
            top_p=s.top_p,
            repetition_penalty=s.repetition_penalty,
            generator=generator,
        )
        texts = iter([self._without_prompt(ids) for ids in written.lists()])
        return [list(itertools.islice(texts, s.captions)) for _ in images]

    def scores(self, images: Tensor, texts: Sequence[Sequence[str]]) -> list[list[Score]]:
        """The filter's scores of each image's texts. images: ``[batch, 3, image_size, image_size]``, of the filter's size."""
        index = [image for image, own in enumerate(texts) for _ in own]
        if not index:
            return [[] for _ in texts]
        tokens = self.tokenizer.encode(
            [text for own in texts for text in own], min(MAX_TOKENS, self.matcher.config.max_positions)
        )
        token_ids = torch.tensor([token for text in tokens for token in text], dtype=torch.long).to(self.device)
        segments = Segments([len(text) for text in tokens], self.device)
        scores = iter(score_captions(self.matcher, self._placed(images, self.matcher), token_ids, segments, index))
        return [list(itertools.islice(scores, len(own))) for own in texts]

    def keeps(self, score: Score) -> bool:
        """Whether a caption with this score stays."""
        s = self.settings
        matches = score.matches if s.threshold is None else score.itm >= s.threshold
        return matches and (s.cosine_threshold is None or score.cosine >= s.cosine_threshold)

    def _placed(self, images: Tensor, model: torch.nn.Module) -> Tensor:
        return images.to(self.device, next(model.parameters()).dtype)

    def _without_prompt(self, token_ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(token_ids)
        if text.startswith(self._prompt_text):
            return text[len(self._prompt_text) :].strip()
        # a first word that the decoder joins with the prompt's last
        return self.tokenizer.decode(token_ids[1 + len(self.prompt) :]).strip()
