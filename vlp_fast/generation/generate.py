"""Captions for images: the one entry point, its checks, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlp_fast.generation.beit3_decoder import Beit3Decoder
from vlp_fast.generation.decoders import (
    BlipAnswerDecoder,
    BlipDecoder,
    CocaDecoder,
    CocaPalmDecoder,
    Decoder,
    Questions,
    Texts,
)
from vlp_fast.generation.rules import Rules
from vlp_fast.generation.search import BeamSettings, Found, SampleSettings, search_beams, search_words
from vlp_fast.models.beit3 import Beit3MaskedModel
from vlp_fast.models.beit3_tasks import Beit3Captioner
from vlp_fast.models.blip import Blip, BlipCaptioner
from vlp_fast.models.blip_tasks import BlipVqa
from vlp_fast.models.coca import Coca
from vlp_fast.models.coca_experts import CocaExperts
from vlp_fast.models.coca_open_clip import OpenClipCoca
from vlp_fast.models.coca_palm import CocaPalm
from vlp_fast.segments import Segments

__all__ = ["Captions", "decoder_of", "generate"]

BEIT3 = (Beit3Captioner, Beit3MaskedModel)
COCA = (Coca, CocaExperts, OpenClipCoca)


class Captions(NamedTuple):
    """Generated texts: those of image 0, best first, then those of image 1; answers: those to question 0 first.

    Attributes:
        token_ids: int64, packed: start token, prompt, new words, and the end token where it was reached. segments: their `Segments`.
        images: the image of each text; of an answer, its question. scores: fp32 ``[texts]``, as `generate` defines them.
    """

    token_ids: Tensor
    segments: Segments
    images: list[int]
    scores: Tensor

    def lists(self) -> list[list[int]]:
        """The token ids of each text, for a tokenizer."""
        return [part.tolist() for part in self.token_ids.split(list(self.segments.lengths))]


@torch.no_grad()
def generate(
    model: nn.Module | Decoder,
    images: Tensor,
    *,
    eos_id: int,
    start_id: int | None = None,
    mask_id: int | None = None,
    questions: Questions | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    max_length: int = 20,
    min_length: int = 0,
    num_captions: int = 1,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> Captions:
    """Writes captions, or answers to questions: the most probable word after another, by beams, or drawn at random.

    The tokens are those of Hugging Face's ``generate`` with the same weights and the options of the same names, for greedy and beam search.
    An image is encoded once, and its keys and values are made once per layer for all its beams or captions. Images do not see each other:
    greedy and beam search write for a batch what they write for each image alone. (In a batch of padded questions transformers and BLIP's
    code let answers read the padding; here there is none, and answers are those they give to each question alone.)

    Args:
        model: `Blip`, `BlipCaptioner`, `BlipVqa`, `Coca`, `CocaExperts`, `CocaPalm`, `OpenClipCoca`, `Beit3Captioner` or
            `Beit3MaskedModel`, in eval mode; or a `Decoder`.
        images: ``[batch, 3, image_size, image_size]``.
        eos_id: the word that ends a caption. start_id: the first token; default: BLIP's [DEC]. mask_id: BEiT-3's [MASK].
        questions: what `BlipVqa` answers, in as many texts; several may be about one image. Below, a caption is then an answer, and
            "per image" means per question.
        prompts: words that each caption begins with, after the start token, one list per image; they may differ in length. (The lists
            that differ cost more: their caches are not regular.) Default: none.
        max_length, min_length: tokens of a caption, with start token, prompt and end token; before `min_length` it does not end.
        num_captions: captions per image: the best of the beams, or so many draws.
        num_beams: 1: no beams. length_penalty: a finished beam's score is divided by (new tokens) ** length_penalty. early_stopping: True:
            stop when `num_beams` have finished; False: when the best running beam could not enter at its present length; "never": when
            it could not at any length.
        sample: draw words. temperature: divides the logits. top_k: among the k best. top_p: among the fewest best that hold this
            probability. generator: of random numbers, on the images' device: the same one gives the same captions.
        repetition_penalty: words already in the text have positive logits divided, negative ones multiplied by it (with beams: log
            probabilities).

    Returns:
        `Captions`. A score is the sum of the log probabilities of the new tokens, in the distributions they were taken from (after penalty,
        temperature and filters); for beams divided by the length to the power of `length_penalty`.

    Raises:
        ValueError: an option that breaks a rule above, or does not go with the others.
        TypeError: a model that cannot write.

    Memory: keys and values of every image once, and of every text; on a CPU those of 16-bit models are kept in fp32, which is faster there.
    Waiting for the device: once a step, to know whether to stop.
    """
    decoder, first = decoder_of(model, start_id, mask_id, questions)
    sampling = temperature != 1.0 or top_k is not None or top_p is not None or generator is not None
    ids = {"eos_id": eos_id, "start_id": first, **({} if mask_id is None else {"mask_id": mask_id})}
    _check_ids(ids, decoder.vocab_size)
    _check_strategy(num_beams, num_captions, sample, sampling, length_penalty, early_stopping, decoder.vocab_size)
    _check_numbers(temperature, top_k, top_p, repetition_penalty)
    read = len(images) if questions is None else len(questions.image_of_each(len(images)))  # images or questions
    texts = _texts(prompts, first, read, decoder.vocab_size, images.device)
    longest = texts.segments.max_length
    if not 0 <= min_length <= max_length <= decoder.max_positions:
        raise ValueError(
            f"min_length must be from 0 to max_length, and max_length at most the model's {decoder.max_positions}; received "
            f"{min_length} and {max_length}."
        )
    if read == 0:
        return Captions(texts.token_ids, texts.segments, [], torch.zeros(0, device=images.device))
    if longest >= max_length:
        raise ValueError(
            f"max_length must leave room for a word after start token and prompt; received {max_length} for {longest} tokens."
        )
    copies = num_beams if num_beams > 1 else num_captions
    rows = [i for i in range(read) for _ in range(copies)]
    lengths = [texts.segments.lengths[i] for i in rows]
    limits = [max_length - n for n in lengths]
    rules = Rules(_padded(texts, rows, first), [max(min_length - n, 0) for n in lengths], eos_id, repetition_penalty)
    writing = decoder.start(images, texts, copies, max(limits))
    if num_beams > 1:
        beams = BeamSettings(beams=num_beams, length_penalty=length_penalty, early_stopping=early_stopping)
        found = search_beams(writing, rules, eos_id, limits, beams, num_captions)
    else:
        drawing = SampleSettings(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator) if sample else None
        found = search_words(writing, rules, eos_id, limits, drawing)
    return _captions(texts, found, num_captions)


def decoder_of(
    model: nn.Module | Decoder, start_id: int | None, mask_id: int | None, questions: Questions | None = None
) -> tuple[Decoder, int]:
    """The decoder of a model, and the token that its texts start with.

    Raises:
        ValueError: ids that the model needs and that are missing, or a model in training mode. TypeError: a model that cannot write.
    """
    if isinstance(model, nn.Module) and model.training:
        raise ValueError("generate needs the model in eval mode; call model.eval() first.")
    name = type(model).__name__
    if mask_id is not None and not isinstance(model, BEIT3):
        raise ValueError(f"mask_id is BEiT-3's; received {mask_id} for {name}.")
    if (questions is None) == isinstance(model, BlipVqa):
        need = "must be given for" if questions is None else "are BlipVqa's; received some for"
        raise ValueError(f"questions {need} {name}.")
    if isinstance(model, Blip | BlipCaptioner):
        return BlipDecoder(model), model.config.dec_id if start_id is None else start_id
    if isinstance(model, BlipVqa):
        assert questions is not None
        return BlipAnswerDecoder(model, questions), model.config.dec_id if start_id is None else start_id
    if isinstance(model, nn.Module) and not isinstance(model, (CocaPalm, *COCA, *BEIT3)):
        raise TypeError(f"model must be a BLIP, CoCa or BEiT-3 that can write, or a Decoder; received {name}.")
    if start_id is None:
        raise ValueError(f"start_id must be given for {name}: its configuration names no first token.")
    if isinstance(model, COCA):
        return CocaDecoder(model), start_id
    if isinstance(model, CocaPalm):
        return CocaPalmDecoder(model), start_id
    if isinstance(model, BEIT3):
        if mask_id is None:
            raise ValueError(f"mask_id must be given for {name}: the next word is read in a [MASK].")
        return Beit3Decoder(model, mask_id), start_id
    assert not isinstance(model, nn.Module)
    return model, start_id


def _check_ids(ids: dict[str, int], vocab_size: int) -> None:
    for name, value in ids.items():
        if not 0 <= value < vocab_size:
            raise ValueError(f"{name} must be a word of the vocabulary of {vocab_size}; received {value}.")


def _check_strategy(
    num_beams: int,
    num_captions: int,
    sample: bool,
    sampling: bool,
    length_penalty: float,
    early_stopping: bool | str,
    vocab_size: int,
) -> None:
    if num_beams < 1 or 2 * num_beams > vocab_size or num_captions < 1:
        raise ValueError(
            f"num_beams and num_captions must be at least 1, and twice the beams at most the vocabulary; received {num_beams} and "
            f"{num_captions}."
        )
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping must be True, False or 'never'; received {early_stopping!r}.")
    if num_beams > 1:
        if sample:
            raise ValueError(f"sample draws one text at a time; received sample=True with num_beams={num_beams}.")
        if num_captions > num_beams:
            raise ValueError(f"num_captions can be at most num_beams; received {num_captions} and {num_beams}.")
    elif length_penalty != 1.0 or early_stopping is not False:
        raise ValueError("length_penalty and early_stopping are of beam search; give num_beams above 1.")
    elif num_captions > 1 and not sample:
        raise ValueError(f"greedy search finds one caption; received num_captions={num_captions} without sample or num_beams.")
    if sampling and not sample:
        raise ValueError("temperature, top_k, top_p and generator are of sampling; give sample=True.")


def _check_numbers(temperature: float, top_k: int | None, top_p: float | None, repetition_penalty: float) -> None:
    if not temperature > 0.0 or not repetition_penalty > 0.0:
        raise ValueError(
            f"temperature and repetition_penalty must be above 0; received {temperature} and {repetition_penalty}."
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1; received {top_k}.")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be above 0 and at most 1; received {top_p}.")


def _texts(prompts: Sequence[Sequence[int]] | None, start_id: int, images: int, vocab_size: int, device: torch.device) -> Texts:
    words = [[]] * images if prompts is None else [[int(w) for w in p] for p in prompts]
    if len(words) != images:
        raise ValueError(f"prompts must have one list per image; received {len(words)} for {images} images.")
    for i, prompt in enumerate(words):
        for word in prompt:
            if not 0 <= word < vocab_size:
                raise ValueError(f"prompts must hold words of the vocabulary of {vocab_size}; prompts[{i}] holds {word}.")
    token_ids = torch.tensor([w for prompt in words for w in (start_id, *prompt)], dtype=torch.long)
    return Texts(token_ids.to(device), Segments([len(p) + 1 for p in words], device))


def _padded(texts: Texts, rows: Sequence[int], fill: int) -> Tensor:
    """The texts named by `rows` as int64 ``[rows, longest]``, filled up with the token they start with."""
    parts = texts.token_ids.split(list(texts.segments.lengths))
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=fill)[list(rows)]


def _captions(texts: Texts, found: Found, num_captions: int) -> Captions:
    prompts = texts.token_ids.split(list(texts.segments.lengths))
    lengths = found.lengths.tolist()
    images = [i for i in range(len(prompts)) for _ in range(num_captions)]
    parts = [part for i, words, n in zip(images, found.words, lengths, strict=True) for part in (prompts[i], words[:n])]
    segments = Segments([texts.segments.lengths[i] + n for i, n in zip(images, lengths, strict=True)], texts.token_ids.device)
    return Captions(torch.cat(parts), segments, images, found.scores)
