"""BEiT-3's multiway layers: our operations against two modules per sub-layer with split and torch.cat.

One projection (fc1 of BEiT-3 base with its bias), and a whole layer, over images of 197 tokens and ragged captions. "two linears + cat"
has an nn.Linear or nn.LayerNorm per expert, rows split and put together again for every one, on the same packed rows and with the same
attention; "two linears + cat, padded" the same over [batch, 197 + longest caption], split along the tokens, as torchscale's MultiwayNetwork
does, with scaled_dot_product_attention and a mask; "grouped_mm" is torch's own grouped product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_fast import AttentionPlan, reference
from vlp_fast.benchmarks.gpu_providers import Provider, RowLayout
from vlp_fast.benchmarks.registry import DTYPES, Entry, NotHere, Options, own_backends
from vlp_fast.benchmarks.side_by_side import Operation, entries, smaller
from vlp_fast.models.beit3 import beit3_preset
from vlp_fast.models.beit3_encoder import Beit3Layer
from vlp_fast.ops import attention, multiway_linear
from vlp_fast.training import caption_lengths

__all__ = ["PROVIDERS", "cases"]

TOKENS, HEADS = 197, 12
BASELINE, PADDED = "two linears + cat", "two linears + cat, padded"
PROVIDERS = {
    "multiway_linear": (BASELINE, "grouped_mm", "vlp_fast torch", "vlp_fast triton"),
    "beit3_layer": (BASELINE, PADDED, "vlp_fast torch", "vlp_fast triton"),
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [..., heads, head_dim] -> their attention


def cases(options: Options) -> Iterator[Entry]:
    """A projection and a layer."""
    rows = f"{options.batch} images and captions"
    yield from entries("multiway_linear", f"fc1, {rows}", partial(_projection, options), options)
    yield from entries("beit3_layer", rows, partial(_layer, options), options)


class Two(nn.Module):
    """A module for each of two experts; the rows are split along `dim` and put together again."""

    def __init__(self, make: Callable[[], nn.Module], dim: int = 0) -> None:
        super().__init__()
        self.experts, self.dim = nn.ModuleList([make(), make()]), dim

    def forward(self, x: Tensor, split: int) -> Tensor:
        first, second = torch.split(x, [split, x.shape[self.dim] - split], self.dim)
        return torch.cat([self.experts[0](first), self.experts[1](second)], self.dim)


class TwoLayer(nn.Module):
    """A BEiT-3 layer of `Two`s."""

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__()

        def linear(width_in: int, width_out: int) -> Two:
            return Two(lambda: nn.Linear(width_in, width_out), dim)

        def norm(width: int) -> Two:
            return Two(lambda: nn.LayerNorm(width), dim)

        self.attention_norm, self.inner_norm, self.ffn_norm, self.norm = norm(width), norm(width), norm(width), norm(hidden)
        self.q, self.k, self.v, self.proj = (linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = linear(width, hidden), linear(hidden, width)

    def forward(self, x: Tensor, split: int, attend: Attend) -> Tensor:
        y = self.attention_norm(x, split)
        q, k, v = (layer(y, split).unflatten(-1, (HEADS, -1)) for layer in (self.q, self.k, self.v))
        x = x + self.proj(self.inner_norm(attend(q, k, v).flatten(-2), split), split)
        hidden = self.fc1(self.ffn_norm(x, split), split)
        hidden = F.gelu(hidden.to(torch.promote_types(hidden.dtype, torch.float32))).to(hidden.dtype)
        return x + self.fc2(self.norm(hidden, split), split)

    @torch.no_grad()
    def load(self, layer: Beit3Layer) -> None:
        """The weights of our layer."""
        ours = dict(layer.named_parameters())
        for theirs, name in {
            "attention_norm": "attention_norm", "inner_norm": "attention.inner_norm", "ffn_norm": "ffn_norm", "norm": "ffn.norm",
            "proj": "attention.proj", "fc1": "ffn.fc1", "fc2": "ffn.fc2",
        }.items():  # fmt: skip
            for e, expert in enumerate(self.get_submodule(theirs).experts):
                expert.weight.copy_(ours[f"{name}.weight"][e])
                expert.bias.copy_(ours[f"{name}.bias"][e])
        for i, two in enumerate((self.q, self.k, self.v)):
            for e, expert in enumerate(two.experts):
                expert.weight.copy_(ours["attention.qkv.weight"][e].chunk(3)[i])
                expert.bias.copy_(ours["attention.qkv.bias"][e].chunk(3)[i])


class Batch:
    """Rows of a batch: images, then captions; and where each lies in a padded batch."""

    def __init__(self, options: Options) -> None:
        batch, device = options.batch, torch.device(options.device)
        self.texts = tuple(caption_lengths(batch))
        self.split, self.rows = batch * TOKENS, batch * TOKENS + sum(self.texts)
        self.offsets = (0, self.split, self.rows)
        self.plan = AttentionPlan.joint([TOKENS] * batch, self.texts, device)
        longest = TOKENS + max(self.texts)
        place = [b * longest + i for b in range(batch) for i in range(TOKENS)]
        place += [b * longest + TOKENS + i for b, n in enumerate(self.texts) for i in range(n)]
        self.padded = RowLayout(torch.tensor(place, device=device), (batch, longest))
        mask = torch.zeros(batch * longest, dtype=torch.bool, device=device)
        mask[self.padded.place] = True
        self.mask = mask.view(batch, 1, 1, longest)


def _projection(options: Options) -> Operation:
    device, dtype, batch = options.device, DTYPES[options.dtype], Batch(options)
    width, hidden = smaller(768, options), smaller(3072, options)
    x = torch.randn(batch.rows, width, device=device).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(2, hidden, width, device=device)).to(dtype).requires_grad_()
    bias = torch.randn(2, hidden, device=device).to(dtype).requires_grad_()
    two = Two(lambda: nn.Linear(width, hidden)).to(device, dtype)
    with torch.no_grad():
        for e, expert in enumerate(two.experts):
            expert.weight.copy_(weight[e])
            expert.bias.copy_(bias[e])

    def grouped() -> Callable[..., Tensor]:
        if not hasattr(F, "grouped_mm"):
            raise NotHere(f"torch {torch.__version__} has none")
        ends = torch.tensor(batch.offsets[1:], dtype=torch.int32, device=device)
        counts = torch.tensor([batch.split, batch.rows - batch.split], device=device)
        expert = torch.arange(2, device=device).repeat_interleave(counts)
        return lambda t: F.grouped_mm(t, weight.transpose(1, 2), offs=ends) + bias[expert]

    def ours(backend: str) -> Callable[..., Tensor]:
        return lambda t: multiway_linear(t, weight, bias, batch.offsets, backend=backend)

    backends, absent = own_backends(device)
    own = {f"vlp_fast {name}": ours(name) for name in backends}
    exact = copy.deepcopy(two).double()
    return Operation(
        [x],
        {BASELINE: lambda t: two(t, batch.split), **own},
        {"grouped_mm": grouped},
        absent,
        exact=lambda t: exact(t, batch.split),
        parameters={BASELINE: list(two.parameters()), **{name: [weight, bias] for name in (*own, "grouped_mm")}},
        reads=[weight, bias],
    )


def _layer(options: Options) -> Operation:
    device, dtype, batch = options.device, DTYPES[options.dtype], Batch(options)
    width, hidden = (192, 384) if options.size == "tiny" else (768, 3072)
    sizes = {"dim": width, "hidden_dim": hidden, "num_heads": HEADS}
    x = torch.randn(batch.rows, width, device=device).to(dtype).requires_grad_()
    backends, absent = own_backends(device)
    layers = {name: Beit3Layer(beit3_preset("base", backend=name, **sizes), 0.0).to(device, dtype) for name in backends}
    first = layers[backends[0]]
    for layer in layers.values():
        layer.load_state_dict(first.state_dict())
    two, padded = (TwoLayer(width, hidden, dim).to(device, dtype) for dim in (0, 1))
    two.load(first)
    padded.load(first)
    exact = copy.deepcopy(two).double()

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=batch.mask).transpose(1, 2)

    def ours(layer: Beit3Layer) -> Callable[..., Tensor]:
        return lambda t: layer(t, batch.plan, {2: batch.offsets}, None, 0)

    own = {f"vlp_fast {name}": ours(layer) for name, layer in layers.items()}
    parameters = {BASELINE: two, PADDED: padded, **{f"vlp_fast {name}": layer for name, layer in layers.items()}}
    return Operation(
        [x],
        {
            BASELINE: lambda t: two(t, batch.split, lambda q, k, v: attention(q, k, v, batch.plan)),
            PADDED: Provider(PADDED, lambda t: padded(t, TOKENS, masked), (batch.padded,), batch.padded),
            **own,
        },
        absent=absent,
        exact=lambda t: exact(t, batch.split, lambda q, k, v: reference.attention(q, k, v, batch.plan)),
        parameters={name: list(module.parameters()) for name, module in parameters.items()},
        reads=list(first.parameters()),
    )
