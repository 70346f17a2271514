"""A decoding step's attention: own caches and shared images, against repeated keys and values.

"sdpa, repeated" is scaled_dot_product_attention on keys and values repeated for every beam beforehand, as padded models keep them; ours
reads one copy per image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_fast.benchmarks.registry import DTYPES, Entry, Options, own_backends
from vlp_fast.benchmarks.side_by_side import FORWARD, Operation, entries
from vlp_fast.decode_plan import DecodePlan
from vlp_fast.ops import decode_attention

__all__ = ["PROVIDERS", "cases"]

PROVIDERS = {"decode_attention": ("sdpa, repeated", "vlp_fast torch", "vlp_fast triton")}
HEADS, HEAD_DIM, TOKENS, BEAMS = 12, 64, 577, 3
CAPACITY, LENGTH = 32, 20  # of each beam's own cache, and what is in it


def cases(options: Options) -> Iterator[Entry]:
    """The image of a caption, and each beam's own cache."""
    images = options.batch
    for name, build in {
        f"{images} images of {TOKENS} tokens, {BEAMS} beams": _images,
        f"{images * BEAMS} caches of {LENGTH} tokens": _caches,
    }.items():
        yield from entries("decode_attention", name, partial(build, images, options), options, (FORWARD,))


def _images(images: int, options: Options) -> Operation:
    plan = DecodePlan.cross([TOKENS] * images, BEAMS, options.device)
    q, k, v = (_rows(n, options) for n in (images * BEAMS, images * TOKENS, images * TOKENS))
    repeated = [t.unflatten(0, (images, TOKENS)).repeat_interleave(BEAMS, 0) for t in (k, v)]
    return _operation(q, k, v, plan, repeated, [k, v], options)


def _caches(images: int, options: Options) -> Operation:
    rows = images * BEAMS
    plan = DecodePlan.self_cache(rows, CAPACITY, LENGTH, options.device)
    q, k, v = (_rows(n, options) for n in (rows, rows * CAPACITY, rows * CAPACITY))
    there = [t.unflatten(0, (rows, CAPACITY))[:, :LENGTH] for t in (k, v)]
    return _operation(q, k, v, plan, there, there, options)


def _rows(count: int, options: Options) -> Tensor:
    return torch.randn(count, HEADS, HEAD_DIM, device=options.device, dtype=DTYPES[options.dtype])


def _operation(
    q: Tensor, k: Tensor, v: Tensor, plan: DecodePlan, padded: list[Tensor], reads: list[Tensor], options: Options
) -> Operation:
    """padded: keys and values of each row, ``[rows, tokens, heads, head_dim]``."""

    def sdpa(q: Tensor) -> Tensor:
        k, v = (t.to(q.dtype).transpose(1, 2) for t in padded)
        return F.scaled_dot_product_attention(q[:, :, None], k, v)[:, :, 0]

    def ours(backend: str) -> Callable[..., Tensor]:
        return lambda q: decode_attention(q, k, v, plan, backend=backend)

    backends, absent = own_backends(options.device)
    providers = {"sdpa, repeated": sdpa, **{f"vlp_fast {name}": ours(name) for name in backends}}
    return Operation([q], providers, absent=absent, reads=reads)
