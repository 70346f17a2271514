"""multiway_linear and multiway_layer_norm inside PyTorch: registered ops, fake and meta tensors, torch.compile, FLOP counts."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vlp_fast.ops import multiway_layer_norm, multiway_linear
from vlp_fast.testing import outputs_and_gradients

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTH, OUT = 6, 5


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


def linear_inputs(offsets, device, dtype=torch.float32):
    experts = len(offsets) - 1
    shapes = ((offsets[-1], WIDTH), (experts, OUT, WIDTH), (experts, OUT))
    return [torch.randn(*shape).to(device, dtype) for shape in shapes]


def norm_inputs(offsets, device, dtype=torch.float32):
    experts = len(offsets) - 1
    return [torch.randn(*shape).to(device, dtype) for shape in ((offsets[-1], WIDTH), (experts, WIDTH), (experts, WIDTH))]


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("activation", "residual"), [("", False), ("gelu", False), ("", True), ("gelu", True)])
@pytest.mark.parametrize("offsets", [[0, 3, 7], [0, 0, 7]], ids=str)
def test_multiway_linear_op_is_registered_right(offsets, activation, residual, bias, backend, device):
    x, weight, b = (t.requires_grad_() for t in linear_inputs(offsets, device))
    more = torch.randn(7, OUT, device=device, requires_grad=True) if residual else None
    arguments = (x, weight, b if bias else None, more, offsets, activation, True, backend)
    torch.library.opcheck(torch.ops.vlp_fast.multiway_linear_v2.default, arguments)


@pytest.mark.parametrize("activation", ["", "gelu"])
def test_multiway_linear_backward_op_is_registered_right(activation, backend, device):
    x, weight, _ = linear_inputs((0, 3, 7), device)
    dout, pre = torch.randn(2, 7, OUT, device=device)
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        arguments = (dout, x, weight, pre if activation else pre.new_empty(0), [0, 3, 7], activation, *needs, backend)
        torch.library.opcheck(torch.ops.vlp_fast.multiway_linear_backward_v2.default, arguments)


def test_multiway_layer_norm_op_is_registered_right(backend, device):
    inputs = [t.requires_grad_() for t in norm_inputs((0, 3, 7), device)]
    torch.library.opcheck(torch.ops.vlp_fast.multiway_layer_norm_v3.default, (*inputs, [0, 3, 7], 1e-5, torch.float32, backend))


def test_multiway_layer_norm_backward_op_is_registered_right(backend, device):
    x, weight, bias = norm_inputs((0, 3, 7), device)
    _, mean, rstd = torch.ops.vlp_fast.multiway_layer_norm_v3(x, weight, bias, [0, 3, 7], 1e-5, torch.float32, backend)
    arguments = (torch.randn_like(x), x, mean, rstd, weight, bias, [0, 3, 7], backend)
    torch.library.opcheck(torch.ops.vlp_fast.multiway_layer_norm_backward_v3.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_multiway_fake_tensors_have_the_real_shapes_and_strides(transposed, dtype, backend, device):
    offsets = [0, 3, 7]
    x, weight, bias = linear_inputs(offsets, device, dtype)
    _, scale, shift = norm_inputs(offsets, device, dtype)
    if transposed:
        x, weight = x.T.contiguous().T, weight.transpose(1, 2).contiguous().transpose(1, 2)
        scale, shift = scale.T.contiguous().T, shift.T.contiguous().T
    dout = torch.randn(7, OUT, device=device).to(dtype)

    def everything(x, weight, bias, scale, shift, dout):
        ops = torch.ops.vlp_fast
        out, mean, rstd = ops.multiway_layer_norm_v3(x, scale, shift, offsets, 1e-5, x.dtype, backend)
        return [
            *ops.multiway_linear_v2(x, weight, bias, dout, offsets, "gelu", True, backend),
            *ops.multiway_linear_v2(x, weight, bias, None, offsets, "gelu", False, backend),
            *ops.multiway_linear_backward_v2(dout, x, weight, dout, offsets, "gelu", True, True, True, backend),
            *ops.multiway_linear_backward_v2(dout, x, weight, dout[:0, 0], offsets, "", False, False, True, backend),
            out,
            mean,
            rstd,
            *ops.multiway_layer_norm_backward_v3(out, x, mean, rstd, scale, shift, offsets, backend),
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


def both(x, weight, bias, scale, shift, offsets, backend):
    hidden = multiway_linear(x, weight, bias, offsets, activation="gelu", backend=backend)
    hidden = multiway_layer_norm(hidden, scale, shift, offsets, backend=backend)
    return multiway_linear(hidden, weight.transpose(1, 2), None, offsets, residual=x, backend=backend)


def both_inputs(offsets, device):
    experts = len(offsets) - 1
    return [*linear_inputs(offsets, device), *(torch.randn(experts, OUT, device=device) for _ in range(2))]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_multiway_compiles_whole(compiler, backend, device):
    torch._dynamo.reset()
    compiled = torch.compile(both, backend=compiler, fullgraph=True)
    inputs = both_inputs((0, 3, 7), device)
    expected = outputs_and_gradients(lambda *t: both(*t, (0, 3, 7), backend), inputs)
    actual = outputs_and_gradients(lambda *t: compiled(*t, (0, 3, 7), backend), inputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_multiway_compiles_at_most_twice_over_five_lengths(backend, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, backend=counter, fullgraph=True)
    for n in (5, 6, 9, 14, 11):
        offsets = (0, n, 2 * n + 3)
        inputs = both_inputs(offsets, device)
        torch.testing.assert_close(compiled(*inputs, offsets, backend), both(*inputs, offsets, backend))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("bias", [True, False])
def test_multiway_linear_flops(bias, backend, device):
    offsets = (0, 3, 7)
    x, weight, b = (t.requires_grad_() for t in linear_inputs(offsets, device))
    product = 2 * 7 * WIDTH * OUT
    with FlopCounterMode(display=False) as counter:
        out = multiway_linear(x, weight, b if bias else None, offsets, activation="gelu", backend=backend)
    assert counter.get_total_flops() == product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        multiway_linear(x.detach(), weight, b, offsets, backend=backend).sum().backward()
    assert counter.get_total_flops() == 2 * product
