"""attention, by every backend that runs here, against the reference: outputs, log-sum-exps, every gradient, dropout."""

import pytest
import torch

from vlp_fast import AttentionPlan, reference
from vlp_fast.ops import attention
from vlp_fast.testing import assert_as_accurate_as, assert_matches_reference, outputs_and_gradients

BACKENDS = ["torch", "triton"]
PLANS = {
    "ragged": lambda d: AttentionPlan.self_attention([5, 1, 19, 33], device=d),
    "uniform": lambda d: AttentionPlan.self_attention([7, 7], device=d),
    "shared": lambda d: AttentionPlan.cross_attention([4, 1, 9, 3], [35, 7], [1, 0, 1, 1], device=d),
    "device_index": lambda d: AttentionPlan.cross_attention([4, 1, 9, 3], [35, 7], [1, 0, 1, 1], device=d),
    "causal": lambda d: AttentionPlan.self_attention([5, 1, 19, 33], causal=True, device=d),
    "causal_more_keys": lambda d: AttentionPlan.from_edges([3, 18], [9, 35], [(0, 0, True), (1, 1, True)], d),
    "causal_more_queries": lambda d: AttentionPlan.from_edges([9, 35], [4, 18], [(0, 0, True), (1, 1, True)], d),
    "prefix_causal": lambda d: AttentionPlan.prefix_causal([17, 2], [4, 20], d),
    "joint": lambda d: AttentionPlan.joint([5, 0, 18, 0], [4, 7, 0, 0], d),
    "empty_segments": lambda d: AttentionPlan.from_edges(
        [0, 3, 0, 4], [5, 0, 2], [(0, 0, False), (1, 1, False), (1, 2, True), (3, 0, False), (3, 1, True)], d
    ),
    "no_key_rows": lambda d: AttentionPlan.from_edges([3, 4, 2], [5, 3], [(1, 0, False)], d),
    "no_edge": lambda d: AttentionPlan.from_edges([3, 4], [5], [], d),
    "no_key": lambda d: AttentionPlan.from_edges([3, 4], [0], [(0, 0, False)], d),
    "no_query": lambda d: AttentionPlan.from_edges([0], [5], [(0, 0, False)], d),
    "nothing": lambda d: AttentionPlan.from_edges([], [], [], d),
    "many_edges": lambda d: AttentionPlan.from_edges(
        [20, 3], [18, 1, 0, 33], [(0, 3, False), (0, 0, True), (0, 1, False), (1, 3, True), (1, 0, False), (0, 2, True)], d
    ),
}


def build(name, device):
    plan = PLANS[name](device)
    if name == "device_index":
        plan = AttentionPlan._device_cross_attention(plan.query, plan.key, plan.edge_key.long())
    return plan


def compare(qkv, plan, backend, **options):
    names = ["out", *(["lse"] if options.get("return_lse") else []), "dq", "dk", "dv"]
    assert_matches_reference(
        lambda *t: attention(*t, plan, backend=backend, **options),
        lambda *t: reference.attention(*t, plan, **options),
        qkv,
        names=names,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PLANS)
def test_attention_every_plan(name, backend, make_qkv, device, poison):
    plan = build(name, device)
    compare(make_qkv(plan), plan, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["ragged", "causal_more_queries", "many_edges", "no_key_rows", "no_edge", "nothing"])
def test_attention_lse_and_its_gradient(name, backend, make_qkv, device, poison):
    plan = build(name, device)
    compare(make_qkv(plan), plan, backend, return_lse=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_lse_alone_has_a_gradient(backend, make_qkv, device):
    plan = build("prefix_causal", device)
    assert_matches_reference(
        lambda *t: attention(*t, plan, backend=backend, return_lse=True)[1],
        lambda *t: reference.attention(*t, plan, return_lse=True)[1],
        make_qkv(plan),
        names=["lse", "dq", "dk", "dv"],
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ragged", "many_edges"])
def test_attention_sixteen_bit(name, dtype, backend, make_qkv, device, poison):
    plan = build(name, device)
    qkv = make_qkv(plan, dtype=dtype)
    compare(qkv, plan, backend, return_lse=True)
    out, lse = attention(*qkv, plan, backend=backend, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [24, 80, 96, 128])
def test_attention_head_dims(head_dim, dtype, backend, make_qkv, device, poison):
    plan = AttentionPlan.prefix_causal([5], [18], device)
    compare(make_qkv(plan, 1, head_dim=head_dim, dtype=dtype), plan, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "heads_k"), [(3, 1), (4, 2), (1, 1)])
def test_attention_query_heads_share_key_heads(heads, heads_k, backend, make_qkv, device, poison):
    plan = build("prefix_causal", device)
    compare(make_qkv(plan, heads, heads_k), plan, backend, return_lse=heads == 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softmax_scale", [0.05, 1.0])
def test_attention_softmax_scale(softmax_scale, backend, make_qkv, device):
    plan = build("many_edges", device)
    compare(make_qkv(plan), plan, backend, softmax_scale=softmax_scale, return_lse=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [30.0, 1e3])
def test_attention_large_scores(size, backend, make_qkv, device):
    plan = build("causal", device)
    q, k, v = make_qkv(plan)
    compare([size * q, k, v], plan, backend, return_lse=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", [-2000.0, 2000.0])
@pytest.mark.parametrize("name", ["ragged", "causal"])
def test_attention_scores_far_from_zero_everywhere(name, score, backend, make_qkv, device):
    plan = build(name, device)
    # multiples of 1/16: the products that make a score are exact in any order, and its size is all that can do harm
    q, k, v = ((16 * x).round() / 16 for x in make_qkv(plan))
    shift = torch.zeros(16, device=device)
    shift[0] = round(abs(score) ** 0.5 * 2)
    compare([q + shift.copysign(torch.tensor(score)), k + shift, v], plan, backend, return_lse=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_huge_scores_pick_one_key(backend, device):
    plan = AttentionPlan.self_attention([4], device=device)
    q = 1e4 * torch.eye(4, 16, device=device)[:, None]
    v = torch.randn(4, 1, 16, device=device)
    out, dq, dk, dv = outputs_and_gradients(lambda *t: attention(*t, plan, backend=backend), [q, q, v], [torch.ones_like(v)])
    torch.testing.assert_close(out, v)
    torch.testing.assert_close(dv, torch.ones_like(v))
    assert dq.isfinite().all()
    assert dk.isfinite().all()


# ----------------------------------------------------------------------------------------------------------------- strides


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["rows_3_heads", "rows_heads_3", "transposed", "sliced", "expanded", "padded_dim"])
def test_attention_takes_strided_views(layout, backend, device):
    plan = build("prefix_causal", device)
    rows, heads, dim = plan.query.rows, 2, 16
    views = {
        "rows_3_heads": lambda: list(torch.randn(rows, 3, heads, dim, device=device).unbind(1)),
        "rows_heads_3": lambda: list(torch.randn(rows, heads, 3 * dim, device=device).split(dim, 2)),
        "transposed": lambda: [torch.randn(dim, heads, rows, device=device).permute(2, 1, 0) for _ in range(3)],
        "sliced": lambda: [torch.randn(2 * rows, heads + 1, dim, device=device)[::2, 1:] for _ in range(3)],
        "expanded": lambda: [
            torch.randn(1, heads, dim, device=device).expand(rows, -1, -1),
            torch.randn(rows, 1, dim, device=device).expand(-1, heads, -1),
            torch.randn(rows, heads, dim, device=device),
        ],
        "padded_dim": lambda: list(torch.randn(3, rows, heads, 2 * dim, device=device)[..., ::2].unbind(0)),
    }[layout]()
    assert not all(x.is_contiguous() for x in views)
    compare(views, plan, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_gradient_of_a_fused_projection(backend, device):
    plan = build("causal", device)
    fused = torch.randn(plan.query.rows, 3, 2, 16, device=device)
    assert_matches_reference(
        lambda x: attention(*x.unbind(1), plan, backend=backend),
        lambda x: reference.attention(*x.unbind(1), plan),
        [fused],
        names=["out", "dqkv"],
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_takes_gradients_of_any_stride(backend, make_qkv, device):
    plan = build("prefix_causal", device)
    qkv = make_qkv(plan)
    rows = plan.query.rows
    douts = {
        "expanded": (torch.ones(1, 1, 1, device=device).expand(rows, 2, 16), torch.ones(1, 1, device=device).expand(2, rows)),
        "transposed": (torch.randn(16, 2, rows, device=device).permute(2, 1, 0), torch.randn(rows, 2, device=device).T),
    }
    for dout, dlse in douts.values():
        assert not dout.is_contiguous()

        def run(d, e):
            return outputs_and_gradients(lambda *t: attention(*t, plan, backend=backend, return_lse=True), qkv, [d, e])

        strided, dense = run(dout, dlse), run(dout.contiguous(), dlse.contiguous())
        for a, b in zip(strided, dense, strict=True):
            assert torch.equal(a, b)


# ----------------------------------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_attention_gradient_of_one_input_alone(wanted, backend, make_qkv, device):
    plan = build("shared", device)
    qkv = make_qkv(plan)
    everything = outputs_and_gradients(lambda *t: attention(*t, plan, backend=backend), qkv)
    qkv[wanted].requires_grad_()
    out = attention(*qkv, plan, backend=backend)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(device)
    (grad,) = torch.autograd.grad(out, qkv[wanted], dout)
    assert_as_accurate_as(grad, everything[1 + wanted], everything[1 + wanted].double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_attention_gives_the_same_bits_twice(dropout_p, backend, make_qkv, device):
    plan = build("many_edges", device)
    qkv = make_qkv(plan)

    def run():
        torch.manual_seed(5)
        return outputs_and_gradients(lambda *t: attention(*t, plan, backend=backend, return_lse=True, dropout_p=dropout_p), qkv)

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_leaves_its_inputs_alone(backend, make_qkv, device):
    plan = build("many_edges", device)
    qkv = make_qkv(plan)
    before = [x.clone() for x in qkv]
    outputs_and_gradients(lambda *t: attention(*t, plan, backend=backend), qkv)
    assert all(torch.equal(a, b) for a, b in zip(before, qkv, strict=True))


def test_attention_float64_on_the_torch_backend_is_the_reference(make_qkv, device):
    plan = build("many_edges", device)
    qkv = make_qkv(plan, dtype=torch.float64)
    ours = outputs_and_gradients(lambda *t: attention(*t, plan, backend="torch", return_lse=True), qkv)
    theirs = outputs_and_gradients(lambda *t: reference.attention(*t, plan, return_lse=True), qkv)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------- dropout


def seeded(seed, function):
    """What `function` returns after torch.manual_seed, and the seed that attention draws then."""

    def run(*inputs):
        torch.manual_seed(seed)
        return function(*inputs)

    return run


def drawn_seed(seed, device):
    torch.manual_seed(seed)
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "dropout_p"),
    [
        *((name, 0.3) for name in ("causal", "shared", "device_index", "no_key_rows", "no_edge", "nothing")),
        ("many_edges", 0.75),
    ],
)
def test_attention_dropout_keeps_what_the_reference_keeps(name, dropout_p, backend, make_qkv, device, poison):
    plan = build(name, device)
    drop = drawn_seed(11, device)
    return_lse = name == "many_edges"
    names = ["out", *(["lse"] if return_lse else []), "dq", "dk", "dv"]
    assert_matches_reference(
        seeded(11, lambda *t: attention(*t, plan, backend=backend, dropout_p=dropout_p, return_lse=return_lse)),
        lambda *t: reference.attention(*t, plan, dropout_p=dropout_p, seed=drop, return_lse=return_lse),
        make_qkv(plan, 4, 2),
        names=names,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_dropout_drops_the_share_asked_for(backend, device):
    lengths, p, dim = [40, 48], 0.3, 48
    plan = AttentionPlan.self_attention(lengths, device=device)
    zeros, values = torch.zeros(88, 2, dim, device=device), torch.zeros(88, 2, dim, device=device)
    for first, n in ((0, 40), (40, 48)):  # value row j is unit vector j: out holds every weight
        values[first : first + n, :, :n] = torch.eye(n, device=device)[:, None]
    out = attention(zeros, zeros, values, plan, backend=backend, dropout_p=p)
    kept = total = 0
    for first, n in ((0, 40), (40, 48)):
        weights = out[first : first + n, :, :n] * n  # 0 or 1 / (1 - p)
        is_kept = weights > 0
        torch.testing.assert_close(weights[is_kept], torch.full_like(weights[is_kept], 1 / (1 - p)))
        kept, total = kept + is_kept.sum().item(), total + is_kept.numel()
    assert abs(kept / total - (1 - p)) < 5 * (p * (1 - p) / total) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_dropout_follows_torchs_generator(backend, make_qkv, device):
    plan = build("causal", device)
    qkv = make_qkv(plan)

    def run():
        return attention(*qkv, plan, backend=backend, dropout_p=0.5)

    torch.manual_seed(1)
    first, second = run(), run()
    torch.manual_seed(1)
    again = run()
    torch.manual_seed(2)
    other = run()
    assert torch.equal(first, again)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_without_dropout_draws_no_number(backend, make_qkv, device):
    plan = build("uniform", device)
    state = torch.get_rng_state()
    qkv = make_qkv(plan)
    torch.set_rng_state(state)
    attention(*qkv, plan, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)
