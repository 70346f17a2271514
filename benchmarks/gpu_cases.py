"""The correctness cases of gpu_check.py, but those of losses: each kernel at the shapes of BLIP, CoCa and BEiT-3, beside its
specification in plain torch.

A case builds a `Problem`: tensors, the call of our kernel, and the same in plain torch, which runs at the dtype of the tensors and in
float64. The numbers of a case are those of a model, with fewer samples; at `tiny`, for the interpreter, few of everything.
Large cases reach beyond 2^31 elements; what they compare is the last rows only, with the specification of those rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vlp_fast import AttentionPlan, Segments, ops, reference
from vlp_fast.decode_plan import DecodePlan

__all__ = ["ALL_DTYPES", "DTYPES", "GUARD", "Case", "Maker", "Problem", "cases"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ALL_DTYPES = tuple(DTYPES)
GUARD = 64  # rows of NaN before and after every input
FAR = 2**31 + 2**20  # elements, beyond what 32 bits address

Lengths = Sequence[int]


@dataclass(frozen=True)
class Maker:
    """Random tensors of one dtype on a device, each inside a buffer that holds NaN before and after it."""

    device: str
    dtype: torch.dtype
    tiny: bool
    generator: torch.Generator

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        buffer = torch.full((shape[0] + 2 * GUARD, *shape[1:]), torch.nan, dtype=self.dtype, device=self.device)
        inside = buffer[GUARD : GUARD + shape[0]]
        return inside.normal_(generator=self.generator).mul_(scale) if inside.numel() else inside

    def randint(self, high: int, size: int) -> Tensor:
        return torch.randint(high, (size,), generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Problem:
    """inputs: floating leaves. ours, reference: functions of them. names: of the outputs, then of the gradients.

    tail: for large cases, rows from the end that are compared, of every input and then of every result; None is all of it, 0 is not
    compared. `reference` gets the inputs so cut. exact: results are whole numbers that must be equal, and there are no gradients.
    """

    inputs: list[Tensor]
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    names: tuple[str, ...]
    tail: tuple[int | None, ...] = ()
    factor: float = 2.0
    exact: bool = False


@dataclass(frozen=True)
class Case:
    """family and name, how to build it, in which dtypes, and the device memory it needs in GB."""

    family: str
    name: str
    build: Callable[[Maker], Problem]
    dtypes: tuple[str, ...] = ALL_DTYPES
    gigabytes: float = 2.0
    tiny_dtypes: tuple[str, ...] = field(default=("fp32",))


def cases() -> Iterator[Case]:
    """Every case but those of losses, family after family; large ones last in each."""
    yield from _attention_cases()
    yield from _pool_cases()
    yield from _multiway_cases()
    yield from _decode_cases()


# ------------------------------------------------------------------------------------------------------------------ attention


@dataclass(frozen=True)
class Attention:
    """heads of head_dim; query segment i reads key segment ``index[i]`` (default: i), or `plan` says who reads whom.

    `fused`: q, k and v are views of one projection. `kv_heads`: fewer heads of keys and values.
    """

    heads: int
    head_dim: int
    query: Lengths
    key: Lengths | None = None
    index: Lengths | None = None
    causal: bool = False
    kv_heads: int | None = None
    fused: bool = False
    pooling: int = 0
    dropout_p: float = 0.0

    def plan(self, tiny: bool, device: str) -> AttentionPlan:
        query, key, index = (_few(x, tiny) for x in (self.query, self.key or self.query, self.index or range(len(self.query))))
        if self.pooling:
            return AttentionPlan.pooling(5 if tiny else self.pooling, key, device)
        edges = [(i, j % len(key), self.causal) for i, j in enumerate(index)]
        return AttentionPlan.from_edges(query, key, edges, device=device)

    def __call__(self, make: Maker) -> Problem:
        plan = self.plan(make.tiny, make.device)
        heads, head_dim = (2, min(self.head_dim, 24)) if make.tiny else (self.heads, self.head_dim)
        kv_heads = heads if self.kv_heads is None else 1
        if self.fused:
            q, k, v = make.randn(plan.query_rows, 3, heads, head_dim).unbind(1)
        else:
            q = make.randn(plan.query_rows, heads, head_dim)
            k, v = (make.randn(plan.key.rows, kv_heads, head_dim) for _ in range(2))
        return attention_problem([q, k, v], plan, self.dropout_p)


def attention_problem(inputs: list[Tensor], plan: AttentionPlan, dropout_p: float = 0.0) -> Problem:
    def drawn() -> Tensor | None:
        torch.manual_seed(0)
        return torch.randint(2**62, (1,), dtype=torch.int64, device=inputs[0].device) if dropout_p else None

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Any:
        torch.manual_seed(0)
        return ops.attention(q, k, v, plan, backend="triton", dropout_p=dropout_p, return_lse=True)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, lse = reference.attention(q, k, v, plan, dropout_p=dropout_p, seed=drawn(), return_lse=True)
        return out, lse if lse.dtype == torch.float64 else lse.float()

    return Problem(inputs, ours, plain, ("out", "lse", "dq", "dk", "dv"))


TEXTS = (14, 9, 21, 1, 35, 0, 12, 7)  # captions, one empty and one of a single token
FOUR_PASSES = (0, 1, 2, 3, 0, 1, 2, 3, 1, 2, 3, 0, 3, 2, 1, 0)  # itm positive, two kinds of negatives, lm
ATTENTION = {
    "ViT-B/16 224 self": Attention(12, 64, (197,) * 4, fused=True),
    "ViT-L/16 384 self": Attention(16, 64, (577,) * 2),
    "ViT-L/14 224 self": Attention(16, 64, (257,) * 3),
    "SigLIP so400m 384 self, head_dim 72": Attention(16, 72, (729,) * 2),
    "ViT-H/14 self, head_dim 80": Attention(16, 80, (257,) * 2),
    "head_dim 128, odd lengths": Attention(6, 128, (131, 63, 200, 1)),
    "BLIP text self": Attention(12, 64, TEXTS),
    "CoCa text causal": Attention(12, 64, (77, 20, 1, 33), causal=True),
    "causal, more keys than queries": Attention(12, 64, (5, 40, 1), (77, 40, 190), causal=True),
    "BLIP cross 197": Attention(12, 64, TEXTS, (197,) * 8),
    "BLIP cross 577, 4 passes, shared keys": Attention(12, 64, TEXTS * 2, (577,) * 4, FOUR_PASSES),
    "CoCa pool, 256 shared queries, head_dim 96": Attention(8, 96, (256,) * 3, (256, 255, 64), pooling=256),
    "multi-query": Attention(12, 64, (197, 35), kv_heads=1),
    "dropout 0.1": Attention(12, 64, (35, 30, 77), dropout_p=0.1),
    "dropout 0.1, longer": Attention(12, 64, (197, 130), dropout_p=0.1),
}


def _joint(make: Maker) -> Problem:
    """BEiT-3: image rows and text rows of a sample lie apart, and read both."""
    images, texts = ([7, 0, 5], [3, 4, 0]) if make.tiny else ([197, 0, 197, 197], [64, 30, 0, 13])
    plan = AttentionPlan.joint(images, texts, device=make.device)
    heads, head_dim = (2, 16) if make.tiny else (12, 64)
    return attention_problem([make.randn(plan.query.rows, heads, head_dim) for _ in range(3)], plan)


def _far_strides(make: Maker) -> Problem:
    """Rows so far apart in memory that the last begins beyond 2^31 elements: views of one buffer."""
    rows, heads, head_dim = (24, 2, 16) if make.tiny else (394, 12, 64)
    stride = 3 * heads * head_dim if make.tiny else (FAR // (rows - 1) + 15) // 16 * 16
    size = (rows - 1) * stride + 3 * heads * head_dim
    buffer = torch.full((size,), torch.nan, dtype=make.dtype, device=make.device)
    views = []
    for i in range(3):
        view = buffer.as_strided((rows, heads, head_dim), (stride, head_dim, 1), i * heads * head_dim)
        views.append(view.copy_(torch.randn(view.shape, generator=make.generator, device=make.device)))
    return attention_problem(views, AttentionPlan.self_attention([rows // 2, rows - rows // 2], device=make.device))


def _far_rows(make: Maker) -> Problem:
    """More than 2^31 elements in each of q, k, v, out and their gradients; the last segments are compared."""
    heads, head_dim, length = (2, 16, 9) if make.tiny else (12, 64, 197)
    count = 4 if make.tiny else FAR // (heads * head_dim * length) + 1
    whole, last = (AttentionPlan.self_attention([length] * n, device=make.device) for n in (count, 2))
    problem = attention_problem([make.randn(count * length, heads, head_dim) for _ in range(3)], last)
    n = 2 * length

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, whole, backend="triton")

    return Problem(problem.inputs, ours, lambda *x: problem.reference(*x)[0], ("out", "dq", "dk", "dv"), (n,) * 7)


def _attention_cases() -> Iterator[Case]:
    for name, build in ATTENTION.items():
        yield Case("attention", name, build, tiny_dtypes=ALL_DTYPES if name == "BLIP text self" else ("fp32",))
    yield Case("attention", "BEiT-3 joint 197 + 64", _joint)
    yield Case("attention", "row strides beyond 2^31 elements", _far_strides, ("bf16", "fp16"), 9)
    yield Case("attention", "2^31 elements, last segments", _far_rows, ("bf16",), 60)


# ---------------------------------------------------------------------------------------------------------------------- pooling


@dataclass(frozen=True)
class Pool:
    """`queries` over rows of `dim`, segment after segment."""

    dim: int
    queries: int
    lengths: Lengths
    eps: float | None = 1e-6

    def __call__(self, make: Maker) -> Problem:
        dim, queries = (min(self.dim, 40), min(self.queries, 3)) if make.tiny else (self.dim, self.queries)
        segments = Segments(_few(self.lengths, make.tiny), make.device)
        inputs = [make.randn(segments.rows, dim), make.randn(queries, dim, scale=dim**-0.5)]
        return Problem(
            inputs,
            lambda x, q: ops.attention_pool(x, q, segments, eps=self.eps, backend="triton"),
            lambda x, q: reference.attention_pool(x, q, segments, eps=self.eps),
            ("out", "dx", "dqueries"),
        )


def _far_pool(make: Maker) -> Problem:
    dim, queries, length = (32, 2, 9) if make.tiny else (768, 8, 576)
    count = 3 if make.tiny else FAR // (dim * length) + 1
    whole, last = Segments([length] * count, make.device), Segments([length], make.device)
    inputs = [make.randn(count * length, dim), make.randn(queries, dim, scale=dim**-0.5)]
    return Problem(
        inputs,
        lambda x, q: ops.attention_pool(x, q, whole, eps=1e-6, backend="triton"),
        lambda x, q: reference.attention_pool(x, q, last, eps=1e-6),
        ("out", "dx", "dqueries"),
        tail=(length, None, 1, length, 0),
    )


def _pool_cases() -> Iterator[Case]:
    table = {
        "CoCa base 576 tokens, 8 heads": Pool(768, 8, (576,) * 8),
        "CoCa large, 16 heads": Pool(1024, 16, (577, 300, 1, 576)),
        "SigLIP so400m MAP": Pool(1152, 16, (729,) * 4),
        "without the norm, ragged, one empty": Pool(768, 12, (197, 0, 33, 1, 255), eps=None),
        "17 queries, width 520": Pool(520, 17, (77, 100)),
    }
    for name, build in table.items():
        yield Case("attention_pool", name, build)
    yield Case("attention_pool", "2^31 elements, last segment", _far_pool, ("bf16",), 24)


# --------------------------------------------------------------------------------------------------------------------- multiway


@dataclass(frozen=True)
class Linear:
    """Expert runs of these lengths through ``[outputs, inputs]`` weights."""

    runs: Lengths
    inputs: int
    outputs: int
    activation: str | None = None
    residual: bool = False
    bias: bool = True

    def __call__(self, make: Maker) -> Problem:
        width, depth = (24, 40) if make.tiny else (self.outputs, self.inputs)
        offsets = _offsets(_few(self.runs, make.tiny))
        inputs = [make.randn(offsets[-1], depth), make.randn(len(offsets) - 1, width, depth, scale=depth**-0.5)]
        inputs += [make.randn(len(offsets) - 1, width)] if self.bias else []
        inputs += [make.randn(offsets[-1], width)] if self.residual else []

        def call(function: Callable[..., Tensor], *tensors: Tensor, **options: str) -> Tensor:
            x, weight, *rest = tensors
            bias = rest[0] if self.bias else None
            residual = rest[-1] if self.residual else None
            return function(x, weight, bias, offsets, activation=self.activation, residual=residual, **options)

        names = ["out", "dx", "dweight", *(["dbias"] if self.bias else []), *(["dresidual"] if self.residual else [])]
        return Problem(
            inputs,
            lambda *t: call(ops.multiway_linear, *t, backend="triton"),
            lambda *t: call(reference.multiway_linear, *t),
            tuple(names),
        )


@dataclass(frozen=True)
class Norm:
    """LayerNorm of expert runs. fp32_in: rows and weights in fp32 and out in the case's dtype, as under autocast."""

    runs: Lengths
    dim: int
    fp32_in: bool = False

    def __call__(self, make: Maker) -> Problem:
        dim, offsets = min(self.dim, 72) if make.tiny else self.dim, _offsets(_few(self.runs, make.tiny))
        experts, inside = len(offsets) - 1, replace(make, dtype=torch.float32) if self.fp32_in else make

        def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            out = reference.multiway_layer_norm(x, w, b, offsets, 1e-5)
            return out if out.dtype == torch.float64 else out.to(make.dtype)

        return Problem(
            [inside.randn(offsets[-1], dim), inside.randn(experts, dim), inside.randn(experts, dim)],
            lambda x, w, b: ops.multiway_layer_norm(x, w, b, offsets, 1e-5, out_dtype=make.dtype, backend="triton"),
            plain,
            ("out", "dx", "dweight", "dbias"),
        )


def _far_linear(make: Maker) -> Problem:
    """x and out beyond 2^31 elements; the gradient of x, but that of the weight is a sum over all rows and not compared."""
    rows, dim, tail = (40, 16, 8) if make.tiny else (FAR // 256 + 1, 256, 256)
    offsets = (0, rows // 3, rows)
    inputs = [make.randn(rows, dim), make.randn(2, dim, dim, scale=dim**-0.5)]
    return Problem(
        inputs,
        lambda x, w: ops.multiway_linear(x, w, None, offsets, backend="triton"),
        lambda x, w: reference.multiway_linear(x, w, None, (0, 0, tail)),
        ("out", "dx", "dweight"),
        tail=(tail, None, tail, tail, 0),
    )


def _far_norm(make: Maker) -> Problem:
    rows, dim, tail = (40, 16, 8) if make.tiny else (FAR // 768 + 1, 768, 256)
    offsets = (0, rows // 3, rows)
    return Problem(
        [make.randn(rows, dim), make.randn(2, dim), make.randn(2, dim)],
        lambda x, w, b: ops.multiway_layer_norm(x, w, b, offsets, 1e-5, backend="triton"),
        lambda x, w, b: reference.multiway_layer_norm(x, w, b, (0, 0, tail), 1e-5),
        ("out", "dx", "dweight", "dbias"),
        tail=(tail, None, None, tail, tail, 0, 0),
    )


BEIT3 = (8 * 197, 8 * 33 + 7)  # image rows, then text rows


def _multiway_cases() -> Iterator[Case]:
    table: dict[str, Callable[[Maker], Problem]] = {
        "BEiT-3 base, q k v": Linear(BEIT3, 768, 2304),
        "BEiT-3 base, fc1 with GELU": Linear(BEIT3, 768, 3072, activation="gelu"),
        "BEiT-3 base, fc2 with residual": Linear(BEIT3, 3072, 768, residual=True),
        "GELU and residual, no bias": Linear(BEIT3, 768, 768, activation="gelu", residual=True, bias=False),
        "five experts, two empty, odd widths": Linear((100, 0, 1, 333, 0), 200, 328),
        "LayerNorm 768": Norm(BEIT3, 768),
        "LayerNorm 1024, one expert empty": Norm((513, 0, 77), 1024),
        "LayerNorm 3072": Norm((300, 65), 3072),
    }
    for name, build in table.items():
        yield Case("multiway", name, build)
    rounded = Norm(BEIT3, 768, fp32_in=True)
    yield Case("multiway", "LayerNorm 768, fp32 in", rounded, ("bf16", "fp16"), tiny_dtypes=("bf16", "fp16"))
    yield Case("multiway", "linear, 2^31 elements, last rows", _far_linear, ("bf16",), 30)
    yield Case("multiway", "LayerNorm, 2^31 elements, last rows", _far_norm, ("bf16",), 30)


# ------------------------------------------------------------------------------------------------------------------- decoding


@dataclass(frozen=True)
class Decode:
    """`beams` rows per image of `tokens` rows; with `cache`, each row also reads so many rows of its own, in one softmax."""

    tokens: Lengths
    beams: int
    cache: int = 0
    heads: int = 12
    head_dim: int = 64

    def __call__(self, make: Maker) -> Problem:
        tokens, head_dim = _few(self.tokens, make.tiny), min(self.head_dim, 24) if make.tiny else self.head_dim
        if self.cache:
            plan = DecodePlan.joint(tokens, self.beams, self.cache + 4, self.cache, make.device)
        else:
            plan = DecodePlan.cross(tokens, self.beams, make.device)
        heads = 2 if make.tiny else self.heads
        q, k, v = (make.randn(n, heads, head_dim) for n in (plan.query.rows, plan.buffer_rows, plan.buffer_rows))

        def ours(q: Tensor) -> Any:
            return ops.decode_attention(q, k, v, plan, backend="triton")

        return Problem(
            [q], _constant(ours), _constant(lambda q: reference.decode_attention(q, k.to(q), v.to(q), plan)), ("out", "dq")
        )


def _constant(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function without a gradient: decoding has none."""
    return lambda q: function(q.detach())


def _decode_cases() -> Iterator[Case]:
    table = {
        "BLIP, 8 images x 3 beams": Decode((577,) * 8, 3),
        "one image, keys split": Decode((901,), 3),
        "BEiT-3 captioning, ragged": Decode((197, 33, 0, 577), 5, 20),
        "odd head": Decode((257, 257), 4, 3, heads=8, head_dim=72),
    }
    for name, build in table.items():
        yield Case("decode_attention", name, build)


# ---------------------------------------------------------------------------------------------------------------------- helpers


def _few(lengths: Lengths, tiny: bool) -> list[int]:
    """At tiny size: at most four segments, of at most 19 rows each, still of different lengths, empty where they were."""
    return [min(n, 19 - i) for i, n in enumerate(list(lengths)[:4])] if tiny else list(lengths)


def _offsets(runs: Lengths) -> tuple[int, ...]:
    return tuple(sum(runs[:i]) for i in range(len(runs) + 1))
