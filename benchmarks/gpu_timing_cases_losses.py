"""What gpu_check.py times of losses: over vocabularies, contrastive, and the draw of hard negatives.

Similarities are those of normalised features whose pairs belong together. Floors are the formulas of kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_fast import ops, reference
from vlp_fast.benchmarks.gpu_cases import Maker
from vlp_fast.benchmarks.gpu_cases_losses import pairs
from vlp_fast.benchmarks.gpu_providers import Absent, Provider, TimedCase, TimedProblem, Work

__all__ = ["timed_loss_cases"]

Call = Callable[..., Tensor]
SCALE = 1 / 0.07  # CLIP's and BLIP's first temperature
BOTH = ("bf16", "fp32")


def timed_loss_cases() -> Iterator[TimedCase]:
    """Every case of losses, family after family."""
    for name, loss in VOCABULARIES.items():
        yield TimedCase("linear_cross_entropy", name, loss, gigabytes=40.0)
    yield TimedCase("contrastive", "CLIP, 4096 pairs of width 512", _contrastive, BOTH)
    yield TimedCase("contrastive", "BLIP, 256 rows x 57,856 keys of width 256", _distilled, BOTH)
    yield TimedCase("contrastive", "SigLIP, 4096 pairs of width 512", _sigmoid, BOTH)
    yield TimedCase("hard_negatives", "256 x 256 of width 256", _hard_negatives, BOTH)


# ---------------------------------------------------------------------------------------------------------------- vocabularies


@dataclass(frozen=True)
class Vocabulary:
    """A word per row. Only both directions together are timed: the forward forms the gradients."""

    rows: int
    vocab_size: int
    dim: int
    label_smoothing: float = 0.0
    bias: bool = True

    def __call__(self, make: Maker) -> TimedProblem:
        rows, words, dim = (11, 37, 16) if make.tiny else (self.rows, self.vocab_size, self.dim)
        targets, smoothing = make.randint(words, rows), self.label_smoothing
        inputs = [make.randn(rows, dim), make.randn(words, dim, scale=dim**-0.5), *([make.randn(words)] if self.bias else [])]

        def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return ops.linear_cross_entropy(hidden, weight, targets, bias, label_smoothing=smoothing, backend="triton")

        def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return F.cross_entropy(F.linear(hidden, weight, bias), targets, label_smoothing=smoothing)

        def liger() -> Call:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

            def call(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
                loss = fused(hidden, weight, targets, bias=bias, label_smoothing=smoothing)
                return loss[0] if isinstance(loss, tuple) else loss

            return call

        def own_of_torch(chunked: bool) -> Call:
            function, settings = getattr(F, "linear_cross_entropy", None), getattr(torch.nn, "LinearCrossEntropyOptions", None)
            if function is None or (chunked and settings is None):
                raise Absent(f"torch {torch.__version__} has none.")
            if chunked and smoothing:
                raise Absent("torch's chunked loss has no label smoothing.")
            options = {"options": settings()} if chunked else {}
            return lambda hidden, weight, bias=None: function(
                hidden, weight, targets, linear_bias=bias, label_smoothing=smoothing, **options
            )

        makers: dict[str, Callable[[], Call]] = {
            "F.cross_entropy(F.linear)": lambda: plain,
            "F.linear_cross_entropy": partial(own_of_torch, False),
            "F.linear_cross_entropy, chunked": partial(own_of_torch, True),
            "Liger fused linear cross-entropy": liger,
        }
        size = inputs[0].element_size()
        return TimedProblem(
            inputs,
            (True,) * len(inputs),
            _providers(ours, makers),
            None,
            Work(6 * rows * words * dim, size * (2 * rows * dim + 2 * words * dim) + 3 * size * rows * words),
            lambda hidden, weight, bias=None: reference.linear_cross_entropy(
                hidden, weight, targets, bias, label_smoothing=smoothing
            ),
        )


VOCABULARIES = {
    "BLIP lm, 3328 x 30,524 x 768, smoothing 0.1": Vocabulary(3328, 30524, 768, 0.1),
    "CoCa captions, 5120 x 49,408 x 768": Vocabulary(5120, 49408, 768, bias=False),
    "BEiT-3 mlm, 6656 x 64,010 x 768": Vocabulary(6656, 64010, 768),
}


def _providers(ours: Call, others: dict[str, Callable[[], Call]]) -> dict[str, Callable[[], Provider]]:
    made: dict[str, Callable[[], Provider]] = {"triton": lambda: Provider("triton", ours, ours=True)}
    return {**made, **{name: partial(_provider, name, make) for name, make in others.items()}}


def _provider(name: str, make: Callable[[], Call]) -> Provider:
    return Provider(name, make())


# ----------------------------------------------------------------------------------------------------------------- contrastive


def _scalar(value: float, make: Maker) -> Tensor:
    return torch.tensor(value, device=make.device)


def _contrastive(make: Maker) -> TimedProblem:
    n, dim = (12, 16) if make.tiny else (4096, 512)
    inputs = [*pairs(make, n, dim), _scalar(SCALE, make)]
    labels = torch.arange(n, device=make.device)

    def plain(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        similarities = scale * (a @ b.T).float()
        return (F.cross_entropy(similarities, labels) + F.cross_entropy(similarities.T, labels)) / 2

    size = inputs[0].element_size()
    return TimedProblem(
        inputs,
        (True, True, True),
        _providers(partial(ops.contrastive_loss, backend="triton"), {"plain matrix": lambda: plain}),
        Work(2 * n * n * dim, size * 2 * n * dim),
        Work(6 * n * n * dim, 3 * size * n * n),
        reference.contrastive_loss,
    )


def _distilled(make: Maker) -> TimedProblem:
    n, m, dim, alpha = (5, 23, 16, 0.4) if make.tiny else (256, 57856, 256, 0.4)
    student, own = pairs(make, n, dim)
    teacher = F.normalize(student + make.randn(n, dim, scale=0.3 * dim**-0.5), dim=1)
    keys = torch.cat([own, F.normalize(make.randn(m - n, dim), dim=1)])

    def plain(features: Tensor, teacher: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        with torch.no_grad():
            targets = alpha * torch.softmax(scale * (teacher @ keys.T).float(), 1)
            targets.diagonal().add_(1 - alpha)
        return -(targets * torch.log_softmax(scale * (features @ keys.T).float(), 1)).sum(1).mean()

    return TimedProblem(
        [student, teacher, keys, _scalar(SCALE, make)],
        (True, False, False, True),
        _providers(partial(ops.distilled_contrastive_loss, alpha=alpha, backend="triton"), {"plain matrix": lambda: plain}),
        Work(4 * n * m * dim, 16 * n * m),  # both rows of similarities, fp32, written and read
        Work(2 * n * m * dim, 16 * n * m),  # both once more, the gradient written, and read by the product
        partial(reference.distilled_contrastive_loss, alpha=alpha),
    )


def _sigmoid(make: Maker) -> TimedProblem:
    n, dim = (12, 16) if make.tiny else (4096, 512)
    inputs = [*pairs(make, n, dim), _scalar(10.0, make), _scalar(-10.0, make)]
    signs = 2 * torch.eye(n, device=make.device) - 1

    def plain(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return -F.logsigmoid(signs * (scale * (a @ b.T).float() + bias)).sum() / n

    size = inputs[0].element_size()
    return TimedProblem(
        inputs,
        (True,) * 4,
        _providers(partial(ops.sigmoid_contrastive_loss, backend="triton"), {"plain matrix": lambda: plain}),
        Work(2 * n * n * dim, size * 2 * n * dim),
        Work(4 * n * n * dim, 3 * size * n * n),
        reference.sigmoid_contrastive_loss,
    )


# -------------------------------------------------------------------------------------------------------------- hard negatives


def _hard_negatives(make: Maker) -> TimedProblem:
    n, dim = (12, 16) if make.tiny else (256, 256)
    queries, keys = pairs(make, n, dim)
    own = torch.arange(n, device=make.device)

    def weights(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        return (torch.softmax(scale * (queries @ keys.T).float(), 1) + 1e-4).fill_diagonal_(0.0)

    def drawn(*tensors: Tensor) -> Tensor:
        return torch.multinomial(weights(*tensors), 1)[:, 0]

    def searched(*tensors: Tensor) -> Tensor:
        running = weights(*tensors).cumsum(1)
        uniform = torch.rand(n, 1, device=running.device)
        return torch.searchsorted(running, uniform * running[:, -1:], right=True)[:, 0].clamp_(max=n - 1)

    def accepts(index: Tensor) -> str | None:
        """A draw has no right answer; its distribution is a matter of the correctness cases."""
        inside = (index >= 0) & (index < n) & (index != own)
        return None if bool(inside.all()) else f"{int((~inside).sum())} draws name no other row"

    others: dict[str, Callable[[], Any]] = {
        "plain matrix, torch.multinomial": lambda: drawn,
        "plain matrix, cumsum and searchsorted": lambda: searched,
    }
    return TimedProblem(
        [queries, keys, _scalar(SCALE, make)],
        (False, False, False),
        _providers(partial(ops.hard_negatives, backend="triton"), others),
        Work(2 * n * n * dim, queries.element_size() * 2 * n * dim),
        accepts=accepts,
    )
