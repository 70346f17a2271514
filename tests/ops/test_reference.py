"""The specification itself: against a dense mask written from the definition, murmur3 in whole numbers, and finite differences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vlp_fast import AttentionPlan, reference
from vlp_fast.segments import Segments

PLANS = {
    "ragged": lambda: AttentionPlan.self_attention([3, 1, 0, 4]),
    "causal": lambda: AttentionPlan.self_attention([3, 1, 4], causal=True),
    "causal_more_queries": lambda: AttentionPlan.from_edges([5, 2], [3, 2], [(0, 0, True), (1, 1, True)]),
    "causal_more_keys": lambda: AttentionPlan.from_edges([2, 1], [4, 3], [(0, 0, True), (1, 1, True)]),
    "shared": lambda: AttentionPlan.cross_attention([2, 3, 1], [4, 2], [1, 1, 0]),
    "prefix_causal": lambda: AttentionPlan.prefix_causal([2, 3], [3, 1]),
    "joint": lambda: AttentionPlan.joint([2, 0, 3], [2, 3, 0]),
    "no_key_rows": lambda: AttentionPlan.from_edges([2, 3, 1], [3, 0], [(0, 0, False), (2, 1, False)]),
}


def dense_mask(plan):
    """bool [rows_q, rows_k] from the words of the documentation: row i of n reads keys 0 .. i + m - n of m where causal."""
    mask = torch.zeros(plan.query.rows, plan.key.rows, dtype=torch.bool)
    for query, key, causal in plan.host_edges.tolist():
        n, m = plan.query.lengths[query], plan.key.lengths[key]
        first_q, first_k = int(plan.query.host_offsets[query]), int(plan.key.host_offsets[key])
        for i in range(n):
            for j in range(m):
                mask[first_q + i, first_k + j] |= not causal or j <= i + m - n
    return mask


def inputs(plan, heads=2, heads_k=2, head_dim=4):
    shapes = ((plan.query.rows, heads), (plan.key.rows, heads_k), (plan.key.rows, heads_k))
    return [torch.randn(rows, h, head_dim, dtype=torch.float64) for rows, h in shapes]


@pytest.mark.parametrize("heads_k", [4, 2, 1])
@pytest.mark.parametrize("name", PLANS)
def test_reference_attention_is_softmax_under_the_dense_mask(name, heads_k):
    plan = PLANS[name]()
    q, k, v = inputs(plan, 4, heads_k)
    out, lse = reference.attention(q, k, v, plan, softmax_scale=0.3, return_lse=True)
    mask = dense_mask(plan)
    for head in range(4):
        keys, values = k[:, head * heads_k // 4], v[:, head * heads_k // 4]
        exponentials = torch.exp(0.3 * q[:, head] @ keys.T) * mask
        total = exponentials.sum(1, keepdim=True)
        torch.testing.assert_close(out[:, head], exponentials @ values / total.clamp_min(1e-300))
        torch.testing.assert_close(lse[head], total[:, 0].log())
    assert torch.equal(reference.attention(q, k, v, plan), reference.attention(q, k, v, plan, softmax_scale=0.5))


@pytest.mark.parametrize("name", PLANS)
def test_reference_attention_agrees_with_sdpa(name):
    plan = PLANS[name]()
    q, k, v = (x.transpose(0, 1) for x in inputs(plan))
    mask = dense_mask(plan)
    expected = F.scaled_dot_product_attention(q, k, v, mask).transpose(0, 1)
    out = reference.attention(*(x.transpose(0, 1) for x in (q, k, v)), plan)
    torch.testing.assert_close(out, expected.masked_fill(~mask.any(1)[:, None, None], 0.0))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_reference_attention_gradients_of_out_and_lse(name, dropout_p):
    plan = PLANS[name]()
    q, k, v = (x.requires_grad_() for x in inputs(plan, 2, 1, 3))
    seed = torch.tensor([12345678901])
    reads = dense_mask(plan).any(1)

    def function(q, k, v):
        out, lse = reference.attention(q, k, v, plan, dropout_p=dropout_p, seed=seed, return_lse=True)
        return out, lse[:, reads]  # finite differences of -inf say nothing

    assert torch.autograd.gradcheck(function, (q, k, v))


@pytest.mark.parametrize("name", ["no_key_rows", "causal_more_queries"])
def test_reference_attention_row_without_key_is_zero_with_zero_gradients(name):
    plan = PLANS[name]()
    q, k, v = (x.requires_grad_() for x in inputs(plan))
    out, lse = reference.attention(q, k, v, plan, return_lse=True)
    blind = ~dense_mask(plan).any(1)
    assert blind.any()
    assert (out[blind] == 0).all()
    assert (lse[:, blind] == -torch.inf).all()
    grads = torch.autograd.grad([out, lse], [q, k, v], [torch.randn_like(out), torch.randn_like(lse)])
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][blind] == 0).all()


def test_reference_attention_without_rows():
    plan = AttentionPlan.from_edges([], [], [])
    out, lse = reference.attention(*inputs(plan), plan, return_lse=True)
    assert out.shape == (0, 2, 4)
    assert lse.shape == (2, 0)


# ----------------------------------------------------------------------------------------------------------------- dropout


def murmur3_finaliser(x):
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1, 2**31, 2**32, 0xDEADBEEFCAFE])
def test_dropout_keep_is_the_documented_hash(seed):
    rows, keys = torch.tensor([0, 5, 2**31 - 1]), torch.tensor([0, 1, 77, 2**31 - 1])
    for head in (0, 3):
        kept = reference.dropout_keep(torch.tensor([seed]), head, rows, keys, 0.37)
        per_head = murmur3_finaliser(murmur3_finaliser(seed % 2**32 ^ 0x9E3779B9) ^ seed >> 32 ^ (head * 0x85EBCA77 % 2**32))
        for i, row in enumerate(rows.tolist()):
            for j, key in enumerate(keys.tolist()):
                bits = murmur3_finaliser(murmur3_finaliser(per_head ^ row) ^ murmur3_finaliser(key ^ 0xC2B2AE3D))
                assert bool(kept[i, j]) == (bits >= int(0.37 * 2**32))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keep_drops_the_share_asked_for_everywhere(p):
    size = 300
    rows = torch.arange(size)
    kept = reference.dropout_keep(torch.tensor([7]), torch.arange(4)[:, None, None], rows, rows, p).double()
    assert kept.shape == (4, size, size)
    deviation = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * deviation / kept.numel() ** 0.5
    for dims, count in (((1, 2), size * size), ((0, 2), 4 * size), ((0, 1), 4 * size)):  # of every head, query row, key row
        assert (kept.mean(dims) - (1 - p)).abs().max() < 5.5 * deviation / count**0.5


def test_dropout_keep_is_unrelated_between_neighbours_heads_and_seeds():
    rows = torch.arange(400)
    kept = [reference.dropout_keep(torch.tensor([s]), h, rows, rows, 0.5).double() - 0.5 for s, h in ((7, 0), (7, 1), (8, 0))]
    bound = 5 * 0.25 / rows.numel()  # five deviations of the mean of products of fair coins worth a half
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (kept[a] * kept[b]).mean().abs() < bound
    for lag in (1, 2, 16):
        assert (kept[0][lag:] * kept[0][:-lag]).mean().abs() < 1.1 * bound
        assert (kept[0][:, lag:] * kept[0][:, :-lag]).mean().abs() < 1.1 * bound
    assert (kept[0] * kept[0].T).mean().abs() < 2 * bound


# ---------------------------------------------------------------------------------------------------------------- multiway


@pytest.mark.parametrize("offsets", [(0, 3, 7), (0, 0, 7), (0, 7, 7), (0, 2, 2, 7)])
def test_reference_multiway_is_each_run_through_its_expert(offsets):
    experts = len(offsets) - 1
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((7, 4), (experts, 5, 4), (experts, 5)))
    runs = list(zip(range(experts), offsets, offsets[1:], strict=False))
    expected = torch.cat([F.linear(x[a:b], weight[e], bias[e]) for e, a, b in runs])
    torch.testing.assert_close(reference.multiway_linear(x, weight, bias, offsets), expected)
    scale, shift = torch.randn(2, experts, 4, dtype=torch.float64)
    expected = torch.cat([F.layer_norm(x[a:b], [4], scale[e], shift[e], 1e-3) for e, a, b in runs])
    torch.testing.assert_close(reference.multiway_layer_norm(x, scale, shift, offsets, 1e-3), expected)


def test_reference_multiway_gradients():
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 3), (2, 4, 3), (2, 4)))
    assert torch.autograd.gradcheck(lambda *t: reference.multiway_linear(*t, (0, 2, 5)), (x, weight, bias))
    scale, shift = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *t: reference.multiway_layer_norm(*t, (0, 2, 5), 1e-5), (x, scale, shift))


def test_reference_dense_mask_of_this_test_means_bottom_right():
    segments = Segments([2]), Segments([4])
    mask = dense_mask(AttentionPlan.from_edges(*segments, [(0, 0, True)]))
    assert np.array_equal(mask.numpy(), [[True, True, True, False], [True, True, True, True]])
