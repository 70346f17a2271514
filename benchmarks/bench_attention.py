"""Attention at the shapes of vision-language models: our backends against padded SDPA and against two matrix products.

    python benchmarks/bench_attention.py [--device cpu] [--dtype fp32] [--seconds 1] [--json F]
    pytest benchmarks/bench_attention.py --benchmark-autosave

Providers: every backend of ``vlp_fast.ops.attention`` that runs on the device; "sdpa padded", scaled_dot_product_attention on
rectangles with a mask, as padded models call it; "naive padded", softmax(q k^T) v on the same rectangles. The padded ones get
tensors that are padded already, but gather keys and values where several captions read one image, as their models do. A
provider that disagrees with the float64 reference is shown as wrong and not timed. Shapes are those of BLIP, CoCa and BEiT-3 at
a batch that a CPU finishes in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor

from vlp_fast import AttentionPlan, reference
from vlp_fast.cli._output import output_console
from vlp_fast.environment import stamp
from vlp_fast.measuring import Timing, measure, prepare_process
from vlp_fast.ops import BACKENDS, attention, backend_status
from vlp_fast.testing import assert_as_accurate_as
from vlp_fast.training import caption_lengths

BATCH = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BASELINE = "sdpa padded"
Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # packed or padded q, k, v -> out of the same layout as q


@dataclass(frozen=True)
class Shape:
    """One attention of a model: query segment i reads key segment ``index[i]``; 12 or 16 heads of 64."""

    name: str
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    index: tuple[int, ...]
    heads: int = 12
    causal: bool = False

    def plan(self, device: str) -> AttentionPlan:
        edges = [(i, j, self.causal) for i, j in enumerate(self.index)]
        return AttentionPlan.from_edges(self.query_lengths, self.key_lengths, edges, device=device)


def shapes(batch: int = BATCH) -> list[Shape]:
    texts, own = tuple(caption_lengths(batch)), tuple(range(batch))
    four = (*own, *own, *(own[1:] + own[:1]), *own)  # ITM positive, two kinds of negatives, LM
    pairs = tuple(197 + length for length in texts)
    return [
        Shape("ViT-B/16 224 self", (197,) * batch, (197,) * batch, own),
        Shape("ViT-L/16 384 self", (577,) * batch, (577,) * batch, own, heads=16),
        Shape("BLIP text self", texts, texts, own),
        Shape("CoCa text causal", texts, texts, own, causal=True),
        Shape("BLIP cross 197", texts, (197,) * batch, own),
        Shape("BLIP cross, 4 passes", texts * 4, (197,) * batch, four),
        Shape("CoCa pooler 256", (256,) * batch, (196,) * batch, own),
        Shape("BEiT-3 pairs", pairs, pairs, own),
    ]


class Case:
    """A shape with its tensors, packed and padded, and the exact answer."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        self.shape, self.plan = shape, shape.plan(device)
        generator = torch.Generator().manual_seed(0)
        rows = (sum(shape.query_lengths), sum(shape.key_lengths), sum(shape.key_lengths))
        self.packed = [torch.randn(n, shape.heads, 64, generator=generator).to(device, dtype) for n in rows]
        lengths = (shape.query_lengths, shape.key_lengths, shape.key_lengths)
        self.padded = [_pad(x, n) for x, n in zip(self.packed, lengths, strict=True)]  # [sequences, heads, length, 64]
        q, k, v = (x.double() for x in self.packed)
        exact = reference.attention(q, k, v, self.plan)
        assert isinstance(exact, Tensor)
        self.exact = exact
        self.mask = self._mask().to(device)
        self.gather = torch.tensor(shape.index, device=device) if shape.index != tuple(range(len(shape.index))) else None

    def _mask(self) -> Tensor:
        """bool ``[sequences, 1, longest query, longest key]``: which keys a query reads."""
        query = torch.tensor(self.shape.query_lengths)[:, None, None]
        key = torch.tensor(self.shape.key_lengths)[list(self.shape.index)][:, None, None]
        i = torch.arange(max(self.shape.query_lengths))[None, :, None]
        j = torch.arange(max(self.shape.key_lengths))[None, None, :]
        return ((j < key) & (j <= i + key - query if self.shape.causal else j < key))[:, None]

    def unpad(self, x: Tensor) -> Tensor:
        """``[sequences, heads, length, 64]`` -> packed rows."""
        return torch.cat([s.transpose(0, 1)[:n] for s, n in zip(x, self.shape.query_lengths, strict=True)])

    def providers(self, device: str) -> dict[str, tuple[Call, list[Tensor]]]:
        """Name -> (call, the tensors it takes)."""
        dense = bool(self.mask.all())

        def keys(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return (k, v) if self.gather is None else (k[self.gather], v[self.gather])

        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = keys(k, v)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=None if dense else self.mask)

        def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = keys(k, v)
            scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
            return torch.softmax(scores if dense else scores.masked_fill(~self.mask, -math.inf), -1) @ v

        def ours(backend: str) -> Call:
            return lambda q, k, v: attention(q, k, v, self.plan, backend=backend)

        calls: dict[str, tuple[Call, list[Tensor]]] = {BASELINE: (sdpa, self.padded), "naive padded": (naive, self.padded)}
        for backend in BACKENDS:
            if backend_status(backend, device).available:
                calls[f"vlp_fast {backend}"] = (ours(backend), self.packed)
        return calls

    def wrong(self, call: Call, tensors: list[Tensor], baseline: Tensor) -> str:
        """Why the provider is wrong, empty where it is right."""
        try:
            out = call(*tensors)
            packed = out if tensors is self.packed else self.unpad(out)
            assert_as_accurate_as(packed, baseline, self.exact)
        except (AssertionError, ValueError, RuntimeError) as error:
            return str(error).partition("\n")[0] or type(error).__name__
        return ""

    def right(self, device: str) -> tuple[dict[str, tuple[Call, list[Tensor]]], dict[str, str]]:
        """Providers that agree with the reference, and the reasons of those that do not."""
        providers = self.providers(device)
        call, tensors = providers["naive padded"]
        baseline = self.unpad(call(*tensors))
        reasons = {name: self.wrong(*provider, baseline) for name, provider in providers.items()}
        return {n: p for n, p in providers.items() if not reasons[n]}, {n: r for n, r in reasons.items() if r}


def forward(call: Call, tensors: list[Tensor]) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return call(*tensors)

    return run


def forward_backward(call: Call, tensors: list[Tensor]) -> Callable[[], object]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    grad = torch.ones_like(leaves[0])

    def run() -> object:
        return torch.autograd.grad(call(*leaves), leaves, grad)

    return run


DIRECTIONS = {"fwd": forward, "fwd+bwd": forward_backward}


def _pad(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    parts = [F.pad(p, (0, 0, 0, 0, 0, max(lengths) - len(p))) for p in x.split(list(lengths))]
    return torch.stack(parts).transpose(1, 2).contiguous()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("provider", [BASELINE, "naive padded", *(f"vlp_fast {name}" for name in BACKENDS)])
@pytest.mark.parametrize("shape", shapes(), ids=lambda shape: shape.name)
def test_attention(benchmark: Any, shape: Shape, provider: str, direction: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = provider.removeprefix("vlp_fast ")
    if backend in BACKENDS and not backend_status(backend, device).available:
        pytest.skip(backend_status(backend, device).reason)
    right, reasons = Case(shape, device, torch.float32).right(device)
    assert provider in right, f"{provider} is wrong: {reasons[provider]}"
    benchmark.group = f"{shape.name}, {direction}"
    call = DIRECTIONS[direction](*right[provider])

    def waited() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(waited)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare attention backends at the shapes of vision-language models.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--batch", type=int, default=BATCH, help=f"images (default: {BATCH})")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each shape and direction (default: 1)")
    parser.add_argument("--json", type=Path, help="write the numbers, with what they were measured on")
    arguments = parser.parse_args()
    prepare_process()
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("shape", "direction", "provider"):
        table.add_column(name, no_wrap=True)
    for name in ("median ms", "quartiles", "n", f"vs {BASELINE}"):
        table.add_column(name, justify="right", no_wrap=True)
    rows, all_wrong = [], []
    for shape in shapes(arguments.batch):
        right, reasons = Case(shape, arguments.device, DTYPES[arguments.dtype]).right(arguments.device)
        all_wrong += [
            f"{provider} is wrong at {shape.name} and was not timed: {reason}" for provider, reason in reasons.items()
        ]
        for direction, wrap in DIRECTIONS.items():
            calls = {name: wrap(*provider) for name, provider in right.items()}
            options = {"steps": 1000, "seconds": arguments.seconds, "warmup": 3, "device": arguments.device}
            timings = measure(calls, **options)  # type: ignore[arg-type]
            for provider, timing in timings.items():
                rows.append({"shape": shape.name, "direction": direction, "provider": provider, **_numbers(timing)})
                speedup = f"x{timings[BASELINE].median / timing.median:.2f}" if BASELINE in timings else "-"
                spread = f"{_short(timing.q1)}-{_short(timing.q3)}"
                table.add_row(shape.name, direction, provider, _short(timing.median), spread, str(timing.count), speedup)
            table.add_section()
    about = stamp(arguments.device, dtype=arguments.dtype, batch=arguments.batch, seed=0)
    console = output_console()
    console.print(
        f"{about['device_name']}, {about['threads']} threads, torch {about['torch']}, {arguments.dtype}, batch {arguments.batch}"
    )
    console.print(table)
    for line in all_wrong:
        console.print(line)
    if arguments.json is not None:
        report = {"schema": 1, "stamp": about, "rows": rows, "wrong": all_wrong}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if all_wrong else 0


def _numbers(timing: Timing) -> dict[str, float]:
    return {"ms_median": timing.median, "ms_q1": timing.q1, "ms_q3": timing.q3, "steps": timing.count}


def _short(ms: float) -> str:
    return f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


if __name__ == "__main__":
    sys.exit(main())
