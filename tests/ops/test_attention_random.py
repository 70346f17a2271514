"""attention on random graphs: segments of 0 to 9 rows, any edges in any order, causal or not, any heads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp_fast import AttentionPlan, reference
from vlp_fast.ops import attention
from vlp_fast.testing import assert_matches_reference, outputs_and_gradients

LENGTHS = st.lists(st.integers(0, 9), min_size=0, max_size=5)
HEADS = st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2), (3, 1)])


@st.composite
def plans(draw, longest=9, most=5):
    lengths = st.lists(st.integers(0, longest), min_size=0, max_size=most)
    query, key = draw(lengths), draw(lengths)
    pairs = [(i, j) for i in range(len(query)) for j in range(len(key))]
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=10)) if pairs else []
    return AttentionPlan.from_edges(query, key, [(i, j, draw(st.booleans())) for i, j in chosen])


def random_qkv(plan, heads, head_dim, seed, dtype, device):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(plan.query.rows, heads[0]), *[(plan.key.rows, heads[1])] * 2]
    return [torch.randn(rows, h, head_dim, generator=generator).to(device, dtype) for rows, h in shapes]


@settings(max_examples=200, derandomize=True, deadline=None)
@given(plan=plans(), heads=HEADS, head_dim=st.integers(1, 9), return_lse=st.booleans(), seed=st.integers(0, 99))
def test_attention_torch_on_random_graphs_in_float64(device, plan, heads, head_dim, return_lse, seed):
    plan = plan.to(device)
    qkv = random_qkv(plan, heads, head_dim, seed, torch.float64, device)
    ours = outputs_and_gradients(lambda *t: attention(*t, plan, backend="torch", return_lse=return_lse), qkv)
    theirs = outputs_and_gradients(lambda *t: reference.attention(*t, plan, return_lse=return_lse), qkv)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(plan=plans(), heads=HEADS, dropout_p=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 99))
def test_attention_torch_on_random_graphs_in_float32(device, plan, heads, dropout_p, seed):
    check_against_reference("torch", plan.to(device), heads, dropout_p, False, seed, torch.float32, device)


@pytest.mark.slow
@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    plan=plans(9, 3),
    heads=HEADS,
    dropout_p=st.sampled_from([0.0, 0.0, 0.5]),
    return_lse=st.booleans(),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_attention_triton_on_random_graphs(device, plan, heads, dropout_p, return_lse, seed, dtype):
    check_against_reference("triton", plan.to(device), heads, dropout_p, return_lse, seed, dtype, device)


def check_against_reference(backend, plan, heads, dropout_p, return_lse, seed, dtype, device):
    torch.manual_seed(seed)
    drop = torch.randint(2**62, (1,), dtype=torch.int64, device=device)

    def ours(*qkv):
        torch.manual_seed(seed)
        return attention(*qkv, plan, backend=backend, dropout_p=dropout_p, return_lse=return_lse)

    assert_matches_reference(
        ours,
        lambda *qkv: reference.attention(*qkv, plan, dropout_p=dropout_p, seed=drop, return_lse=return_lse),
        random_qkv(plan, heads, 16, seed, dtype, device),
    )
