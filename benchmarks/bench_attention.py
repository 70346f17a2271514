"""Attention at the shapes of BLIP, CoCa and BEiT-3: our backends against padded rectangles and against variable-length calls.

"sdpa padded" is scaled_dot_product_attention on rectangles with a mask, as padded models call it; "naive padded", softmax(q k^T) v on the
same rectangles. They get tensors that are padded already. Where several captions read one image, all but ours gather keys and values in the
call, as their models do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_fast import AttentionPlan, reference
from vlp_fast.benchmarks.gpu_providers import Provider, RowLayout
from vlp_fast.benchmarks.gpu_rivals import PACKED_RIVALS, Sequences
from vlp_fast.benchmarks.registry import DTYPES, Entry, NotHere, Options
from vlp_fast.benchmarks.side_by_side import Operation, entries, needs_cuda
from vlp_fast.ops import BACKENDS, attention, backend_status
from vlp_fast.training import caption_lengths

__all__ = ["PROVIDERS", "cases"]

PROVIDERS = {"attention": ("sdpa padded", "naive padded", *PACKED_RIVALS, *(f"vlp_fast {name}" for name in BACKENDS))}
HEAD_DIM = 64


@dataclass(frozen=True)
class Shape:
    """One attention of a model: query segment i reads key segment ``index[i]``."""

    name: str
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    index: tuple[int, ...]
    heads: int = 12
    causal: bool = False

    @property
    def gathers(self) -> bool:
        return self.index != tuple(range(len(self.key_lengths)))

    def mask(self) -> Tensor:
        """bool ``[sequences, 1, longest query, longest key]``: which keys a query reads."""
        query = torch.tensor(self.query_lengths)[:, None, None]
        key = torch.tensor(self.key_lengths)[list(self.index)][:, None, None]
        i = torch.arange(max(self.query_lengths))[None, :, None]
        j = torch.arange(max(self.key_lengths))[None, None, :]
        return ((j < key) & (j <= i + key - query if self.causal else j < key))[:, None]


def shapes(batch: int) -> list[Shape]:
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


def cases(options: Options) -> Iterator[Entry]:
    """Every attention of the models, at half the batch."""
    for shape in shapes(max(options.batch // 2, 1)):
        yield from entries("attention", shape.name, partial(_operation, shape, options), options)


@dataclass(frozen=True)
class Rectangle:
    """Rows padded to the longest sequence, ``[sequences, heads, longest, head_dim]``."""

    rows: RowLayout

    def into(self, x: Tensor) -> Tensor:
        return self.rows.into(x).transpose(1, 2).contiguous()

    def back(self, x: Tensor) -> Tensor:
        return self.rows.back(x.transpose(1, 2))


def _operation(shape: Shape, options: Options) -> Operation:
    device, dtype = options.device, DTYPES[options.dtype]
    rows = (sum(shape.query_lengths), sum(shape.key_lengths), sum(shape.key_lengths))
    inputs = [torch.randn(n, shape.heads, HEAD_DIM).to(device, dtype).requires_grad_() for n in rows]
    edges = [(i, j, shape.causal) for i, j in enumerate(shape.index)]
    plan = AttentionPlan.from_edges(shape.query_lengths, shape.key_lengths, edges, device=device)
    padded = Sequences(shape.query_lengths, shape.key_lengths, device)
    q_layout, k_layout = Rectangle(padded.padded("q")), Rectangle(padded.padded("k"))
    mask, index = shape.mask().to(device), torch.tensor(shape.index, device=device)
    dense = bool(mask.all())

    def keys(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t[index] for t in tensors) if shape.gathers else tensors

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = keys(k, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if dense else mask)

    def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = keys(k, v)
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        return torch.softmax(scores if dense else scores.masked_fill(~mask, -math.inf), -1) @ v

    def ours(backend: str) -> Callable[..., Tensor]:
        return lambda q, k, v: attention(q, k, v, plan, backend=backend)

    providers: dict[str, Callable[..., Tensor] | Provider] = {
        name: Provider(name, call, (q_layout, k_layout, k_layout), q_layout)
        for name, call in {"sdpa padded": sdpa, "naive padded": naive}.items()
    }
    absent = {}
    for backend in BACKENDS:
        status = backend_status(backend, device)
        if status.available:
            providers[f"vlp_fast {backend}"] = ours(backend)
        else:
            absent[f"vlp_fast {backend}"] = status.reason
    optional = {name: partial(_packed, shape, options, name) for name in PACKED_RIVALS}
    return Operation(
        inputs,
        providers,
        optional,
        absent,
        exact=lambda q, k, v: reference.attention(q, k, v, plan),
        plain="naive padded",
    )


def _packed(shape: Shape, options: Options, name: str) -> Callable[..., Tensor]:
    """A variable-length call on packed rows; keys and values of a shared image are repeated in it."""
    needs_cuda(options)
    if options.dtype == "fp32" and name != "xformers":
        raise NotHere("needs 16-bit numbers")
    read = [shape.key_lengths[j] for j in shape.index]
    attend = PACKED_RIVALS[name](Sequences(shape.query_lengths, read, options.device, causal=shape.causal))
    if not shape.gathers:
        return attend
    starts = [sum(shape.key_lengths[:j]) for j in range(len(shape.key_lengths))]
    rows = torch.cat([starts[j] + torch.arange(shape.key_lengths[j]) for j in shape.index]).to(options.device)
    return lambda q, k, v: attend(q, k.index_select(0, rows), v.index_select(0, rows))
