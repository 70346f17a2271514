"""multiway_linear and multiway_layer_norm: every expert sees its run of rows, and only its run."""

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlp_fast import reference
from vlp_fast.modules import MultiwayLayerNorm
from vlp_fast.ops import multiway_layer_norm, multiway_linear
from vlp_fast.testing import assert_matches_reference, outputs_and_gradients

OFFSETS = [(0, 3, 7), (0, 0, 7), (0, 7, 7), (0, 2, 2, 7), (0, 7), (0, 0, 0)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTH, OUT = 6, 5


@pytest.fixture(params=["torch", "triton"], scope="module")
def backend(request):
    return request.param


def linear_inputs(offsets, device, dtype=torch.float32):
    experts = len(offsets) - 1
    shapes = ((offsets[-1], WIDTH), (experts, OUT, WIDTH), (experts, OUT))
    return [torch.randn(*shape).to(device, dtype) for shape in shapes]


def norm_inputs(offsets, device, dtype=torch.float32):
    experts = len(offsets) - 1
    return [torch.randn(*shape).to(device, dtype) for shape in ((offsets[-1], WIDTH), (experts, WIDTH), (experts, WIDTH))]


def linear(offsets, backend):
    return lambda *t: multiway_linear(*t, offsets, backend=backend)


def norm(offsets, backend, eps=1e-5):
    return lambda *t: multiway_layer_norm(*t, offsets, eps, backend=backend)


def epilogue(function, offsets, activation, **options):
    """multiway_linear of ops or reference as a function of x, weight, bias and, if given, residual."""
    return lambda x, weight, bias, residual=None: function(
        x, weight, bias, offsets, activation=activation, residual=residual, **options
    )


def check_linear(inputs, offsets, backend):
    assert_matches_reference(
        linear(offsets, backend),
        lambda *t: reference.multiway_linear(*t, offsets),
        inputs,
        names=["out", "dx", "dweight", "dbias"],
    )


def check_norm(inputs, offsets, backend, eps=1e-5):
    assert_matches_reference(
        norm(offsets, backend, eps),
        lambda *t: reference.multiway_layer_norm(*t, offsets, eps),
        inputs,
        names=["out", "dx", "dweight", "dbias"],
    )


# ------------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_multiway_linear_is_the_reference(offsets, dtype, backend, device, poison):
    check_linear(linear_inputs(offsets, device, dtype), offsets, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_multiway_layer_norm_is_the_reference(offsets, dtype, backend, device, poison):
    check_norm(norm_inputs(offsets, device, dtype), offsets, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("offsets", [(0, 3, 7), (0, 2, 2, 7), (0, 0, 0)], ids=str)
def test_multiway_linear_epilogues_are_the_reference(offsets, activation, with_residual, dtype, backend, device, poison):
    inputs = linear_inputs(offsets, device, dtype)
    if with_residual:
        inputs.append(torch.randn(offsets[-1], OUT).to(device, dtype))
    ours = epilogue(multiway_linear, offsets, activation, backend=backend)
    assert_matches_reference(
        ours,
        epilogue(reference.multiway_linear, offsets, activation),
        inputs,
        names=["out", "dx", "dweight", "dbias", "dresidual"][: 1 + len(inputs)],
    )
    # without a gradient nothing is kept, and the result is the same
    with torch.no_grad():
        without = ours(*inputs)
    assert torch.equal(without, ours(*(t.requires_grad_() for t in inputs)))


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_multiway_linear_residual_without_bias(activation, backend, device, poison):
    x, weight, _ = linear_inputs((0, 3, 7), device)
    assert_matches_reference(
        lambda x, w, r: multiway_linear(x, w, None, (0, 3, 7), activation=activation, residual=r, backend=backend),
        lambda x, w, r: reference.multiway_linear(x, w, None, (0, 3, 7), activation=activation, residual=r),
        [x, weight, torch.randn(7, OUT, device=device)],
    )


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
def test_multiway_linear_keeps_a_wider_residual_wide(narrow, activation, backend, device):
    x, weight, bias = linear_inputs((0, 3, 7), device, narrow)
    leaves = [t.requires_grad_() for t in (x, weight, bias, 1000 * torch.randn(7, OUT, device=device))]
    ours = epilogue(multiway_linear, (0, 3, 7), activation, backend=backend)
    out = ours(*leaves)
    branch = ours(*leaves[:3])
    assert out.dtype == torch.float32
    assert (out - leaves[3] - branch).abs().max() <= 2 * torch.finfo(narrow).eps * branch.abs().max() + 1e-3
    out.backward(torch.randn(7, OUT, device=device))
    assert [t.grad.dtype for t in leaves] == [narrow, narrow, narrow, torch.float32]
    narrow_residual = multiway_linear(*linear_inputs((0, 3, 7), device), (0, 3, 7), residual=branch.detach(), backend=backend)
    assert narrow_residual.dtype == torch.float32


def test_multiway_linear_residual_and_its_gradient_may_have_any_stride(backend, device):
    inputs = linear_inputs((0, 3, 7), device)
    ours = epilogue(multiway_linear, (0, 3, 7), "gelu", backend=backend)
    for residual in (torch.randn(OUT, 7, device=device).T, torch.randn(1, OUT, device=device).expand(7, -1)):
        dout = torch.ones(1, 1, device=device).expand(7, OUT)
        strided = outputs_and_gradients(ours, [*inputs, residual], [dout])
        dense = outputs_and_gradients(ours, [*inputs, residual.contiguous()], [dout.contiguous()])
        for a, b in zip(strided, dense, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 2, 3)], ids=str)
def test_multiway_linear_computes_only_the_gradients_asked_for_through_epilogues(wanted, backend, device, poison):
    inputs = [*linear_inputs((0, 3, 7), device), torch.randn(7, OUT, device=device)]
    ours = epilogue(multiway_linear, (0, 3, 7), "gelu", backend=backend)
    everything = outputs_and_gradients(ours, inputs)
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    out = ours(*leaves)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(device))
    for i, x in enumerate(leaves):
        assert (x.grad is not None) == (i in wanted)
        if i in wanted:
            torch.testing.assert_close(x.grad, everything[1 + i])


def test_multiway_linear_keeps_values_before_the_activation_only_for_a_gradient(backend, device):
    inputs = linear_inputs((0, 3, 7), device)
    kept = []

    def pack(t):
        kept.append(t.shape)
        return t

    def call(activation):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            epilogue(multiway_linear, (0, 3, 7), activation, backend=backend)(*inputs)
        return (7, OUT) in kept

    assert not call("gelu")
    inputs[1].requires_grad_()
    assert call("gelu")
    assert not call(None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_multiway_layer_norm_sums_gradients_of_many_rows_in_fp32(dtype, backend, device):
    offsets = (0, 300, 321)
    check_norm(norm_inputs(offsets, device, dtype), offsets, backend)


@settings(
    max_examples=12, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # the fixture is a name, the same for every example
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_multiway_on_random_runs(backend, device, lengths, seed):
    offsets = tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))
    torch.manual_seed(seed)
    check_linear(linear_inputs(offsets, device), offsets, backend)
    check_norm(norm_inputs(offsets, device), offsets, backend)


def test_multiway_linear_without_bias(backend, device, poison):
    x, weight, _ = linear_inputs((0, 3, 7), device)
    assert_matches_reference(
        lambda *t: multiway_linear(*t, None, (0, 3, 7), backend=backend),
        lambda *t: reference.multiway_linear(*t, None, (0, 3, 7)),
        [x, weight],
    )


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1])
def test_multiway_layer_norm_eps(eps, backend, device):
    check_norm(norm_inputs((0, 3, 7), device), (0, 3, 7), backend, eps)


def test_multiway_layer_norm_default_eps(device):
    inputs = norm_inputs((0, 3, 7), device)
    assert torch.equal(multiway_layer_norm(*inputs, (0, 3, 7)), multiway_layer_norm(*inputs, (0, 3, 7), 1e-5))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_multiway_takes_strided_rows(layout, backend, device):
    x = {
        "transposed": lambda: torch.randn(WIDTH, 7, device=device).T,
        "sliced": lambda: torch.randn(14, 2 * WIDTH, device=device)[::2, ::2],
        "expanded": lambda: torch.randn(1, WIDTH, device=device).expand(7, -1),
    }[layout]()
    offsets = (0, 3, 7)
    check_linear([x, *linear_inputs(offsets, device)[1:]], offsets, backend)
    check_norm([x, *norm_inputs(offsets, device)[1:]], offsets, backend)


@pytest.mark.parametrize("function", [linear, norm])
def test_multiway_takes_gradients_of_any_stride(function, backend, device):
    offsets = (0, 3, 7)
    inputs = (linear_inputs if function is linear else norm_inputs)(offsets, device)
    width = OUT if function is linear else WIDTH
    for dout in (torch.ones(1, 1, device=device).expand(7, width), torch.randn(width, 7, device=device).T):
        strided = outputs_and_gradients(function(offsets, backend), inputs, [dout])
        dense = outputs_and_gradients(function(offsets, backend), inputs, [dout.contiguous()])
        for a, b in zip(strided, dense, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("function", [linear, norm])
def test_multiway_computes_only_the_gradients_asked_for(function, wanted, backend, device, poison):
    offsets = (0, 3, 7)
    inputs = (linear_inputs if function is linear else norm_inputs)(offsets, device)
    everything = outputs_and_gradients(function(offsets, backend), inputs)
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    out = function(offsets, backend)(*leaves)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(device))
    for i, x in enumerate(leaves):
        assert (x.grad is not None) == (i in wanted)
        if i in wanted:
            torch.testing.assert_close(x.grad, everything[1 + i])


@pytest.mark.parametrize("function", [linear, norm])
def test_multiway_idle_expert_has_a_gradient_of_zero(function, backend, device, poison):
    offsets = (0, 7, 7)
    inputs = (linear_inputs if function is linear else norm_inputs)(offsets, device)
    _, _, dweight, dbias = outputs_and_gradients(function(offsets, backend), inputs)
    for grad in (dweight, dbias):
        assert (grad[0] != 0).any()
        assert (grad[1] == 0).all()


@pytest.mark.parametrize("function", [linear, norm])
def test_multiway_gives_the_same_bits_twice_and_leaves_its_inputs_alone(function, backend, device):
    offsets = (0, 3, 7)
    inputs = (linear_inputs if function is linear else norm_inputs)(offsets, device)
    before = [x.clone() for x in inputs]
    first, second = (outputs_and_gradients(function(offsets, backend), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@pytest.mark.parametrize("function", [linear, norm])
def test_multiway_adding_an_empty_expert_changes_nothing(function, backend, device):
    inputs = (linear_inputs if function is linear else norm_inputs)((0, 3, 7), device)
    x, weight, bias = inputs
    junk = [torch.full_like(t[:1], torch.nan) for t in (weight, bias)]
    widened = [torch.cat([t[:1], j, t[1:]]) for t, j in zip((weight, bias), junk, strict=True)]
    assert torch.equal(function((0, 3, 3, 7), backend)(x, *widened), function((0, 3, 7), backend)(x, weight, bias))


@pytest.mark.parametrize("offsets", [[0, 3, 7], torch.tensor([0, 3, 7]).tolist()])
def test_multiway_offsets_may_be_any_sequence(offsets, device):
    inputs = linear_inputs((0, 3, 7), device)
    assert torch.equal(multiway_linear(*inputs, offsets), multiway_linear(*inputs, (0, 3, 7)))


# ------------------------------------------------------------------------------------------------------------------ dtypes


def test_multiway_autocast(device):
    offsets = (0, 3, 7)
    x, weight, bias = (t.requires_grad_() for t in linear_inputs(offsets, device))
    with torch.autocast(device, torch.bfloat16):
        out = multiway_linear(x, weight, bias, offsets)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert weight.grad.dtype == torch.float32
    assert torch.equal(out, multiway_linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), offsets))


def test_multiway_linear_autocast_leaves_the_residual_wide(device):
    offsets = (0, 3, 7)
    x, weight, bias = linear_inputs(offsets, device)
    residual = torch.randn(7, OUT, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = multiway_linear(x, weight, bias, offsets, residual=residual)
        branch = multiway_linear(x, weight, bias, offsets)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, branch + residual, atol=3e-2, rtol=0)


def test_multiway_layer_norm_takes_the_wider_dtype(device):
    x, weight, bias = norm_inputs((0, 3, 7), device)
    narrow = multiway_layer_norm(x.bfloat16(), weight, bias, (0, 3, 7))
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, multiway_layer_norm(x.bfloat16().float(), weight, bias, (0, 3, 7)))


def test_multiway_layer_norm_statistics_are_fp32(backend, device):
    x = torch.full((4, 512), 300.0, device=device).half()
    x[:, ::2] = 301.0  # squares and sums overflow float16
    weight, bias = torch.ones(1, 512, device=device).half(), torch.zeros(1, 512, device=device).half()
    out = multiway_layer_norm(x, weight, bias, (0, 4), backend=backend)
    torch.testing.assert_close(out[:, ::2], torch.ones_like(out[:, ::2]), atol=1e-3, rtol=0)
    _, mean, rstd = torch.ops.vlp_fast.multiway_layer_norm_v3(x, weight, bias, [0, 4], 1e-5, x.dtype, backend)
    assert mean.dtype == rstd.dtype == torch.float32


@pytest.mark.parametrize("offsets", [(0, 700, 1500), (0, 1500), (0, 0, 1500), (0, 3, 3)])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_multiway_layer_norm_rounds_its_sums_once_to_the_dtype_asked_for(offsets, x_dtype, out_dtype):
    """More rows than a part has; gradients are those of the exact norm of the same rows, rounded to each input's dtype."""
    torch.manual_seed(0)
    rows, experts, width = offsets[-1], len(offsets) - 1, 512
    x = (torch.randn(rows, width) + 1.0).to(x_dtype).requires_grad_()
    weight, bias = (torch.randn(experts, width).requires_grad_() for _ in range(2))
    out = multiway_layer_norm(x, weight, bias, offsets, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    exact = reference.multiway_layer_norm(*leaves, offsets, 1e-5)
    near = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
    torch.testing.assert_close(out.double(), exact, rtol=near[out_dtype], atol=1e-5)
    dout = torch.randn(rows, width).to(out_dtype)
    found = torch.autograd.grad(out, (x, weight, bias), dout)
    expected = torch.autograd.grad(exact, leaves, dout.double())
    for one, other, leaf in zip(found, expected, (x, weight, bias), strict=True):
        assert one.dtype == leaf.dtype
        torch.testing.assert_close(one.double(), other, rtol=near[leaf.dtype], atol=2e-4)
    direct = multiway_layer_norm(x.detach(), weight.detach(), bias.detach(), offsets, out_dtype=out_dtype)
    assert torch.equal(direct, out)


def test_a_norm_before_a_linear_layer_rounds_to_the_dtype_of_autocast():
    norm = MultiwayLayerNorm(6, before_linear=True)
    x = torch.randn(7, 6)
    assert norm(x, (0, 3, 7)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x, (0, 3, 7))
        assert MultiwayLayerNorm(6)(x, (0, 3, 7)).dtype == torch.float32
        assert norm(x.double(), (0, 3, 7)).dtype == torch.float64
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, norm(x, (0, 3, 7)).bfloat16())


# --------------------------------------------------------------------------------------------------------------- sentences

X, W, B = torch.zeros(7, 6), torch.zeros(2, 5, 6), torch.zeros(2, 5)
S = torch.zeros(2, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: multiway_linear(X[None], W, B, (0, 3, 7)), "x must be packed as [rows, width]; received shape [1, 7, 6]."),
        (
            lambda: multiway_linear(X, W[0], B, (0, 3, 7)),
            "weight must have 3 dimensions, experts first; received shape [5, 6].",
        ),
        (lambda: multiway_linear(X, W, B[:1], (0, 3, 7)), "bias must be [2, 5], a row per expert; received [1, 5]."),
        (lambda: multiway_linear(X, W, B, (0, 7)), "expert_offsets must have one entry more than the 2 experts; received 2."),
        (lambda: multiway_linear(X, W, B, (1, 3, 7)), "expert_offsets must rise from 0 to the 7 rows; received [1, 3, 7]."),
        (lambda: multiway_linear(X, W, B, (0, 3, 6)), "expert_offsets must rise from 0 to the 7 rows; received [0, 3, 6]."),
        (lambda: multiway_linear(X, W, B, (0, 8, 7)), "expert_offsets must rise from 0 to the 7 rows; received [0, 8, 7]."),
        (lambda: multiway_linear(X[:, :4], W, B, (0, 3, 7)), "x must have weight's input width 6; received 4."),
        (lambda: multiway_linear(X, W, B, (0, 3, 7), activation="relu"), "activation must be None or 'gelu'; received 'relu'."),
        (
            lambda: multiway_linear(X, W, B, (0, 3, 7), residual=X),
            "residual must be [7, 5] on cpu, as the output; received [7, 6] on cpu.",
        ),
        (
            lambda: multiway_linear(X, W.half(), B, (0, 3, 7)),
            "weight must have x's dtype and device, torch.float32 on cpu; received torch.float16 on cpu.",
        ),
        (
            lambda: multiway_linear(X, W, B.to("meta"), (0, 3, 7)),
            "bias must have x's dtype and device, torch.float32 on cpu; received torch.float32 on meta.",
        ),
        (
            lambda: multiway_linear(X, W, B, (0, 3, 7), backend="flash_attn"),
            "backend of multiway_linear must be triton, torch or None; 'flash_attn' has attention only.",
        ),
        (
            lambda: multiway_linear(X.double(), W.double(), B.double(), (0, 3, 7), backend="triton"),
            "backend 'triton' computes in float32, float16 or bfloat16; received torch.float64.",
        ),
        (
            lambda: multiway_layer_norm(torch.zeros(1, 9000), *torch.zeros(2, 1, 9000), (0, 1), backend="triton"),
            "backend 'triton' normalises up to 8192 columns; received 9000.",
        ),
        (
            lambda: multiway_layer_norm(X, S, S.half(), (0, 3, 7)),
            "weight and bias must be on x's device cpu and share one dtype; received torch.float32 on cpu and torch.float16 on cpu.",
        ),
        (
            lambda: multiway_layer_norm(X, S, S, (0, 3, 7), out_dtype=torch.int64),
            "out_dtype must be a floating dtype or None; received torch.int64.",
        ),
        (lambda: multiway_layer_norm(X[0], S, S, (0, 3, 7)), "x must be packed as [rows, width]; received shape [6]."),
        (
            lambda: multiway_layer_norm(X, S[0], S, (0, 3, 7)),
            "weight must have 2 dimensions, experts first; received shape [6].",
        ),
        (lambda: multiway_layer_norm(X, S, S[:1], (0, 3, 7)), "bias must be [2, 6], a row per expert; received [1, 6]."),
        (
            lambda: multiway_layer_norm(X, S[:, :4], S[:, :4], (0, 3, 7)),
            "weight and bias must both be [num_experts, 6]; received [2, 4] and [2, 4].",
        ),
        (
            lambda: multiway_layer_norm(X, S, S, (0, 3, 5, 7)),
            "expert_offsets must have one entry more than the 2 experts; received 4.",
        ),
    ],
)
def test_multiway_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
