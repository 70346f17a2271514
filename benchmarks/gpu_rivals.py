"""What our attention is timed against: scaled_dot_product_attention by backend, variable-length calls, FlexAttention.

A rival sees the plan as sequences: rows that attend to rows, in an order in which those of a sequence lie together. Padded rivals get
rectangles, packed ones rows in that order, both made beforehand; where a model would have to gather in every layer, there is a rival
that does it inside the timed call too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlp_fast.benchmarks.gpu_providers import Absent, Provider, RowLayout

__all__ = ["PACKED_RIVALS", "Sequences", "attention_rivals"]

Rivals = Iterator[tuple[str, Callable[[], Provider]]]
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
SORTED = ", rows sorted before"


@dataclass(frozen=True)
class Sequences:
    """The plan as sequences that each attend within themselves.

    Attributes:
        q_order, k_order: the problem's rows, sequence after sequence; None where they lie so already.
        q_lengths, k_lengths: rows of each sequence. causal: aligned to the bottom right.
        shared: whether all sequences have the same query rows, of which the problem holds one set.
        index: where several captions read one image, the image of each caption, and `captions`: their lengths; the sequences above
            are the images, each with all its captions.
        flex: whether FlexAttention is timed, which is compiled for every shape.
    """

    q_lengths: Sequence[int]
    k_lengths: Sequence[int]
    device: str
    q_order: Tensor | None = None
    k_order: Tensor | None = None
    causal: bool = False
    shared: bool = False
    index: Tensor | None = None
    captions: Sequence[int] = ()
    flex: bool = False

    def packed(self, side: str) -> RowLayout | None:
        """Rows sequence after sequence."""
        order = self.q_order if side == "q" else self.k_order
        return None if order is None else RowLayout(_inverse(order), (order.numel(),))

    def padded(self, side: str) -> RowLayout:
        """A rectangle, a row of it per sequence."""
        order, lengths = (self.q_order, self.q_lengths) if side == "q" else (self.k_order, self.k_lengths)
        return _rectangle(lengths, order, self.device)

    def offsets(self, side: str) -> tuple[Tensor, int]:
        """(cu_seqlens, max_seqlen)."""
        lengths = self.q_lengths if side == "q" else self.k_lengths
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.device), max(lengths)

    def documents(self, side: str) -> Tensor:
        """The sequence of each row."""
        lengths = torch.tensor(self.q_lengths if side == "q" else self.k_lengths, device=self.device)
        return torch.arange(len(lengths), device=self.device).repeat_interleave(lengths)


def _rectangle(lengths: Sequence[int], order: Tensor | None, device: str) -> RowLayout:
    widest = max(lengths)
    place = torch.tensor([i * widest + j for i, n in enumerate(lengths) for j in range(n)], device=device)
    if order is not None:
        place = torch.empty_like(place).index_copy_(0, order, place)
    return RowLayout(place, (len(lengths), widest))


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).index_copy_(0, order, torch.arange(order.numel(), device=order.device))


def attention_rivals(s: Sequences) -> Rivals:
    """Name -> what makes the rival, the slow to compile last."""
    suffix = SORTED if s.index is not None else ""
    for name in SDPA:
        yield f"sdpa {name}{suffix}", partial(_sdpa, f"sdpa {name}{suffix}", s, name)
        if s.index is not None:
            yield f"sdpa {name}, keys gathered", partial(_sdpa_gathered, f"sdpa {name}, keys gathered", s, name)
    for name, make in PACKED_RIVALS.items():
        yield name + suffix, partial(_packed, name + suffix, s, make)
        if s.index is not None:
            yield f"{name}, gather and scatter", partial(_gathered, f"{name}, gather and scatter", s, make)
    yield f"flex_attention{suffix}", partial(_flex, f"flex_attention{suffix}", s)


# ------------------------------------------------------------------------------------------------------------------- rectangles


def _sdpa(name: str, s: Sequences, backend: str) -> Provider:
    q_layout, k_layout = s.padded("q"), s.padded("k")
    batch, longest = k_layout.shape
    # PyTorch aligns causal rectangles to the top left
    assert not s.causal or {*s.q_lengths} == {*s.k_lengths} == {longest}, "causal sequences must be equally long"
    mask = None
    if len(set(s.k_lengths)) > 1:
        visible = torch.arange(longest, device=s.device) < torch.tensor(s.k_lengths, device=s.device)[:, None]
        mask = visible[:, None, None]  # [batch, 1, 1, keys]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.expand(batch, *q.shape) if s.shared else q
        with sdpa_kernel(SDPA[backend]):
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=s.causal
            )
        return out.transpose(1, 2)

    return Provider(name, call, (None if s.shared else q_layout, k_layout, k_layout), q_layout)


def _sdpa_gathered(name: str, s: Sequences, backend: str) -> Provider:
    """A rectangle row per caption, with a copy of its image's keys and values made in the call, as models do."""
    layout, keys, index = _rectangle(s.captions, None, s.device), s.padded("k"), s.index

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.index_select(0, index).transpose(1, 2) for t in (k, v))
        with sdpa_kernel(SDPA[backend]):
            return F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)

    return Provider(name, call, (layout, keys, keys), layout)


# ------------------------------------------------------------------------------------------------------------------ packed rows

Packed = Callable[[Tensor, Tensor, Tensor], Tensor]


def _packed(name: str, s: Sequences, make: Callable[[Sequences], Packed]) -> Provider:
    attend, batch = make(s), len(s.k_lengths)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q.repeat(batch, 1, 1) if s.shared else q, k, v)

    q_layout, k_layout = s.packed("q"), s.packed("k")
    return Provider(name, call, (q_layout, k_layout, k_layout), q_layout)


def _gathered(name: str, s: Sequences, make: Callable[[Sequences], Packed]) -> Provider:
    """Query rows put into the order of the sequences, and results put back, in the call."""
    attend, order = make(s), s.q_order
    back = _inverse(order)
    return Provider(name, lambda q, k, v: _Permuted.apply(attend(_Permuted.apply(q, order, back), k, v), back, order))


class _Permuted(torch.autograd.Function):
    """x[order]. Both directions gather; PyTorch's own backward would add."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return dout.index_select(0, inverse), None, None


def _varlen_attn(s: Sequences) -> Packed:
    _needs_cuda(s)
    from torch.nn.attention.varlen import varlen_attn

    (cu_q, max_q), (cu_k, max_k) = s.offsets("q"), s.offsets("k")
    if "window_size" in inspect.signature(varlen_attn).parameters:
        options = {"window_size": (-1, 0 if s.causal else -1)}
    else:
        options = {"is_causal": s.causal}
    return lambda q, k, v: varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **options)


def _flash_attn(s: Sequences) -> Packed:
    from flash_attn import flash_attn_varlen_func

    (cu_q, max_q), (cu_k, max_k) = s.offsets("q"), s.offsets("k")
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=s.causal)


def _xformers(s: Sequences) -> Packed:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    bias = BlockDiagonalMask.from_seqlens(list(s.q_lengths), list(s.k_lengths), device=s.device)
    bias = bias.make_causal_from_bottomright() if s.causal else bias
    return lambda q, k, v: memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]


# of the sequences -> a call on packed q, k, v
PACKED_RIVALS: dict[str, Callable[[Sequences], Packed]] = {
    "varlen_attn": _varlen_attn,
    "flash_attn": _flash_attn,
    "xformers": _xformers,
}


def _flex(name: str, s: Sequences) -> Provider:
    _needs_cuda(s)
    if not s.flex:
        raise Absent("it is compiled for every shape, which takes long, and timed at captions and at BLIP's four passes only.")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key = s.documents("q"), s.documents("k")

    def same_document(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return query[i] == key[j]

    torch._dynamo.reset()  # or a shape too many is not compiled, and forms all scores
    mask = create_block_mask(same_document, None, None, query.numel(), key.numel(), device=s.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return compiled(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return _packed(name, s, lambda _: attend)


def _needs_cuda(s: Sequences) -> None:
    if s.device != "cuda":
        raise Absent("it is timed on a GPU only.")
