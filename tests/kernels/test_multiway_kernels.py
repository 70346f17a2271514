"""The multiway launchers at sizes of several tiles, against the reference in float64: in the Triton interpreter, or on a GPU."""

import os
import sys

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import pytest
import torch

pytest.importorskip("triton")

from vlp_fast import reference
from vlp_fast.kernels import _attention_common, _multiway_common, multiway_layer_norm, multiway_linear
from vlp_fast.kernels._configs import NormConfig, multiway_linear_config, multiway_norm_config

DEVICE = "cpu" if _attention_common.INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(),
    reason="triton was imported without TRITON_INTERPRET=1 and there is no GPU",
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # of the largest value


@pytest.fixture(autouse=True)
def _poison():
    """Uninitialised memory is NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def check(names, actual, expected, dtype):
    for name, a, e in zip(names, actual, expected, strict=True):
        assert a.shape == e.shape, name
        if e.numel():
            scale = max(e.abs().max().item(), 1e-3)
            assert (a.cpu().double() - e.detach().cpu()).abs().max().item() <= TOLERANCE[dtype] * scale, name


def linear_case(offsets, width, depth, dtype, activation="gelu"):
    """Inputs, what the launchers make of them, and what the reference does."""
    offsets, experts, rows = list(offsets), len(offsets) - 1, offsets[-1]
    x, weight = random(rows, depth, dtype=dtype), random(experts, width, depth, dtype=dtype, seed=1) * depth**-0.5
    bias, residual, dout = (
        random(*s, dtype=dtype, seed=n) for n, s in enumerate(((experts, width), (rows, width), (rows, width)), 2)
    )
    out, pre = multiway_linear.multiway_linear(x, weight, bias, residual, offsets, activation, True, dtype)
    grads = multiway_linear.multiway_linear_backward(dout, x, weight, pre, offsets, activation, True, True, True)
    leaves = [t.cpu().double().requires_grad_() for t in (x, weight, bias)]
    exact = reference.multiway_linear(*leaves, offsets, activation=activation or None, residual=residual.cpu().double())
    return (out, *grads), (exact, *torch.autograd.grad(exact, leaves, dout.cpu().double()))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("offsets", "width", "depth"),
    [((0, 130, 130, 150), 256, 128), ((0, 1, 66), 130, 70), ((0, 40, 41), 128, 64)],
    ids=["several tiles, whole", "several tiles, ragged", "64-row tiles"],
)
def test_multiway_linear_kernels_over_several_tiles(offsets, width, depth, dtype):
    actual, expected = linear_case(offsets, width, depth, dtype)
    check(("out", "dx", "dweight", "dbias"), actual, expected, dtype)


def test_multiway_linear_kernels_take_more_tiles_than_a_group():
    rows = 20 * multiway_linear_config("product", 4, 2000).block_m + 3
    actual, expected = linear_case((0, 5, rows), 65, 3, torch.float32, "")
    check(("out", "dx", "dweight", "dbias"), actual, expected, torch.float32)


def test_multiway_linear_kernels_same_bits_twice():
    first, second = (linear_case((0, 70, 90), 70, 130, torch.float16)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_multiway_linear_kernels_addresses_are_64_bit(monkeypatch):
    # address space, of which a few pages are touched
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    row_stride, few, rows = 2**22, 5, 2**10
    buffer = torch.empty(rows * row_stride, dtype=torch.float16, device=DEVICE)
    x = buffer.as_strided((rows, 16), (row_stride, 1))
    x[-few:] = random(few, 16, dtype=torch.float16)
    offsets, weight = [0, rows - few, rows], random(2, 8, 16, dtype=torch.float16)
    small = x[-few:].contiguous()
    out, _ = multiway_linear.multiway_linear(x, weight, None, None, offsets, "", False, torch.float16)
    expected, _ = multiway_linear.multiway_linear(small, weight[1:], None, None, [0, few], "", False, torch.float16)
    assert torch.equal(out[-few:], expected)


def test_multiway_linear_kernels_form_only_the_bias_gradient():
    offsets, dout = [0, 70, 70, 75], random(75, 130)
    x, weight = random(75, 8), random(3, 130, 8)
    dx, dweight, dbias = multiway_linear.multiway_linear_backward(
        dout, x, weight, x.new_empty(0), offsets, "", False, False, True
    )
    assert (dx.numel(), dweight.numel()) == (0, 0)
    expected = torch.stack([dout[:70].sum(0), torch.zeros_like(dout[0]), dout[70:].sum(0)])
    torch.testing.assert_close(dbias, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [1, 70, 1100])
def test_multiway_layer_norm_kernels_over_several_programs(dim, dtype, monkeypatch):
    monkeypatch.setattr(multiway_layer_norm, "multiway_norm_config", lambda dim: NormConfig(4, programs=3))
    offsets, rows = [0, 3, 3, 19], 19
    x, weight, bias, dout = (
        random(*s, dtype=dtype, seed=n) for n, s in enumerate(((rows, dim), (3, dim), (3, dim), (rows, dim)))
    )
    out, mean, rstd = multiway_layer_norm.multiway_layer_norm(x, weight, bias, offsets, 1e-3, x.dtype)
    grads = multiway_layer_norm.multiway_layer_norm_backward(dout, x, mean, rstd, weight, offsets)
    leaves = [t.cpu().double().requires_grad_() for t in (x, weight, bias)]
    exact = reference.multiway_layer_norm(*leaves, offsets, 1e-3)
    expected = (exact, *torch.autograd.grad(exact, leaves, dout.cpu().double()))
    check(("out", "dx", "dweight", "dbias"), (out, *grads), expected, dtype)


@pytest.mark.parametrize(
    ("rows_dtype", "out_dtype"),
    [(torch.float32, torch.float16), (torch.float16, torch.float16), (torch.float16, torch.float32)],
)
def test_multiway_layer_norm_kernels_round_once_to_another_dtype(rows_dtype, out_dtype):
    """As under autocast: fp32 weights, rows of either dtype, out and its gradient in the dtype asked for."""
    offsets, dim = [0, 3, 3, 19], 70
    x, dout = random(19, dim, dtype=rows_dtype), random(19, dim, dtype=out_dtype, seed=1)
    weight, bias = random(3, dim, seed=2), random(3, dim, seed=3)
    out, mean, rstd = multiway_layer_norm.multiway_layer_norm(x, weight, bias, offsets, 1e-3, out_dtype)
    assert (out.dtype, mean.dtype) == (out_dtype, torch.float32)
    dx, dweight, dbias = multiway_layer_norm.multiway_layer_norm_backward(dout, x, mean, rstd, weight, offsets)
    leaves = [t.cpu().double().requires_grad_() for t in (x, weight, bias)]
    exact = reference.multiway_layer_norm(*leaves, offsets, 1e-3)
    expected = torch.autograd.grad(exact, leaves, dout.cpu().double())
    check(("out",), (out,), (exact,), out_dtype)
    check(("dx",), (dx,), expected[:1], rows_dtype)
    check(("dweight", "dbias"), (dweight, dbias), expected[1:], torch.float32)


def test_multiway_layer_norm_kernels_add_many_partial_sums_the_same_way_twice(monkeypatch):
    monkeypatch.setattr(multiway_layer_norm, "multiway_norm_config", lambda dim: NormConfig(4, programs=1000))
    x, dout = random(100, 40), random(100, 40, seed=1)
    weight = torch.ones(2, 40, device=DEVICE)
    _, mean, rstd = multiway_layer_norm.multiway_layer_norm(x, weight, weight, [0, 90, 100], 1e-5, x.dtype)
    first, second = (
        multiway_layer_norm.multiway_layer_norm_backward(dout, x, mean, rstd, weight, [0, 90, 100]) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(first[2], torch.stack([dout[:90].sum(0), dout[90:].sum(0)]), atol=1e-5, rtol=1e-5)


def test_multiway_norm_config_says_how_wide_a_row_may_be():
    assert multiway_norm_config(8192).num_warps == 16
    with pytest.raises(ValueError, match="multiway norms take rows of up to 8192 columns; received 8193."):
        multiway_norm_config(8193)


@pytest.mark.gpu
def test_multiway_offsets_that_a_cuda_graph_reads_outlive_the_cache():
    stream, device = torch.cuda.Stream(), torch.device("cuda", torch.cuda.current_device())
    with torch.cuda.stream(stream):
        first = _multiway_common.device_offsets([0, 5, 11], device)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        assert _multiway_common.device_offsets([0, 5, 11], device) is first
    _multiway_common._device_offsets.cache_clear()
    assert _multiway_common._CAPTURED[first.data_ptr()] is first


def test_multiway_offsets_are_copied_to_the_device_once():
    first = _multiway_common.device_offsets([0, 3, 7], torch.device(DEVICE))
    assert _multiway_common.device_offsets([0, 3, 7], torch.device(DEVICE)) is first
    assert (first.dtype, first.tolist()) == (torch.int32, [0, 3, 7])
    assert _multiway_common.count_tiles([0, 3, 3, 7], 2) == 4
