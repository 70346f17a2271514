"""BEiT-3's heads of fine-tuning: retrieval, captioning, question answering, reasoning over two images, image classification.

Paper: Wang et al., Image as a Foreign Language (2022), figure 3 and section 3; the heads are those of the released code. Each model is
`Beit3` with a head, so that all entry points of `Beit3` are there too; `Beit3.load_trunk` starts one from a pretrained model. Losses
and the masking of captions are in `vlp_fast.training.beit3_tasks`.

Dimensions: N = image tokens (class token first), dim, V words, classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlp_fast.models._config import check_positive
from vlp_fast.models.beit3 import Beit3, Beit3Config, Beit3Output
from vlp_fast.modules import Linear, init_transformer, unit_features
from vlp_fast.segments import Segments

__all__ = [
    "Beit3Captioner",
    "Beit3Classifier",
    "Beit3ClassifierConfig",
    "Beit3QuestionAnswering",
    "Beit3Reasoning",
    "Beit3Retrieval",
]

START_SCALE = 0.001  # of the last weights of heads that start almost silent
HEAD_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class Beit3ClassifierConfig(Beit3Config):
    """num_classes: answers of VQA (3129 in the release), classes of ImageNet (1000), or 2 for reasoning.

    The release answers questions and classifies images with ``normalize_output=False``: those heads begin with a norm of their own.
    """

    num_classes: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_classes")


class Beit3Retrieval(Beit3):
    """Images and texts, each alone, as unit vectors whose products are similarities (figure 3d).

    logit_scale: the logarithm of what multiplies similarities in the contrastive loss.
    """

    def __init__(self, config: Beit3Config) -> None:
        super().__init__(config)
        self.vision_head = Linear(config.dim, config.dim, bias=False)
        self.language_head = Linear(config.dim, config.dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        for head in (self.vision_head, self.language_head):
            head.apply(init_transformer)

    def image_features(self, images: Tensor) -> Tensor:
        """Images ``[batch, 3, S, S]`` -> ``[batch, dim]``, of length 1."""
        return unit_features(self.vision_head(_class_rows(self.encode_image(images))))

    def text_features(self, token_ids: Tensor, segments: Segments) -> Tensor:
        """Packed captions -> ``[captions, dim]``, of length 1, from the first token of each."""
        return unit_features(self.language_head(_first_words(self.encode_text(token_ids, segments))))


class Beit3Captioner(Beit3):
    """Captions as hidden words to be predicted in place, from the image and the words up to their own place (figure 3c)."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__(config)
        self.word_head = Linear(config.dim, config.vocab_size)
        self.word_head.apply(init_transformer)

    def caption_rows(self, images: Tensor, token_ids: Tensor, segments: Segments) -> Tensor:
        """Hidden rows ``[rows, dim]`` of captions, some of whose words may be masked; image i belongs to caption i."""
        return self.encode_captioned(images, token_ids, segments).text

    def logits(self, rows: Tensor) -> Tensor:
        """Hidden rows ``[rows, dim]`` -> ``[rows, V]``: the word at the place of each row, not the next one."""
        return self.word_head(rows)


class Beit3QuestionAnswering(Beit3):
    """An answer out of a fixed list, from an image and a question (VQA)."""

    def __init__(self, config: Beit3ClassifierConfig) -> None:
        super().__init__(config)
        dim = config.dim
        self.pooler = nn.Sequential(nn.LayerNorm(dim, HEAD_EPS), Linear(dim, dim), nn.Tanh())
        self.head = nn.Sequential(
            Linear(dim, 2 * dim), nn.LayerNorm(2 * dim, HEAD_EPS), nn.GELU(), Linear(2 * dim, config.num_classes)
        )
        for head in (self.pooler, self.head):
            head.apply(init_transformer)

    def forward(self, images: Tensor, token_ids: Tensor, segments: Segments) -> Tensor:
        """Images and one question each -> logits ``[batch, classes]``."""
        return self.head(self.pooler(_class_rows(self.encode_pairs(images, token_ids, segments))))


class Beit3Reasoning(Beit3):
    """Whether a sentence is true of two images (NLVR2): the sentence is read with each, and four rows decide."""

    def __init__(self, config: Beit3ClassifierConfig) -> None:
        super().__init__(config)
        dim = config.dim
        self.head = nn.Sequential(
            nn.LayerNorm(4 * dim, HEAD_EPS),
            Linear(4 * dim, 2 * dim),
            nn.LayerNorm(2 * dim, HEAD_EPS),
            nn.GELU(),
            Linear(2 * dim, config.num_classes),
        )
        self.head.apply(init_transformer)
        _quieten(self.head[1])
        _quieten(self.head[4])

    def forward(self, first_images: Tensor, second_images: Tensor, token_ids: Tensor, segments: Segments) -> Tensor:
        """Two images ``[batch, 3, S, S]`` and a sentence each -> logits ``[batch, classes]``."""
        twice = Segments(segments.lengths * 2, segments.device)
        out = self.encode_pairs(torch.cat([first_images, second_images]), token_ids.repeat(2), twice)
        first, second = torch.cat([_class_rows(out), _first_words(out)], 1).chunk(2)
        return self.head(torch.cat([first, second], 1))


class Beit3Classifier(Beit3):
    """Classes of images (ImageNet), from the mean of the patches' rows: of those that stay, with `patch_drop`."""

    def __init__(self, config: Beit3ClassifierConfig) -> None:
        super().__init__(config)
        self.head_norm = nn.LayerNorm(config.dim, HEAD_EPS)
        self.head = Linear(config.dim, config.num_classes)
        self.head.apply(init_transformer)
        _quieten(self.head)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[batch, 3, S, S]`` -> logits ``[batch, classes]``."""
        rows = self.encode_image(images).image.unflatten(0, (len(images), -1))
        return self.head(self.head_norm(rows[:, 1:].mean(1)))


def _class_rows(out: Beit3Output) -> Tensor:
    """The class token's row of every image, ``[batch, dim]``."""
    return out.image[out.image_segments.first_rows()]


def _first_words(out: Beit3Output) -> Tensor:
    """The first row of every text, ``[batch, dim]``."""
    return out.text[out.text_segments.first_rows()]


@torch.no_grad()
def _quieten(layer: nn.Module) -> None:
    """Nearly zero at first, as unilm begins these heads."""
    for parameter in layer.parameters():
        parameter.mul_(0.001)
