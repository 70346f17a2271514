"""Contrastive losses and hard negatives, on both backends, against the whole matrix of similarities in plain PyTorch."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vlp_fast import reference
from vlp_fast.ops import contrastive_loss, distilled_contrastive_loss, hard_negatives, sigmoid_contrastive_loss
from vlp_fast.testing import assert_as_accurate_as, outputs_and_gradients

torch_backend = sys.modules["vlp_fast.ops._contrastive_torch"]
BACKENDS = ["torch", "triton"]
DRAW = torch.ops.vlp_fast.hard_negatives_v2


@pytest.fixture(params=[1, 3, 100], ids=lambda n: f"{n} rows a block")
def blocks(request, monkeypatch):
    """So many rows at a time on the torch backend, for 7 fp64 columns; as few as there can be on the triton backend."""
    monkeypatch.setattr(torch_backend, "BLOCK_BYTES", request.param * 7 * 8)
    if request.param == 1:
        one_tile_a_block(monkeypatch)


def one_tile_a_block(monkeypatch):
    kernels, similarity = (pytest.importorskip(f"vlp_fast.kernels.{name}") for name in ("contrastive", "_similarity"))
    monkeypatch.setattr(kernels, "BLOCK_BYTES", 1)
    monkeypatch.setattr(similarity, "PART_BYTES", 1)


def leaves(*shapes, dtype=torch.float64, device="cpu"):
    features = (F.normalize(torch.randn(s, dtype=torch.float64), dim=-1) for s in shapes)
    return [x.to(device, dtype).requires_grad_() for x in features]


def number(value, dtype=torch.float64, device="cpu"):
    return torch.tensor(value, dtype=dtype, device=device, requires_grad=True)


def dtype_of(backend):
    """The widest that a backend computes in."""
    return torch.float64 if backend == "torch" else torch.float32


def compare(function, plain, inputs, dout=1.7):
    """Value and gradients as accurate as those of `plain` at the same dtypes, held against `plain` in float64."""
    douts = [torch.tensor(dout, dtype=torch.promote_types(inputs[0].dtype, torch.float32), device=inputs[0].device)]
    exact_inputs = [x.detach().double() for x in inputs]
    results = [
        outputs_and_gradients(function, inputs, douts),
        outputs_and_gradients(lambda *x: plain(*x).to(douts[0].dtype), inputs, douts),
        outputs_and_gradients(plain, exact_inputs, [douts[0].double()]),
    ]
    # a loss is a difference of numbers as large as its logits, a gradient a sum of weights that err by epsilon times the logits
    logits = inputs[-1 if len(inputs) < 4 else 2].abs().item()
    sizes = [max(logits, 1.0), logits**2 / (8 * len(inputs[0]))]
    for i, (actual, baseline, exact) in enumerate(zip(*results, strict=True)):
        scale = max(exact.abs().max().item(), sizes[min(i, 1)])
        assert_as_accurate_as(actual, baseline, exact, scale=scale, what=f"gradient {i}" if i else "the loss")


SIZES = [(1, 4), (7, 5), (70, 40), (130, 33)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_contrastive_loss_matches_reference(size, scale, backend, blocks, device, poison):
    dtype = dtype_of(backend)
    a, b = leaves(size, size, dtype=dtype, device=device)
    compare(lambda *x: contrastive_loss(*x, backend=backend), reference.contrastive_loss, [a, b, number(scale, dtype, device)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("size", "queue"), [((7, 5), 0), ((7, 5), 9), ((1, 4), 3), ((19, 33), 1100)])
def test_distilled_contrastive_loss_matches_reference(size, queue, alpha, backend, blocks, device, poison):
    dtype = dtype_of(backend)
    features, teacher, keys = leaves(size, size, (size[0] + queue, size[1]), dtype=dtype, device=device)
    constants = teacher.detach(), keys.detach()
    compare(
        lambda f, s: distilled_contrastive_loss(f, *constants, s, alpha, backend=backend),
        lambda f, s: reference.distilled_contrastive_loss(f, *(x.to(f.dtype) for x in constants), s, alpha),
        [features, number(14.0, dtype, device)],
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("first", "others"), [(0, 0), (3, 5)])
def test_sigmoid_contrastive_loss_matches_reference(first, others, size, backend, blocks, device, poison):
    dtype = dtype_of(backend)
    a, b = leaves(size, (size[0] + others, size[1]), dtype=dtype, device=device)
    compare(
        lambda *x: sigmoid_contrastive_loss(*x, first=first, backend=backend),
        lambda *x: reference.sigmoid_contrastive_loss(*x, first=first),
        [a, b, number(10.0, dtype, device), number(-10.0, dtype, device)],
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [-90.0, -16.0, -3.0, 0.0, 20.0])
def test_sigmoid_contrastive_loss_keeps_the_digits_of_small_losses(bias, backend):
    """-log sigmoid(16) is 1.1e-7: formed as log(1 + e), nothing of it would be left."""
    a, one, shift = torch.zeros(3, 4), torch.tensor(1.0), torch.tensor(bias)
    loss = sigmoid_contrastive_loss(a, a, one, shift, backend=backend)
    pairs, others = (F.softplus(torch.tensor(x, dtype=torch.float64)) for x in (-bias, bias))
    torch.testing.assert_close(loss.double(), pairs + 2 * others, rtol=1e-6, atol=0.0)
    alone = sigmoid_contrastive_loss(a[:1], a[:1], one, -shift, backend=backend)  # a single pair: no large terms beside it
    torch.testing.assert_close(alone.double(), others, rtol=1e-6, atol=1e-38)


def test_reference_of_contrastive_losses_gradcheck():
    a, b = leaves((3, 4), (3, 4))
    assert torch.autograd.gradcheck(reference.contrastive_loss, (a, b, number(3.0)))
    assert torch.autograd.gradcheck(reference.sigmoid_contrastive_loss, (a, b, number(3.0), number(-1.0)))


def test_contrastive_losses_gradcheck(blocks):
    a, b = leaves((3, 4), (3, 4))
    assert torch.autograd.gradcheck(lambda *x: contrastive_loss(*x, backend="torch"), (a, b, number(3.0)))
    assert torch.autograd.gradcheck(lambda *x: sigmoid_contrastive_loss(*x, backend="torch"), (a, b, number(3.0), number(-1.0)))
    # the teacher's use of the scale is a constant, so the numerical check is of the features alone, or without a teacher
    teacher, keys, scale = torch.randn(3, 4).double(), torch.randn(8, 4).double(), number(3.0)

    def distilled(f, s, alpha):
        return distilled_contrastive_loss(f, teacher, keys, s, alpha, backend="torch")

    assert torch.autograd.gradcheck(lambda f: distilled(f, scale.detach(), 0.4), (a,))
    assert torch.autograd.gradcheck(lambda f, s: distilled(f, s, 0.0), (a, scale))


@pytest.mark.parametrize("backend", BACKENDS)
def test_contrastive_loss_of_one_pair_is_zero(backend):
    dtype = dtype_of(backend)
    a, b = leaves((1, 4), (1, 4), dtype=dtype)
    loss = contrastive_loss(a, b, number(5.0, dtype), backend=backend)
    assert loss.item() == pytest.approx(0.0, abs=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_contrastive_loss_of_identical_features_is_the_logarithm_of_the_batch(backend):
    same = F.normalize(torch.ones(6, 8), dim=1).requires_grad_()
    loss = contrastive_loss(same, same, number(100.0, torch.float32), backend=backend)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(6.0).log())
    assert same.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_contrastive_losses_of_16_bit_features_are_fp32(dtype, backend, blocks, device):
    """Also under autocast, and when the backward runs in it."""
    a, b = leaves((70, 33), (70, 33), dtype=dtype, device=device)
    scale, bias = number(20.0, torch.float32, device), number(-5.0, torch.float32, device)
    teacher = b.detach()
    functions = [
        (lambda a, b, s, t: contrastive_loss(a, b, s, backend=backend), lambda a, b, s, t: reference.contrastive_loss(a, b, s)),
        (lambda *x: sigmoid_contrastive_loss(*x, backend=backend), reference.sigmoid_contrastive_loss),
        (
            lambda a, b, s, t: distilled_contrastive_loss(a, teacher, teacher, s, 0.4, backend=backend),
            lambda a, b, s, t: reference.distilled_contrastive_loss(a, teacher.to(a.dtype), teacher.to(a.dtype), s, 0.4),
        ),
    ]
    for function, plain in functions:
        exact = plain(*(x.detach().double() for x in (a, b, scale, bias)))
        with torch.autocast(device, torch.bfloat16):
            loss = function(a, b, scale, bias)
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=2e-6)
            gradients = torch.autograd.grad(loss * 3.0, (a, b, scale, bias), allow_unused=True)
        wide = [x.detach().double().requires_grad_() for x in (a, b, scale, bias)]
        expected = torch.autograd.grad(plain(*wide) * 3.0, wide, allow_unused=True)
        for x, actual, e in zip((a, b, scale, bias), gradients, expected, strict=True):
            if e is not None:
                assert actual.dtype == x.dtype
                bound = (
                    (16 if x.dtype == torch.float32 else 2)
                    * torch.finfo(x.dtype).eps
                    * max(e.abs().max().item(), 0.1 if e.dim() == 0 else 0)
                )
                assert (actual.double() - e).abs().max() <= bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_contrastive_losses_take_strided_features(backend, device):
    """Transposed, and rows that are all the same memory."""
    dtype = dtype_of(backend)
    (wide,) = leaves((9, 20), dtype=dtype, device=device)
    scale = number(9.0, dtype, device)
    compare(lambda x, s: contrastive_loss(x.T[:, :9], x[0].expand(20, 20)[:, :9], s, backend=backend),
            lambda x, s: reference.contrastive_loss(x.T[:, :9], x[0].expand(20, 20)[:, :9], s), [wide, scale])  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_distilled_contrastive_loss_sends_no_gradient_to_teacher_and_keys(backend):
    dtype = dtype_of(backend)
    features, teacher, keys = leaves((4, 3), (4, 3), (6, 3), dtype=dtype)
    distilled_contrastive_loss(features, teacher, keys, number(3.0, dtype), 0.4, backend=backend).backward()
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
        patch.setattr(torch_backend, "BLOCK_BYTES", rows * batch * 8)
        torch.testing.assert_close(contrastive_loss(a[order], b[order], torch.tensor(9.0)), whole)
    torch.testing.assert_close(contrastive_loss(b, a, torch.tensor(9.0)), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_contrastive_losses_same_bits_twice(backend, blocks):
    dtype = dtype_of(backend)
    a, b = leaves((70, 5), (70, 5), dtype=dtype)

    def run():
        scale, bias = number(9.0, dtype), number(-3.0, dtype)
        loss = contrastive_loss(a, b, scale, backend=backend) + sigmoid_contrastive_loss(a, b, scale, bias, backend=backend)
        return loss, *torch.autograd.grad(loss, (a, b, scale, bias))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


# ------------------------------------------------------------------------------------------------------------- hard negatives


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "more", "first"), [(7, 0, 0), (5, 9, 4), (3, 150, 70)])
@pytest.mark.parametrize("floor", [0.0, 1e-4])
def test_hard_negatives_invert_the_distribution_function(floor, batch, more, first, backend, blocks, device):
    """A number from the middle of a key's share draws that key."""
    queries, keys = (x.detach() for x in leaves((batch, 5), (batch + more, 5), dtype=dtype_of(backend), device=device))
    own = set(range(first, first + batch))
    columns = own | set(range(0, batch + more, 1 if more < 100 else 13))
    check_draws(queries, keys, 6.0, floor, first, backend, columns)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_negatives_of_rows_that_are_sure_of_their_own(backend, device):
    """What is left beside a weight of 1 - 1e-9 is drawn from in its own proportions, not from the rounding of a difference."""
    (keys,) = (x.detach() for x in leaves((6, 3), dtype=torch.float32, device=device))
    check_draws(keys, keys, 60.0, 0.0, 0, backend, range(6))


def check_draws(queries, keys, scale, floor, first, backend, columns):
    exact_queries, exact_keys = queries.double(), keys.double()
    weights = torch.softmax(scale * exact_queries @ exact_keys.T, 1) + floor
    weights.diagonal(first).fill_(0.0)
    shares = weights / weights.sum(1, keepdim=True)
    edges = torch.cat([shares.new_zeros(len(shares), 1), shares.cumsum(1)], 1)
    for column in columns:
        middle = (edges[:, column] + edges[:, column + 1]) / 2
        plain = reference.hard_negatives(exact_queries, exact_keys, scale, middle, floor=floor, first=first)
        factor = torch.tensor(scale, dtype=queries.dtype, device=queries.device)
        drawn = DRAW(queries, keys, factor, middle.to(queries.dtype), floor, first, backend)
        wide_enough = shares[:, column] > 1e-4  # 0 for a row's own
        assert (drawn[wide_enough] == column).all()
        assert (plain[wide_enough] == column).all()
        assert (drawn != torch.arange(first, first + len(drawn), device=drawn.device)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [2, 5, 67])
def test_hard_negatives_stay_within_the_batch_whatever_rounding_does(batch, backend):
    queries = torch.eye(batch) * 1e4  # each row's own weight is 1 and all others 0
    for uniform in (0.0, 0.5, 1.0 - 2**-24, 1.0):
        drawn = DRAW(queries, queries, torch.tensor(1.0), torch.full((batch,), uniform), 0.0, 0, backend)
        assert ((drawn >= 0) & (drawn < batch) & (drawn != torch.arange(batch))).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_negatives_of_one_generator_are_the_same(backend, device):
    queries, keys = (x.detach() for x in leaves((9, 5), (9, 5), dtype=torch.float32, device=device))

    def draw():
        generator = torch.Generator(device).manual_seed(3)
        return hard_negatives(queries, keys, 14.0, generator=generator, backend=backend)

    assert torch.equal(draw(), draw())


# --------------------------------------------------------------------------------------------------- registration and errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_contrastive_ops_are_registered_right(backend):
    dtype = dtype_of(backend)
    a, b = leaves((4, 3), (4, 3), dtype=dtype)
    scale, bias, uniform = number(5.0, dtype), number(-2.0, dtype), torch.rand(4, dtype=dtype)
    ops, constants = torch.ops.vlp_fast, (b.detach(), b.detach())
    torch.library.opcheck(ops.contrastive_forward_v2, (a, b, scale, backend))
    torch.library.opcheck(ops.distilled_contrastive_forward_v2, (a, *constants, scale, 0.4, True, backend))
    torch.library.opcheck(ops.sigmoid_contrastive_forward_v2, (a, b, scale, bias, 0, True, backend))
    torch.library.opcheck(DRAW, (a.detach(), b.detach(), scale.detach(), uniform, 1e-4, 0, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_contrastive_losses_compile_whole(backend):
    dtype = dtype_of(backend)
    a, b = leaves((4, 3), (4, 3), dtype=dtype)
    scale = number(5.0, dtype)

    def run(a, b, scale):
        distilled = distilled_contrastive_loss(a, b, torch.cat([b, b + 1]), scale, 0.4, backend=backend)
        sigmoid = sigmoid_contrastive_loss(a, b, scale, -scale, backend=backend)
        return contrastive_loss(a * 2, b, scale, backend=backend) + distilled + sigmoid

    eager = torch.autograd.grad(run(a, b, scale), (a, b, scale))
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(a, b, scale), (a, b, scale))
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("function", "forward", "backward"),
    [
        (lambda a, b, s: contrastive_loss(a, b, s), 1, 3),
        (lambda a, b, s: distilled_contrastive_loss(a, b, b, s, 0.4), 2, 1),
        (lambda a, b, s: sigmoid_contrastive_loss(a, b, s, s), 1, 2),
    ],
    ids=["contrastive", "distilled", "sigmoid"],
)
def test_contrastive_losses_meta_and_flops(function, forward, backward, dtype):
    a, b = (torch.zeros(6, 5, device="meta", dtype=dtype, requires_grad=True) for _ in range(2))
    scale = torch.zeros((), device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        loss = function(a, b, scale)
        assert counter.get_total_flops() == forward * 2 * 6 * 6 * 5
        loss.backward()
    assert counter.get_total_flops() == (forward + backward) * 2 * 6 * 6 * 5
    assert loss.dtype == torch.float32
    assert a.grad.shape == (6, 5)
    assert a.grad.dtype == dtype


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
        (
            lambda x: sigmoid_contrastive_loss(x, x, ONE, ONE, first=1),
            "b must have at least first .* 3 rows, a batch of 3 and first 1",
        ),
        (lambda x: hard_negatives(x, x[:2], ONE), "keys must have at least first .* 2 rows, a batch of 3 and first 0"),
        (lambda x: hard_negatives(x[:1], x[:1], ONE), "at least 2 pairs in the batch; received 1"),
        (lambda x: hard_negatives(x, x, ONE, floor=-1.0), "floor must be at least 0; received -1.0"),
        (
            lambda x: contrastive_loss(x.double(), x.double(), ONE, backend="triton"),
            "takes float32, float16 or bfloat16; received",
        ),
        (
            lambda x: contrastive_loss(x, x, ONE, backend="xformers"),
            "backend of contrastive_loss must be triton, torch or None",
        ),
        (lambda x: hard_negatives(x, torch.zeros(3, 5), ONE), "keys must have the width and device of queries"),
    ],
)
def test_contrastive_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(3, 4))
