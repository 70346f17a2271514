"""BLIP fine-tuned for two tasks whose graphs differ from captioning and retrieval: visual question answering and NLVR2.

Paper: Li et al., BLIP (2022), figure 5 and section 5: (a) a question reads the image, and the decoder, which writes the answer, reads the
question's states; (b) a caption reads two images through two cross-attentions in every layer. Losses: `vlp_fast.training.blip_tasks`.

Dimensions: batch images, questions, answers and captions packed as rows, N = image tokens, dim = text width, vision_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.models.blip import BlipConfig, BlipImageEncoder, BlipTextTower, Captioning, ImageRows
from vlp_fast.modules import MLP, CrossAttention, Dropout, Linear, SelfAttention, TextEmbedding, init_transformer
from vlp_fast.passes import PassInfo, TextPass, with_first_token
from vlp_fast.segments import Segments

__all__ = ["BlipNlvr2", "BlipVqa", "Nlvr2TextEncoder"]

FIRST_MERGED_LAYER = 6  # from here on NLVR2's layers learn how two images' readings are joined


class BlipVqa(Captioning):
    """Visual question answering: `question_tower` reads the image, `text_tower` writes answers and reads the question's rows.

    The decoder is a captioner's, with questions where that has images: ``text_tower([answer_pass], question_rows, question_segments)``.
    Questions and answers enter as packed token ids and `Segments`: [CLS] words [SEP], no padding.
    """

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = BlipImageEncoder(config)
        self.question_tower = BlipTextTower(config, num_experts=1, context_dim=config.vision_dim)
        self.text_tower = BlipTextTower(config, num_experts=1, context_dim=config.dim)
        self._make_word_head()
        init_transformer(self.lm_transform)

    def encode_image(self, images: Tensor) -> ImageRows:
        """Images ``[batch, 3, image_size, image_size]`` -> rows and their segments."""
        rows = self.image_encoder(images)
        return ImageRows(rows, self.image_encoder.segments(len(images), rows.device))

    def encode_questions(
        self, token_ids: Tensor, segments: Segments, image: ImageRows, images: Sequence[int] | Tensor
    ) -> Tensor:
        """Question i about image ``images[i]`` -> ``[rows, dim]``; [ENC] comes first."""
        ids = with_first_token(token_ids, segments, self.config.enc_id)
        (rows,) = self.question_tower([TextPass("question", ids, segments, images=images)], image.rows, image.segments)
        return rows

    def answer_pass(self, token_ids: Tensor, segments: Segments, questions: Sequence[int] | Tensor) -> TextPass:
        """The pass that predicts answer i to question ``questions[i]`` word by word: [DEC] first, causal."""
        ids = with_first_token(token_ids, segments, self.config.dec_id)
        return TextPass("answer", ids, segments, expert=self.decoder, causal=True, images=questions)


class BlipNlvr2(nn.Module):
    """Natural language visual reasoning: is a caption true of a pair of images?

    Captions enter as packed token ids and `Segments`: [CLS] words [SEP], no padding.
    """

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = BlipImageEncoder(config)
        self.text_encoder = Nlvr2TextEncoder(config)
        self.head = nn.ModuleDict({"fc1": Linear(config.dim, config.dim), "fc2": Linear(config.dim, 2)})
        self.head.apply(init_transformer)

    def forward(self, first: Tensor, second: Tensor, token_ids: Tensor, segments: Segments) -> Tensor:
        """Caption i and images ``first[i]``, ``second[i]`` (``[captions, 3, image_size, image_size]`` each) -> logits ``[captions, 2]``.

        Raises: ValueError where images and captions are not as many.
        """
        if not len(first) == len(second) == len(segments):
            raise ValueError(
                f"every caption needs two images; received {len(first)} first and {len(second)} second ones for "
                f"{len(segments)} captions."
            )
        images = self.image_encoder(torch.cat([first, second])).chunk(2)
        ids = with_first_token(token_ids, segments, self.config.enc_id)
        rows = self.text_encoder(ids, segments, images, self.image_encoder.segments(len(first), ids.device))
        return self.head["fc2"](F.relu(self.head["fc1"](rows[segments.first_rows()])))


class Nlvr2TextEncoder(nn.Module):
    """BLIP's text encoder over two images at once.

    Shape: token_ids int64 ``[rows]`` of captions, two times image rows ``[captions * N, vision_dim]`` -> ``[rows, dim]``.
    """

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.embedding = TextEmbedding(
            config.vocab_size,
            config.max_positions,
            config.dim,
            eps=config.text_eps,
            dropout_p=config.dropout_p,
            padding_idx=config.pad_id,
        )
        self.blocks = nn.ModuleList(Nlvr2Block(config, merge=i >= FIRST_MERGED_LAYER) for i in range(config.depth))
        self.apply(init_transformer)

    def forward(self, token_ids: Tensor, segments: Segments, images: Sequence[Tensor], image_segments: Segments) -> Tensor:
        plan = AttentionPlan.self_attention(segments)
        cross_plan = AttentionPlan.cross_attention(segments, image_segments, range(len(segments)))
        x = self.embedding(token_ids, segments.positions())
        for block in self.blocks:
            x = block(x, plan, images, cross_plan)
        return x

    def describe(self, token_ids: Tensor, segments: Segments, *images: object) -> PassInfo:
        """What a call processed, for a profile."""
        return PassInfo("text_encoder", len(segments), segments.rows, segments.rows)


class Nlvr2Block(nn.Module):
    """BERT layer with a cross-attention per image, whose outputs are averaged or, with `merge`, joined by a linear layer."""

    def __init__(self, config: BlipConfig, *, merge: bool) -> None:
        super().__init__()
        dim, heads, p, backend = config.dim, config.num_heads, config.dropout_p, config.backend
        self.attention = SelfAttention(dim, heads, dropout_p=p, backend=backend)
        self.attention_norm = nn.LayerNorm(dim, config.text_eps)
        self.cross_attention = nn.ModuleList(
            CrossAttention(dim, config.vision_dim, heads, dropout_p=p, backend=backend) for _ in range(2)
        )
        self.merge = Linear(2 * dim, dim) if merge else None
        self.cross_norm = nn.LayerNorm(dim, config.text_eps)
        self.mlp = MLP(dim, config.hidden_dim)
        self.mlp_norm = nn.LayerNorm(dim, config.text_eps)
        self.dropout = Dropout(p)

    def forward(self, x: Tensor, plan: AttentionPlan, images: Sequence[Tensor], cross_plan: AttentionPlan) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, plan)))
        read = [attend(x, rows, cross_plan) for attend, rows in zip(self.cross_attention, images, strict=True)]
        both = (read[0] + read[1]) / 2 if self.merge is None else self.merge(torch.cat(read, -1))
        x = self.cross_norm(x + self.dropout(both))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))
