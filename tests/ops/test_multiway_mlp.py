"""multiway_mlp: the values and gradients of its three operations, from less that is kept."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlp_fast import reference
from vlp_fast.modules import MLP, Linear, MultiwayFFN
from vlp_fast.ops import mlp, multiway_layer_norm, multiway_linear, multiway_mlp
from vlp_fast.testing import assert_matches_reference, outputs_and_gradients

OFFSETS = [(0, 3, 7), (0, 0, 7), (0, 2, 2, 7), (0, 7), (0, 0, 0)]
WIDTH, HIDDEN, OUT = 6, 12, 5
OPS = torch.ops.vlp_fast


@pytest.fixture(params=["torch", "triton"], scope="module")
def backend(request):
    return request.param


def inputs_of(offsets, device, dtype=torch.float32):
    """x, both weights and biases, weight and bias of the norm, residual."""
    rows, experts = offsets[-1], len(offsets) - 1
    shapes = [
        (rows, WIDTH), (experts, HIDDEN, WIDTH), (experts, HIDDEN), (experts, OUT, HIDDEN), (experts, OUT),
        (experts, HIDDEN), (experts, HIDDEN), (rows, OUT),
    ]  # fmt: skip
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def as_function(function, offsets, parts, **options):
    """multiway_mlp, of ops or reference, as a function of the tensors of `inputs_of` that `parts` names."""

    def run(x, *rest):
        rest = list(rest)
        weight1, bias1 = rest.pop(0), rest.pop(0) if "bias" in parts else None
        weight2, bias2 = rest.pop(0), rest.pop(0) if "bias" in parts else None
        norm = (rest.pop(0), rest.pop(0)) if "norm" in parts else None
        residual = rest.pop(0) if "residual" in parts else None
        return function(x, weight1, bias1, weight2, bias2, offsets, norm=norm, residual=residual, **options)

    return run


def chosen(inputs, parts):
    x, weight1, bias1, weight2, bias2, *norm, residual = inputs
    first = [x, weight1, bias1, weight2, bias2] if "bias" in parts else [x, weight1, weight2]
    return first + (norm if "norm" in parts else []) + ([residual] if "residual" in parts else [])


PARTS = ["bias", "norm", "bias norm residual", "bias residual"]


CASES = [(offsets, parts, torch.float32) for offsets in OFFSETS for parts in PARTS]
CASES += [
    (offsets, "bias norm residual", dtype) for offsets in ((0, 3, 7), (0, 7)) for dtype in (torch.float16, torch.bfloat16)
]


@pytest.mark.parametrize(("offsets", "parts", "dtype"), CASES, ids=str)
def test_multiway_mlp_is_the_reference(offsets, parts, dtype, backend, device, poison):
    inputs = chosen(inputs_of(offsets, device, dtype), parts)
    ours = as_function(multiway_mlp, offsets, parts, backend=backend)
    assert_matches_reference(ours, as_function(reference.multiway_mlp, offsets, parts), inputs, factor=3.0)


@pytest.mark.parametrize("parts", PARTS)
def test_multiway_mlp_is_its_operations_to_the_bit(parts, backend, device):
    offsets = (0, 3, 7)

    def apart(x, weight1, bias1, weight2, bias2, offsets, *, norm, residual):
        hidden = multiway_linear(x, weight1, bias1, offsets, activation="gelu", backend=backend)
        hidden = hidden if norm is None else multiway_layer_norm(hidden, *norm, offsets, backend=backend)
        return multiway_linear(hidden, weight2, bias2, offsets, residual=residual, backend=backend)

    inputs = chosen(inputs_of(offsets, device), parts)
    ours = as_function(multiway_mlp, offsets, parts, backend=backend)
    found, expected = (outputs_and_gradients(f, inputs) for f in (ours, as_function(apart, offsets, parts)))
    for a, b in zip(found, expected, strict=True):
        # the kernel's GELU of what it has summed, PyTorch's of what was kept
        torch.testing.assert_close(a, b, rtol=0.0 if backend == "torch" else 1e-5, atol=0.0 if backend == "torch" else 1e-5)
    with torch.no_grad():
        assert torch.equal(ours(*inputs), expected[0])


def test_multiway_mlp_gradients_of_some_inputs_alone(backend, device):
    inputs = inputs_of((0, 3, 7), device)
    ours = as_function(multiway_mlp, (0, 3, 7), "bias norm residual", backend=backend)
    dout = torch.ones(7, OUT, device=device)
    whole = outputs_and_gradients(ours, inputs, [dout])[1:]
    for i, expected in enumerate(whole):
        leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate(inputs)]
        (alone,) = torch.autograd.grad(ours(*leaves), [leaves[i]], dout)
        torch.testing.assert_close(alone, expected)
    leaves = [t.clone().requires_grad_() for t in inputs]
    ours(*leaves).sum().backward()  # the gradient of the output has strides of 0
    for leaf, expected in zip(leaves, whole, strict=True):
        torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("parts", ["bias norm residual", "bias"])
def test_multiway_mlp_keeps_the_values_before_the_gelu_alone(parts, backend, device):
    rows, offsets = 40, (0, 30, 40)
    inputs = [t.requires_grad_() for t in chosen(inputs_of(offsets, device), parts)]

    def kept(function):
        numbers = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.setdefault(t.data_ptr(), t), lambda t: t):
            function(*inputs)
        return sum(t.numel() for t in numbers.values() if t.shape[:1] == (rows,))

    assert kept(as_function(multiway_mlp, offsets, parts, backend=backend)) == rows * (WIDTH + HIDDEN)


def test_multiway_mlp_under_autocast_computes_as_linear_layers_do(device):
    inputs, parts = inputs_of((0, 3, 7), device), "bias norm residual"
    ours, dout = as_function(multiway_mlp, (0, 3, 7), parts, backend="torch"), torch.ones(7, OUT, device=device)
    with torch.autocast(device, torch.bfloat16):
        found = outputs_and_gradients(ours, inputs, [dout])
    exact = outputs_and_gradients(ours, [t.double() for t in inputs], [dout.double()])
    assert {t.dtype for t in found} == {torch.float32}  # the residual's, and the parameters'
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.05, atol=0.02 * b.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["norm residual bias", ""])
def test_multiway_mlp_ops_are_registered_right(parts, backend, device):
    offsets = [0, 3, 7]
    x, weight1, bias1, weight2, bias2, *norm, residual = (t.requires_grad_() for t in inputs_of(tuple(offsets), device))
    bias1, bias2 = (bias1, bias2) if "bias" in parts else (None, None)
    norm = norm if "norm" in parts else [None, None]
    residual = residual if "residual" in parts else None
    torch.library.opcheck(
        OPS.multiway_mlp_v1.default, (x, weight1, bias1, weight2, bias2, *norm, residual, offsets, 1e-5, backend)
    )
    x, weight1, weight2, *norm = (None if t is None else t.detach() for t in (x, weight1, weight2, *norm))
    dout, pre = torch.randn(7, OUT, device=device), torch.randn(7, HIDDEN, device=device)
    for needs in ([True] * 5, [True, False, False, False, False], [False, True, True, True, True], [False] * 5):
        arguments = (dout, x, weight1, weight2, pre, *norm, offsets, 1e-5, needs, backend)
        torch.library.opcheck(OPS.multiway_mlp_backward_v1.default, arguments)


def test_multiway_mlp_compiles_whole_and_counts_its_products(backend, device):
    offsets, parts = (0, 3, 7), "bias norm residual"
    inputs = inputs_of(offsets, device)
    ours = as_function(multiway_mlp, offsets, parts, backend=backend)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs_and_gradients(compiled, inputs), outputs_and_gradients(ours, inputs), strict=True):
        torch.testing.assert_close(a, b)
    with FlopCounterMode(display=False) as counter:
        ours(*(t.requires_grad_() for t in inputs)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 7 * HIDDEN * (WIDTH + OUT)


@pytest.mark.parametrize(
    ("place", "shape", "says"),
    [
        (0, (7, 9), "x must have weight1's input width 6; received 9"),
        (1, (2, 12), r"weight1 must have 3 dimensions, experts first; received shape \[2, 12\]"),
        (2, (2, 11), r"bias1 must be \[2, 12\], a row per expert; received \[2, 11\]"),
        (
            3,
            (2, 5, 11),
            r"weight2 must be \[2, out, 12\], with weight1's experts and reading its outputs; received \[2, 5, 11\]",
        ),
        (3, (3, 5, 12), r"weight2 must be \[2, out, 12\].*received \[3, 5, 12\]"),
        (4, (2, 4), r"bias2 must be \[2, 5\], a row per expert; received \[2, 4\]"),
        (5, (2, 5), r"norm must be weight and bias, \[2, 12\] both; received \[2, 5\] and \[2, 12\]"),
        (7, (7, 4), r"residual must be \[7, 5\] on .*, as the output; received \[7, 4\]"),
    ],
)
def test_multiway_mlp_says_what_does_not_fit(place, shape, says, backend, device):
    inputs = inputs_of((0, 3, 7), device)
    inputs[place] = torch.zeros(shape, device=device, requires_grad=True)
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient), pytest.raises(ValueError, match=says):
            as_function(multiway_mlp, (0, 3, 7), "bias norm residual", backend=backend)(*inputs)


def test_multiway_mlp_says_which_dtype_does_not_fit(device):
    inputs = inputs_of((0, 3, 7), device)
    inputs[3] = inputs[3].double().requires_grad_()
    with pytest.raises(ValueError, match="weight2 must have x's dtype and device, torch.float32 on .*; received torch.float64"):
        as_function(multiway_mlp, (0, 3, 7), "bias", backend="torch")(*chosen(inputs, "bias"))


# ----------------------------------------------------------------------------------------------------------------- modules


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_mlp_module_with_and_without_the_operation(dtype):
    module, x = MLP(8, 16).to(dtype), torch.randn(9, 8, dtype=dtype)

    def run(x, *parameters):
        names = dict(zip(dict(module.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(module, names, (x,))

    inputs = [x, *(p.detach() for p in module.parameters())]
    fused = outputs_and_gradients(run, inputs)
    module.fc1.register_forward_hook(lambda *args: None)  # a watched layer is called
    for a, b in zip(fused, outputs_and_gradients(run, inputs), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(fused[0], mlp(x, *(p.detach() for p in module.parameters())))


def test_a_layer_in_another_ones_place_is_called():
    class Twice(Linear):
        def forward(self, input):
            return 2.0 * super().forward(input)

    module, x = MLP(8, 16), torch.randn(9, 8)
    plain = module(x)
    other = Twice(16, 8)
    other.load_state_dict(module.fc2.state_dict())
    module.fc2 = other
    torch.testing.assert_close(module(x), 2.0 * plain)
    feed = MultiwayFFN(8, 16)
    calls = []
    before = feed(x, (0, 4, 9))
    feed.norm.register_forward_hook(lambda *args: calls.append(args))
    torch.testing.assert_close(feed(x, (0, 4, 9)), before)
    assert len(calls) == 1
