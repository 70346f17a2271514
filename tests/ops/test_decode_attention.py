"""Decode attention: both backends against the reference, which is checked against attention on the same graph."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vlp_fast import AttentionPlan, reference
from vlp_fast.decode_plan import DecodePlan
from vlp_fast.ops import attention, decode_attention
from vlp_fast.ops._decode_attention_torch import BoundAttention
from vlp_fast.ops.decode_attention import bind_decode_attention
from vlp_fast.testing import assert_as_accurate_as

BACKENDS = ["torch", "triton"]
PLANS = {
    "own caches": lambda d: DecodePlan.self_cache(6, 8, 3, d),
    "empty caches": lambda d: DecodePlan.self_cache(2, 8, 0, d),
    "shared images": lambda d: DecodePlan.cross([5, 5, 5], 3, d),
    "ragged images": lambda d: DecodePlan.cross([5, 0, 70], 3, d),
    "joint": lambda d: DecodePlan.joint([5, 5], 3, 8, 2, d),
    "joint, ragged": lambda d: DecodePlan.joint([4, 70], 2, 8, 1, d),
    "joint, empty caches": lambda d: DecodePlan.joint([5, 5], 3, 8, 0, d),
    "any edges": lambda d: DecodePlan.from_edges(
        [2, 0, 3, 1], [10, 0, 4], [3, 4, 0], [(0, 1), (0, 0), (2, 2), (2, 1)], device=d
    ),
    "many rows": lambda d: DecodePlan.cross([33], 40, d),
    "no segment": lambda d: DecodePlan.cross([], 3, d),
}


def make(plan, heads=4, heads_k=2, head_dim=16, dtype=torch.float32):
    """q and buffers that hold NaN wherever no slot lies."""
    q = torch.randn(plan.query.rows, heads, head_dim, dtype=torch.float64)
    k, v = (torch.full((plan.buffer_rows + 3, heads_k, head_dim), torch.nan, dtype=torch.float64) for _ in "kv")
    for start, length in zip(plan.host_starts, plan.host_lengths, strict=True):
        k[start : start + length] = torch.randn(length, heads_k, head_dim, dtype=torch.float64)
        v[start : start + length] = torch.randn(length, heads_k, head_dim, dtype=torch.float64)
    return [t.to(plan.device, dtype) for t in (q, k, v)]


def check(plan, backend, tensors=None, **options):
    tensors = make(plan, **options) if tensors is None else tensors
    out, lse = decode_attention(*tensors, plan, backend=backend, return_lse=True)
    assert torch.equal(decode_attention(*tensors, plan, backend=backend).isnan(), torch.zeros_like(out, dtype=torch.bool))
    exact = reference.decode_attention(*(t.double() for t in tensors), plan, return_lse=True)
    plain = reference.decode_attention(*tensors, plan, return_lse=True)
    for name, a, b, e in zip(("out", "lse"), (out, lse), plain, exact, strict=True):
        assert_as_accurate_as(a, b.to(a.dtype), e, what=name, scale=1.0)
    assert_as_accurate_as(decode_attention(*tensors, plan, backend=backend), plain[0], exact[0], scale=1.0)


@st.composite
def random_plans(draw):
    """Any slots, apart or over each other, and any edges, a slot read twice by one segment among them."""
    slots = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=4))
    query = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    pairs = st.tuples(st.integers(0, len(query) - 1), st.integers(0, max(len(slots) - 1, 0)))
    return query, slots, draw(st.lists(pairs, max_size=7 if slots else 0))


@pytest.mark.parametrize("backend", BACKENDS)
@given(graph=random_plans(), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_decode_attention_of_random_plans(backend, graph, seed):
    query, slots, edges = graph
    torch.manual_seed(seed)
    check(DecodePlan.from_edges(query, [s for s, _ in slots], [n for _, n in slots], edges), backend)


def test_reference_decode_attention_is_attention_on_the_same_graph():
    plan = DecodePlan.joint([5, 3], 2, 4, 2)
    q, k, v = make(plan, dtype=torch.float64)
    rows = torch.cat([torch.arange(s, s + n) for s, n in zip(plan.host_starts, plan.host_lengths, strict=True)])
    edges = [(int(segment), int(slot), False) for segment, slot in plan.host_edges]
    same = AttentionPlan.from_edges(plan.query.lengths, plan.host_lengths.tolist(), edges)
    expected = reference.attention(q, k[rows], v[rows], same, return_lse=True)
    for a, b in zip(reference.decode_attention(q, k, v, plan, return_lse=True), expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(decode_attention(q, k, v, plan), attention(q, k[rows], v[rows], same))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_decode_attention_matches_reference(backend, plan, device, poison):
    check(plan(device), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [pytest.param(16, marks=pytest.mark.heavy), 72])
def test_decode_attention_half_precision(backend, dtype, head_dim, device):
    check(DecodePlan.joint([40, 40], 3, 8, 3, device), backend, heads=6, heads_k=6, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_attention_follows_lengths_that_grow_in_place(backend, device):
    plan = DecodePlan.joint([5, 5], 2, 4, 0, device)
    lengths = plan.key_lengths
    for expected in (1, 3, 4):
        plan.advance(expected - int(plan.host_lengths[-1]))
        assert plan.key_lengths is lengths
        assert lengths.tolist() == [5, 5, *[expected] * 4] == plan.host_lengths.tolist()
        check(plan, backend)
    with pytest.raises(ValueError, match="room in every growing slot"):
        plan.advance()


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_attention_shared_image_is_its_gathered_copies(backend, device):
    shared, copies = (
        DecodePlan.cross([7, 7], 3, device),
        DecodePlan.from_edges([1] * 6, range(0, 42, 7), [7] * 6, [(i, i) for i in range(6)], device=device),
    )
    q, k, v = make(shared)
    rows = torch.arange(14, device=device).view(2, 1, 7).expand(2, 3, 7).reshape(-1)
    a = decode_attention(q, k, v, shared, backend=backend)
    torch.testing.assert_close(a, decode_attention(q, k[rows], v[rows], copies, backend=backend))


def test_decode_attention_splits_agree(device, monkeypatch):
    from vlp_fast.kernels import decode_attention as module

    plan = DecodePlan.joint([90, 150], 2, 40, 33, device)
    tensors = make(plan, heads_k=1)
    results = []
    for splits in (1, 2, 5):
        monkeypatch.setattr(module, "_splits", lambda *_, n=splits: n)
        check(plan, "triton", tensors)
        results.append(decode_attention(*tensors, plan, backend="triton"))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_attention_strided_buffers(backend, device):
    plan = DecodePlan.self_cache(3, 6, 4, device)
    q, k, v = make(plan)
    both = torch.stack([k, v], 1)  # keys and values of one buffer
    assert torch.equal(
        decode_attention(q, both[:, 0], both[:, 1], plan, backend=backend), decode_attention(q, k, v, plan, backend=backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_attention_is_registered_right(backend, device):
    plan = DecodePlan.joint([5, 5], 2, 4, 2, device)
    tensors = (plan.query.offsets, plan.edge_offsets, plan.edge_key, plan.key_starts, plan.key_lengths)
    parts = plan.parts if backend == "torch" else []
    for need in (True, False):
        arguments = (
            *make(plan),
            *tensors,
            parts,
            1,
            plan.most_keys if backend == "triton" else plan.max_keys,
            plan.pairs,
            0.25,
            need,
            backend,
        )
        torch.library.opcheck(torch.ops.vlp_fast.decode_attention_v1, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_attention_compiles_whole(backend, device):
    plan = DecodePlan.cross([5, 5], 2, device)
    q, k, v = make(plan)

    def run(q):
        return decode_attention(q * 2, k, v, plan, backend=backend) + 1

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(q), run(q))


def test_decode_attention_flops_are_those_of_the_keys_there_are():
    plan = DecodePlan.joint([5, 5], 2, 8, 3)
    with FlopCounterMode(display=False) as counter:
        decode_attention(*make(plan), plan)
    assert counter.get_total_flops() == 4 * (4 * 8) * 4 * 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(6, 16)}, "q must be packed"),
        ({"q": torch.zeros(5, 4, 16)}, "it has 5 rows, the segments 6"),
        ({"q": torch.zeros(6, 3, 16)}, "num_heads_k must divide num_heads"),
        ({"k": torch.zeros(16, 2, 16), "v": torch.zeros(16, 2, 16)}, "the plan's slots, 48 rows; they have 16"),
        ({"v": torch.zeros(48, 2, 8)}, "one shape"),
        ({"v": torch.zeros(48, 2, 16, dtype=torch.float64)}, "share one device and dtype"),
        ({"softmax_scale": 0.0}, "softmax_scale must be above 0"),
        ({"backend": "flash_attn"}, "has attention only"),
        (
            {"q": torch.zeros(6, 4, 12), "k": torch.zeros(48, 2, 12), "v": torch.zeros(48, 2, 12), "backend": "triton"},
            "multiple of 8",
        ),
    ],
)
def test_decode_attention_errors(change, words):
    arguments = {"q": torch.zeros(6, 4, 16), "k": torch.zeros(48, 2, 16), "v": torch.zeros(48, 2, 16), **change}
    with pytest.raises(ValueError, match=words):
        decode_attention(
            arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), DecodePlan.self_cache(6, 8, 3), **arguments
        )


def test_decode_attention_has_no_backward():
    plan = DecodePlan.self_cache(2, 4, 3)
    q, k, v = make(plan)
    with pytest.raises(RuntimeError, match="decode_attention has no backward; k needs a gradient"):
        decode_attention(q, k.requires_grad_(), v, plan)
    with torch.no_grad():
        decode_attention(q, k, v, plan)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1], [0, 1], [3], []), "need one number per slot; received 2, 1, 1 and 1"),
        (([1], [-1], [3], []), "slot 0 has start -1"),
        (([1], [0], [3], [(0, 1)]), r"edges must name one of 1 query segments and 1 slots; received \(0, 1\)"),
    ],
)
def test_decode_plan_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        DecodePlan.from_edges(*arguments)
    with pytest.raises(ValueError, match="beams must be at least 1; received 0"):
        DecodePlan.cross([3], 0)
    with pytest.raises(ValueError, match="within their capacity"):
        DecodePlan.self_cache(2, 3, 4)


def _by_heads(rows, heads, width, dtype):
    return torch.randn(heads, rows, width).to(dtype).transpose(0, 1)


BOUND = {
    "own slots": (lambda: DecodePlan.self_cache(6, 9, 4), True),
    "one text": (lambda: DecodePlan.self_cache(1, 9, 1), True),
    "images of beams": (lambda: DecodePlan.cross([5, 5, 5], 4), True),
    "beams a segment each": (lambda: DecodePlan.from_edges([1] * 6, [0, 7], [7, 7], [(i, i // 3) for i in range(6)]), True),
    "slots behind others": (lambda: DecodePlan.from_edges([1] * 3, [4, 10, 16], [3] * 3, [(0, 0), (1, 1), (2, 2)]), False),
    "two parts": (lambda: DecodePlan.joint([5, 5], 2, 6, 3), False),
    "ragged": (lambda: DecodePlan.cross([5, 4], 2), False),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("heads_k", [4, 2, 1])
@pytest.mark.parametrize("case", BOUND)
def test_bound_to_its_buffers_it_is_the_same(case, heads_k, dtype):
    torch.manual_seed(0)
    make, direct = BOUND[case]
    plan = make()
    rows = plan.buffer_rows
    k, v = (_by_heads(rows, heads_k, 16, dtype) for _ in range(2))
    bound = bind_decode_attention(k, v, plan)
    assert isinstance(bound, BoundAttention) == direct
    for growing in (0, 1, 2):
        if growing:
            if not plan.growing.any():
                break
            plan.advance()
        q = torch.randn(plan.query.rows, 3, 4, 16).to(dtype)[:, 1]  # rows with others between them
        expected = decode_attention(q, k, v, plan)
        torch.testing.assert_close(bound(q), expected, rtol=1e-5, atol=1e-6)
        narrow = bound(q.bfloat16())
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(
            narrow, decode_attention(q.bfloat16().to(dtype), k, v, plan).bfloat16(), rtol=2e-2, atol=2e-2
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda k, v: (k, v[:, :1]), "one shape"), (lambda k, v: (k[:5], v[:5]), "slots"), (lambda k, v: (k.half(), v), "dtype")],
)
def test_bound_to_wrong_buffers_it_says_what_is_wrong(change, message):
    plan = DecodePlan.self_cache(2, 4, 2)
    k, v = change(*(_by_heads(8, 2, 16, torch.float32) for _ in range(2)))
    with pytest.raises(ValueError, match=message):
        bind_decode_attention(k, v, plan)(torch.randn(2, 2, 16))
