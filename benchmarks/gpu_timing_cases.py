"""What gpu_check.py times: shapes of BLIP, CoCa and BEiT-3 at the batch of a GPU, our call, its floor and its rivals; losses apart.

Floors are the formulas of kernels/README.md. At `tiny`, for the interpreter, three samples of a few rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from vlp_fast import AttentionPlan, ops, reference
from vlp_fast.benchmarks.gpu_cases import Maker
from vlp_fast.benchmarks.gpu_providers import Layout, Provider, TimedCase, TimedProblem, Work
from vlp_fast.benchmarks.gpu_rivals import Sequences, attention_rivals
from vlp_fast.decode_plan import DecodePlan
from vlp_fast.modules import AttentionalPooler
from vlp_fast.training import caption_lengths

__all__ = ["timed_cases"]

RAGGED = 0  # captions as the web has them: 6 to 40 tokens, 14 on average


def timed_cases() -> Iterator[TimedCase]:
    """Every case but those of losses, family after family."""
    for name, shape in ATTENTION.items():
        yield TimedCase("attention", name, shape, gigabytes=40.0)
    for name, pool in POOLS.items():
        yield TimedCase("attention_pool", name, pool, gigabytes=40.0)
    for name, linear in LINEARS.items():
        yield TimedCase("multiway", name, linear)
    yield TimedCase("decode_attention", "64 images of 577 tokens, 3 beams", _decode)


def captions(batch: int, tiny: bool) -> list[int]:
    """Lengths of captions, in no order."""
    lengths = [min(n, 3 + i % 3) if tiny else n for i, n in enumerate(caption_lengths(batch))]
    random.Random(0).shuffle(lengths)
    return lengths


# -------------------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class Attention:
    """`batch` samples with `heads` of `head_dim`.

    kind: "self", rows of `image` tokens or else of `text`; "cross", texts read images; "pool", `queries` that all samples share read
    images; "joint", images and texts lie apart and read each other. passes: of BLIP's captions over the same images, 1 or 4.
    """

    kind: str
    heads: int
    head_dim: int
    batch: int
    image: int | None = None
    text: int | None = None
    causal: bool = False
    queries: int = 256
    passes: int = 1

    def __call__(self, make: Maker) -> TimedProblem:
        batch = 3 if make.tiny else self.batch
        heads, head_dim = (2, 16) if make.tiny else (self.heads, self.head_dim)
        plan, sequences = self.layout(batch, make)
        q = make.randn(plan.query_rows, heads, head_dim)
        k, v = (make.randn(plan.key.rows, heads, head_dim) for _ in "kv")
        queries, keys = closed_sample(plan)
        part = sub_plan(plan, queries, keys)
        query_rows, key_rows = plan.query.take(queries)[0], plan.key.take(keys)[0]
        width, size = heads * head_dim, q.element_size()
        rows = plan.query_rows, plan.query.rows, plan.key.rows  # of q, of out, of k and v
        providers = {
            "triton": lambda: Provider("triton", lambda q, k, v: ops.attention(q, k, v, plan, backend="triton"), ours=True)
        }
        return TimedProblem(
            [q, k, v],
            (True, True, True),
            {**providers, **dict(attention_rivals(sequences))},
            Work(4 * width * plan.pairs, size * width * (rows[0] + rows[1] + 2 * rows[2]) + 4 * heads * rows[1]),
            Work(10 * width * plan.pairs, size * width * (2 * rows[0] + 2 * rows[1] + 4 * rows[2]) + 8 * heads * rows[1]),
            lambda q, k, v: reference.attention(q, k, v, part),
            (None if plan.shares_queries else query_rows, key_rows, key_rows, query_rows),
            (not plan.shares_queries, True, True),
        )

    def layout(self, batch: int, make: Maker) -> tuple[AttentionPlan, Sequences]:
        """The plan, and the same as sequences."""
        device, tiny = make.device, make.tiny
        image = [min(self.image or 0, 9) if tiny else self.image or 0] * batch
        text = captions(batch, tiny) if not self.text else [min(self.text, 5) if tiny else self.text] * batch
        if self.kind == "self":
            lengths = image if self.image else text
            plan = AttentionPlan.self_attention(lengths, causal=self.causal, device=device)
            return plan, Sequences(lengths, lengths, device, causal=self.causal, flex=self.text == RAGGED)
        if self.kind == "pool":
            queries = 4 if tiny else self.queries
            return AttentionPlan.pooling(queries, image, device), Sequences([queries] * batch, image, device, shared=True)
        if self.kind == "joint":
            plan = AttentionPlan.joint(image, text, device=device)
            order = torch.cat([plan.query.take([i, batch + i])[0] for i in range(batch)])
            both = [a + b for a, b in zip(image, text, strict=True)]
            return plan, Sequences(both, both, device, order, order)
        if self.passes == 1:
            return AttentionPlan.cross_attention(text, image, device=device), Sequences(text, image, device)
        return four_passes(text, image, device)


def four_passes(text: list[int], image: list[int], device: str) -> tuple[AttentionPlan, Sequences]:
    """BLIP's step: matched pairs, other captions of the images, other images of the captions, and the caption's own loss."""
    draw, own = random.Random(0), list(range(len(image)))
    others = [draw.choice([j for j in own if j != i]) for i in own]
    lengths = [*text, *(text[j] for j in others), *text, *text]
    index = [*own, *own, *others, *own]
    plan = AttentionPlan.cross_attention(lengths, image, index, device)
    by_image = [[i for i, j in enumerate(index) if j == k] for k in own]
    order = plan.query.take([i for group in by_image for i in group])[0]
    totals = [sum(lengths[i] for i in group) for group in by_image]
    return plan, Sequences(totals, image, device, order, index=torch.tensor(index, device=device), captions=lengths, flex=True)


def closed_sample(plan: AttentionPlan, count: int = 3) -> tuple[list[int], list[int]]:
    """Query and key segments that read and are read by no others: those around the first, the middle and the last key segment."""
    edges = [(int(i), int(j)) for i, j, _ in plan.host_edges]
    last = len(plan.key) - 1
    keys, before = {last * i // max(count - 1, 1) for i in range(count)}, set()
    while keys != before:
        before = set(keys)
        queries = {i for i, j in edges if j in keys}
        keys |= {j for i, j in edges if i in queries}
    return sorted(queries), sorted(keys)


def sub_plan(plan: AttentionPlan, queries: Sequence[int], keys: Sequence[int]) -> AttentionPlan:
    """The plan of these segments alone."""
    q, k = ({old: new for new, old in enumerate(segments)} for segments in (queries, keys))
    edges = [(q[int(i)], k[int(j)], bool(c)) for i, j, c in plan.host_edges if int(i) in q]
    lengths = [plan.query.lengths[i] for i in queries], [plan.key.lengths[j] for j in keys]
    rows = plan.query_rows if plan.shares_queries else None
    return AttentionPlan.from_edges(*lengths, edges, device=plan.device, query_rows=rows)


ATTENTION = {
    "ViT-B/16 224 self, 256 x 197": Attention("self", 12, 64, 256, image=197),
    "ViT-L/16 384 self, 128 x 577": Attention("self", 16, 64, 128, image=577),
    "ViT-L/14 224 self, 256 x 257": Attention("self", 16, 64, 256, image=257),
    "BLIP text self, ragged": Attention("self", 12, 64, 256, text=RAGGED),
    "BLIP cross, ragged x 197": Attention("cross", 12, 64, 256, image=197, text=RAGGED),
    "BLIP cross, ragged x 577": Attention("cross", 12, 64, 256, image=577, text=RAGGED),
    "BLIP cross, 4 passes, shared keys x 197": Attention("cross", 12, 64, 256, image=197, text=RAGGED, passes=4),
    "BLIP cross, 4 passes, shared keys x 577": Attention("cross", 12, 64, 256, image=577, text=RAGGED, passes=4),
    "CoCa pool, 256 shared queries x 256, head_dim 96": Attention("pool", 8, 96, 256, image=256),
    "CoCa text causal, 256 x 77": Attention("self", 12, 64, 256, text=77, causal=True),
    "CoCa cross, 256 x 76 x 256": Attention("cross", 12, 64, 256, image=256, text=76),
    "BEiT-3 joint, 256 x (197 + 64)": Attention("joint", 12, 64, 256, image=197, text=64),
}

# ---------------------------------------------------------------------------------------------------------------------- pooling


@dataclass(frozen=True)
class Pool:
    """A pooler with one query over `batch` images, with its projections and norms, against one that forms keys and values."""

    dim: int
    heads: int
    tokens: int
    batch: int = 256

    def __call__(self, make: Maker) -> TimedProblem:
        dim, heads, tokens, batch = (32, 4, 9, 3) if make.tiny else (self.dim, self.heads, self.tokens, self.batch)
        torch.manual_seed(0)
        module = AttentionalPooler(dim, dim, heads, 1).to(make.device, make.dtype)
        module.backend = "triton"
        names = [name for name, _ in module.named_parameters()]
        attention = nn.MultiheadAttention(dim, heads, batch_first=True, device=make.device, dtype=make.dtype)
        plan = module.plan([tokens] * batch, make.device)
        x = make.randn(batch * tokens, dim)
        inputs = [x, *(p.detach().clone() for p in module.parameters())]

        def ours(x: Tensor, *parameters: Tensor) -> Tensor:
            return functional_call(module, dict(zip(names, parameters, strict=True)), (x, plan))

        def formed(x: Tensor, *parameters: Tensor) -> Tensor:
            own = dict(zip(names, parameters, strict=True))
            rows = F.layer_norm(x, [dim], own["ln_k.weight"], own["ln_k.bias"], module.ln_k.eps).unflatten(0, (batch, tokens))
            query = F.layer_norm(own["query"], [dim], own["ln_q.weight"], own["ln_q.bias"], module.ln_q.eps)
            weights = {name.removeprefix("attn."): p for name, p in own.items() if name.startswith("attn.")}
            arguments = (query.expand(batch, 1, dim), rows, rows)
            return functional_call(attention, weights, arguments, {"need_weights": False})[0].flatten(0, 1)

        size, rows = x.element_size(), batch * tokens
        return TimedProblem(
            inputs,
            (True,) * len(inputs),
            {
                "triton": lambda: Provider("triton", ours, ours=True),
                "nn.MultiheadAttention": lambda: Provider("nn.MultiheadAttention", formed),
            },
            Work(4 * rows * heads * dim, size * rows * dim),
            Work(10 * rows * heads * dim, 2 * size * rows * dim + 8 * rows),
            formed,
        )


POOLS = {
    "CoCa base, 1 query x 576, 8 heads": Pool(768, 8, 576),
    "SigLIP so400m MAP, 1 query x 729, 16 heads": Pool(1152, 16, 729),
}

# --------------------------------------------------------------------------------------------------------------------- multiway

PAIRS = (256 * 197, 256 * 64)  # image rows, then text rows


class First:
    """The first of stacked tensors."""

    def into(self, x: Tensor) -> Tensor:
        return x[0].contiguous()

    def back(self, x: Tensor) -> Tensor:
        return x[None]


@dataclass(frozen=True)
class Linear:
    """Rows of two modalities through the weights of their experts."""

    inputs: int
    outputs: int
    activation: str | None = None

    def __call__(self, make: Maker) -> TimedProblem:
        width, depth = (24, 40) if make.tiny else (self.outputs, self.inputs)
        split, rest = (13, 6) if make.tiny else PAIRS
        rows, offsets = split + rest, (0, split, split + rest)
        x, weight = make.randn(rows, depth), make.randn(2, width, depth, scale=depth**-0.5)
        bias = make.randn(2, width)
        ends = torch.tensor(offsets[1:], dtype=torch.int32, device=make.device)
        activate: Callable[[Tensor], Tensor] = F.gelu if self.activation else lambda x: x

        def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return ops.multiway_linear(x, weight, bias, offsets, activation=self.activation, backend="triton")

        def two(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            parts = [F.linear(part, weight[e], bias[e]) for e, part in enumerate(x.split([split, rest]))]
            return activate(torch.cat(parts))

        def grouped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            added = torch.cat([bias[0].expand(split, -1), bias[1].expand(rest, -1)])
            return activate(F.grouped_mm(x, weight.transpose(1, 2), offs=ends) + added)

        def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.linear(x, weight, bias)

        size, pre = x.element_size(), rows * width if self.activation else 0
        layouts: tuple[Layout | None, ...] = (None, First(), First())
        return TimedProblem(
            [x, weight, bias],
            (True, True, True),
            {
                "triton": lambda: Provider("triton", ours, ours=True),
                "two F.linear and cat": lambda: Provider("two F.linear and cat", two),
                "F.grouped_mm": lambda: Provider("F.grouped_mm", grouped),
                "one dense F.linear": lambda: Provider("one dense F.linear", dense, layouts, is_bound=True),
            },
            Work(2 * rows * depth * width, size * (rows * depth + 2 * width * depth + rows * width)),
            # pre: kept by the forward of both directions; read, and its gradient made, by the backward
            Work(4 * rows * depth * width, size * (2 * rows * width + 2 * rows * depth + 4 * depth * width + 4 * pre)),
            partial(reference.multiway_linear, expert_offsets=offsets, activation=self.activation),
        )


LINEARS = {
    "BEiT-3 base, q k v": Linear(768, 2304),
    "BEiT-3 base, fc1 with GELU": Linear(768, 3072, "gelu"),
    "BEiT-3 base, fc2": Linear(3072, 768),
}

# --------------------------------------------------------------------------------------------------------------------- decoding


@dataclass(frozen=True)
class PerBeam:
    """A copy of each image's rows for each of its beams."""

    images: int
    beams: int

    def into(self, x: Tensor) -> Tensor:
        return repeated(x, self.images, self.beams)

    def back(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.images, self.beams))[:, 0].flatten(0, 1)


def repeated(x: Tensor, images: int, beams: int) -> Tensor:
    """``[images * tokens, ...]`` -> ``[images * beams, tokens, ...]``."""
    return x.unflatten(0, (images, -1)).repeat_interleave(beams, 0)


def _decode(make: Maker) -> TimedProblem:
    images, tokens, beams, heads, head_dim = (2, 9, 3, 2, 16) if make.tiny else (64, 577, 3, 12, 64)
    plan = DecodePlan.cross([tokens] * images, beams, make.device)
    q = make.randn(plan.query.rows, heads, head_dim)
    k, v = (make.randn(images * tokens, heads, head_dim) for _ in "kv")

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of ``[sequences, rows, heads, head_dim]``."""
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.decode_attention(q, k, v, plan, backend="triton")

    def private(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q[:, None], k, v)[:, 0]

    def copied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return private(q, repeated(k, images, beams), repeated(v, images, beams))

    def as_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(*(t.unflatten(0, (images, -1)) for t in (q, k, v))).flatten(0, 1)

    own = PerBeam(images, beams)
    calls: dict[str, tuple[Any, ...]] = {
        "sdpa, keys repeated in the call": (copied,),
        "sdpa, private copies": (private, (None, own, own)),
        "sdpa, beams as query rows": (as_rows,),
    }
    return TimedProblem(
        [q, k, v],
        (False, False, False),
        {
            "triton": lambda: Provider("triton", ours, ours=True),
            **{name: partial(Provider, name, *how) for name, how in calls.items()},
        },
        Work(4 * heads * head_dim * plan.pairs, 2 * q.element_size() * heads * head_dim * images * tokens),
        reference=lambda q, k, v: reference.decode_attention(q, k, v, plan),
    )
