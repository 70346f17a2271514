"""What attention must satisfy whatever the numbers: packing, sharing, empty segments and order change nothing."""

import pytest
import torch
import torch.nn.functional as F

from vlp_fast import AttentionPlan
from vlp_fast.ops import attention
from vlp_fast.testing import assert_as_accurate_as, outputs_and_gradients

BACKENDS = ["torch", "triton"]
LENGTHS = [5, 1, 18, 3]


def run(qkv, plan, backend, douts=None, **options):
    return outputs_and_gradients(lambda *t: attention(*t, plan, backend=backend, **options), qkv, douts)


def assert_close(actual, expected):
    """Equal up to the rounding of sums in another order: the expected value is its own baseline."""
    assert len(actual) == len(expected)
    scale = max(x.abs().max().item() for x in expected if x.numel())
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_as_accurate_as(a, b, b.double(), scale=scale, what=f"tensor {i}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_packed_is_each_sequence_alone(causal, backend, make_qkv, device):
    plan = AttentionPlan.self_attention(LENGTHS, causal=causal, device=device)
    qkv = make_qkv(plan)
    dout = torch.randn_like(qkv[0])
    packed = run(qkv, plan, backend, [dout])
    parts = [
        run(
            [x.split(LENGTHS)[i] for x in qkv],
            AttentionPlan.self_attention([n], causal=causal, device=device),
            backend,
            [dout.split(LENGTHS)[i]],
        )
        for i, n in enumerate(LENGTHS)
    ]
    assert_close(packed, [torch.cat(column) for column in zip(*parts, strict=True)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_packed_is_padded_sdpa(causal, backend, make_qkv, device):
    plan = AttentionPlan.self_attention(LENGTHS, causal=causal, device=device)
    qkv = make_qkv(plan)
    dout = torch.randn_like(qkv[0])
    longest = max(LENGTHS)
    real = torch.arange(longest, device=device) < torch.tensor(LENGTHS, device=device)[:, None]

    def padded(q, k, v):
        rectangle = [
            x.new_full((len(LENGTHS), longest, 2, 16), torch.nan).masked_fill(~real[..., None, None], 0) for x in (q, k, v)
        ]
        filled = [r.index_put((real,), x).transpose(1, 2) for r, x in zip(rectangle, (q, k, v), strict=True)]
        mask = real[:, None, None, :].expand(-1, 1, longest, -1)
        mask = mask.tril() if causal else mask
        return F.scaled_dot_product_attention(*filled, mask).transpose(1, 2)[real]

    assert_close(run(qkv, plan, backend, [dout]), outputs_and_gradients(padded, qkv, [dout]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("on_device", [False, True])
def test_attention_shared_segment_is_a_gathered_copy(on_device, backend, make_qkv, device):
    captions, images, index = [4, 2, 7, 1, 3], [20, 9, 5], [1, 0, 1, 1, 0]
    shared = AttentionPlan.cross_attention(captions, images, index, device=device)
    if on_device:
        shared = AttentionPlan._device_cross_attention(shared.query, shared.key, torch.tensor(index, device=device))
    rows, copied = shared.key.take(index)
    copies = AttentionPlan.cross_attention(shared.query, copied)
    q, k, v = make_qkv(shared)
    dout = torch.randn_like(q)
    out, dq, dk, dv = run([q, k, v], shared, backend, [dout])
    out_copy, dq_copy, dk_copy, dv_copy = run([q, k[rows], v[rows]], copies, backend, [dout])
    summed = [torch.zeros_like(k).index_add_(0, rows, copy) for copy in (dk_copy, dv_copy)]
    assert_close([out, dq, dk, dv], [out_copy, dq_copy, *summed])
    assert (dk[29:] == 0).all()  # nobody reads the last image
    assert (dv[29:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_rows_of_one_image_may_be_one_segment(backend, make_qkv, device):
    apart = AttentionPlan.cross_attention([4, 2, 7, 1], [20, 9], [0, 0, 1, 1], device=device)
    together = AttentionPlan.cross_attention([6, 8], [20, 9], device=device)
    qkv = make_qkv(apart)
    assert_close(run(qkv, apart, backend), run(qkv, together, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_one_key_segment_may_be_two(backend, make_qkv, device):
    whole = AttentionPlan.cross_attention([4, 18], [29], [0, 0], device=device)
    cut = AttentionPlan.from_edges([4, 18], [20, 9], [(0, 0, False), (0, 1, False), (1, 1, False), (1, 0, False)], device)
    qkv = make_qkv(whole)
    assert_close(run(qkv, cut, backend, return_lse=True), run(qkv, whole, backend, return_lse=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_empty_segments_change_nothing(backend, make_qkv, device):
    edges = [(0, 1, False), (1, 0, True), (1, 1, False)]
    plain = AttentionPlan.from_edges([4, 18], [18, 3], edges, device)
    # an empty query segment in front, empty key segments in front and between, read by everyone
    moved = [(q + 1, {0: 1, 1: 3}[k], c) for q, k, c in edges]
    empty = [(q, k, c) for q in range(3) for k, c in ((0, True), (2, False))]
    padded = AttentionPlan.from_edges([0, 4, 18], [0, 18, 0, 3], [*empty, *moved, (0, 1, False)], device)
    qkv = make_qkv(plain)
    assert_close(run(qkv, padded, backend, return_lse=True), run(qkv, plain, backend, return_lse=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_permuting_samples_permutes_results(backend, make_qkv, device):
    plan = AttentionPlan.self_attention(LENGTHS, causal=True, device=device)
    rows, permuted = plan.query.take([2, 0, 3, 1])
    qkv = make_qkv(plan)
    dout = torch.randn_like(qkv[0])
    expected = [x[rows] for x in run(qkv, plan, backend, [dout])]
    other = AttentionPlan.self_attention(permuted, causal=True)
    assert_close(run([x[rows] for x in qkv], other, backend, [dout[rows]]), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_order_of_edges_changes_nothing(backend, make_qkv, device):
    edges = [(0, 1, False), (0, 0, True), (0, 2, False), (1, 2, False)]
    plan = AttentionPlan.from_edges([6, 2], [18, 3, 5], edges, device)
    backwards = AttentionPlan.from_edges([6, 2], [18, 3, 5], edges[::-1], device)
    qkv = make_qkv(plan)
    assert_close(run(qkv, plan, backend), run(qkv, backwards, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_permuting_keys_changes_nothing(backend, make_qkv, device):
    plan = AttentionPlan.cross_attention([6], [35], device=device)
    q, k, v = make_qkv(plan)
    order = torch.randperm(35)
    expected = run([q, k, v], plan, backend)
    actual = run([q, k[order], v[order]], plan, backend)
    assert_close(actual, [expected[0], expected[1], expected[2][order], expected[3][order]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_equal_scores_average_the_values(backend, make_qkv, device):
    plan = AttentionPlan.cross_attention([6], [35], device=device)
    q, _, v = make_qkv(plan)
    out, lse = attention(q, torch.zeros_like(v), v, plan, backend=backend, return_lse=True)
    torch.testing.assert_close(out, v.mean(0).expand(6, -1, -1))
    torch.testing.assert_close(lse, torch.full_like(lse, 35.0).log())


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_lse_joins_two_halves(backend, make_qkv, device):
    whole = AttentionPlan.cross_attention([6], [20], device=device)
    half = AttentionPlan.cross_attention([6], [10], device=device)
    q, k, v = make_qkv(whole)
    expected, expected_lse = attention(q, k, v, whole, backend=backend, return_lse=True)
    (a, lse_a), (b, lse_b) = (
        attention(q, k[rows], v[rows], half, backend=backend, return_lse=True) for rows in (slice(10), slice(10, None))
    )
    lse = torch.logaddexp(lse_a, lse_b)
    joined = a * (lse_a - lse).exp().T[..., None] + b * (lse_b - lse).exp().T[..., None]
    torch.testing.assert_close(joined, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_nan_stays_in_its_sample(backend, make_qkv, device):
    plan = AttentionPlan.self_attention([5, 18, 3], device=device)
    qkv = make_qkv(plan)
    for x in qkv:
        x[5:23] = torch.nan
    for x in run(qkv, plan, backend):
        assert x[:5].isfinite().all()
        assert x[23:].isfinite().all()
        assert x[5:23].isnan().all()
