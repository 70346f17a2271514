"""How each model writes a text word by word: what a search asks of it, and the steps of BLIP, the CoCas and BEiT-3.

A search (`vlp_fast.generation.search`) knows `Decoder` and `Writing` only. A decoder runs the prompts of all images as one packed,
causal forward, and after that one row per text and step (BEiT-3: two), whose keys and values stay in a `TextCache`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.decode_plan import DecodePlan
from vlp_fast.generation.cache import TextCache, cached_dtype
from vlp_fast.models.beit3 import Beit3Layer, Beit3MaskedModel
from vlp_fast.models.beit3_tasks import Beit3Captioner
from vlp_fast.models.blip import Blip, BlipCaptioner, ImageRows
from vlp_fast.models.blip_tasks import BlipVqa
from vlp_fast.models.coca import Coca
from vlp_fast.models.coca_experts import CocaExpertLayer, CocaExperts
from vlp_fast.models.coca_open_clip import CrossBlock, OpenClipCoca
from vlp_fast.models.coca_palm import CocaPalm
from vlp_fast.modules import CrossAttention, PostNormBlock, PreNormBlock, rotary_table
from vlp_fast.ops import attention, attention_only, decode_attention, linear
from vlp_fast.segments import Segments

__all__ = [
    "Beit3Decoder",
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


class CrossAttendingWriting:
    """Texts that attend to themselves and, by cross-attention, to the keys and values of their image (an answer: its question).

    Args:
        rows: what the model does with words: (token ids, positions, own attention, image attention) -> ``[rows, dim]``.
        logits: ``[rows, dim]`` -> ``[rows, vocab_size]``. contexts: layer -> keys and values of all images, packed.
    """

    def __init__(
        self,
        decoder: BlipDecoder | CocaDecoder | CocaPalmDecoder,
        rows: Callable[[Tensor, Tensor, Attend, AttendImage], Tensor],
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
            return attention(q, kv[:, 0], kv[:, 1], own, backend=backend)

        def attend_image(layer: int, q: Tensor) -> Tensor:
            if step is not None:
                return _decode(q, self._contexts[layer], step, self._backend)
            return attention(q, *contexts[layer], cross, backend=backend)

        hidden = rows(prompts.token_ids, segments.positions(), attend, attend_image)[segments.last_rows()]
        self.logits = logits(hidden).repeat_interleave(cache.copies, 0)
        self._positions = _Positions(segments, cache.copies, decoder.max_positions)

    def step(self, token_ids: Tensor) -> Tensor:
        self._cache.advance()
        return self._logits(self._rows(token_ids, self._positions.next(), self._attend, self._attend_image))

    def reorder(self, index: Tensor) -> None:
        self._cache.reorder(index)

    def _attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        self._cache.write(layer, kv)
        return _decode(q, self._cache.read(layer), self._cache.plans[0], self._backend)

    def _attend_image(self, layer: int, q: Tensor) -> Tensor:
        return _decode(q, self._contexts[layer], self._plan, self._backend)


class BlipDecoder:
    """BLIP's text tower with its decoder's self-attention. A text's first token is [DEC]."""

    def __init__(self, model: Blip | BlipCaptioner | BlipVqa) -> None:
        self.model = model
        self.max_positions, self.vocab_size = model.config.max_positions, model.config.vocab_size

    def start(self, images: Tensor, prompts: Texts, copies: int, steps: int) -> Writing:
        model, (rows, segments) = self.model, self._context(images)
        contexts = {i: _cross(block).project_context(rows) for i, block in enumerate(model.text_tower.blocks)}
        cache = TextCache(prompts.segments, copies, steps)
        return CrossAttendingWriting(self, self._rows, model.word_logits, contexts, segments, prompts, cache)

    def _context(self, images: Tensor) -> ImageRows:
        """The rows that texts read, a segment for each prompt."""
        rows = self.model.image_encoder(images)
        return ImageRows(rows, self.model.image_encoder.segments(len(images), rows.device))

    def _rows(self, token_ids: Tensor, positions: Tensor, attend: Attend, attend_image: AttendImage) -> Tensor:
        tower, expert = self.model.text_tower, self.model.decoder
        x = tower.embedding(token_ids, positions)
        experts = (*[0] * (expert + 1), *[len(x)] * (tower.num_experts - expert))
        for layer, block in enumerate(tower.blocks):
            assert isinstance(block, PostNormBlock)
            own = block.attention
            out = attend(layer, *_split(own.qkv(x, experts), own.num_heads)).flatten(1)
            x = block.attention_norm(own.proj(out, experts, x), experts)
            x = block.cross_norm(x + _read(block.cross_attention, layer, x, attend_image))
            x = block.mlp_norm(x + block.mlp(x))
        return x


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
        words = model.text_decoder.words
        return CrossAttendingWriting(self, self._rows, words, contexts, image.segments, prompts, cache)

    def _readers(self) -> Iterable[nn.Module]:
        """The modules that read the image, one per layer of the text decoder."""
        decoder = self.model.text_decoder
        return decoder.cross_blocks if isinstance(self.model, OpenClipCoca) else decoder.blocks

    def _encoder_layers(self) -> nn.ModuleList:
        return self.model.encoder.layers if isinstance(self.model, CocaExperts) else self.model.text_encoder.blocks

    def _rows(self, token_ids: Tensor, positions: Tensor, attend: Attend, attend_image: AttendImage) -> Tensor:
        encoder = self.model.encoder if isinstance(self.model, CocaExperts) else self.model.text_encoder
        decoder, readers = self.model.text_decoder, [*[None] * self._first, *self._readers()]
        x = encoder.word(token_ids) + encoder.position[positions]
        for layer, (block, reader) in enumerate(zip([*self._encoder_layers(), *decoder.blocks], readers, strict=True)):
            assert isinstance(block, CocaExpertLayer | PreNormBlock)
            own, norm = block.attention, block.attention_norm if isinstance(block, CocaExpertLayer) else block.norm1
            x = x + own.proj(attend(layer, *_split(own.qkv(norm(x)), own.num_heads)).flatten(1))
            if isinstance(block, CocaExpertLayer):
                x = block.feed_forward(x, (0, 0, len(x)))  # no row is an image's
                continue
            if reader is block:  # the paper's layer reads the image between attention and MLP
                x = x + _read(block.cross_attention, layer, block.cross_norm(x), attend_image)
            x = x + block.mlp(block.norm2(x))
            if isinstance(reader, CrossBlock):
                x = x + _read(reader.cross_attention, layer, reader.norm1(x), attend_image)
                x = x + reader.mlp(reader.norm2(x))
        return decoder.norm(x)


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


class Beit3Decoder:
    """BEiT-3 as a captioner: the word that follows a text is what the model reads in a [MASK] behind it.

    Image rows read the image alone, so that their keys and values are made once; a word reads the image and the words up to itself. A step
    runs two rows a text: the word just written, which the cache keeps, and [MASK], which the next step writes over.

    Args:
        mask_id: the word [MASK] (Wang et al., BEiT-3, section 3.1; the released captioner).
    """

    def __init__(self, model: Beit3Captioner | Beit3MaskedModel, mask_id: int) -> None:
        self.model, self.mask_id = model, mask_id
        self.max_positions, self.vocab_size = model.config.max_positions, model.config.vocab_size

    def start(self, images: Tensor, prompts: Texts, copies: int, steps: int) -> Writing:
        return Beit3Writing(self, images, prompts, copies, steps)


class Beit3Writing:
    """Texts of BEiT-3. Rows of a step: the new words, then as many [MASK]."""

    def __init__(self, decoder: Beit3Decoder, images: Tensor, prompts: Texts, copies: int, steps: int) -> None:
        self._model = model = decoder.model
        self._backend = _own_backend(model.config.backend)
        shared, segments = model.num_image_tokens, prompts.segments
        self._cache = cache = TextCache(segments, copies, steps, shared=shared, drafts=1)
        self._masks = torch.full((cache.rows,), decoder.mask_id, dtype=torch.long, device=images.device)
        # the prompts with a [MASK] behind each, after all images
        masked = Segments([n + 1 for n in segments.lengths], segments.device)
        words = masked.rows_before_last(1)
        token_ids = prompts.token_ids.new_full((masked.rows,), decoder.mask_id).index_copy(0, words, prompts.token_ids)
        image = model.embed_images(images)
        split = len(image)
        plan = AttentionPlan.prefix_causal([shared] * len(images), masked.lengths, image.device)

        def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
            cache.start(layer, kv[split:][words], kv[:split])
            return attention(q, kv[:, 0], kv[:, 1], plan, backend=model.config.backend)

        x = self._rows(torch.cat([image, model.embed_text(token_ids, masked)]), split, attend)
        self.logits = model.word_head(x[split:][masked.last_rows()]).repeat_interleave(copies, 0)
        self._positions = _Positions(segments, copies, decoder.max_positions)

    def step(self, token_ids: Tensor) -> Tensor:
        self._cache.advance()
        model = self._model
        positions = torch.cat([self._positions.next(), self._positions.after()])
        x = model.word(torch.cat([token_ids, self._masks])) + model.text_position(positions)
        return model.word_head(self._rows(x, 0, self._attend)[len(token_ids) :])

    def reorder(self, index: Tensor) -> None:
        self._cache.reorder(index)

    def _attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        cache, outs = self._cache, []
        # a word must not see the [MASK] behind it: two calls, the second with slots one row longer
        for draft, plan in enumerate(cache.plans):
            rows = slice(draft * cache.rows, (draft + 1) * cache.rows)
            cache.write(layer, kv[rows], draft)
            outs.append(_decode(q[rows], cache.read(layer), plan, self._backend))
        return torch.cat(outs)

    def _rows(self, x: Tensor, images: int, attend: Attend) -> Tensor:
        """The layers over rows of which the first `images` are of images: for every number of experts, the runs of theirs."""
        experts = {1: (0, len(x)), 2: (0, images, len(x)), 3: (0, 0, len(x), len(x))}
        encoder = self._model.encoder
        for layer, block in enumerate(encoder.layers):
            assert isinstance(block, Beit3Layer)
            own, runs = block.attention, experts[block.attention_experts]
            out = attend(layer, *_split(own.qkv(block.attention_norm(x, runs), runs), own.num_heads)).flatten(1)
            x = own.proj(out if own.inner_norm is None else own.inner_norm(out, runs), runs, x)
            runs = experts[block.ffn_experts]
            x = block.ffn(block.ffn_norm(x, runs), runs, x)
        return x if encoder.norm is None else encoder.norm(x, experts[2])


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


def _read(cross: CrossAttention, layer: int, x: Tensor, attend_image: AttendImage) -> Tensor:
    return cross.proj(attend_image(layer, cross.query(x).unflatten(1, (cross.num_heads, -1))).flatten(1))


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
