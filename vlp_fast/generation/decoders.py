"""How a model writes a text word by word: what a search asks of it, and the steps of BLIP and the CoCas (beit3_decoder.py has BEiT-3's).

A search (`vlp_fast.generation.search`) knows `Decoder` and `Writing` only. A decoder runs the prompts of all images as one packed,
causal forward, and after that one row per text and step (BEiT-3: two), whose keys and values stay in a `TextCache`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.decode_plan import DecodePlan
from vlp_fast.generation.cache import TextCache, cached_dtype
from vlp_fast.models.blip import Blip, BlipCaptioner, ImageRows
from vlp_fast.models.blip_tasks import BlipVqa
from vlp_fast.models.coca import Coca
from vlp_fast.models.coca_experts import CocaExpertLayer, CocaExperts
from vlp_fast.models.coca_open_clip import CrossBlock, OpenClipCoca
from vlp_fast.models.coca_palm import CocaPalm
from vlp_fast.modules import CrossAttention, PostNormBlock, PreNormBlock, SelfAttention, rotary_table
from vlp_fast.modules.bound import Bound, bind, bind_expert, bind_gelu, bind_mlp
from vlp_fast.ops import attention, attention_only, decode_attention, linear
from vlp_fast.ops.decode_attention import bind_decode_attention
from vlp_fast.ops.linear import bind_linear
from vlp_fast.segments import Segments

__all__ = [
    "BlipAnswerDecoder",
    "BlipDecoder",
    "CocaDecoder",
    "CocaPalmDecoder",
    "Decoder",
    "Questions",
    "Texts",
    "Writing",
]


class Texts(NamedTuple):
    """The beginnings of texts, one per image. token_ids: int64 ``[rows]``, packed, start token first. segments: their `Segments`."""

    token_ids: Tensor
    segments: Segments


class Questions(NamedTuple):
    """Questions about images. token_ids: int64 ``[rows]``, packed: [CLS] or [ENC], words, [SEP]. segments: their `Segments`.
    images: the image of each question; None: question i is about image i."""

    token_ids: Tensor
    segments: Segments
    images: Sequence[int] | None = None

    def image_of_each(self, images: int) -> list[int]:
        """Raises ValueError where questions have no image, or another one than those that there are."""
        chosen = list(range(images)) if self.images is None else [int(i) for i in self.images]
        if len(chosen) != len(self.segments):
            raise ValueError(
                f"every question needs an image, by its place or by `images`; received {len(self.segments)} questions and "
                f"{len(chosen)} images for them."
            )
        for i in chosen:
            if not 0 <= i < images:
                raise ValueError(f"questions must be about one of the {images} images; received image {i}.")
        return chosen


class Writing(Protocol):
    """Texts being written, ``[texts]`` of them: those of image 0, then those of image 1.

    Attributes: logits: ``[texts, vocab_size]``, of the words that follow the prompts.
    """

    logits: Tensor

    def step(self, token_ids: Tensor) -> Tensor:
        """Appends one word to each text, int64 ``[texts]`` -> logits ``[texts, vocab_size]`` of the next."""

    def reorder(self, index: Tensor) -> None:
        """Text i goes on as a copy of text ``index[i]``, int64 ``[texts]``, of the same image."""


class Decoder(Protocol):
    """A model that writes. max_positions: tokens that a text may have."""

    max_positions: int
    vocab_size: int

    def start(self, images: Tensor, prompts: Texts, copies: int, steps: int) -> Writing:
        """Encodes images and prompts, once each, to write `copies` texts of up to `steps` further words for each image."""


Attend = Callable[[int, Tensor, Tensor], Tensor]  # layer, q [rows, heads, head_dim], kv [rows, 2, heads_k, head_dim] -> as q
AttendImage = Callable[[int, Tensor], Tensor]  # layer, q -> as q
Rows = Callable[[Tensor, Tensor, Attend, AttendImage], Tensor]  # token ids, positions -> [rows, dim]
Branch = Callable[[int, Tensor, Attend, AttendImage], Tensor]  # layer, rows -> what is added to them


class CrossAttendingWriting:
    """Texts that attend to themselves and, by cross-attention, to the keys and values of their image (an answer: its question).

    Args:
        rows: what the model does with words: (token ids, positions, own attention, image attention) -> ``[rows, dim]``.
        logits: ``[rows, dim]`` -> ``[rows, vocab_size]``. contexts: layer -> keys and values of all images, packed.
    """

    def __init__(
        self,
        decoder: BlipDecoder | CocaDecoder | CocaPalmDecoder,
        rows: Rows,
        logits: Callable[[Tensor], Tensor],
        contexts: Mapping[int, tuple[Tensor, Tensor]],
        image_segments: Segments,
        prompts: Texts,
        cache: TextCache,
    ) -> None:
        backend, segments = decoder.model.config.backend, prompts.segments
        self._rows, self._logits, self._cache = rows, logits, cache
        self._backend = _own_backend(backend)
        self._plan = DecodePlan.cross(image_segments.lengths, cache.copies, image_segments.device)
        own = AttentionPlan.self_attention(segments, causal=True)
        self._contexts = {layer: (_by_heads(k), _by_heads(v)) for layer, (k, v) in contexts.items()}
        cross = AttentionPlan.cross_attention(segments, image_segments)
        regular = len(set(segments.lengths)) == 1
        # prompts of one length read their images as a step does; others would be copied to a common length
        step = DecodePlan.cross(image_segments.lengths, segments.max_length, image_segments.device) if regular else None

        def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
            cache.start(layer, kv)
            if segments.max_length == 1:  # a first token reads itself alone
                return kv[:, 1].expand_as(q)
            return attention(q, kv[:, 0], kv[:, 1], own, backend=backend)

        def attend_image(layer: int, q: Tensor) -> Tensor:
            if step is not None:
                return _decode(q, self._contexts[layer], step, self._backend)
            return attention(q, *contexts[layer], cross, backend=backend)

        hidden = rows(prompts.token_ids, segments.positions(), attend, attend_image)[segments.last_rows()]
        self.logits = logits(hidden).repeat_interleave(cache.copies, 0)
        self._positions = _Positions(segments, cache.copies, decoder.max_positions)
        bind, plan = partial(bind_decode_attention, backend=self._backend), cache.plans[0]
        self._own = {layer: bind(*cache.read(layer), plan) for layer in cache.layers}
        self._image = {layer: bind(*kv, self._plan) for layer, kv in self._contexts.items()}

    def step(self, token_ids: Tensor) -> Tensor:
        self._cache.advance()
        return self._logits(self._rows(token_ids, self._positions.next(), self._attend, self._attend_image))

    def reorder(self, index: Tensor) -> None:
        self._cache.reorder(index)

    def _attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        self._cache.write(layer, kv)
        return self._own[layer](q)

    def _attend_image(self, layer: int, q: Tensor) -> Tensor:
        return self._image[layer](q)


class BlipDecoder:
    """BLIP's text tower with its decoder's self-attention. A text's first token is [DEC]."""

    def __init__(self, model: Blip | BlipCaptioner | BlipVqa) -> None:
        self.model = model
        self.max_positions, self.vocab_size = model.config.max_positions, model.config.vocab_size

    def start(self, images: Tensor, prompts: Texts, copies: int, steps: int) -> Writing:
        model, (rows, segments) = self.model, self._context(images)
        contexts = {i: _cross(block).project_context(rows) for i, block in enumerate(model.text_tower.blocks)}
        cache = TextCache(prompts.segments, copies, steps)
        return CrossAttendingWriting(self, self._rows(), self._words(), contexts, segments, prompts, cache)

    def _context(self, images: Tensor) -> ImageRows:
        """The rows that texts read, a segment for each prompt."""
        rows = self.model.image_encoder(images)
        return ImageRows(rows, self.model.image_encoder.segments(len(images), rows.device))

    def _rows(self) -> Rows:
        tower, expert = self.model.text_tower, self.model.decoder
        layers = []
        for block in tower.blocks:
            assert isinstance(block, PostNormBlock)
            own = block.attention
            qkv, proj, norm = (
                bind_expert(part, expert, tower.num_experts) for part in (own.qkv, own.proj, block.attention_norm)
            )
            cross, mlp = (
                (_cross_branch(block.cross_attention), bind(block.cross_norm)),
                (bind_mlp(block.mlp), bind(block.mlp_norm)),
            )
            layers.append(((_own_branch(qkv, proj, own.num_heads), norm), cross, mlp))

        def rows(token_ids: Tensor, positions: Tensor, attend: Attend, attend_image: AttendImage) -> Tensor:
            x = tower.embedding(token_ids, positions)
            for layer, ((own, norm), (cross, cross_norm), (mlp, mlp_norm)) in enumerate(layers):
                x = norm(x + own(layer, x, attend))
                x = cross_norm(x + cross(layer, x, attend_image))
                x = mlp_norm(x + mlp(x))
            return x

        return rows

    def _words(self) -> Bound:
        model = self.model
        transform, norm, words = bind_gelu(model.lm_transform), bind(model.lm_norm), bind_linear(*model.word_weights())
        return lambda rows: words(norm(transform(rows)))


class BlipAnswerDecoder(BlipDecoder):
    """BLIP's answer decoder: an answer reads its question's rows, which have read the image. There are as many prompts as questions."""

    def __init__(self, model: BlipVqa, questions: Questions) -> None:
        super().__init__(model)
        self._vqa, self._questions = model, questions

    def _context(self, images: Tensor) -> ImageRows:
        token_ids, segments, _ = self._questions
        about = self._questions.image_of_each(len(images))
        return ImageRows(self._vqa.encode_questions(token_ids, segments, self._vqa.encode_image(images), about), segments)


class CocaDecoder:
    """CoCa's text encoder without its CLS row, which no word reads, and the text decoder over it: the paper's, with experts of the
    modalities too, or open_clip's."""

    def __init__(self, model: Coca | CocaExperts | OpenClipCoca) -> None:
        self.model = model
        self.max_positions, self.vocab_size = model.config.context_length, model.config.vocab_size
        self._first = len(self._encoder_layers())  # layer that reads the image

    def start(self, images: Tensor, prompts: Texts, copies: int, steps: int) -> Writing:
        model, image = self.model, self.model.encode_image(images)
        contexts = {}
        for layer, block in enumerate(self._readers(), self._first):
            rows = block.context_norm(image.rows) if isinstance(block, CrossBlock) else image.rows
            contexts[layer] = _cross(block).project_context(rows)
        cache = TextCache(prompts.segments, copies, steps)
        words = bind(model.text_decoder.words)
        return CrossAttendingWriting(self, self._rows(), words, contexts, image.segments, prompts, cache)

    def _readers(self) -> Iterable[nn.Module]:
        """The modules that read the image, one per layer of the text decoder."""
        decoder = self.model.text_decoder
        return decoder.cross_blocks if isinstance(self.model, OpenClipCoca) else decoder.blocks

    def _encoder_layers(self) -> nn.ModuleList:
        return self.model.encoder.layers if isinstance(self.model, CocaExperts) else self.model.text_encoder.blocks

    def _rows(self) -> Rows:
        encoder = self.model.encoder if isinstance(self.model, CocaExperts) else self.model.text_encoder
        decoder, readers = self.model.text_decoder, [*[None] * self._first, *self._readers()]
        layers = [self._branches(*both) for both in zip([*self._encoder_layers(), *decoder.blocks], readers, strict=True)]
        norm = bind(decoder.norm)

        def rows(token_ids: Tensor, positions: Tensor, attend: Attend, attend_image: AttendImage) -> Tensor:
            x = encoder.word(token_ids) + encoder.position[positions]
            for layer, branches in enumerate(layers):
                for branch in branches:
                    x = x + branch(layer, x, attend, attend_image)
            return norm(x)

        return rows

    @staticmethod
    def _branches(block: nn.Module, reader: nn.Module | None) -> list[Branch]:
        """What a layer adds to its rows, in turn: the paper's reads the image between attention and MLP, open_clip's behind them."""
        if isinstance(block, CocaExpertLayer):
            norm, fc1, fc2 = (bind_expert(part, 1, 2) for part in (block.ffn_norm, block.fc1, block.fc2))
            return [_attends(block.attention_norm, block.attention), _adds(norm, lambda x: fc2(fc1(x)))]
        assert isinstance(block, PreNormBlock)
        branches = [_attends(block.norm1, block.attention), _adds(bind(block.norm2), bind_mlp(block.mlp))]
        if reader is block:
            branches.insert(1, _reads(block.cross_norm, block.cross_attention))
        elif isinstance(reader, CrossBlock):
            branches += [_reads(reader.norm1, reader.cross_attention), _adds(bind(reader.norm2), bind_mlp(reader.mlp))]
        return branches


class CocaPalmDecoder:
    """CoCa on PaLM's blocks, without its CLS row, which no word reads. Rotary positions have no last: texts may be of any length."""

    max_positions = 2**31 - 1

    def __init__(self, model: CocaPalm) -> None:
        self.model, self.vocab_size = model, model.config.vocab_size

    def start(self, images: Tensor, prompts: Texts, copies: int, steps: int) -> Writing:
        model, image = self.model, self.model.encode_image(images)
        first = len(model.text_encoder.blocks)
        contexts = {i: block.project_context(image.rows) for i, block in enumerate(model.text_decoder.cross_blocks, first)}
        cache = TextCache(prompts.segments, copies, steps)
        return CrossAttendingWriting(self, self._rows, self._words, contexts, image.segments, prompts, cache)

    def _rows(self, token_ids: Tensor, positions: Tensor, attend: Attend, attend_image: AttendImage) -> Tensor:
        encoder, decoder = self.model.text_encoder, self.model.text_decoder
        x = decoder.words(token_ids)
        rotary = rotary_table(positions, encoder.head_dim, dtype=x.dtype)
        readers = [*[None] * len(encoder.blocks), *decoder.cross_blocks]
        for layer, (block, reader) in enumerate(zip([*encoder.blocks, *decoder.blocks], readers, strict=True)):
            q, k, v, inner = block.project(x, rotary)
            x = block.join(x, attend(layer, q, torch.stack([k, v], 1)), inner)
            if reader is not None:
                q, inner = reader.project(x)
                x = reader.join(x, attend_image(layer, q), inner)
        return decoder.norm(x)

    def _words(self, rows: Tensor) -> Tensor:
        return linear(rows, self.model.text_decoder.words.weight)


class _Positions:
    """The position of the word that each text takes next; texts of longer prompts are complete before others, but step on."""

    def __init__(self, prompts: Segments, copies: int, max_positions: int) -> None:
        lengths = torch.tensor(prompts.lengths, dtype=torch.long).repeat_interleave(copies)
        self._next, self._last = lengths.to(prompts.device), max_positions - 1

    def next(self) -> Tensor:
        positions = self.after()
        self._next = self._next + 1
        return positions

    def after(self) -> Tensor:
        return self._next.clamp(max=self._last)


def _cross(block: nn.Module) -> CrossAttention:
    assert isinstance(block, PostNormBlock | PreNormBlock | CrossBlock)
    return block.cross_attention


def _own_branch(qkv: Bound, proj: Bound, heads: int) -> Callable[[int, Tensor, Attend], Tensor]:
    return lambda layer, x, attend: proj(attend(layer, *_split(qkv(x), heads)).flatten(1))


def _cross_branch(cross: CrossAttention) -> Callable[[int, Tensor, AttendImage], Tensor]:
    query, proj, heads = bind(cross.query), bind(cross.proj), cross.num_heads
    return lambda layer, x, attend_image: proj(attend_image(layer, query(x).unflatten(1, (heads, -1))).flatten(1))


def _attends(norm: nn.Module, own: SelfAttention) -> Branch:
    normed, branch = bind(norm), _own_branch(bind(own.qkv), bind(own.proj), own.num_heads)
    return lambda layer, x, attend, attend_image: branch(layer, normed(x), attend)


def _reads(norm: nn.Module, cross: CrossAttention) -> Branch:
    normed, branch = bind(norm), _cross_branch(cross)
    return lambda layer, x, attend, attend_image: branch(layer, normed(x), attend_image)


def _adds(norm: Bound, mlp: Bound) -> Branch:
    return lambda layer, x, attend, attend_image: mlp(norm(x))


def _split(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """``[rows, 3 * dim]`` -> q ``[rows, heads, head_dim]``, and keys and values as one, ``[rows, 2, heads, head_dim]``."""
    parts = qkv.unflatten(1, (3, num_heads, -1))
    return parts[:, 0], parts[:, 1:]


def _by_heads(x: Tensor) -> Tensor:
    """``[rows, heads, head_dim]`` as it lies in a cache: the rows of a head follow one another."""
    rows, heads, width = x.shape
    return x.new_empty(heads, rows, width, dtype=cached_dtype(x)).copy_(x.transpose(0, 1)).transpose(0, 1)


def _decode(q: Tensor, kv: tuple[Tensor, Tensor], plan: DecodePlan, backend: str | None) -> Tensor:
    out = decode_attention(q.to(kv[0].dtype), *kv, plan, backend=backend)
    assert isinstance(out, Tensor)
    return out.to(q.dtype)


def _own_backend(backend: str | None) -> str | None:
    return None if attention_only(backend) else backend
