"""The attention launchers against the reference in float64: in the Triton interpreter, or on a GPU."""

import os
import sys

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import pytest
import torch

pytest.importorskip("triton")

from vlp_fast import reference
from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.kernels import _attention_common
from vlp_fast.kernels import attention_backward as backward_module
from vlp_fast.kernels import attention_forward as forward_module
from vlp_fast.kernels.attention_backward import attention_backward
from vlp_fast.kernels.attention_forward import attention_forward

DEVICE = "cpu" if _attention_common.INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(),
    reason="triton was imported without TRITON_INTERPRET=1 and there is no GPU",
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # of values around 1
SEED = torch.tensor([-0x123456789ABCDEF], dtype=torch.int64)
PLANS = {
    "ragged self": lambda: AttentionPlan.self_attention([1, 16, 0, 17, 65]),
    "causal self": lambda: AttentionPlan.self_attention([17, 1, 130], causal=True),
    "cross, shared index": lambda: AttentionPlan.cross_attention([5, 17, 0, 3], [33, 16, 4], [1, 0, 0, 1]),
    "prefix causal": lambda: AttentionPlan.prefix_causal([17, 0, 9], [5, 33, 0]),
    "joint, empty parts": lambda: AttentionPlan.joint([17, 0, 3, 0], [5, 16, 0, 0]),
    "causal, more keys": lambda: AttentionPlan.from_cu_seqlens([0, 5, 40], [0, 70, 130], causal=True),
    "causal, more queries": lambda: AttentionPlan.from_cu_seqlens([0, 70, 130], [0, 5, 40], causal=True),
    "rows without keys": lambda: AttentionPlan.from_edges(
        [3, 16, 4], [0, 5, 7, 2], [(0, 0, False), (1, 1, False), (1, 2, True)]
    ),
}


class Case:
    """Inputs of one call, and what the reference makes of them in float64."""

    def __init__(self, plan, heads=2, heads_k=2, head_dim=16, dtype=torch.float32, dropout_p=0.0, strided=False, small=False):
        self.one_to_one = small and plan.facts.one_to_one  # without `small` the kernels of any graph, with it those of one tile
        generator = torch.Generator().manual_seed(head_dim + plan.num_edges)
        self.plan, self.dtype, self.dropout_p, self.scale = plan, dtype, dropout_p, 1.3 * head_dim**-0.5
        self.seed = SEED.to(DEVICE)
        rows_q, rows_k = plan.query_rows, plan.key.rows

        def random(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

        if strided:  # views of a fused projection, [rows, heads, 3, head_dim]
            fused = random(rows_q, heads, 3, head_dim)
            self.q, self.k, self.v = fused.unbind(2)
        else:
            self.q, self.k, self.v = (
                random(rows_q, heads, head_dim),
                random(rows_k, heads_k, head_dim),
                random(rows_k, heads_k, head_dim),
            )
        rows_q = plan.query.rows
        self.dout, self.dlse = random(rows_q, heads, head_dim), random(heads, rows_q).float()

    @property
    def facts(self):
        facts = self.plan.facts
        lengths = self.plan.query.rows, facts.max_seqlen_q, facts.max_seqlen_k
        return self.seed, *lengths, self.scale, self.dropout_p, facts.has_causal, self.one_to_one

    @property
    def edges(self):
        plan = self.plan.to(DEVICE)
        return plan.query.offsets, plan.key.offsets, plan.edge_offsets, plan.edge_key, plan.edge_causal

    def forward(self):
        return attention_forward(self.q, self.k, self.v, *self.edges, *self.facts)

    def backward(self, out, lse, dlse):
        plan = self.plan.to(DEVICE)
        transposed = plan.key_edge_offsets, plan.key_edge_query, plan.key_edge_causal
        return attention_backward(self.dout, dlse, self.q, self.k, self.v, out, lse, *self.edges, *transposed, *self.facts)

    def reference(self, dlse):
        inputs = [t.detach().cpu().double().requires_grad_() for t in (self.q, self.k, self.v)]
        out, lse = reference.attention(
            *inputs, self.plan, softmax_scale=self.scale, dropout_p=self.dropout_p, seed=SEED, return_lse=True
        )
        finite = torch.where(lse.isinf(), 0.0, lse)
        total = (out * self.dout.cpu().double()).sum() + (0.0 if dlse is None else (finite * dlse.cpu().double()).sum())
        return out, lse, *torch.autograd.grad(total, inputs)

    def check(self, with_dlse=True):
        dlse = self.dlse if with_dlse else None
        out, lse = self.forward()
        assert out.dtype == self.dtype
        assert out.is_contiguous()
        assert lse.dtype == torch.float32
        gradients = self.backward(out, lse, dlse)
        names = ("out", "lse", "dq", "dk", "dv")
        for name, actual, expected in zip(names, (out, lse, *gradients), self.reference(dlse), strict=True):
            assert actual.shape == expected.shape, name
            tolerance = TOLERANCE[self.dtype] if name != "lse" else TOLERANCE[torch.float32]
            torch.testing.assert_close(
                actual.cpu().double(),
                expected.detach(),
                atol=tolerance,
                rtol=tolerance,
                msg=lambda m, name=name: f"{name}: {m}",
            )


@pytest.fixture(autouse=True)
def _poison():
    """Uninitialised memory is NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_attention_kernels_match_reference(plan):
    Case(plan()).check()


SMALL_PLANS = {
    "ragged self": lambda: AttentionPlan.self_attention([1, 16, 0, 7]),
    "causal self": lambda: AttentionPlan.self_attention([17, 1, 30], causal=True),
    "cross": lambda: AttentionPlan.cross_attention([5, 16, 0, 3], [9, 0, 4, 16]),
    "causal, more keys": lambda: AttentionPlan.from_cu_seqlens([0, 5, 14], [0, 16, 30], causal=True),
    "causal, more queries": lambda: AttentionPlan.from_cu_seqlens([0, 16, 30], [0, 5, 14], causal=True),
}


@pytest.mark.parametrize("plan", SMALL_PLANS.values(), ids=SMALL_PLANS.keys())
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_attention_small_kernels_match_reference(plan, dropout_p, monkeypatch):
    launched = []

    def watch(module, name):
        launch = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: launched.append(name) or launch(*arguments))

    watch(forward_module, "attention_small_forward")
    watch(backward_module, "attention_small_backward")
    case = Case(plan(), dropout_p=dropout_p, small=True)
    case.check()
    small = max(case.plan.facts.max_seqlen_q, case.plan.facts.max_seqlen_k) <= 16
    assert launched == ["attention_small_forward", *(["attention_small_backward"] if small else [])]


@pytest.mark.parametrize("head_dim", [24, 96])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_attention_small_kernels_head_dim_and_dtype(head_dim, dtype):
    Case(AttentionPlan.self_attention([3, 20], causal=True), head_dim=head_dim, dtype=dtype, small=True, strided=True).check()


@pytest.mark.parametrize("plan", [([3, 0, 20], 5), ([17], 40), ([70, 2], 1), ([0], 3)], ids=str)
def test_attention_kernels_shared_queries(plan):
    lengths, queries = plan
    Case(AttentionPlan.pooling(queries, lengths), head_dim=24).check()


@pytest.mark.parametrize("head_dim", [16, 24, 80, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_attention_kernels_head_dim_and_dtype(head_dim, dtype):
    Case(AttentionPlan.prefix_causal([17, 0], [9, 35]), head_dim=head_dim, dtype=dtype).check(with_dlse=head_dim != 80)


@pytest.mark.parametrize("lengths", [[63], [1, 130], [16, 64]], ids=str)
def test_attention_kernels_half_precision_tiles(lengths):
    Case(AttentionPlan.self_attention(lengths, causal=True), heads=1, heads_k=1, dtype=torch.float16).check()


@pytest.mark.parametrize("heads_k", [1, 2])
def test_attention_kernels_grouped_heads(heads_k):
    Case(AttentionPlan.prefix_causal([7, 3], [9, 18]), heads=4, heads_k=heads_k).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_attention_kernels_dropout_is_the_reference_mask(dtype):
    Case(AttentionPlan.prefix_causal([17, 4], [9, 35]), heads=2, heads_k=1, dropout_p=0.3, dtype=dtype).check()


def test_attention_kernels_dropout_above_one_half():
    Case(AttentionPlan.self_attention([20]), dropout_p=0.75).check()


def test_attention_kernels_read_views_of_a_fused_projection():
    case = Case(AttentionPlan.self_attention([17, 5]), strided=True)
    assert not case.q.is_contiguous()
    case.check()


def test_attention_kernels_take_any_strides():
    case = Case(AttentionPlan.cross_attention([17, 5], [20, 6]))
    case.k = case.k.transpose(1, 2).contiguous().transpose(1, 2)  # the head dimension is not dense
    case.q = case.q[:1].expand(22, -1, -1)  # one row, read 22 times
    case.check()


def test_attention_kernels_take_an_expanded_gradient():
    case = Case(AttentionPlan.self_attention([17, 5]))
    case.dout = torch.ones((), device=DEVICE).expand(22, 2, 16)
    case.dlse = torch.ones((), device=DEVICE).expand(2, 22)
    case.check()


def test_attention_kernels_rows_without_keys_are_zero_for_any_lse_gradient():
    case = Case(PLANS["rows without keys"]())
    out, lse = case.forward()
    unseen = lse.isinf()
    assert unseen.any()
    assert (out.transpose(0, 1)[unseen] == 0).all()
    dq, dk, dv = case.backward(out, lse, torch.where(unseen, torch.nan, case.dlse))
    assert (dq.transpose(0, 1)[unseen] == 0).all()
    assert not any(t.isnan().any() for t in (dq, dk, dv))
    assert (dk[:0].numel(), dk[-2:].abs().max().item(), dv[-2:].abs().max().item()) == (0, 0.0, 0.0)  # keys nobody reads


@pytest.mark.parametrize(("queries", "keys"), [([], []), ([], [3]), ([0, 0], [0, 3]), ([4], []), ([4], [0])], ids=str)
def test_attention_kernels_nothing_to_do(queries, keys):
    edges = [(i, i, True) for i in range(min(len(queries), len(keys)))]
    case = Case(AttentionPlan.from_edges(queries, keys, edges))
    out, lse = case.forward()
    assert out.shape == (sum(queries), 2, 16)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert all((t == 0).all() for t in case.backward(out, lse, case.dlse))


def test_attention_kernels_large_scores_do_not_overflow():
    case = Case(AttentionPlan.self_attention([5, 20]))
    case.q = case.q - 60.0  # scores far below and far above 0, and zero keys beyond the segment beside them
    case.k = case.k.sign() * (case.k.abs() + 4.0)
    out, lse = case.forward()
    expected = case.reference(None)
    assert lse.abs().max() > 100
    torch.testing.assert_close(out.cpu().double(), expected[0].detach(), atol=2e-3, rtol=2e-3)
    gradients = case.backward(out, lse, None)
    for actual, wanted in zip(gradients, expected[2:], strict=True):
        torch.testing.assert_close(actual.cpu().double(), wanted, atol=5e-2, rtol=5e-2)


def test_attention_kernels_addresses_are_64_bit(monkeypatch):
    # 4 GB of address space, of which a few pages are touched
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    rows, row_stride = 2**20, 2304
    buffer = torch.empty(rows * row_stride, dtype=torch.float16, device=DEVICE)
    k = buffer.as_strided((rows, 1, 16), (row_stride, 16, 1))
    case = Case(AttentionPlan.cross_attention([3], [rows - 5, 5], [1]), heads=1, heads_k=1, dtype=torch.float16)
    few = Case(AttentionPlan.cross_attention([3], [5]), heads=1, heads_k=1, dtype=torch.float16)
    k[-5:] = few.k
    case.q, case.k, case.v = few.q, k, k
    few.v = few.k
    assert torch.equal(case.forward()[0], few.forward()[0])


def test_attention_kernels_same_bits_twice():
    case = Case(AttentionPlan.cross_attention([5, 17, 3], [33], [0, 0, 0]), dropout_p=0.1)
    runs = []
    for _ in range(2):
        out, lse = case.forward()
        runs.append((out, lse, *case.backward(out, lse, case.dlse)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_attention_kernels_shared_keys_equal_gathered_copies():
    shared = Case(AttentionPlan.cross_attention([5, 17, 3], [9, 20], [1, 0, 1]))
    copies = Case(AttentionPlan.cross_attention([5, 17, 3], [20, 9, 20]))
    rows = torch.cat([torch.arange(9, 29), torch.arange(9), torch.arange(9, 29)]).to(DEVICE)
    copies.q, copies.dout, copies.k, copies.v = shared.q, shared.dout, shared.k[rows], shared.v[rows]
    out, lse = shared.forward()
    assert torch.equal(out, copies.forward()[0])
    dq, dk, dv = shared.backward(out, lse, None)
    dq_copies, dk_copies, dv_copies = copies.backward(out, lse, None)
    assert torch.equal(dq, dq_copies)
    for together, apart in ((dk, dk_copies), (dv, dv_copies)):
        torch.testing.assert_close(together, torch.zeros_like(together).index_add(0, rows, apart), atol=1e-5, rtol=1e-5)
