"""Attention plans: what every builder means, edge by edge, and that the transposed graph is the same graph."""

import numpy as np
import pytest
import torch

from vlp_fast import AttentionPlan, Segments

EDGES = [(2, 0, False), (0, 1, True), (2, 2, True), (0, 0, False), (3, 2, False)]


def forward_edges(plan):
    """{(query, key, causal)} from the rows by query segment."""
    offsets, key, causal = (x.tolist() for x in (plan.edge_offsets, plan.edge_key, plan.edge_causal))
    return [(i, key[e], bool(causal[e])) for i in range(len(plan.query)) for e in range(offsets[i], offsets[i + 1])]


def transposed_edges(plan):
    offsets, query, causal = (x.tolist() for x in (plan.key_edge_offsets, plan.key_edge_query, plan.key_edge_causal))
    return [(query[e], j, bool(causal[e])) for j in range(len(plan.key)) for e in range(offsets[j], offsets[j + 1])]


def brute_force_pairs(plan):
    count = 0
    for i, j, causal in forward_edges(plan):
        n, m = plan.query.lengths[i], plan.key.lengths[j]
        count += sum(1 for row in range(n) for column in range(m) if not causal or column <= row + m - n)
    return count


def assert_same_plan(a, b):
    assert (a.query, a.key, a.facts, a.pairs) == (b.query, b.key, b.facts, b.pairs)
    assert forward_edges(a) == forward_edges(b)
    assert transposed_edges(a) == transposed_edges(b)


PLANS = {
    "self": (lambda: AttentionPlan.self_attention([2, 0, 3]), [(i, i, False) for i in range(3)]),
    "causal": (lambda: AttentionPlan.self_attention([2, 0, 3], causal=True), [(i, i, True) for i in range(3)]),
    "cross": (lambda: AttentionPlan.cross_attention([2, 3], [4, 5]), [(0, 0, False), (1, 1, False)]),
    "cross_index": (
        lambda: AttentionPlan.cross_attention([2, 3, 1], [4, 5], [1, 1, 0]),
        [(0, 1, False), (1, 1, False), (2, 0, False)],
    ),
    "joint": (
        lambda: AttentionPlan.joint([4, 0, 2], [3, 5, 0]),
        [
            (0, 0, False),
            (0, 3, False),
            (1, 4, False),
            (2, 2, False),
            (3, 0, False),
            (3, 3, False),
            (4, 4, False),
            (5, 2, False),
        ],
    ),
    "prefix_causal": (
        lambda: AttentionPlan.prefix_causal([4, 2], [3, 1]),
        [(0, 0, False), (1, 1, False), (2, 0, False), (2, 2, True), (3, 1, False), (3, 3, True)],
    ),
    "cu_seqlens": (
        lambda: AttentionPlan.from_cu_seqlens([0, 2, 2], [0, 4, 9], causal=True),
        [(0, 0, True), (1, 1, True)],
    ),
    "edges": (
        lambda: AttentionPlan.from_edges([2, 1, 3, 4], [4, 3, 2], EDGES),
        [(0, 1, True), (0, 0, False), (2, 0, False), (2, 2, True), (3, 2, False)],
    ),
    "nothing": (lambda: AttentionPlan.from_edges([2, 1], [], []), []),
}


@pytest.mark.parametrize("name", PLANS)
def test_plan_has_the_edges_its_builder_names(name):
    build, edges = PLANS[name]
    plan = build()
    assert forward_edges(plan) == edges
    assert plan.host_edges.tolist() == [list(map(int, edge)) for edge in edges]
    assert plan.num_edges == len(edges)


@pytest.mark.parametrize("name", PLANS)
def test_plan_transposed_edges_are_the_same_edges_in_query_order(name):
    plan = PLANS[name][0]()
    assert sorted(transposed_edges(plan)) == sorted(forward_edges(plan))
    for j in range(len(plan.key)):
        queries = [query for query, key, _ in transposed_edges(plan) if key == j]
        assert queries == sorted(queries)
    for tensor in (
        plan.edge_offsets,
        plan.edge_key,
        plan.edge_causal,
        *(getattr(plan, f"key_edge_{x}") for x in ("offsets", "query")),
    ):
        assert tensor.dtype == torch.int32


@pytest.mark.parametrize("name", PLANS)
def test_plan_counts_the_pairs_inside_its_masks(name):
    plan = PLANS[name][0]()
    assert plan.pairs == brute_force_pairs(plan)


@pytest.mark.parametrize("seed", range(20))
def test_plan_of_random_edges_is_consistent(seed):
    rng = np.random.default_rng(seed)
    query, key = rng.integers(0, 9, rng.integers(0, 6)).tolist(), rng.integers(0, 9, rng.integers(0, 6)).tolist()
    edges = [(i, j, bool(rng.random() < 0.5)) for i in range(len(query)) for j in range(len(key)) if rng.random() < 0.4]
    rng.shuffle(edges)
    plan = AttentionPlan.from_edges(query, key, edges)
    assert (
        sorted(forward_edges(plan)) == sorted(transposed_edges(plan)) == sorted((int(i), int(j), bool(c)) for i, j, c in edges)
    )
    assert plan.pairs == brute_force_pairs(plan)
    facts = plan.facts
    assert (facts.num_query_segments, facts.num_key_segments) == (len(query), len(key))
    assert (facts.max_seqlen_q, facts.max_seqlen_k) == (max(query, default=0), max(key, default=0))
    assert facts.max_edges == max((sum(int(e[0]) == i for e in edges) for i in range(len(query))), default=0)
    causal = [bool(e[2]) for e in edges]
    assert (facts.has_causal, facts.all_causal) == (any(causal), bool(causal) and all(causal))


def test_plan_edges_of_a_query_segment_keep_the_order_given():
    plan = AttentionPlan.from_edges(
        [1, 1], [1, 1, 1], [(1, 2, False), (0, 1, False), (1, 0, True), (0, 0, False), (1, 1, False)]
    )
    assert forward_edges(plan) == [(0, 1, False), (0, 0, False), (1, 2, False), (1, 0, True), (1, 1, False)]


@pytest.mark.parametrize(
    ("plan", "one_to_one", "uniform"),
    [
        (AttentionPlan.self_attention([3, 3]), True, True),
        (AttentionPlan.self_attention([3, 2]), True, False),
        (AttentionPlan.cross_attention([3, 3], [5, 5], [1, 0]), False, True),
        (AttentionPlan.cross_attention([3, 3], [5, 5], [0, 1]), True, True),
        (AttentionPlan.cross_attention([3, 3], [5, 5, 5], [0, 1]), False, True),
        (AttentionPlan.from_edges([3, 3], [3, 3], [(0, 0, False)]), False, True),
        (AttentionPlan.joint([3], [3]), False, True),
    ],
)
def test_plan_facts_say_what_it_has_in_common(plan, one_to_one, uniform):
    assert (plan.facts.one_to_one, plan.facts.uniform) == (one_to_one, uniform)
    hash(plan.facts)


def test_named_builders_are_edges_in_short():
    segments = [2, 0, 3]
    index = [(i, i, True) for i in range(3)]
    assert_same_plan(AttentionPlan.self_attention(segments, causal=True), AttentionPlan.from_edges(segments, segments, index))
    assert_same_plan(
        AttentionPlan.cross_attention([2, 3], [4, 5], torch.tensor([1, 0])),
        AttentionPlan.from_edges([2, 3], [4, 5], [(0, 1, False), (1, 0, False)]),
    )
    assert_same_plan(
        AttentionPlan.from_cu_seqlens([0, 2, 5], torch.tensor([0, 4, 9])), AttentionPlan.cross_attention([2, 3], [4, 5])
    )


def test_plan_takes_segments_and_lives_where_they_are(device):
    segments = Segments([2, 3], device)
    plan = AttentionPlan.self_attention(segments)
    assert plan.query is segments
    assert plan.device == segments.device
    assert AttentionPlan.self_attention([2, 3], device=device).device.type == device


def test_plan_gives_cu_seqlens_back():
    query, key = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
    cu_q, cu_k, max_q, max_k = AttentionPlan.from_cu_seqlens(query, key).cu_seqlens()
    assert torch.equal(cu_q, query)
    assert torch.equal(cu_k, key)
    assert (max_q, max_k) == (3, 5)


@pytest.mark.parametrize("name", ["cross_index", "joint", "prefix_causal", "edges"])
def test_plan_with_other_edges_has_no_cu_seqlens(name):
    with pytest.raises(ValueError, match="cu_seqlens express only plans in which query segment i reads key segment i"):
        PLANS[name][0]().cu_seqlens()


@pytest.mark.parametrize("name", PLANS)
def test_plan_to_another_device_and_back(name, device):
    plan = PLANS[name][0]()
    assert plan.to("cpu") is plan
    meta = plan.to("meta")
    assert meta.device.type == meta.edge_key.device.type == meta.key_edge_query.device.type == "meta"
    assert (meta.facts, meta.pairs, meta.query, meta.key) == (plan.facts, plan.pairs, plan.query, plan.key)
    assert_same_plan(meta.to(device), plan)


def test_plan_repr_says_the_sizes():
    text = repr(AttentionPlan.self_attention([1, 4]))
    assert text.startswith("AttentionPlan(query=Segments(segments=2, rows=5")
    assert text.endswith("edges=2, pairs=17)")


# ------------------------------------------------------------------------------------------------ targets on the device only


@pytest.mark.parametrize("index", [[0, 1, 2, 3], [3, 3, 0, 3], [2, 1, 2, 1]])
def test_plan_of_a_device_index_is_the_host_plan(index, device):
    query, key = Segments([2, 0, 3, 1], device), Segments([4, 1, 0, 2], device)
    plan = AttentionPlan._device_cross_attention(query, key, torch.tensor(index, device=device))
    host = AttentionPlan.cross_attention(query, key, index)
    assert forward_edges(plan) == forward_edges(host)
    assert transposed_edges(plan) == transposed_edges(host)  # the stable sort keeps the order of queries
    for name in ("edge_offsets", "edge_key", "edge_causal", "key_edge_offsets", "key_edge_query", "key_edge_causal"):
        assert getattr(plan, name).dtype == torch.int32
        assert getattr(plan, name).device.type == device
    assert plan.host_edges is None
    assert plan.pairs == query.rows * key.max_length >= host.pairs  # what the host can know
    assert plan.facts.max_edges == 1
    assert not plan.facts.has_causal
    assert not plan.facts.one_to_one


def test_plan_of_a_device_index_never_reads_it():
    plan = AttentionPlan.cross_attention([2, 3], [4, 5, 6], torch.empty(2, dtype=torch.int64, device="meta"))
    assert plan.host_edges is None
    assert plan.device.type == "meta"
    assert plan.to("meta") is plan
    with pytest.raises(ValueError, match="index must name one key segment per query segment; received 3 for 2 query segments."):
        AttentionPlan.cross_attention([2, 3], [4, 5, 6], torch.empty(3, dtype=torch.int64, device="meta"))


# ---------------------------------------------------------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: AttentionPlan.from_edges([1, 1], [1], [(2, 0, True)]),
            r"edges must name existing segments; edge \(2, 0, True\) names query segment 2 of 2.",
        ),
        (
            lambda: AttentionPlan.from_edges([1, 1], [1], [(0, 0, False), (1, -1, False)]),
            r"edges must name existing segments; edge \(1, -1, False\) names key segment -1 of 1.",
        ),
        (
            lambda: AttentionPlan.from_edges([1, 1], [1, 1, 1], [(1, 2, False), (0, 0, False), (1, 2, True)]),
            "edges must not repeat; query segment 1 reads key segment 2 more than once.",
        ),
        (
            lambda: AttentionPlan.cross_attention([1, 1], [1]),
            "cross-attention without an index needs one key segment per query segment; received 2 query and 1 key segments.",
        ),
        (
            lambda: AttentionPlan.cross_attention([1, 1], [1], [0]),
            "index must name one key segment per query segment; received 1 for 2 query segments.",
        ),
        (lambda: AttentionPlan.cross_attention([1, 1], [1], [0, 1]), "names key segment 1 of 1."),
        (lambda: AttentionPlan.cross_attention([1], [1], [0.5]), "index must be a flat list of whole numbers"),
        (lambda: AttentionPlan.joint([1, 2], [1]), "needs both lengths of every sample; received 2 first and 1 second."),
        (
            lambda: AttentionPlan.prefix_causal([1], [1, 2]),
            "needs both lengths of every sample; received 1 first and 2 second.",
        ),
        (
            lambda: AttentionPlan.from_cu_seqlens([0, 1], [0, 1, 2]),
            "cu_seqlens_q and cu_seqlens_k must describe equally many sequences; received 1 and 2.",
        ),
        (lambda: AttentionPlan.self_attention([1, -2]), r"lengths must not be negative; lengths\[1\] is -2."),
    ],
)
def test_plan_builders_say_what_is_wrong(build, message):
    with pytest.raises(ValueError, match=message):
        build()
