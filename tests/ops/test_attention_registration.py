"""attention inside PyTorch: registered ops, fake and meta tensors, torch.compile, autocast, FLOP counts, checkpointing, threads."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from vlp_fast import AttentionPlan
from vlp_fast.ops import attention
from vlp_fast.testing import outputs_and_gradients

BACKENDS = ["torch", "triton"]


@pytest.fixture
def plan(device):
    return AttentionPlan.prefix_causal([4, 2], [3, 5], device)


def op_arguments(plan, qkv, seed=None, dropout_p=0.0):
    return (
        *qkv,
        plan.query.offsets,
        plan.key.offsets,
        plan.edge_offsets,
        plan.edge_key,
        plan.edge_causal,
        plan.key_edge_offsets,
        plan.key_edge_query,
        plan.key_edge_causal,
        seed,
        plan.query.rows,
        plan.facts.max_seqlen_q,
        plan.facts.max_seqlen_k,
        plan.pairs,
        0.25,
        dropout_p,
        plan.facts.has_causal,
        plan.facts.one_to_one,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_attention_forward_op_is_registered_right(dropout_p, plan, make_qkv, device):
    qkv = [x.requires_grad_() for x in make_qkv(plan, 2, 1)]
    seed = torch.tensor([3], device=device) if dropout_p else None
    torch.library.opcheck(torch.ops.vlp_fast.attention_forward_v2.default, op_arguments(plan, qkv, seed, dropout_p))


@pytest.mark.slow
@pytest.mark.parametrize("with_dlse", [True, False])
def test_attention_backward_op_is_registered_right(with_dlse, plan, make_qkv, device):
    qkv = make_qkv(plan, 2, 1)
    arguments = op_arguments(plan, qkv)
    out, lse = torch.ops.vlp_fast.attention_forward_v2(*arguments)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse) if with_dlse else None
    torch.library.opcheck(torch.ops.vlp_fast.attention_backward_v2.default, (dout, dlse, *qkv, out, lse, *arguments[3:]))


@pytest.mark.parametrize("layout", ["dense", "permuted"])
def test_attention_fake_tensors_have_the_real_shapes_and_strides(layout, plan, make_qkv):
    qkv = make_qkv(plan)
    if layout == "permuted":
        qkv = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in qkv]
    arguments = op_arguments(plan, qkv)
    real = torch.ops.vlp_fast.attention_forward_v2(*arguments)
    dout = torch.randn_like(real[0])
    real = [*real, *torch.ops.vlp_fast.attention_backward_v2(dout, None, *qkv, *real, *arguments[3:])]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        out, lse = torch.ops.vlp_fast.attention_forward_v2(*fakes)
        grads = torch.ops.vlp_fast.attention_backward_v2(mode.from_tensor(dout), None, *fakes[:3], out, lse, *fakes[3:])
    for fake, x in zip((out, lse, *grads), real, strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (x.shape, x.stride(), x.dtype)


@pytest.mark.parametrize("backend", [None, "triton"])
def test_attention_meta_tensors_have_shapes_and_gradients(backend):
    plan = AttentionPlan.cross_attention([4000] * 64, [3000] * 64, device="meta")
    q = torch.empty(64 * 4000, 12, 64, device="meta", requires_grad=True)
    k, v = (torch.empty(64 * 3000, 12, 64, device="meta", requires_grad=True) for _ in range(2))
    out, lse = attention(q, k, v, plan, backend=backend, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (12, 64 * 4000)
    out.sum().backward()
    assert q.grad.shape == q.shape
    assert k.grad.shape == v.grad.shape == k.shape


# ----------------------------------------------------------------------------------------------------------------- compile


def step(q, k, v, plan, backend, return_lse=False, dropout_p=0.0):
    result = attention(2 * q, k, v, plan, backend=backend, return_lse=return_lse, dropout_p=dropout_p)
    return (result[0] + 1, result[1]) if return_lse else result + 1


def compiled_with(compiler, **options):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    return torch.compile(step, backend=counter, fullgraph=True, **options), counter


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("return_lse", [False, True])
def test_attention_compiles_whole(return_lse, backend, plan, make_qkv):
    function, _ = compiled_with("aot_eager")
    qkv = make_qkv(plan)
    expected = outputs_and_gradients(lambda *t: step(*t, plan, backend, return_lse), qkv)
    actual = outputs_and_gradients(lambda *t: function(*t, plan, backend, return_lse), qkv)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_compiles_with_inductor(backend, plan, make_qkv):
    function, _ = compiled_with("inductor")
    qkv = make_qkv(plan)
    expected = outputs_and_gradients(lambda *t: step(*t, plan, backend), qkv)
    actual = outputs_and_gradients(lambda *t: function(*t, plan, backend), qkv)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_compiles_with_dropout(backend, plan, make_qkv):
    function, _ = compiled_with("aot_eager")
    q, k, v = make_qkv(plan)
    torch.manual_seed(1)
    a, b = function(q, k, v, plan, backend, dropout_p=0.5), function(q, k, v, plan, backend, dropout_p=0.5)
    assert not torch.equal(a, b)
    torch.manual_seed(1)
    assert torch.equal(function(q, k, v, plan, backend, dropout_p=0.5), a)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_compiles_at_most_twice_over_five_lengths(backend, make_qkv, device):
    function, counter = compiled_with("aot_eager")
    for n in (5, 6, 9, 14, 11):
        plan = AttentionPlan.self_attention([n, n + 3, 2], causal=True, device=device)
        qkv = make_qkv(plan)
        expected = outputs_and_gradients(lambda *t, plan=plan: step(*t, plan, backend), qkv)
        actual = outputs_and_gradients(lambda *t, plan=plan: function(*t, plan, backend), qkv)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


# ------------------------------------------------------------------------------------------------------------------- FLOPs


def count(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def forward_and_backward(plan, qkv, backend):
    leaves = [x.requires_grad_() for x in qkv]
    forward = count(lambda: attention(*leaves, plan, backend=backend))
    return forward, count(lambda: attention(*leaves, plan, backend=backend).sum().backward())


def test_attention_flops_are_those_inside_the_mask(make_qkv, plan):
    # image reads image 4 * 4 + 2 * 2; text reads its image 3 * 4 + 5 * 2 and itself 1 + 2 + 3 and 1 + .. + 5
    pairs = 16 + 4 + 12 + 10 + 6 + 15
    assert plan.pairs == pairs
    heads, dim = 4, 16
    forward = 2 * (2 * pairs * heads * dim)  # q k^T and weights v, two operations a multiply-add
    assert forward_and_backward(plan, make_qkv(plan, heads, 2), "triton") == (forward, forward + 5 * (2 * pairs * heads * dim))


def test_attention_flops_on_meta_tensors():
    plan = AttentionPlan.self_attention([577] * 32, device="meta")
    qkv = [torch.empty(577 * 32, 12, 64, device="meta") for _ in range(3)]
    forward = 4 * 32 * 577**2 * 12 * 64
    assert forward_and_backward(plan, qkv, None) == (forward, forward * 7 // 2)


def test_attention_flops_of_the_torch_backend_are_counted_on_the_cpu(make_qkv, device):
    plan = AttentionPlan.self_attention([6, 6], device=device)
    forward = 4 * 2 * 36 * 2 * 16
    assert forward_and_backward(plan, make_qkv(plan), "torch") == (forward, forward * 7 // 2)


# -------------------------------------------------------------------------------------------------------- autocast and others


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_autocast_computes_in_its_dtype(backend, plan, make_qkv, device):
    q, k, v = (x.requires_grad_() for x in make_qkv(plan))
    with torch.autocast(device, torch.bfloat16):
        out, lse = attention(q, k.half(), v, plan, backend=backend, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    out.sum().backward()
    assert q.grad.dtype == torch.float32
    with torch.autocast(device, torch.bfloat16, enabled=False):
        assert attention(q, k, v, plan, backend=backend).dtype == torch.float32
    expected, _ = attention(q.bfloat16(), k.half().bfloat16(), v.bfloat16(), plan, backend=backend, return_lse=True)
    assert torch.equal(out, expected)


def test_attention_autocast_leaves_float64_alone(plan, make_qkv, device):
    with torch.autocast(device, torch.bfloat16):
        assert attention(*make_qkv(plan, dtype=torch.float64), plan, backend="torch").dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_attention_under_checkpointing_drops_the_same_weights(use_reentrant, backend, plan, make_qkv):
    def function(q, k, v):
        return attention(q, k, v, plan, backend=backend, dropout_p=0.5)

    qkv = make_qkv(plan)
    torch.manual_seed(2)
    expected = outputs_and_gradients(function, qkv)
    torch.manual_seed(2)
    actual = outputs_and_gradients_by_backward(lambda *t: checkpoint(function, *t, use_reentrant=use_reentrant), qkv)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def outputs_and_gradients_by_backward(function, inputs):
    """As `outputs_and_gradients`, through .backward(), the only way that re-entrant checkpointing knows."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.device))
    return [out.detach(), *(x.grad for x in leaves)]


# Triton's interpreter runs one kernel at a time
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.gpu)])
def test_attention_runs_in_threads(backend, plan, make_qkv):
    qkv = make_qkv(plan)
    expected = attention(*qkv, plan, backend=backend)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: attention(*qkv, plan, backend=backend), range(6)))
    assert all(torch.equal(x, expected) for x in results)


def test_attention_takes_a_copied_plan(plan, make_qkv):
    qkv = make_qkv(plan)
    assert torch.equal(attention(*qkv, copy.deepcopy(plan)), attention(*qkv, plan))


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_inference_mode(backend, plan, make_qkv):
    qkv = make_qkv(plan)
    with torch.inference_mode():
        out = attention(*qkv, plan, backend=backend)
    assert torch.equal(out, attention(*qkv, plan, backend=backend))
