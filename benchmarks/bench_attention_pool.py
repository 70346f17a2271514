"""Attentional pooling: with one query K and V are never formed, against nn.MultiheadAttention; and with 256 queries.

"nn.MultiheadAttention" follows a LayerNorm of the tokens, its query expanded to the batch, as in open_clip's pooler; ours is
`AttentionalPooler` with the same weights. Tokens get a gradient, weights none. CoCa and MAP poolers at 576 tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from vlp_fast.benchmarks.registry import DTYPES, Entry, Options, own_backends
from vlp_fast.benchmarks.side_by_side import Operation, entries, smaller
from vlp_fast.modules import AttentionalPooler

__all__ = ["PROVIDERS", "cases"]

PROVIDERS = {"attention_pool": ("nn.MultiheadAttention", "vlp_fast torch", "vlp_fast triton")}
TOKENS, DIM, HEADS = 576, 768, 8


def cases(options: Options) -> Iterator[Entry]:
    """One query at four times the batch, and 256 queries."""
    for queries, batch in ((1, 4 * options.batch), (smaller(256, options), options.batch)):
        name = f"{batch} x {TOKENS} tokens, {queries} queries"
        yield from entries("attention_pool", name, partial(_operation, queries, batch, options), options)


def _operation(queries: int, batch: int, options: Options) -> Operation:
    device, dtype, dim = options.device, DTYPES[options.dtype], smaller(DIM, options)
    x = torch.randn(batch, TOKENS, dim, device=device, dtype=dtype).requires_grad_()
    module = AttentionalPooler(dim, dim, HEADS, queries).to(device, dtype).requires_grad_(False)
    twin = nn.MultiheadAttention(dim, HEADS, batch_first=True).to(device, dtype).requires_grad_(False)
    twin.load_state_dict(module.attn.state_dict())

    def pooled(module: AttentionalPooler, twin: nn.MultiheadAttention, x: Tensor) -> Tensor:
        tokens = module.ln_k(x)
        return twin(module.ln_q(module.query).expand(len(x), -1, -1), tokens, tokens, need_weights=False)[0]

    def ours(backend: str) -> Callable[..., Tensor]:
        def run(tokens: Tensor) -> Tensor:
            module.backend = backend
            return module(tokens)

        return run

    backends, absent = own_backends(device)
    return Operation(
        [x],
        {"nn.MultiheadAttention": partial(pooled, module, twin), **{f"vlp_fast {name}": ours(name) for name in backends}},
        absent=absent,
        exact=partial(pooled, copy.deepcopy(module).double(), copy.deepcopy(twin).double()),
        reads=list(module.parameters()),
    )
