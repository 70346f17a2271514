"""The correctness cases of losses: over vocabularies, contrastive, and the draw of hard negatives (gpu_cases.py has the others)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_fast import ops, reference
from vlp_fast.benchmarks.gpu_cases import Case, Maker, Problem

__all__ = ["loss_cases", "pairs"]


def loss_cases() -> Iterator[Case]:
    """Every case of losses, family after family."""
    yield from _vocabulary_cases()
    yield from _contrastive_cases()
    yield from _hard_negative_cases()


# ---------------------------------------------------------------------------------------------------------------- vocabularies


@dataclass(frozen=True)
class Loss:
    """A vocabulary loss; a seventh of the targets is ignored."""

    rows: int
    vocab_size: int
    dim: int
    label_smoothing: float = 0.0
    reduction: str = "mean"
    bias: bool = True

    def __call__(self, make: Maker) -> Problem:
        rows, vocab_size, dim = (11, 37, 16) if make.tiny else (self.rows, self.vocab_size, self.dim)
        targets = make.randint(vocab_size, rows)
        targets[::7] = -100
        inputs = [make.randn(rows, dim), make.randn(vocab_size, dim, scale=2 * dim**-0.5)]
        inputs += [make.randn(vocab_size)] if self.bias else []
        options = {"label_smoothing": self.label_smoothing, "reduction": self.reduction}

        def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            logits = F.linear(hidden, weight, bias)
            wide = logits if logits.dtype == torch.float64 else logits.float()
            return F.cross_entropy(wide, targets, **options)

        def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return ops.linear_cross_entropy(hidden, weight, targets, bias, backend="triton", **options)

        names = ("loss", "dhidden", "dweight", *(("dbias",) if self.bias else ()))
        return Problem(inputs, ours, plain, names)


def _vocabulary_cases() -> Iterator[Case]:
    table = {
        "BLIP lm, smoothing 0.1": Loss(3328, 30524, 768, 0.1),
        "CoCa captions, sum, no bias": Loss(2600, 49408, 768, reduction="sum", bias=False),
        "BEiT-3 mlm, per row": Loss(2049, 64010, 768, reduction="none"),
        "odd vocabulary, large width": Loss(301, 1001, 1024, 0.2),
    }
    for name, build in table.items():
        yield Case("linear_cross_entropy", name, build, gigabytes=16)


# ----------------------------------------------------------------------------------------------------------------- contrastive


def pairs(make: Maker, rows: int, dim: int, keys: int | None = None) -> tuple[Tensor, Tensor]:
    """Normalised features ``[rows, dim]`` and ``[keys, dim]`` (default: as many); row i and key i belong together, cosine about 0.3.

    Pairs that fit much better would make losses of nearly 0, differences of large numbers that no fp32 holds.
    """
    a = F.normalize(make.randn(rows, dim), dim=1)
    b = torch.cat([a + make.randn(rows, dim, scale=3 * dim**-0.5), make.randn((rows if keys is None else keys) - rows, dim)])
    return a, F.normalize(b, dim=1)


def _scalar(value: float, make: Maker) -> Tensor:
    return torch.tensor(value, device=make.device, dtype=make.dtype)


@dataclass(frozen=True)
class Contrast:
    """kind: "both" directions over a batch, "distilled" with soft targets over `keys` of a queue, or "sigmoid"."""

    kind: str
    rows: int
    dim: int
    keys: int | None = None
    scale: float = 14.0

    def __call__(self, make: Maker) -> Problem:
        rows, dim, keys = (13, 24, None if self.keys is None else 29) if make.tiny else (self.rows, self.dim, self.keys)
        a, b = pairs(make, rows, dim, keys)
        scale = _scalar(self.scale, make)
        if self.kind == "distilled":
            teacher = F.normalize(a + make.randn(rows, dim, scale=0.5 * dim**-0.5), dim=1)
            return _distilled(a, teacher, b, scale)
        bias = [_scalar(-self.scale, make)] if self.kind == "sigmoid" else []
        ours, plain = (
            (ops.sigmoid_contrastive_loss, reference.sigmoid_contrastive_loss)
            if self.kind == "sigmoid"
            else (ops.contrastive_loss, reference.contrastive_loss)
        )
        names = ("loss", "da", "db", "dlogit_scale", *(["dlogit_bias"] if bias else []))
        return Problem([a, b, scale, *bias], partial(ours, backend="triton"), _wide_loss(plain), names)


def _distilled(features: Tensor, teacher: Tensor, keys: Tensor, scale: Tensor, alpha: float = 0.4) -> Problem:
    """teacher and keys are constants, and no leaves."""

    def ours(features: Tensor, scale: Tensor) -> Tensor:
        return ops.distilled_contrastive_loss(features, teacher, keys, scale, alpha, backend="triton")

    def plain(features: Tensor, scale: Tensor) -> Tensor:
        return reference.distilled_contrastive_loss(features, teacher.to(features), keys.to(features), scale, alpha)

    return Problem([features, scale], ours, _wide_loss(plain), ("loss", "dfeatures", "dlogit_scale"))


def _wide_loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss in fp32 at least, as ours is."""
    return lambda *tensors: _at_least_fp32(function(*tensors))


def _at_least_fp32(loss: Tensor) -> Tensor:
    return loss if loss.dtype == torch.float64 else loss.float()


def _contrastive_cases() -> Iterator[Case]:
    table = {
        "CLIP, 1024 pairs": Contrast("both", 1024, 512),
        "CoCa, odd batch and width": Contrast("both", 333, 200, scale=50.0),
        "two pairs": Contrast("both", 2, 64),
        "BLIP, queue of 57,600": Contrast("distilled", 64, 256, 57664),
        "distilled, odd queue": Contrast("distilled", 37, 256, 1001),
        "SigLIP, 1024 pairs": Contrast("sigmoid", 1024, 768, scale=10.0),
        "SigLIP, odd batch and width": Contrast("sigmoid", 77, 136, scale=10.0),
    }
    for name, build in table.items():
        yield Case("contrastive", name, build)


# -------------------------------------------------------------------------------------------------------------- hard negatives


@dataclass(frozen=True)
class Draw:
    """A key per row, of `keys` of which those of the rows begin at `first`."""

    rows: int
    dim: int
    keys: int | None = None
    first: int = 0
    floor: float = 1e-4

    def __call__(self, make: Maker) -> Problem:
        rows, dim = (13, 24) if make.tiny else (self.rows, self.dim)
        first = min(self.first, 7) if make.tiny else self.first
        total = rows if self.keys is None else 29 if make.tiny else self.keys
        queries, keys = pairs(make, rows, dim, total)
        keys = keys.roll(first, 0)
        scale = torch.tensor(14.0, device=make.device)
        uniform = torch.rand(rows, generator=make.generator, device=make.device)

        def ours(queries: Tensor, keys: Tensor) -> Tensor:
            index = torch.ops.vlp_fast.hard_negatives_v2(queries, keys, scale, uniform, self.floor, first, "triton")
            return drawn_by(index, queries, keys, scale, uniform, self.floor, first)

        return Problem(
            [queries, keys], ours, lambda q, k: torch.ones(len(q), dtype=torch.bool, device=q.device), (), exact=True
        )


def drawn_by(
    index: Tensor, queries: Tensor, keys: Tensor, scale: Tensor, uniform: Tensor, floor: float, first: int, slack: float = 1e-5
) -> Tensor:
    """Whether each row's number falls, up to rounding, where the distribution in float64 has the key drawn."""
    rows = torch.arange(len(queries), device=queries.device)
    weights = torch.softmax(scale.double() * queries.double() @ keys.double().T, 1) + floor
    weights[rows, rows + first] = 0.0
    running = weights.cumsum(1)
    running = running / running[:, -1:]
    end = running.gather(1, index[:, None])[:, 0]
    begin = end - (weights / weights.sum(1, keepdim=True)).gather(1, index[:, None])[:, 0]
    return (begin - slack <= uniform) & (uniform <= end + slack) & (index != rows + first)


def _hard_negative_cases() -> Iterator[Case]:
    table = {
        "BLIP, 256 x 256": Draw(256, 256),
        "odd batch and width, ALBEF's floor of 0": Draw(131, 200, floor=0.0),
        "two pairs": Draw(2, 64),
        "keys of four processes": Draw(256, 256, 1024, 512),
    }
    for name, build in table.items():
        yield Case("hard_negatives", name, build)
