"""The torch backend's matrix products through oneDNN, whether or not this machine would choose it, in every layout."""

import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlp_fast.ops import _products, linear, linear_gelu, packed_weights
from vlp_fast.ops._products import fp32_products, mm, onednn_is_faster, onednn_is_faster_for_few_rows
from vlp_fast.ops.linear import bind_linear
from vlp_fast.testing import assert_as_accurate_as

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN")


@pytest.fixture(params=[pytest.param(True, marks=needs_onednn), False], ids=["oneDNN", "PyTorch's own"])
def library(request, monkeypatch):
    """Products of any size through one library."""
    monkeypatch.setattr(_products, "LEAST", 0)
    monkeypatch.setattr(_products, "onednn_is_faster", lambda: request.param)


def layouts(rows, columns):
    """The same shape lying in memory in every way that callers have."""
    return {
        "rows": torch.randn(rows, columns),
        "columns": torch.randn(columns, rows).t(),
        "slice of columns": torch.randn(rows, 2 * columns)[:, columns:],
        "slice of rows": torch.randn(rows + 5, columns)[3:-2],
        "every second": torch.randn(rows, 2 * columns)[:, ::2],
        "one row": torch.randn(1, columns).expand(rows, columns),
        "one column": torch.randn(rows, 1).expand(rows, columns),
        "one number": torch.randn(1, 1).expand(rows, columns),
    }


@pytest.mark.parametrize("shape", [(130, 70, 50), (200, 30, 4), (1, 9, 7), (5, 1, 3), (64, 64, 1)], ids=str)
def test_mm_of_every_layout(shape, library):
    m, k, n = shape
    for (a_name, a), (b_name, b) in itertools.product(layouts(m, k).items(), layouts(k, n).items()):
        exact = a.double() @ b.double()
        torch.testing.assert_close(mm(a, b).double(), exact, rtol=1e-5, atol=1e-4, msg=f"{a_name} by {b_name}")


@pytest.mark.parametrize(
    "bias", [None, torch.randn(50), torch.randn(100)[::2], torch.randn(1).expand(50)], ids=lambda b: str(b is not None)
)
@pytest.mark.parametrize("a_layout", ["rows", "columns"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_mm_adds_bias_and_residual_into_out(has_residual, a_layout, bias, library):
    a, b = layouts(60, 40)[a_layout], torch.randn(40, 50)
    residual = torch.randn(60, 50) if has_residual else None
    exact = a.double() @ b.double()
    exact = exact if bias is None else exact + bias.double()
    exact = exact if residual is None else exact + residual.double()
    torch.testing.assert_close(mm(a, b, bias, residual=residual).double(), exact, rtol=1e-5, atol=1e-4)
    whole = torch.full((80, 100), torch.nan)
    out = whole[10:70, 20:70]
    assert mm(a, b, bias, residual=residual, out=out) is out
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-4)
    assert whole.isnan().sum() == whole.numel() - out.numel()


def test_mm_onto_its_own_residual(library):
    a, b, total = torch.randn(60, 40), torch.randn(40, 50), torch.randn(60, 50)
    exact = total.double() + a.double() @ b.double()
    mm(a, b, residual=total, out=total)
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_mm_of_other_dtypes_is_pytorchs(dtype, library):
    a, b = torch.randn(8, 6).to(dtype), torch.randn(6, 4).to(dtype)
    assert torch.equal(mm(a, b), a @ b)


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns", "slice of columns", "slice of rows"])
def test_mm_of_bf16_with_a_bias_is_as_accurate_as_addmm(layout, has_residual):
    a, b, bias, residual = (
        x.bfloat16() for x in (layouts(60, 40)[layout], torch.randn(50, 40).t(), torch.randn(50), torch.randn(60, 50))
    )
    start = bias + residual if has_residual else bias
    exact = a.double() @ b.double() + bias.double() + (residual.double() if has_residual else 0.0)
    found = mm(a, b, bias, residual=residual if has_residual else None)
    assert_as_accurate_as(found, torch.addmm(start, a, b), exact)


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 4), (4, 5, 0)], ids=str)
def test_mm_of_nothing(shape):
    m, k, n = shape
    assert torch.equal(mm(torch.zeros(m, k), torch.zeros(k, n)), torch.zeros(m, n))


def test_mm_uses_onednn_where_it_is_chosen_and_large(monkeypatch):
    called = []
    monkeypatch.setattr(_products, "_onednn", lambda a, b, bias: called.append(a.shape) or a @ b)
    monkeypatch.setattr(_products, "onednn_is_faster", lambda: True)
    large, small = (128, 128, 128), (4, 4, 4)
    for m, k, n in (large, small):
        mm(torch.zeros(m, k), torch.zeros(k, n))
    assert called == [(128, 128)]
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=False):
        mm(torch.zeros(128, 128), torch.zeros(128, 128))
    assert len(called) == 1


@pytest.fixture
def processor(monkeypatch):
    """Puts us on a processor."""

    def become(intel, instructions):
        monkeypatch.setattr(_products, "_made_by_intel", lambda: intel)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
        for library in ("mkl", "mkldnn"):
            monkeypatch.setattr(getattr(torch.backends, library), "is_available", lambda: True)
        _products._may_choose.cache_clear()

    yield become
    _products._may_choose.cache_clear()


@pytest.mark.parametrize(
    ("intel", "instructions", "all_rows", "few_rows", "named"),
    [
        (False, "AVX512", True, False, "oneDNN"),
        (True, "AVX512", False, False, "PyTorch's own choice"),
        (False, "AVX2", False, True, "oneDNN for few rows, else MKL"),
        (True, "AVX2", False, False, "PyTorch's own choice"),
        (False, "DEFAULT", False, False, "PyTorch's own choice"),
    ],
)
def test_onednn_is_chosen_on_processors_of_other_makers(intel, instructions, all_rows, few_rows, named, processor):
    processor(intel, instructions)
    assert (onednn_is_faster(), onednn_is_faster_for_few_rows(), fp32_products()[0]) == (all_rows, few_rows, named)


@needs_onednn
@pytest.mark.parametrize(("rows", "out", "chosen"), [(1, 4096, True), (33, 768, False), (256, 2048, True), (257, 2048, False)])
def test_few_rows_go_to_onednn_on_avx2(rows, out, chosen, processor, monkeypatch):
    called = []
    monkeypatch.setattr(_products, "_onednn", lambda a, b, bias: called.append(a.shape) or a @ b)
    processor(False, "AVX2")
    x, weight = torch.randn(rows, 768), torch.randn(out, 768)
    mm(x, weight.t())
    assert bool(called) is chosen
    mm(x, torch.randn(768, out))  # not a weight as a linear layer has it
    assert len(called) == chosen


@needs_onednn
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns", "slice of columns", "every second"])
@pytest.mark.parametrize(
    ("rows", "most", "most_of_packed"), [(1, 0, 0), (2, 1, 1), (16, 1, 1), (17, 1, 0), (32, 1, 0), (33, 0, 0)]
)
@torch.no_grad()
def test_products_of_few_rows_are_turned_on_avx2(rows, most, most_of_packed, layout, has_bias, processor, monkeypatch):
    """Called from everywhere: mm, linear, linear_gelu and their bound forms, with packed weights or none."""
    processor(False, "AVX2")
    monkeypatch.setattr(_products, "LEAST", 2000)
    turned, called = _products._turned, []
    monkeypatch.setattr(_products, "_turned", lambda *args: called.append(1) or turned(*args))
    x, layer = layouts(rows, 40)[layout], nn.Linear(40, 60, bias=has_bias)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double() if has_bias else None)
    out, residual = torch.empty(rows, 60), torch.randn(rows, 60)
    for expected_calls, block in ((most, nullcontext()), (most_of_packed, packed_weights(layer))):
        with block:
            called.clear()
            weights = (layer.weight, layer.bias)
            assert_near(mm(x, layer.weight.t(), layer.bias), expected)
            assert mm(x, layer.weight.t(), layer.bias, residual=residual, out=out) is out
            assert_near(out, expected + residual)
            found = linear(x, *weights)
            assert found.is_contiguous()
            assert_near(found, expected)
            assert_near(linear_gelu(x, *weights), F.gelu(expected))
            for gelu in (False, True):
                assert_near(bind_linear(*weights, gelu=gelu)(x), F.gelu(expected) if gelu else expected)
            assert len(called) == 6 * expected_calls


def assert_near(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["rows", "columns", "slice of columns", "every second"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_products_of_bf16_are_made_in_fp32_where_the_processor_has_none(has_residual, layout, monkeypatch):
    monkeypatch.setattr(_products, "supports_bf16", lambda: False)
    a, b, bias, residual = (
        x.bfloat16() for x in (layouts(60, 40)[layout], torch.randn(50, 40).t(), torch.randn(50), torch.randn(60, 50))
    )
    wide = mm(a.float(), b.float(), bias.float()) + (residual.float() if has_residual else 0.0)
    found = mm(a, b, bias, residual=residual if has_residual else None)
    assert torch.equal(found, wide.bfloat16())  # rounded once
    out = torch.empty(60, 100, dtype=torch.bfloat16)[:, ::2]
    assert mm(a, b, bias, residual=residual if has_residual else None, out=out) is out
    assert torch.equal(out, found)
    monkeypatch.setattr(_products, "INTENSE", 2**40)  # too few multiply-adds to widen for
    assert torch.equal(mm(a, b), a @ b)
