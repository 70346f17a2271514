"""ops.linear is torch.nn.functional.linear, whichever library it goes through; the module has nn.Linear's parameters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlp_fast.modules import Linear
from vlp_fast.ops import _products, linear
from vlp_fast.testing import assert_as_accurate_as, assert_matches_reference


@pytest.fixture(params=[True, False], ids=["oneDNN", "PyTorch's own"])
def library(request, monkeypatch):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch is built without oneDNN")
    monkeypatch.setattr(_products, "LEAST", 0)
    monkeypatch.setattr(_products, "onednn_is_faster", lambda: request.param)
    return request.param


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(9,), (6, 9), (2, 3, 9), (0, 9)], ids=str)
def test_linear_matches_pytorch(shape, has_bias, library):
    inputs = [torch.randn(shape), torch.randn(7, 9), *([torch.randn(7)] if has_bias else [])]
    assert_matches_reference(linear, F.linear, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_linear_of_other_dtypes_is_pytorchs(dtype, library):
    x, weight = torch.randn(4, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("shape", [(9,), (6, 9), (2, 3, 9), (0, 9)], ids=str)
def test_linear_of_bf16_without_a_gradient_is_as_accurate(shape):
    x, weight, bias = (torch.randn(size).bfloat16() for size in (shape, (7, 9), (7,)))
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert_as_accurate_as(linear(x, weight, bias), F.linear(x, weight, bias), exact)


def test_linear_under_autocast_is_pytorchs(library):
    x, weight, bias = torch.randn(4, 8), torch.randn(5, 8), torch.randn(5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("shape", [(64, 48), (2, 30, 48), (0, 48), (48,)], ids=str)
def test_linear_of_bf16_on_a_processor_without_it_is_as_accurate(shape, autocast, monkeypatch):
    monkeypatch.setattr(_products, "supports_bf16", lambda: False)
    inputs = [torch.randn(size).bfloat16() for size in (shape, (40, 48), (40,))]
    given = [t.float() if autocast else t for t in inputs]

    def run(function, inputs):
        inputs = [t.detach().requires_grad_() for t in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and function is not exactly):
            out = function(*inputs)
        out.backward(torch.ones_like(out).cumsum(-1) / 40)
        return [out, *(t.grad for t in inputs)]

    def exactly(*inputs):
        return F.linear(*inputs)

    exact = run(exactly, [t.double() for t in inputs])
    for found, theirs, expected in zip(run(linear, given), run(F.linear, given), exact, strict=True):
        assert found.dtype == theirs.dtype
        assert_as_accurate_as(found, theirs, expected)


@pytest.mark.parametrize("dims", [((4, 8), (5, 7), None), ((4, 8), (5, 8), (4,)), ((4, 8), (8,), None)], ids=str)
def test_linear_refuses_what_pytorch_refuses(dims, library):
    x, weight, bias = (None if d is None else torch.zeros(d) for d in dims)
    try:
        expected = F.linear(x, weight, bias)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            linear(x, weight, bias)
    else:
        torch.testing.assert_close(linear(x, weight, bias), expected)


def test_linear_module_is_nn_linear(library):
    ours, theirs = Linear(6, 4), nn.Linear(6, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    assert isinstance(ours, nn.Linear)


def test_linear_compiles_whole_and_is_counted(library):
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    compiled = torch.compile(lambda x, w: linear(x, w).sin(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight).sin())
    with FlopCounterMode(display=False) as counter:
        linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 6 * 8 * 5
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 6 * 8 * 5


@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_without_a_gradient_is_the_same(has_bias, library):
    x, weight, bias = torch.randn(2, 3, 9), torch.randn(7, 9, requires_grad=True), torch.randn(7) if has_bias else None
    with torch.no_grad():
        alone = linear(x, weight, bias)
    torch.testing.assert_close(alone, linear(x, weight, bias).detach(), rtol=1e-6, atol=1e-6)
    assert not alone.requires_grad
