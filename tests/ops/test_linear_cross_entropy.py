"""linear_cross_entropy: both backends against the reference, which is checked against PyTorch; memory, registration, errors."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vlp_fast import reference
from vlp_fast.ops import linear_cross_entropy
from vlp_fast.ops import linear_cross_entropy as op
from vlp_fast.testing import assert_matches_reference

BACKENDS = ["torch", "triton"]
module = sys.modules["vlp_fast.ops.linear_cross_entropy"]


@pytest.fixture
def small_chunks(monkeypatch):
    """Few rows at a time, so that small inputs make several chunks."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 37 * 4)


def make(n=11, dim=8, vocab_size=37, dtype=torch.float32, bias=True, ignored=3, device="cpu"):
    generator = torch.Generator().manual_seed(n)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    targets = torch.randint(vocab_size, (n,), generator=generator)
    targets[:ignored] = -100
    tensors = [random(n, dim), random(vocab_size, dim), *([random(vocab_size)] if bias else [])]
    return tensors, targets.to(device)


def call(function, targets, **options):
    return lambda hidden, weight, bias=None: function(hidden, weight, targets, bias, **options)


# --------------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
def test_reference_linear_cross_entropy_is_pytorchs(reduction, label_smoothing):
    (hidden, weight, bias), targets = make(dtype=torch.float64)
    rows = torch.tensor([0, 5, 5, 9])
    settings = {"label_smoothing": label_smoothing, "reduction": reduction}
    torch.testing.assert_close(
        reference.linear_cross_entropy(hidden, weight, targets, bias, **settings),
        F.cross_entropy(F.linear(hidden, weight, bias), targets, **settings),
    )
    torch.testing.assert_close(
        reference.linear_cross_entropy(hidden, weight, targets[rows], bias, rows=rows, **settings),
        F.cross_entropy(F.linear(hidden[rows], weight, bias), targets[rows], **settings),
    )


@pytest.mark.parametrize("function", [reference.linear_cross_entropy, linear_cross_entropy], ids=["reference", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_gradcheck(function, reduction, small_chunks):
    tensors, targets = make(n=5, dim=3, dtype=torch.float64, ignored=1)
    inputs = tuple(t.requires_grad_() for t in tensors)
    run = call(function, targets, label_smoothing=0.2, reduction=reduction)
    # not the numerical check of the op's other outputs, which have no gradient
    assert torch.autograd.gradcheck(run, inputs)


# ---------------------------------------------------------------------------------------------------------------- backends


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("label_smoothing", "bias"), [(0.0, True), (0.1, True), (0.1, False)])
def test_linear_cross_entropy_matches_reference(backend, reduction, label_smoothing, bias, device, small_chunks, poison):
    tensors, targets = make(bias=bias, device=device)
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    assert_matches_reference(
        call(linear_cross_entropy, targets, backend=backend, **options),
        call(reference.linear_cross_entropy, targets, **options),
        tensors,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("chunked", [True, False])
def test_linear_cross_entropy_half_precision(backend, dtype, chunked, device, request):
    if chunked:
        request.getfixturevalue("small_chunks")
    tensors, targets = make(dtype=dtype, device=device)
    tensors = [t * 0.5 for t in tensors]
    # the loss is fp32 here and 16-bit in the baseline
    assert_matches_reference(
        lambda *t: call(linear_cross_entropy, targets, backend=backend, label_smoothing=0.1)(*t).to(dtype),
        call(reference.linear_cross_entropy, targets, label_smoothing=0.1),
        tensors,
    )
    assert linear_cross_entropy(tensors[0], tensors[1], targets, backend=backend).dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "dim", "vocab_size"), [(1, 8, 1), (3, 5, 1100), (40, 16, 2)])
def test_linear_cross_entropy_sizes(backend, n, dim, vocab_size, device):
    tensors, targets = make(n, dim, vocab_size, ignored=0, device=device)
    assert_matches_reference(
        call(linear_cross_entropy, targets, backend=backend, label_smoothing=0.1),
        call(reference.linear_cross_entropy, targets, label_smoothing=0.1),
        tensors,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e3, 1e4])
def test_linear_cross_entropy_large_logits(backend, size, device):
    tensors, targets = make(device=device)
    tensors[0] *= size
    run = call(linear_cross_entropy, targets, backend=backend)
    expected = call(reference.linear_cross_entropy, targets.cpu())(*(t.cpu().double() for t in tensors))
    torch.testing.assert_close(run(*tensors).cpu().double(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignored", [0, 4])
def test_linear_cross_entropy_of_no_row_is_zero(backend, ignored, device):
    tensors, targets = make(n=ignored, ignored=ignored, device=device)
    leaves = [t.requires_grad_() for t in tensors]
    loss = call(linear_cross_entropy, targets, backend=backend, label_smoothing=0.1)(*leaves)
    assert loss.item() == 0.0
    for grad in torch.autograd.grad(loss, leaves):
        assert (grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_cross_entropy_rows_are_those_that_enter(backend, device):
    (hidden, weight, bias), targets = make(device=device, ignored=0)
    rows = torch.tensor([2, 7, 7], device=device)
    leaf = hidden.clone().requires_grad_()
    loss = linear_cross_entropy(leaf, weight, targets[rows], bias, rows=rows, backend=backend)
    (dhidden,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(hidden[rows], weight, bias), targets[rows]))
    assert sorted(dhidden.abs().sum(1).nonzero()[:, 0].tolist()) == [2, 7]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_strided_inputs_and_gradient(backend, reduction, device):
    (hidden, weight, bias), targets = make(device=device)
    leaves = [hidden.T.contiguous().T.requires_grad_(), weight.T.contiguous().T.requires_grad_(), bias.requires_grad_()]
    loss = call(linear_cross_entropy, targets, backend=backend, reduction=reduction)(*leaves)
    grads = torch.autograd.grad(loss.sum() * 3.0, leaves)  # of stride 0
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(
        call(reference.linear_cross_entropy, targets, reduction=reduction)(*doubles).sum() * 3.0, doubles
    )
    for actual, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6)


def test_linear_cross_entropy_backward_twice():
    (hidden, weight, _), targets = make()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(*leaves, targets)
    first = torch.autograd.grad(loss * 2.0, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 2 * b)


def test_linear_cross_entropy_tied_weight_gets_both_gradients():
    _, targets = make(ignored=0)
    words = torch.randn(37, 8, requires_grad=True)
    ids = torch.arange(11)
    (actual,) = torch.autograd.grad(linear_cross_entropy(words[ids].tanh(), words, targets), words)
    (expected,) = torch.autograd.grad(F.cross_entropy(words[ids].tanh() @ words.T, targets), words)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_cross_entropy_same_bits_twice(backend, device, small_chunks):
    tensors, targets = make(n=40, device=device)
    leaves = [t.requires_grad_() for t in tensors]

    def run():
        loss = call(linear_cross_entropy, targets, backend=backend)(*leaves)
        return loss, *torch.autograd.grad(loss, leaves)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@given(n=st.integers(0, 9), chunk=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_linear_cross_entropy_does_not_depend_on_chunks_or_order(n, chunk, seed):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(n, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    targets = torch.randint(6, (n,))
    whole = linear_cross_entropy(hidden, weight, targets, reduction="sum")
    order = torch.randperm(n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", 4 * 6 * chunk)
        torch.testing.assert_close(linear_cross_entropy(hidden[order], weight, targets[order], reduction="sum"), whole)


# ------------------------------------------------------------------------------------------------------------------ memory

MEMORY = """
import resource, sys, torch
from vlp_fast.ops import linear_cross_entropy
rows, words, dim = 8192, 49408, 16
hidden = torch.randn(rows, dim, requires_grad=True)
weight = torch.randn(words, dim, requires_grad=True)
targets = torch.randint(words, (rows,))
linear_cross_entropy(hidden[:8], weight, targets[:8]).backward()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1).backward()
print((peak() - before) / (4 * rows * words))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in bytes elsewhere")
def test_linear_cross_entropy_needs_an_eighth_of_the_logits():
    """The largest resident size of a process: with 8192 rows and 49,408 words the logits would be 1.6 GB."""
    process = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    assert float(process.stdout) <= 1 / 8


# ------------------------------------------------------------------------------------------------------------ registration


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_opcheck(backend, reduction, device):
    tensors, targets = make(device=device)
    leaves = [t.requires_grad_() for t in tensors]
    arguments = (*leaves, targets, -100, 0.1, reduction, True, True, True, backend)
    torch.library.opcheck(torch.ops.vlp_fast.linear_cross_entropy_forward_v1, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_compiles_whole(backend, reduction, device):
    tensors, targets = make(device=device)
    leaves = [t.requires_grad_() for t in tensors]

    def run(hidden, weight, bias):
        return op(hidden * 2, weight, targets, bias, reduction=reduction, backend=backend).sum()

    eager = torch.autograd.grad(run(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("reduction", "backward"), [("mean", 2), ("none", 3)])
def test_linear_cross_entropy_meta_and_flops(reduction, backward):
    tensors, targets = make(device="meta")
    leaves = [t.requires_grad_() for t in tensors]
    product = 2 * 11 * 8 * 37
    with FlopCounterMode(display=False) as counter:
        loss = call(linear_cross_entropy, targets, reduction=reduction)(*leaves)
        assert counter.get_total_flops() == product
        loss.sum().backward()
    assert counter.get_total_flops() == (1 + backward) * product
    assert [t.grad.shape for t in leaves] == [t.shape for t in leaves]


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_cross_entropy_autocast(backend, device):
    tensors, targets = make(device=device)
    leaves = [t.requires_grad_() for t in tensors]
    with torch.autocast(device, torch.bfloat16):
        loss = call(linear_cross_entropy, targets, backend=backend)(*leaves)
        expected = F.cross_entropy(F.linear(*leaves).float(), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    for actual, exact in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, exact, rtol=5e-2, atol=2e-2)


def test_linear_cross_entropy_forms_no_gradient_that_nobody_needs(monkeypatch):
    asked = []
    run = module._Chunks.run
    monkeypatch.setattr(module._Chunks, "run", lambda self, *a: asked.append(a[3]) or run(self, *a))
    (hidden, weight, bias), targets = make()
    linear_cross_entropy(hidden, weight, targets, bias)
    linear_cross_entropy(hidden, weight.requires_grad_(), targets, bias).backward()
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, targets, bias)
    assert asked == [(False, False, False), (False, True, False), (False, False, False)]


# ------------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": torch.zeros(2, 2, 4)}, "hidden must be packed"),
        ({"weight": torch.zeros(5, 3)}, r"weight must be \[vocab_size, 4\]; received shape \[5, 3\]"),
        ({"weight": torch.zeros(5, 4, dtype=torch.float64)}, "must share one dtype"),
        ({"bias": torch.zeros(4)}, r"bias must be \[5\]"),
        ({"targets": torch.zeros(3)}, "targets must be int64"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, "one per row that enters"),
        ({"targets": torch.tensor([0, 5, 1])}, r"words 0 to 4 or ignore_index -100; targets\[1\] is 5"),
        ({"targets": torch.tensor([0, 1, -1])}, r"targets\[2\] is -1"),
        ({"rows": torch.zeros(3)}, "rows must be a flat tensor of whole numbers"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\]; received 1.5"),
        ({"reduction": "max"}, "reduction must be one of mean, sum, none; received 'max'"),
        ({"backend": "xformers"}, "has attention only"),
    ],
)
def test_linear_cross_entropy_errors(change, words):
    arguments = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(5, 4),
        "targets": torch.zeros(3, dtype=torch.int64),
        **change,
    }
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_that_is_kept_gives_its_gradients_again(dtype):
    """A loss of weight 1 hands on the gradients that its forward has formed: they must not be changed by who gets them."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(6, 8).to(dtype), torch.randn(11, 8).to(dtype), torch.randint(0, 11, (6,))
    weight.requires_grad_()
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    first = weight.grad.clone(), hidden.grad.clone()
    assert first[0].abs().max() > 0
    for times in (2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(weight.grad, times * first[0], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(hidden.grad, times * first[1], rtol=1e-2, atol=1e-2)
    weight.grad.zero_()
    loss.backward()
    torch.testing.assert_close(weight.grad, first[0])
