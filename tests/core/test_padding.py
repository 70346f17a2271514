"""The padded layout of a plan: every row once, every mask right, and not much padding."""

import numpy as np
import pytest
import torch

from vlp_fast import AttentionPlan, Segments
from vlp_fast.padding import FREE_PAIRS, WASTE, padded_plan


def random_plan(seed, longest=12):
    rng = np.random.default_rng(seed)
    query, key = rng.integers(0, longest, rng.integers(1, 9)).tolist(), rng.integers(0, longest, rng.integers(1, 6)).tolist()
    edges = [(i, j, bool(rng.random() < 0.3)) for i in range(len(query)) for j in range(len(key)) if rng.random() < 0.4]
    return AttentionPlan.from_edges(query, key, edges)


def expected_mask(plan):
    """bool [rows_q, rows_k]: which query row reads which key row, straight from the edges."""
    mask = np.zeros((plan.query.rows, plan.key.rows), bool)
    for i, j, causal in plan.host_edges.tolist():
        n, m = plan.query.lengths[i], plan.key.lengths[j]
        for row in range(n):
            for column in range(m):
                if not causal or column <= row + m - n:
                    mask[plan.query.host_offsets[i] + row, plan.key.host_offsets[j] + column] = True
    return mask


def layout_mask(plan):
    """The same, as the padded layout has it; asserts that no slot that is read repeats a key."""
    padded = padded_plan(plan)
    slots = torch.arange(plan.query.rows) if padded.slots is None else padded.slots.cpu()
    per_slot = []
    for bucket in padded.buckets:
        keys = bucket.key_rows.cpu().view(bucket.groups, 1, bucket.seqlen_k).expand(-1, bucket.seqlen_q, -1)
        seen = torch.ones(bucket.groups, bucket.seqlen_q, bucket.seqlen_k, dtype=torch.bool)
        if bucket.causal:
            seen = seen.tril()
        if bucket.mask is not None:
            seen = bucket.mask.cpu()[:, 0].expand_as(seen)
        per_slot += [
            (int(row), visible_keys[visible].tolist())
            for row, visible_keys, visible in zip(
                bucket.query_rows.cpu(), keys.reshape(-1, bucket.seqlen_k), seen.reshape(-1, bucket.seqlen_k), strict=True
            )
        ]
    mask = np.zeros((plan.query.rows, plan.key.rows), bool)
    for row, slot in enumerate(slots.tolist()):
        if slot == len(per_slot):  # one past the slots: reads nothing
            continue
        held, keys = per_slot[slot]
        assert held == row
        assert len(set(keys)) == len(keys)
        mask[row, keys] = True
    return mask


@pytest.mark.parametrize("seed", range(40))
def test_padded_plan_holds_every_row_under_its_mask(seed):
    plan = random_plan(seed)
    assert np.array_equal(layout_mask(plan), expected_mask(plan))


@pytest.mark.parametrize("index", [[0, 1, 2, 3], [3, 3, 0, 1]])
@pytest.mark.parametrize(("query", "key"), [([2, 0, 3, 1], [4, 1, 0, 2]), ([3, 3, 3, 3], [5, 5, 5, 5])])
def test_padded_plan_of_a_device_index_holds_every_row_under_its_mask(index, query, key, device):
    segments = Segments(query, device), Segments(key, device)
    plan = AttentionPlan._device_cross_attention(*segments, torch.tensor(index, device=device))
    host = AttentionPlan.cross_attention(*segments, index)
    assert np.array_equal(layout_mask(plan), expected_mask(host))


@pytest.mark.parametrize("seed", range(10))
def test_padded_plan_wastes_little(seed):
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(4, 1, 40)).astype(int).tolist()
    plan = AttentionPlan.self_attention(lengths)
    padded = padded_plan(plan)
    for bucket in padded.buckets:
        pairs = bucket.groups * bucket.seqlen_q * bucket.seqlen_k
        chosen = bucket.query_rows.unique()
        useful = sum(n * n for first, n in zip(plan.query.host_offsets, lengths, strict=False) if int(first) in chosen)
        assert pairs <= max(FREE_PAIRS, WASTE * useful)
    assert len(padded.buckets) < 12


def test_padded_plan_keeps_images_apart_from_longer_pairs():
    """A quarter of waste is much where there are many pairs: eight images of 197 rows beside pairs of up to 222."""
    plan = AttentionPlan.self_attention(Segments([197] * 8 + [205, 208, 209, 211, 211, 213, 214, 222]))
    buckets = padded_plan(plan).buckets
    assert (buckets[0].groups, buckets[0].seqlen_q, buckets[0].mask) == (8, 197, None)
    assert sum(b.groups * b.seqlen_q * b.seqlen_k for b in buckets) < 1.03 * plan.pairs


def test_padded_plan_of_equal_segments_is_a_view():
    padded = padded_plan(AttentionPlan.self_attention([7] * 5))
    (bucket,) = padded.buckets
    assert padded.slots is None
    assert bucket.mask is None
    assert (bucket.groups, bucket.seqlen_q, bucket.seqlen_k, bucket.query_start, bucket.key_start) == (5, 7, 7, 0, 0)


def test_padded_plan_of_ragged_causal_segments_needs_no_mask():
    (bucket,) = padded_plan(AttentionPlan.self_attention([7, 3, 5], causal=True)).buckets
    assert bucket.causal
    assert bucket.mask is None


def test_padded_plan_reads_a_shared_image_once():
    captions, images = [3, 4, 2, 5, 1], [50, 60]
    (bucket,) = padded_plan(AttentionPlan.cross_attention(captions, images, [0, 0, 1, 0, 1])).buckets
    assert (bucket.groups, bucket.seqlen_q, bucket.seqlen_k) == (2, 12, 60)
    assert bucket.mask.shape == (2, 1, 1, 60)


def test_padded_plan_is_kept_and_ready_on_the_cpu():
    plan = AttentionPlan.self_attention([3, 2])
    assert plan._padded is not None
    assert padded_plan(plan) is plan._padded


@pytest.mark.parametrize("lengths", [([], []), ([0, 0], [3]), ([2], [0]), ([2], [])])
def test_padded_plan_without_a_pair_has_no_bucket(lengths):
    query, key = lengths
    edges = [(i, j, False) for i in range(len(query)) for j in range(len(key))]
    padded = padded_plan(AttentionPlan.from_edges(query, key, edges))
    assert padded.buckets == ()
    assert padded.slots.tolist() == [0] * sum(query)


def test_padded_plan_is_not_built_inside_a_compiled_region(monkeypatch):
    plan = AttentionPlan._device_cross_attention(Segments([2]), Segments([3]), torch.tensor([0]))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="needs vlp_fast.padding.padded_plan\\(plan\\) once before torch.compile"):
        padded_plan(plan)


@pytest.mark.parametrize("seed", range(8))
def test_padded_plan_of_pairs_is_that_of_groups(seed):
    rng = np.random.default_rng(seed)
    lengths_q, lengths_k = (rng.integers(0, 30, 12).tolist() for _ in range(2))
    lengths_k = lengths_q if seed % 2 else lengths_k
    causal = rng.integers(0, 2, 12) if seed < 4 else np.full(12, seed % 4 // 2)
    plan = AttentionPlan.from_edges(lengths_q, lengths_k, [(i, i, bool(c)) for i, c in enumerate(causal)])
    assert_padded_as_groups(plan)


@pytest.mark.parametrize(
    "plan",
    [
        AttentionPlan.self_attention([5] * 3),
        AttentionPlan.self_attention([5] * 3, causal=True),
        AttentionPlan.self_attention([7]),
        AttentionPlan.pooling(4, [6] * 3),
        AttentionPlan.from_edges([4] * 2, [6] * 2, [(0, 0, True), (1, 1, True)]),
        AttentionPlan.from_edges([4] * 2, [4] * 2, [(0, 0, True), (1, 1, False)]),
        AttentionPlan.self_attention([0] * 3),
    ],
    ids=repr,
)
def test_padded_plan_of_equal_pairs_is_that_of_groups(plan):
    assert_padded_as_groups(plan)


def assert_padded_as_groups(plan):
    assert plan.facts.one_to_one
    found = padded_plan(plan)
    plan.facts, plan._padded = plan.facts._replace(one_to_one=False), None
    expected = padded_plan(plan)
    assert (found.slots is None) == (expected.slots is None)
    assert found.slots is None or torch.equal(found.slots, expected.slots)
    assert len(found.buckets) == len(expected.buckets)
    for one, other in zip(found.buckets, expected.buckets, strict=True):
        for name, value in one._asdict().items():
            right = getattr(other, name)
            same = torch.equal(value, right) if isinstance(value, torch.Tensor) else value == right
            assert same, name
