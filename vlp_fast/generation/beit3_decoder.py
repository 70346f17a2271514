"""How BEiT-3 writes a text word by word: each word in a [MASK] behind those that are there."""

from __future__ import annotations

import torch
from torch import Tensor

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.generation.cache import TextCache
from vlp_fast.generation.decoders import Attend, Texts, Writing, _decode, _own_backend, _Positions, _split
from vlp_fast.models.beit3 import Beit3MaskedModel
from vlp_fast.models.beit3_encoder import Beit3Layer
from vlp_fast.models.beit3_tasks import Beit3Captioner
from vlp_fast.ops import attention
from vlp_fast.segments import Segments

__all__ = ["Beit3Decoder"]


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
