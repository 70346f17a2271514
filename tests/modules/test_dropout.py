"""`modules.Dropout` on the CPU against what nn.Dropout promises."""

from __future__ import annotations

import pytest
import torch

from vlp_fast.modules import Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_share_scale_and_gradient(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(999, 1001, dtype=dtype, requires_grad=True)  # no multiple of four
    out = Dropout(p)(x)
    kept = out != 0
    assert abs(1 - kept.double().mean().item() - p) < 0.003  # six deviations
    torch.testing.assert_close(out[kept].detach(), torch.full_like(out[kept], 1 / (1 - p)), rtol=1e-2, atol=0.0)
    assert abs(out.double().mean().item() - 1) < 0.02
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, out.detach())


def test_values_are_dropped_independently():
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(2**16, 8)) != 0).double() - 0.5
    correlation = kept.T @ kept / len(kept) * 4
    assert (correlation - torch.eye(8)).abs().max() < 0.025  # neighbours come from one random number
    assert ((kept[1:] * kept[:-1]).mean(0) * 4).abs().max() < 0.025


def test_the_default_generator_decides():
    x = torch.ones(100)
    torch.manual_seed(3)
    first, second = Dropout(0.5)(x), Dropout(0.5)(x)
    torch.manual_seed(3)
    assert torch.equal(Dropout(0.5)(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.0, 1.0, 1e-7])
def test_ends(p):
    x = torch.randn(64, 3)
    torch.testing.assert_close(Dropout(p)(x), torch.nn.functional.dropout(x, round(p)))


def test_evaluation_and_inplace():
    x = torch.randn(64, 3)
    assert Dropout(0.5).eval()(x) is x
    copy = x.clone()
    out = Dropout(0.5, inplace=True)(copy)
    assert out is copy
    assert set(torch.unique(out / x).tolist()) == {0.0, 2.0}
    assert Dropout(0.5)(torch.empty(0, 3)).shape == (0, 3)
