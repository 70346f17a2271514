"""The accuracy rule must be able to fail: each way of being wrong is tried here."""

import math

import pytest
import torch

from vlp_fast.testing import assert_as_accurate_as, assert_matches_reference, outputs_and_gradients

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def exact():
    return torch.randn(64, 8, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_assert_as_accurate_as_accepts_rounding(exact, dtype):
    assert_as_accurate_as(exact.to(dtype), exact.to(dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_assert_as_accurate_as_scales_with_the_baselines_error(exact, dtype):
    noise = 100 * torch.finfo(dtype).eps * torch.randn(exact.shape, dtype=torch.float64)
    baseline = (exact + noise).to(dtype)
    assert_as_accurate_as((exact - 1.5 * noise).to(dtype), baseline, exact)
    with pytest.raises(AssertionError, match=r"dq is off by .* at \[\d+, \d\] where .* is allowed: 2.0 times the baseline's"):
        assert_as_accurate_as((exact - 3.0 * noise).to(dtype), baseline, exact, what="dq")
    assert_as_accurate_as((exact - 3.0 * noise).to(dtype), baseline, exact, factor=4.0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("spacings", [40.0, 1e4])
def test_assert_as_accurate_as_rejects_one_wrong_element(exact, dtype, spacings):
    actual = exact.clone()
    actual[3, 5] += spacings * torch.finfo(dtype).eps * exact.abs().max()
    with pytest.raises(AssertionError, match=r"at \[3, 5\]"):
        assert_as_accurate_as(actual.to(dtype), exact.to(dtype), exact)


def test_assert_as_accurate_as_rejects_many_small_errors_under_the_largest_of_the_baseline(exact):
    baseline = exact.clone()
    baseline[0, 0] += 1e-3
    actual = exact + 1e-3
    with pytest.raises(AssertionError, match="in the root mean square"):
        assert_as_accurate_as(actual.float(), baseline.float(), exact)


def test_assert_as_accurate_as_rejects_zeros_in_place_of_small_values():
    exact = 1e-6 * torch.randn(100, dtype=torch.float64)
    with pytest.raises(AssertionError, match="off by"):
        assert_as_accurate_as(torch.zeros(100), exact.float(), exact)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_assert_as_accurate_as_wants_nan_and_inf_in_the_same_places(exact, value):
    special = exact.clone()
    special[1, 2] = value
    assert_as_accurate_as(special.float(), special.float(), special)
    with pytest.raises(AssertionError, match=r"in 0 places and should have it in 1; 1 places differ, the first is \[1, 2\]"):
        assert_as_accurate_as(exact.float(), special.float(), special)
    with pytest.raises(AssertionError, match=r"in 1 places and should have it in 0; 1 places differ, the first is \[1, 2\]"):
        assert_as_accurate_as(special.float(), exact.float(), exact)


def test_assert_as_accurate_as_tells_inf_from_minus_inf():
    exact = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
    with pytest.raises(AssertionError, match="inf in"):
        assert_as_accurate_as(-exact.float(), exact.float(), exact)


def test_assert_as_accurate_as_rounds_to_infinity_like_the_dtype():
    exact = torch.tensor([1e6, 1.0], dtype=torch.float64)
    assert_as_accurate_as(exact.half(), exact.half(), exact)


def test_assert_as_accurate_as_rejects_other_shapes(exact):
    with pytest.raises(AssertionError, match=r"out has shape \[64\]; the baseline has \[64, 8\], the exact value \[64, 8\]"):
        assert_as_accurate_as(exact[:, 0].float(), exact.float(), exact, what="out")


def test_assert_as_accurate_as_refuses_what_makes_it_toothless(exact):
    with pytest.raises(ValueError, match=r"exact must be float64; received torch.float32"):
        assert_as_accurate_as(exact.float(), exact.float(), exact.float())
    with pytest.raises(ValueError, match=r"actual must be float64, float32, float16 or bfloat16; received torch.int64"):
        assert_as_accurate_as(exact.long(), exact, exact)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="the baseline of the result must be finite"):
            assert_as_accurate_as(exact.float(), torch.full_like(exact, value), exact)


def test_assert_as_accurate_as_measures_the_floor_from_the_scale_given():
    exact = torch.zeros(4, dtype=torch.float64)
    actual = torch.full((4,), 1e-6)
    with pytest.raises(AssertionError, match="where 0 is allowed"):
        assert_as_accurate_as(actual, exact.float(), exact)
    assert_as_accurate_as(actual, exact.float(), exact, scale=1.0)
    with pytest.raises(AssertionError, match="is off by 1e-06"):
        assert_as_accurate_as(actual, exact.float(), exact, scale=0.1)


def test_assert_as_accurate_as_takes_empty_tensors():
    empty = torch.zeros(0, 4, dtype=torch.float64)
    assert_as_accurate_as(empty.float(), empty.float(), empty)


def test_outputs_and_gradients_gives_zeros_where_nothing_arrives():
    a, b = torch.randn(3), torch.randn(3)
    out, da, db = outputs_and_gradients(lambda x, y: 2 * x, [a, b], [torch.ones(3)])
    assert torch.equal(out, 2 * a)
    assert torch.equal(da, torch.full((3,), 2.0))
    assert torch.equal(db, torch.zeros(3))
    assert torch.equal(outputs_and_gradients(lambda x: x.detach(), [a])[1], torch.zeros(3))


def good(x, w):
    return x @ w, x.sum(1)


def wrong_output(x, w):
    return x @ w, x.sum(1) * 1.001


class _HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        return dout / 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_assert_matches_reference_looks_at_every_output_and_gradient(dtype):
    x, w = torch.randn(5, 7).to(dtype), torch.randn(7, 3).to(dtype)
    names = ["product", "sum", "dx", "dw"]
    assert_matches_reference(good, good, [x, w], names=names)
    if dtype == torch.float32:
        with pytest.raises(AssertionError, match="sum is off"):
            assert_matches_reference(wrong_output, good, [x, w], names=names)
    with pytest.raises(AssertionError, match="dw is off"):
        assert_matches_reference(lambda x, w: good(x, _HalfGradient.apply(w)), good, [x, w], names=names)
