"""multiway_linear and multiway_layer_norm: every expert sees its run of rows, and only its run."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vlp_fast import reference
from vlp_fast.ops import multiway_layer_norm, multiway_linear
from vlp_fast.testing import assert_matches_reference, outputs_and_gradients

OFFSETS = [(0, 3, 7), (0, 0, 7), (0, 7, 7), (0, 2, 2, 7), (0, 7), (0, 0, 0)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTH, OUT = 6, 5


def linear_inputs(offsets, device, dtype=torch.float32):
    experts = len(offsets) - 1
    shapes = ((offsets[-1], WIDTH), (experts, OUT, WIDTH), (experts, OUT))
    return [torch.randn(*shape).to(device, dtype) for shape in shapes]


def norm_inputs(offsets, device, dtype=torch.float32):
    experts = len(offsets) - 1
    return [torch.randn(*shape).to(device, dtype) for shape in ((offsets[-1], WIDTH), (experts, WIDTH), (experts, WIDTH))]


def linear(offsets):
    return lambda *t: multiway_linear(*t, offsets)


def norm(offsets, eps=1e-5):
    return lambda *t: multiway_layer_norm(*t, offsets, eps)


def check_linear(inputs, offsets):
    assert_matches_reference(
        linear(offsets), lambda *t: reference.multiway_linear(*t, offsets), inputs, names=["out", "dx", "dweight", "dbias"]
    )


def check_norm(inputs, offsets, eps=1e-5):
    assert_matches_reference(
        norm(offsets, eps),
        lambda *t: reference.multiway_layer_norm(*t, offsets, eps),
        inputs,
        names=["out", "dx", "dweight", "dbias"],
    )


# ------------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_multiway_linear_is_the_reference(offsets, dtype, device, poison):
    check_linear(linear_inputs(offsets, device, dtype), offsets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_multiway_layer_norm_is_the_reference(offsets, dtype, device, poison):
    check_norm(norm_inputs(offsets, device, dtype), offsets)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_multiway_on_random_runs(device, lengths, seed):
    offsets = tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))
    torch.manual_seed(seed)
    check_linear(linear_inputs(offsets, device), offsets)
    check_norm(norm_inputs(offsets, device), offsets)


def test_multiway_linear_without_bias(device, poison):
    x, weight, _ = linear_inputs((0, 3, 7), device)
    assert_matches_reference(
        lambda *t: multiway_linear(*t, None, (0, 3, 7)), lambda *t: reference.multiway_linear(*t, None, (0, 3, 7)), [x, weight]
    )


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1])
def test_multiway_layer_norm_eps(eps, device):
    check_norm(norm_inputs((0, 3, 7), device), (0, 3, 7), eps)


def test_multiway_layer_norm_default_eps(device):
    inputs = norm_inputs((0, 3, 7), device)
    assert torch.equal(multiway_layer_norm(*inputs, (0, 3, 7)), multiway_layer_norm(*inputs, (0, 3, 7), 1e-5))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_multiway_takes_strided_rows(layout, device):
    x = {
        "transposed": lambda: torch.randn(WIDTH, 7, device=device).T,
        "sliced": lambda: torch.randn(14, 2 * WIDTH, device=device)[::2, ::2],
        "expanded": lambda: torch.randn(1, WIDTH, device=device).expand(7, -1),
    }[layout]()
    offsets = (0, 3, 7)
    check_linear([x, *linear_inputs(offsets, device)[1:]], offsets)
    check_norm([x, *norm_inputs(offsets, device)[1:]], offsets)


@pytest.mark.parametrize("function", [linear, norm])
def test_multiway_takes_gradients_of_any_stride(function, device):
    offsets = (0, 3, 7)
    inputs = (linear_inputs if function is linear else norm_inputs)(offsets, device)
    width = OUT if function is linear else WIDTH
    for dout in (torch.ones(1, 1, device=device).expand(7, width), torch.randn(width, 7, device=device).T):
        strided = outputs_and_gradients(function(offsets), inputs, [dout])
        dense = outputs_and_gradients(function(offsets), inputs, [dout.contiguous()])
        for a, b in zip(strided, dense, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("function", [linear, norm])
def test_multiway_computes_only_the_gradients_asked_for(function, wanted, device, poison):
    offsets = (0, 3, 7)
    inputs = (linear_inputs if function is linear else norm_inputs)(offsets, device)
    everything = outputs_and_gradients(function(offsets), inputs)
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    out = function(offsets)(*leaves)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(device))
    for i, x in enumerate(leaves):
        assert (x.grad is not None) == (i in wanted)
        if i in wanted:
            torch.testing.assert_close(x.grad, everything[1 + i])


@pytest.mark.parametrize("function", [linear, norm])
def test_multiway_idle_expert_has_a_gradient_of_zero(function, device, poison):
    offsets = (0, 7, 7)
    inputs = (linear_inputs if function is linear else norm_inputs)(offsets, device)
    _, _, dweight, dbias = outputs_and_gradients(function(offsets), inputs)
    for grad in (dweight, dbias):
        assert (grad[0] != 0).any()
        assert (grad[1] == 0).all()


@pytest.mark.parametrize("function", [linear, norm])
def test_multiway_gives_the_same_bits_twice_and_leaves_its_inputs_alone(function, device):
    offsets = (0, 3, 7)
    inputs = (linear_inputs if function is linear else norm_inputs)(offsets, device)
    before = [x.clone() for x in inputs]
    first, second = (outputs_and_gradients(function(offsets), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@pytest.mark.parametrize("function", [linear, norm])
def test_multiway_adding_an_empty_expert_changes_nothing(function, device):
    inputs = (linear_inputs if function is linear else norm_inputs)((0, 3, 7), device)
    x, weight, bias = inputs
    junk = [torch.full_like(t[:1], torch.nan) for t in (weight, bias)]
    widened = [torch.cat([t[:1], j, t[1:]]) for t, j in zip((weight, bias), junk, strict=True)]
    assert torch.equal(function((0, 3, 3, 7))(x, *widened), function((0, 3, 7))(x, weight, bias))


@pytest.mark.parametrize("offsets", [[0, 3, 7], torch.tensor([0, 3, 7]).tolist()])
def test_multiway_offsets_may_be_any_sequence(offsets, device):
    inputs = linear_inputs((0, 3, 7), device)
    assert torch.equal(multiway_linear(*inputs, offsets), multiway_linear(*inputs, (0, 3, 7)))


# ------------------------------------------------------------------------------------------------------------ registration


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("offsets", [[0, 3, 7], [0, 0, 7]], ids=str)
def test_multiway_linear_op_is_registered_right(offsets, bias, device):
    x, weight, b = (t.requires_grad_() for t in linear_inputs(offsets, device))
    torch.library.opcheck(torch.ops.vlp_fast.multiway_linear_v1.default, (x, weight, b if bias else None, offsets))


def test_multiway_linear_backward_op_is_registered_right(device):
    x, weight, _ = linear_inputs((0, 3, 7), device)
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        arguments = (torch.randn(7, OUT, device=device), x, weight, [0, 3, 7], *needs)
        torch.library.opcheck(torch.ops.vlp_fast.multiway_linear_backward_v1.default, arguments)


def test_multiway_layer_norm_op_is_registered_right(device):
    inputs = [t.requires_grad_() for t in norm_inputs((0, 3, 7), device)]
    torch.library.opcheck(torch.ops.vlp_fast.multiway_layer_norm_v1.default, (*inputs, [0, 3, 7], 1e-5))


def test_multiway_layer_norm_backward_op_is_registered_right(device):
    x, weight, bias = norm_inputs((0, 3, 7), device)
    _, mean, rstd = torch.ops.vlp_fast.multiway_layer_norm_v1(x, weight, bias, [0, 3, 7], 1e-5)
    arguments = (torch.randn_like(x), x, mean, rstd, weight, bias, [0, 3, 7])
    torch.library.opcheck(torch.ops.vlp_fast.multiway_layer_norm_backward_v1.default, arguments)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_multiway_fake_tensors_have_the_real_shapes_and_strides(transposed, dtype, device):
    offsets = [0, 3, 7]
    x, weight, bias = linear_inputs(offsets, device, dtype)
    _, scale, shift = norm_inputs(offsets, device, dtype)
    if transposed:
        x, weight = x.T.contiguous().T, weight.transpose(1, 2).contiguous().transpose(1, 2)
        scale, shift = scale.T.contiguous().T, shift.T.contiguous().T
    dout = torch.randn(7, OUT, device=device).to(dtype)

    def everything(x, weight, bias, scale, shift, dout):
        ops = torch.ops.vlp_fast
        out, mean, rstd = ops.multiway_layer_norm_v1(x, scale, shift, offsets, 1e-5)
        return [
            ops.multiway_linear_v1(x, weight, bias, offsets),
            *ops.multiway_linear_backward_v1(dout, x, weight, offsets, True, True, True),
            out,
            mean,
            rstd,
            *ops.multiway_layer_norm_backward_v1(out, x, mean, rstd, scale, shift, offsets),
        ]

    tensors = (x, weight, bias, scale, shift, dout)
    real = everything(*tensors)
    with FakeTensorMode() as mode:
        fake = everything(*(mode.from_tensor(t) for t in tensors))
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_multiway_meta_tensors_have_shapes_and_gradients():
    offsets = (0, 3, 7)
    x, weight, bias = (t.to("meta").requires_grad_() for t in linear_inputs(offsets, "cpu"))
    out = multiway_linear(x, weight, bias, offsets)
    assert out.shape == (7, OUT)
    out.sum().backward()
    assert (x.grad.shape, weight.grad.shape, bias.grad.shape) == (x.shape, weight.shape, bias.shape)
    assert multiway_layer_norm(*(t.to("meta") for t in norm_inputs(offsets, "cpu")), offsets).shape == (7, WIDTH)


def both(x, weight, bias, scale, shift, offsets):
    return multiway_layer_norm(multiway_linear(x, weight, bias, offsets).relu(), scale, shift, offsets)


def both_inputs(offsets, device):
    experts = len(offsets) - 1
    return [*linear_inputs(offsets, device), *(torch.randn(experts, OUT, device=device) for _ in range(2))]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_multiway_compiles_whole(compiler, device):
    torch._dynamo.reset()
    compiled = torch.compile(both, backend=compiler, fullgraph=True)
    inputs = both_inputs((0, 3, 7), device)
    expected = outputs_and_gradients(lambda *t: both(*t, (0, 3, 7)), inputs)
    actual = outputs_and_gradients(lambda *t: compiled(*t, (0, 3, 7)), inputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_multiway_compiles_at_most_twice_over_five_lengths(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, backend=counter, fullgraph=True)
    for n in (5, 6, 9, 14, 11):
        offsets = (0, n, 2 * n + 3)
        inputs = both_inputs(offsets, device)
        torch.testing.assert_close(compiled(*inputs, offsets), both(*inputs, offsets))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("bias", [True, False])
def test_multiway_linear_flops(bias, device):
    offsets = (0, 3, 7)
    x, weight, b = (t.requires_grad_() for t in linear_inputs(offsets, device))
    product = 2 * 7 * WIDTH * OUT
    with FlopCounterMode(display=False) as counter:
        out = multiway_linear(x, weight, b if bias else None, offsets)
    assert counter.get_total_flops() == product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        multiway_linear(x.detach(), weight, b, offsets).sum().backward()
    assert counter.get_total_flops() == 2 * product


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


def test_multiway_layer_norm_takes_the_wider_dtype(device):
    x, weight, bias = norm_inputs((0, 3, 7), device)
    narrow = multiway_layer_norm(x.bfloat16(), weight, bias, (0, 3, 7))
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, multiway_layer_norm(x.bfloat16().float(), weight, bias, (0, 3, 7)))


def test_multiway_layer_norm_statistics_are_fp32(device):
    x = torch.full((4, 512), 300.0, device=device).half()
    x[:, ::2] = 301.0  # squares and sums overflow float16
    weight, bias = torch.ones(1, 512, device=device).half(), torch.zeros(1, 512, device=device).half()
    out = multiway_layer_norm(x, weight, bias, (0, 4))
    torch.testing.assert_close(out[:, ::2], torch.ones_like(out[:, ::2]), atol=1e-3, rtol=0)
    _, mean, rstd = torch.ops.vlp_fast.multiway_layer_norm_v1(x, weight, bias, [0, 4], 1e-5)
    assert mean.dtype == rstd.dtype == torch.float32


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
