"""Attention with a learned bias, against its formula in float64: ragged and joint plans, gradients of the table, error texts."""

import pytest
import torch

from vlp_fast import AttentionPlan
from vlp_fast.modules.relative_bias import biased_attention, pair_buckets, relative_buckets

HEADS, HEAD_DIM, ENTRIES = 3, 8, 11


def explicit(q, k, v, plan, positions, buckets, table):
    """Each query row with the rows that it reads, one at a time."""
    out = torch.zeros_like(q)
    starts = plan.query.host_offsets
    for query in range(len(plan.query)):
        keys = [range(starts[j], starts[j + 1]) for i, j, _ in plan.host_edges.tolist() if i == query]
        rows = torch.tensor([row for part in keys for row in part], dtype=torch.int64)
        for row in range(starts[query], starts[query + 1]):
            bias = table[buckets[positions[row], positions[rows]]].T  # [heads, keys]
            scores = torch.einsum("hd,khd->hk", q[row], k[rows]) * HEAD_DIM**-0.5 + bias
            out[row] = torch.einsum("hk,khd->hd", scores.softmax(1), v[rows])
    return out


def inputs(plan):
    torch.manual_seed(0)
    rows = plan.query.rows
    q, k, v = (torch.randn(rows, HEADS, HEAD_DIM, dtype=torch.float64, requires_grad=True) for _ in range(3))
    table = torch.randn(ENTRIES, HEADS, dtype=torch.float64, requires_grad=True)
    return q, k, v, table, plan.query.positions(), torch.randint(ENTRIES, (40, 40))


PLANS = {
    "ragged": lambda: AttentionPlan.self_attention([5, 1, 0, 7]),
    "equal": lambda: AttentionPlan.self_attention([4, 4, 4]),
    "joint": lambda: AttentionPlan.joint([3, 0, 6, 1], [4, 4, 0, 4]),
    "several_buckets": lambda: AttentionPlan.self_attention([2, 40, 3, 1, 1, 38] + [2] * 40),
}


@pytest.mark.parametrize("name", PLANS)
def test_biased_attention_is_its_formula_with_its_gradients(name):
    plan = PLANS[name]()
    q, k, v, table, positions, buckets = inputs(plan)
    pairs = pair_buckets(plan, positions, buckets)
    results = []
    for out in (
        biased_attention(q, k, v, plan, table, pairs),
        explicit(q, k, v, plan, positions, buckets, table),
    ):
        weight = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
        gradients = torch.autograd.grad((out * weight).sum(), (q, k, v, table), allow_unused=True, materialize_grads=True)
        results.append((out, *gradients))
    torch.testing.assert_close(*results)


def test_biased_attention_of_nothing_is_empty():
    plan = AttentionPlan.self_attention([0, 0])
    q, k, v, table, positions, buckets = inputs(plan)
    assert biased_attention(q, k, v, plan, table, pair_buckets(plan, positions, buckets)).shape == q.shape


def test_biased_attention_alike_samples_share_their_pairs():
    plan = PLANS["equal"]()
    q, k, v, table, positions, buckets = inputs(plan)
    shared, own = (pair_buckets(plan, positions, buckets, alike=alike) for alike in (True, False))
    assert [len(pair) for pair in shared] == [1]
    assert [len(pair) for pair in own] == [3]
    torch.testing.assert_close(biased_attention(q, k, v, plan, table, shared), biased_attention(q, k, v, plan, table, own))


def test_biased_attention_in_16_bits_keeps_the_dtype():
    plan = PLANS["joint"]()
    q, k, v, table, positions, buckets = inputs(plan)
    pairs = pair_buckets(plan, positions, buckets)
    half = biased_attention(*(x.bfloat16() for x in (q, k, v)), plan, table.float(), pairs)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), biased_attention(q, k, v, plan, table, pairs), atol=0.05, rtol=0.05)


def test_biased_attention_says_what_does_not_fit():
    plan = PLANS["ragged"]()
    q, k, v, table, positions, buckets = inputs(plan)
    pairs = pair_buckets(plan, positions, buckets)
    with pytest.raises(ValueError, match=r"table must be \[entries, 3\]"):
        biased_attention(q, k, v, plan, table[:, :2], pairs)
    with pytest.raises(ValueError, match="pairs must come from pair_buckets for this plan"):
        biased_attention(q, k, v, plan, table, [pair[:, 1:] for pair in pairs])
    causal = AttentionPlan.self_attention([5, 1, 0, 7], causal=True)
    with pytest.raises(ValueError, match="plans of full edges; received one with causal edges"):
        biased_attention(q, k, v, causal, table, pairs)


def test_relative_buckets():
    buckets, entries = relative_buckets(grid=2, text_length=6, max_positions=4)
    assert (buckets.shape, entries) == ((9, 9), 9 + 3 + 2 * 6 + 2)
    # patches of a 2 x 2 grid: the offset from a patch to itself is the middle one of 3 x 3
    assert buckets[5:, 5:].tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert buckets[4, 4:].tolist() == [11, 9, 9, 9, 9]
    assert buckets[5:, 4].tolist() == [10] * 4
    assert set(buckets[:4, 4:].flatten().tolist()) == {12}
    assert set(buckets[4:, :4].flatten().tolist()) == {13}
    assert buckets[0, :4].tolist() == [25, 23, 23, 23]
    assert buckets[1:4, 0].tolist() == [24] * 3
    assert buckets[1:4, 1:4].tolist() == [[18, 19, 20], [17, 18, 19], [16, 17, 18]]
