"""bf16 attention as products (`vlp_fast.ops._attention_bf16`) against float64 and against the roundings of eager code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlp_fast import AttentionPlan
from vlp_fast.ops import _attention_bf16, attention

SCALE = 0.2  # no power of two: scores must be scaled before they are rounded


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, keep: Tensor | None = None) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) * SCALE
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    if keep is not None:
        weights = weights * keep / 0.75
    return weights.to(q.dtype) @ v


def _run(function, tensors: list[Tensor], dout: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*(x.transpose(1, 2) for x in leaves))
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("groups", "heads", "length_q", "length_k", "masked", "causal", "drops"),
    [
        (3, 2, 7, 19, False, False, False),
        (3, 4, 300, 301, False, False, True),  # blocks of two groups and of one
        (1, 2, 750, 750, True, True, False),  # a group that is larger than a block
        (4, 3, 40, 40, False, True, True),
        (4, 3, 21, 33, True, False, True),
    ],
)
def test_error_is_eager_codes_at_most(groups, heads, length_q, length_k, masked, causal, drops):
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(groups, n, heads, 32).bfloat16() for n in (length_q, length_k, length_k, length_q))
    mask = None
    if masked:
        mask = torch.ones(groups, 1, 1, length_k, dtype=torch.bool)
        mask[0, ..., length_k // 2 :] = False
    keep, dropout_p = (torch.rand(groups, heads, length_q, length_k) >= 0.25, 0.25) if drops else (None, 0.0)
    dout = dout.transpose(1, 2)
    exact = _run(lambda *x: _eager(*x, mask, causal, keep), [x.double() for x in (q, k, v)], dout)
    eager = _run(lambda *x: _eager(*x, mask, causal, keep), [q, k, v], dout)
    found = _run(lambda *x: _attention_bf16.attention(*x, mask, causal, SCALE, keep, dropout_p), [q, k, v], dout)
    for ours, theirs, right in zip(found, eager, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert 0.0 < _error(ours, right) < 1.15 * _error(theirs, right) < 0.01


def test_gradient_of_a_sum_has_stride_zero():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, 2, 16).bfloat16() for _ in range(3))
    ones = torch.ones((), dtype=torch.bfloat16).expand(2, 2, 9, 16)
    one = _run(lambda *x: _attention_bf16.attention(*x, None, False, SCALE), [q, k, v], ones)
    other = _run(lambda *x: _attention_bf16.attention(*x, None, False, SCALE), [q, k, v], ones.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_autocast_changes_nothing_inside():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 9, 16).bfloat16() for _ in range(3))
    plain = _attention_bf16.attention(q, k, v, None, False, SCALE)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_attention_bf16.attention(q, k, v, None, False, SCALE), plain)


def test_without_a_gradient_the_bits_are_the_same():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 40, 16).bfloat16() for _ in range(3))
    recorded = _attention_bf16.attention(q.requires_grad_(), k, v, None, False, SCALE)
    assert recorded.requires_grad
    with torch.no_grad():
        assert torch.equal(_attention_bf16.attention(q, k, v, None, False, SCALE), recorded)


def test_the_torch_backend_chooses_it_where_it_is_faster(monkeypatch):
    torch.manual_seed(0)
    called = []
    inner = _attention_bf16.attention
    monkeypatch.setattr(_attention_bf16, "attention", lambda *args: called.append(1) or inner(*args))
    monkeypatch.setattr(_attention_bf16, "_products_are_faster", lambda: True)
    plan = AttentionPlan.self_attention([50, 50])
    q, k, v = torch.randn(3, 100, 2, 16).bfloat16().requires_grad_()
    out = attention(q, k, v, plan)
    assert called == [1]
    exact = attention(*(x.detach().double() for x in (q, k, v)), plan)
    assert _error(out.detach(), exact) < 0.01
    with torch.no_grad():
        attention(q, k, v, plan)  # few scores and no gradient: the fused call
    attention(q.float(), k.float(), v.float(), plan)
    attention(q, k, v, plan, return_lse=True)
    attention(q[:50], k[:50], v[:50], AttentionPlan.self_attention([50]))  # few scores
    attention(q, k[:, :1], v[:, :1], plan)  # multi-query
    assert called == [1]
    torch.manual_seed(1)
    dropped = attention(q, k, v, plan, dropout_p=0.5)
    assert called == [1, 1]
    monkeypatch.setattr(_attention_bf16, "_products_are_faster", lambda: False)
    torch.manual_seed(1)
    assert _error(dropped.detach(), attention(q, k, v, plan, dropout_p=0.5).detach().double()) < 0.01  # the same mask
    assert called == [1, 1]


def test_shapes_without_values():
    with FakeTensorMode():
        q = torch.empty(3, 2, 5, 16, dtype=torch.bfloat16, requires_grad=True)
        k = torch.empty(3, 2, 7, 16, dtype=torch.bfloat16)
        out = _attention_bf16.attention(q, k, k, None, False, SCALE)
        assert (out.shape, out.dtype) == (q.shape, q.dtype)


def test_compiles_in_one_graph(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(_attention_bf16, "_products_are_faster", torch.compiler.assume_constant_result(lambda: True))
    plan = AttentionPlan.self_attention([30, 30])
    q, k, v = torch.randn(3, 60, 2, 16).bfloat16().requires_grad_()
    compiled = torch.compile(lambda *x: attention(*x, plan), backend="aot_eager", fullgraph=True)
    outs = [f(q, k, v) for f in (compiled, lambda *x: attention(*x, plan))]
    assert torch.equal(*outs)
    grads = [torch.autograd.grad(out.float().square().sum(), q)[0] for out in outs]
    assert torch.equal(*grads)
