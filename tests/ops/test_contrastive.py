"""Contrastive losses and hard negatives against the whole matrix of similarities in plain PyTorch."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vlp_fast.ops import contrastive_loss, distilled_contrastive_loss, hard_negatives, sigmoid_contrastive_loss

module = sys.modules["vlp_fast.ops.contrastive"]


@pytest.fixture(params=[1, 3, 100], ids=lambda n: f"{n} rows a block")
def blocks(request, monkeypatch):
    """So many rows at a time, for 7 fp64 columns."""
    monkeypatch.setattr(module, "BLOCK_BYTES", request.param * 7 * 8)


def plain_contrastive(a, b, scale):
    s, labels = scale * a @ b.T, torch.arange(len(a), device=a.device)
    return (F.cross_entropy(s, labels) + F.cross_entropy(s.T, labels)) / 2


def plain_distilled(features, teacher, keys, scale, alpha):
    with torch.no_grad():
        targets = alpha * torch.softmax(scale * teacher @ keys.T, 1)
        targets.diagonal().add_(1.0 - alpha)
    return -(targets * torch.log_softmax(scale * features @ keys.T, 1)).sum(1).mean()


def plain_sigmoid(a, b, scale, bias):
    z = 2 * torch.eye(len(a), dtype=a.dtype, device=a.device) - 1
    return -F.logsigmoid(z * (scale * a @ b.T + bias)).sum() / len(a)


def leaves(*shapes, dtype=torch.float64, device="cpu"):
    return [F.normalize(torch.randn(s, dtype=dtype, device=device), dim=-1).requires_grad_() for s in shapes]


def number(value, dtype=torch.float64, device="cpu"):
    return torch.tensor(value, dtype=dtype, device=device, requires_grad=True)


def compare(function, plain, inputs, extra=(), dout=1.7):
    actual, expected = function(*inputs, *extra), plain(*inputs, *extra)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(torch.autograd.grad(actual * dout, inputs), torch.autograd.grad(expected * dout, inputs), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
def test_contrastive_loss_is_the_plain_one(scale, blocks, device):
    compare(contrastive_loss, plain_contrastive, [*leaves((7, 5), (7, 5), device=device), number(scale, device=device)])


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("queue", [0, 9])
def test_distilled_contrastive_loss_is_the_plain_one(alpha, queue, blocks, device):
    features, teacher, keys = leaves((7, 5), (7, 5), (7 + queue, 5), device=device)
    constants = teacher.detach(), keys.detach()
    compare(
        lambda f, s: distilled_contrastive_loss(f, *constants, s, alpha),
        lambda f, s: plain_distilled(f, *constants, s, alpha),
        [features, number(14.0, device=device)],
    )


def test_sigmoid_contrastive_loss_is_the_plain_one(blocks, device):
    compare(
        sigmoid_contrastive_loss,
        plain_sigmoid,
        [*leaves((7, 5), (7, 5), device=device), number(10.0, device=device), number(-10.0, device=device)],
    )


def test_contrastive_losses_gradcheck(blocks):
    a, b = leaves((3, 4), (3, 4))
    assert torch.autograd.gradcheck(contrastive_loss, (a, b, number(3.0)))
    assert torch.autograd.gradcheck(sigmoid_contrastive_loss, (a, b, number(3.0), number(-1.0)))
    # the teacher's use of the scale is a constant, so the numerical check is of the features alone, or without a teacher
    teacher, keys, scale = torch.randn(3, 4).double(), torch.randn(8, 4).double(), number(3.0)
    assert torch.autograd.gradcheck(lambda f: distilled_contrastive_loss(f, teacher, keys, scale.detach(), 0.4), (a,))
    assert torch.autograd.gradcheck(lambda f, s: distilled_contrastive_loss(f, teacher, keys, s, 0.0), (a, scale))


def test_contrastive_losses_of_one_pair():
    a, b = leaves((1, 4), (1, 4))
    assert contrastive_loss(a, b, number(5.0)).item() == pytest.approx(0.0, abs=1e-12)
    compare(sigmoid_contrastive_loss, plain_sigmoid, [a, b, number(5.0), number(0.5)])


def test_contrastive_losses_of_identical_features():
    same = F.normalize(torch.ones(6, 8), dim=1).requires_grad_()
    loss = contrastive_loss(same, same, number(100.0, torch.float32))
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(6.0).log())
    assert same.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_contrastive_losses_compute_in_fp32(dtype, device):
    a, b = (x.detach().to(dtype).requires_grad_() for x in leaves((6, 8), (6, 8), device=device))
    scale = number(20.0, torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        actual = [contrastive_loss(a, b, scale), distilled_contrastive_loss(a, b, b, scale, 0.4)]
    expected = [
        plain_contrastive(a.float(), b.float(), scale),
        plain_distilled(a.float(), b.float(), b.float().detach(), scale, 0.4),
    ]
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad(one, a, retain_graph=True)
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, torch.autograd.grad(other, a, retain_graph=True)[0], rtol=2e-2, atol=1e-3)


def test_distilled_contrastive_loss_sends_no_gradient_to_teacher_and_keys():
    features, teacher, keys = leaves((4, 3), (4, 3), (6, 3))
    distilled_contrastive_loss(features, teacher, keys, number(3.0), 0.4).backward()
    assert features.grad.abs().sum() > 0
    assert teacher.grad is None
    assert keys.grad is None


@given(batch=st.integers(1, 8), rows=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_contrastive_loss_does_not_depend_on_blocks_or_order(batch, rows, seed):
    torch.manual_seed(seed)
    a, b = (x.detach() for x in leaves((batch, 4), (batch, 4)))
    order = torch.randperm(batch)
    whole = contrastive_loss(a, b, torch.tensor(9.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_BYTES", rows * batch * 8)
        torch.testing.assert_close(contrastive_loss(a[order], b[order], torch.tensor(9.0)), whole)
    torch.testing.assert_close(contrastive_loss(b, a, torch.tensor(9.0)), whole)


def test_contrastive_losses_same_bits_twice(blocks):
    a, b = leaves((7, 5), (7, 5))

    def run():
        loss = contrastive_loss(a, b, number(9.0)) + sigmoid_contrastive_loss(a, b, number(9.0), number(-3.0))
        return loss, *torch.autograd.grad(loss, (a, b))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


# ------------------------------------------------------------------------------------------------------------- hard negatives


def test_hard_negatives_invert_the_distribution_function(blocks):
    queries, keys = (x.detach() for x in leaves((7, 5), (7, 5)))
    scale = torch.tensor(6.0, dtype=torch.float64)
    weights = torch.softmax(scale * queries @ keys.T, 1) + 1e-4
    weights.fill_diagonal_(0.0)
    edges = torch.cat([torch.zeros(7, 1).double(), (weights / weights.sum(1, keepdim=True)).cumsum(1)], 1)
    for column in range(7):
        middle = (edges[:, column] + edges[:, column + 1]) / 2
        drawn = torch.ops.vlp_fast.hard_negatives_v1(queries, keys, scale, middle, 1e-4)
        expected = torch.full((7,), column)
        assert torch.equal(drawn[torch.arange(7) != column], expected[torch.arange(7) != column])
        assert drawn[column] != column


def test_hard_negatives_stay_within_the_batch_whatever_rounding_does():
    queries = torch.eye(5) * 1e4  # each row's own weight is 1 and all others 0
    for uniform in (0.0, 0.5, 1.0 - 2**-24, 1.0):
        drawn = torch.ops.vlp_fast.hard_negatives_v1(queries, queries, torch.tensor(1.0), torch.full((5,), uniform), 0.0)
        assert ((drawn >= 0) & (drawn < 5) & (drawn != torch.arange(5))).all()


# --------------------------------------------------------------------------------------------------- registration and errors


def test_contrastive_ops_are_registered_right():
    a, b = leaves((4, 3), (4, 3))
    scale, bias, uniform = number(5.0), number(-2.0), torch.rand(4, dtype=torch.float64)
    torch.library.opcheck(torch.ops.vlp_fast.contrastive_forward_v1, (a, b, scale))
    torch.library.opcheck(torch.ops.vlp_fast.distilled_contrastive_forward_v1, (a, b.detach(), b.detach(), scale, 0.4, True))
    torch.library.opcheck(torch.ops.vlp_fast.sigmoid_contrastive_forward_v1, (a, b, scale, bias, True))
    torch.library.opcheck(torch.ops.vlp_fast.hard_negatives_v1, (a.detach(), b.detach(), scale.detach(), uniform, 1e-4))


def test_contrastive_losses_compile_whole():
    a, b = leaves((4, 3), (4, 3))
    scale = number(5.0)

    def run(a, b, scale):
        distilled = distilled_contrastive_loss(a, b, torch.cat([b, b + 1]), scale, 0.4)
        return contrastive_loss(a * 2, b, scale) + distilled + sigmoid_contrastive_loss(a, b, scale, -scale)

    eager = torch.autograd.grad(run(a, b, scale), (a, b, scale))
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(a, b, scale), (a, b, scale))
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("function", "forward", "backward"),
    [
        (lambda a, b, s: contrastive_loss(a, b, s), 1, 3),
        (lambda a, b, s: distilled_contrastive_loss(a, b, b, s, 0.4), 2, 1),
        (lambda a, b, s: sigmoid_contrastive_loss(a, b, s, s), 1, 2),
    ],
    ids=["contrastive", "distilled", "sigmoid"],
)
def test_contrastive_losses_meta_and_flops(function, forward, backward):
    inputs = [torch.zeros(s, device="meta", requires_grad=True) for s in ((6, 5), (6, 5), ())]
    with FlopCounterMode(display=False) as counter:
        loss = function(*inputs)
        assert counter.get_total_flops() == forward * 2 * 6 * 6 * 5
        loss.backward()
    assert counter.get_total_flops() == (forward + backward) * 2 * 6 * 6 * 5
    assert inputs[0].grad.shape == (6, 5)


ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: contrastive_loss(x, x[:2], ONE), r"a and b must have one shape .* received \[3, 4\] and \[2, 4\]"),
        (lambda x: contrastive_loss(x[:0], x[:0], ONE), "at least one row"),
        (lambda x: contrastive_loss(x[0], x, ONE), r"a must be \[rows, dim\]"),
        (lambda x: contrastive_loss(x, x, 14.0), "logit_scale must be a tensor of one number; received 14.0"),
        (
            lambda x: sigmoid_contrastive_loss(x, x, ONE, torch.ones(2)),
            r"logit_bias must be a tensor of one number; received \[2\]",
        ),
        (lambda x: distilled_contrastive_loss(x, x, x[:2], ONE, 0.4), "keys at least as many rows"),
        (lambda x: distilled_contrastive_loss(x, x, x, ONE, 1.1), r"alpha must be in \[0, 1\]; received 1.1"),
        (lambda x: hard_negatives(x, x[:2], ONE), "queries and keys must have one shape"),
        (lambda x: hard_negatives(x[:1], x[:1], ONE), "at least 2 pairs in the batch; received 1"),
        (lambda x: hard_negatives(x, x, ONE, floor=-1.0), "floor must be at least 0; received -1.0"),
        (lambda x: hard_negatives(x, torch.zeros(3, 5), ONE), "keys must have the width and device of queries"),
    ],
)
def test_contrastive_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(3, 4))
