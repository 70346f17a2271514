"""Attention pooling: both backends against the reference, which is checked against plain attention."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vlp_fast import Segments, reference
from vlp_fast.ops import attention_pool
from vlp_fast.testing import assert_matches_reference

BACKENDS = ["torch", "triton"]
EPS = [None, 1e-5]


def make(lengths, num_queries=3, dim=24, dtype=torch.float32, offset=0.0):
    segments = Segments(lengths)
    queries = torch.randn(num_queries, dim, dtype=torch.float64).mul(dim**-0.5).to(dtype)
    return segments, (torch.randn(segments.rows, dim, dtype=torch.float64) + offset).to(dtype), queries


def check(segments, x, queries, eps, backend, device="cpu", factor=2.0):
    moved = segments.to(device)
    assert_matches_reference(
        lambda x, q: attention_pool(x, q, moved, eps=eps, backend=backend),
        lambda x, q: reference.attention_pool(x, q, moved, eps=eps),
        [x.to(device), queries.to(device)],
        names=("out", "dx", "dqueries"),
        factor=factor,
    )


# --------------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("eps", EPS)
def test_reference_attention_pool_is_one_head_of_attention(eps):
    segments, x, queries = make([4, 0, 7], dtype=torch.float64)
    out = reference.attention_pool(x, queries, segments, eps=eps)
    rows = x if eps is None else F.layer_norm(x, [24], eps=eps)
    for segment, part in enumerate(rows.split([4, 0, 7])):
        expected = F.scaled_dot_product_attention(queries[None], part[None], part[None], scale=1.0)[0] if len(part) else 0.0
        torch.testing.assert_close(out[segment], torch.as_tensor(expected, dtype=torch.float64).expand(3, 24))


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("op", [reference.attention_pool, attention_pool], ids=["reference", "torch"])
def test_attention_pool_gradcheck(op, eps):
    segments, x, queries = make([3, 0, 1, 5, 5], num_queries=2, dim=6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, q: op(x, q, segments, eps=eps), (x.requires_grad_(), queries.requires_grad_()), fast_mode=False
    )


# ---------------------------------------------------------------------------------------------------------------- backends


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize(
    ("lengths", "num_queries", "dim"),
    [([5, 1, 0, 33, 33, 16], 3, 24), ([200], 8, 136), ([0, 0], 2, 16), ([], 2, 16), ([17, 70], 17, 40), ([1], 1, 8)],
)
def test_attention_pool_matches_reference(backend, eps, lengths, num_queries, dim, device, poison):
    check(*make(lengths, num_queries, dim), eps, backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_pool_of_more_columns_than_a_program_sums(backend, device, poison):
    check(*make([19, 4], 2, 904), 1e-5, backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("eps", EPS)
def test_attention_pool_half_precision(backend, dtype, eps, device):
    # 16-bit rows under the norm are rounded once more than plain torch's when they are made from differences
    check(*make([40, 7], 4, 72, dtype), eps, backend, device, factor=3.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_pool_rows_far_from_zero(backend, device):
    """A common offset of a hundred deviations costs the norm no more than it costs plain torch."""
    check(*make([50, 3], 2, 136, offset=100.0), 1e-5, backend, device, factor=4.0)


@pytest.mark.parametrize(("backend", "size"), [("torch", 1000.0), ("triton", 30.0)])
def test_attention_pool_large_scores(backend, size, device):
    # the kernel's backward takes delta from the rounded output, as FlashAttention does, which large queries magnify
    segments, x, queries = make([9, 30], 2, 16)
    check(segments, x, queries * size, 1e-5, backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_pool_strided_inputs_and_gradient(backend, device):
    segments, x, queries = make([6, 3])
    wide = torch.randn(9, 2, 24, device=device)
    wide[:, 1] = x.to(device)
    leaf, q = wide.requires_grad_(), queries.T.contiguous().T.to(device).requires_grad_()
    out = attention_pool(leaf[:, 1], q, segments.to(device), eps=1e-5, backend=backend)
    dleaf, dq = torch.autograd.grad(out.sum(), (leaf, q))  # a gradient of stride 0
    x, queries = x.double().requires_grad_(), queries.double().requires_grad_()
    expected = torch.autograd.grad(reference.attention_pool(x, queries, segments, eps=1e-5).sum(), (x, queries))
    torch.testing.assert_close(dleaf[:, 1].cpu().double(), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dq.cpu().double(), expected[1], atol=1e-5, rtol=1e-5)
    assert (dleaf[:, 0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_pool_same_bits_twice(backend, device):
    segments, x, queries = make([65, 3, 40])

    def run():
        leaves = x.to(device).requires_grad_(), queries.to(device).requires_grad_()
        out = attention_pool(*leaves, segments.to(device), eps=1e-5, backend=backend)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@given(lengths=st.lists(st.integers(0, 9), max_size=6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_attention_pool_ignores_order_and_empty_segments(lengths, seed):
    torch.manual_seed(seed)
    segments, x, queries = make(lengths, dtype=torch.float64)
    out = attention_pool(x, queries, segments, eps=1e-5)
    order = torch.randperm(len(lengths)).tolist()
    rows, taken = segments.take(order)
    torch.testing.assert_close(attention_pool(x[rows], queries, taken, eps=1e-5), out[order])
    padded = attention_pool(x, queries, Segments([0, *lengths, 0]), eps=1e-5)
    torch.testing.assert_close(padded[1:-1], out)
    assert (padded[0] == 0).all()


# ------------------------------------------------------------------------------------------------------------ registration


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_pool_opcheck(backend, device):
    segments, x, queries = make([5, 0, 5])
    x, queries, segments = x.to(device).requires_grad_(), queries.to(device).requires_grad_(), segments.to(device)
    lengths = [5, 0, 5] if backend == "torch" else []
    for eps in EPS:
        torch.library.opcheck(
            torch.ops.vlp_fast.attention_pool_forward_v1, (x, queries, segments.offsets, lengths, 5, eps, backend)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_pool_compiles_whole(backend, device):
    segments, x, queries = make([5, 3])
    segments = segments.to(device)

    def run(x, q):
        return attention_pool(x * 2, q, segments, eps=1e-5, backend=backend).square().sum()

    leaves = x.to(device).requires_grad_(), queries.to(device).requires_grad_()
    eager = torch.autograd.grad(run(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_attention_pool_meta_and_flops():
    segments, x, queries = make([5, 0, 3])
    x, queries = x.to("meta").requires_grad_(), queries.to("meta").requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = attention_pool(x, queries, segments.to("meta"), eps=1e-5)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert out.shape == (3, 3, 24)
    assert x.grad.shape == x.shape
    assert forward == 2 * (2 * 8 * 3 * 24)
    assert counter.get_total_flops() == forward + 5 * (2 * 8 * 3 * 24)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_pool_autocast_computes_in_its_dtype(backend, device):
    segments, x, queries = make([5, 3])
    with torch.autocast(device, torch.bfloat16):
        out = attention_pool(x.to(device), queries.to(device), segments.to(device), eps=1e-5, backend=backend)
    assert out.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(8, 1, 16)}, "x must be packed"),
        ({"queries": torch.zeros(16)}, "queries must be packed"),
        ({"queries": torch.zeros(2, 8)}, "queries must have x's width 16; received 8"),
        ({"queries": torch.zeros(2, 16, dtype=torch.float64)}, "one dtype"),
        ({"x": torch.zeros(7, 16)}, "it has 7 rows, the segments 8"),
        ({"eps": -1.0}, "eps must be at least 0; received -1.0"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"backend": "flash_attn"}, "has attention only"),
        ({"x": torch.zeros(8, 12), "queries": torch.zeros(2, 12), "backend": "triton"}, "multiple of 8; received 12"),
        (
            {
                "x": torch.zeros(8, 16, dtype=torch.float64),
                "queries": torch.zeros(2, 16, dtype=torch.float64),
                "backend": "triton",
            },
            "float32, float16 or bfloat16",
        ),
    ],
)
def test_attention_pool_errors(change, words):
    arguments = {"x": torch.zeros(8, 16), "queries": torch.zeros(2, 16), "segments": Segments([5, 3]), **change}
    with pytest.raises(ValueError, match=words):
        attention_pool(arguments.pop("x"), arguments.pop("queries"), arguments.pop("segments"), **arguments)
