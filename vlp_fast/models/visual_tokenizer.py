"""A trainable visual tokenizer: ids of image patches, the targets of masked image modelling.

Papers: van den Oord et al., Neural Discrete Representation Learning (2017), section 3 and appendix A.1: straight-through codes whose
centres are moving averages. Peng et al., BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers (2022), section 3.1:
codes on the unit sphere, chosen by cosine, and what is reconstructed may be the features of a teacher instead of pixels (VQ-KD).
Łańcucki et al., Robust Training of Vector Quantized Bottleneck Models (2020): vectors are centred and scaled before codes are chosen,
and unused codes move to patches; without the first, nearly all vectors of plain images point one way.

Figure: patches -> transformer -> centred unit vectors -> nearest code -> transformer -> pixels of every patch, or a teacher's features.
Training is `vlp_fast.training.train_visual_tokenizer`. Here are no published weights and no teacher.

Dimensions: batch images, P patches, C codes of code_dim, target_dim values reconstructed per patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.models._config import check_positive
from vlp_fast.modules import Linear, PreNormBlock, VisionTransformer, init_transformer, unit_features
from vlp_fast.segments import Segments

__all__ = ["VqCodes", "VqTokenizer", "VqTokenizerConfig"]

MAX_SIMILARITIES = 2**24  # held at a time: 64 MiB
IMAGES_AT_ONCE = 64  # of `encode`
SMALLEST_SPREAD = 1e-6


@dataclass(frozen=True, kw_only=True)
class VqTokenizerConfig:
    """Sizes of the tokenizer; the defaults suit 224 pixels and 8,192 codes, as BEiT-3 has them, with a small network.

    code_dim: width of a code. decay: of the moving averages. revive_below: a code that is chosen less often than this part of an
    even share moves to a patch of the batch. target_dim: values to reconstruct per patch; None: its pixels.
    """

    image_size: int = 224
    patch_size: int = 16
    dim: int = 384
    encoder_depth: int = 4
    decoder_depth: int = 2
    num_heads: int = 6
    hidden_dim: int = 1536
    eps: float = 1e-6
    num_codes: int = 8192
    code_dim: int = 32
    decay: float = 0.99
    revive_below: float = 0.03
    target_dim: int | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        check_positive(
            self, "image_size", "patch_size", "dim", "encoder_depth", "decoder_depth", "num_heads", "num_codes", "code_dim"
        )
        if self.target_dim is not None:
            check_positive(self, "target_dim")
        for name in ("decay", "revive_below"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1); received {getattr(self, name)}.")


class VqCodes(NamedTuple):
    """Of each patch. projected: the vector as it was made, fp32 ``[batch * P, code_dim]``. rows: centred and of length 1. ids: int64
    ``[batch * P]``. codes: theirs, like `rows`."""

    projected: Tensor
    rows: Tensor
    ids: Tensor
    codes: Tensor


class VqTokenizer(nn.Module):
    """Encoder, codes and decoder. `encode` makes it a visual tokenizer for `Beit3Pretraining`.

    Codes, and what centres the vectors, are buffers: moving averages that only `update_codes` changes, in training and evaluation
    alike. A new tokenizer's codes are random directions; the first `update_codes` moves them to the patches it is given.
    """

    centre: Tensor
    spread: Tensor
    codes: Tensor
    shares: Tensor
    sums: Tensor
    updates: Tensor

    def __init__(self, config: VqTokenizerConfig) -> None:
        super().__init__()
        self.config = c = config
        self.encoder = VisionTransformer(
            image_size=c.image_size,
            patch_size=c.patch_size,
            dim=c.dim,
            depth=c.encoder_depth,
            num_heads=c.num_heads,
            hidden_dim=c.hidden_dim,
            eps=c.eps,
            class_token=False,
            backend=c.backend,
        )
        self.to_code = Linear(c.dim, c.code_dim)
        # mean and deviation of the vectors before they are centred
        self.register_buffer("centre", torch.zeros(c.code_dim))
        self.register_buffer("spread", torch.ones(c.code_dim))
        # unit vectors; each code's part of the patches, and of the sum of their vectors; how often they were updated
        self.register_buffer("codes", unit_features(torch.randn(c.num_codes, c.code_dim)))
        self.register_buffer("shares", torch.zeros(c.num_codes))
        self.register_buffer("sums", torch.zeros(c.num_codes, c.code_dim))
        self.register_buffer("updates", torch.zeros(()))
        self.from_code = Linear(c.code_dim, c.dim)
        self.position = nn.Parameter(torch.zeros(self.encoder.num_tokens, c.dim))
        self.decoder = nn.ModuleList(
            PreNormBlock(c.dim, c.num_heads, c.hidden_dim, eps=c.eps, backend=c.backend) for _ in range(c.decoder_depth)
        )
        self.norm = nn.LayerNorm(c.dim, c.eps)
        self.head = Linear(c.dim, c.target_dim or 3 * c.patch_size**2)
        for part in (self.to_code, self.from_code, self.decoder, self.head):
            part.apply(init_transformer)
        nn.init.trunc_normal_(self.position, std=0.02)

    @property
    def num_codes(self) -> int:
        return self.config.num_codes

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The code of every patch: ``[n, 3, image_size, image_size]`` -> int64 ``[n, P]``, on the device of `images`.

        The images go through in bounded chunks on the tokenizer's device, which may be another. The same images give the same ids.
        """
        patches = self.encoder.num_tokens
        chunks = images.split(IMAGES_AT_ONCE)
        ids = [self.quantise(chunk.to(self.codes.device)).ids.view(-1, patches).to(images.device) for chunk in chunks]
        return torch.cat(ids)

    def quantise(self, images: Tensor) -> VqCodes:
        """Images -> the vectors of their patches and the nearest codes; gradients reach the vectors, not the codes."""
        projected = self.to_code(self.encoder(images)).float()
        rows = self._centred(projected)
        with torch.no_grad():
            blocks = rows.split(max(MAX_SIMILARITIES // self.num_codes, 1))
            ids = torch.cat([torch.mm(block, self.codes.T).argmax(1) for block in blocks])
        return VqCodes(projected, rows, ids, self.codes[ids])

    def _centred(self, projected: Tensor) -> Tensor:
        return unit_features((projected - self.centre) / self.spread)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes ``[batch * P, code_dim]`` -> ``[batch * P, target_dim]``; pixels of a patch lie by channel, row, column."""
        patches = self.encoder.num_tokens
        batch = len(codes) // patches
        x = (self.from_code(codes).unflatten(0, (batch, patches)) + self.position).flatten(0, 1)
        plan = AttentionPlan.self_attention(Segments([patches] * batch, x.device))
        for block in self.decoder:
            x = block(x, plan)
        return self.head(self.norm(x))

    def forward(self, images: Tensor) -> tuple[Tensor, VqCodes]:
        """The reconstruction of every patch and its code; the gradient of the decoder passes straight through the choice of code."""
        found = self.quantise(images)
        return self.decode(found.rows + (found.codes - found.rows).detach()), found

    def patches(self, images: Tensor) -> Tensor:
        """The pixels of each patch, ``[batch * P, 3 * patch_size ** 2]`` by channel, row, column: what `decode` gives for pixels."""
        size = self.config.patch_size
        return nn.functional.unfold(images, size, stride=size).transpose(1, 2).flatten(0, 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images as their codes tell them, ``[batch, 3, image_size, image_size]``.

        Raises: ValueError for a tokenizer that reconstructs features instead of pixels.
        """
        size, side = self.config.patch_size, self.config.image_size
        if self.config.target_dim not in (None, 3 * size**2):
            raise ValueError(f"reconstruct needs pixels, target_dim=None; received target_dim={self.config.target_dim}.")
        patches = self.decode(self.quantise(images).codes).unflatten(0, (len(images), -1))
        return nn.functional.fold(patches.transpose(1, 2), side, size, stride=size)

    @torch.no_grad()
    def update_codes(self, found: VqCodes) -> None:
        """Moves every code towards the patches that chose it, and codes that are hardly chosen to patches drawn at random.

        It draws on the device and waits for nothing. The averages are over the patches given: in a process group give every process
        the patches of all, or train the tokenizer in one.
        """
        c = self.config
        if not len(found.ids):
            return
        # the plain mean of the first updates, until that weighs the newest less than the moving average does
        self.updates += 1
        newest = (1 / self.updates).clamp(min=1 - c.decay)
        deviation, mean = torch.std_mean(found.projected, 0, correction=0)
        self.centre.lerp_(mean, newest)
        self.spread.lerp_(deviation.clamp(min=SMALLEST_SPREAD), newest)
        rows = self._centred(found.projected)
        counts = torch.zeros_like(self.shares).index_add_(0, found.ids, torch.ones_like(rows[:, 0]))
        sums = torch.zeros_like(self.sums).index_add_(0, found.ids, rows)
        self.shares.lerp_(counts / len(rows), newest)
        self.sums.lerp_(sums / len(rows), newest)
        dead = (self.shares < c.revive_below / c.num_codes)[:, None]
        drawn = rows[torch.randint(len(rows), (c.num_codes,), device=rows.device)]
        # a revived code starts with an even share, which gives it time to be chosen
        self.shares.copy_(torch.where(dead[:, 0], 1 / c.num_codes, self.shares))
        self.sums.copy_(torch.where(dead, drawn / c.num_codes, self.sums))
        self.codes.copy_(unit_features(self.sums))
