"""packed_weights: the same numbers, from copies that follow the weights; linear_gelu: linear and GELU as one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlp_fast.modules import MLP, Linear
from vlp_fast.ops import _products, linear, linear_gelu, multiway_linear, packed_weights, packing

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 8, 300])
@torch.no_grad()
def test_products_with_packed_weights_are_those_of_the_weights(rows, dtype):
    layer, x = Linear(48, 64).to(dtype), torch.randn(rows, 48).to(dtype)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    with packed_weights(layer):
        found = layer(x)
        assert packing.find_packed(layer.weight.t()).is_mkldnn
    torch.testing.assert_close(
        found.double(), expected, rtol=2e-6 if dtype == torch.float32 else 8e-3, atol=1e-5 if dtype == torch.float32 else 1e-2
    )
    assert found.dtype == dtype


@torch.no_grad()
def test_experts_are_packed_each_for_itself_and_their_transposes_are_not():
    weight = nn.Parameter(torch.randn(3, 16, 16))
    model = nn.ParameterDict({"weight": weight})
    x = torch.randn(6, 16)
    expected = torch.cat([x[:2] @ weight[0].t(), x[2:] @ weight[2].t()])
    with packed_weights(model):
        torch.testing.assert_close(multiway_linear(x, weight, None, (0, 2, 2, 6)), expected)
        # x @ weight, as a backward has it, is another product
        torch.testing.assert_close(_products.mm(x, weight[1]), x @ weight[1])
        assert packing.find_packed(weight[1]) is None


def test_a_changed_weight_is_packed_again_and_a_block_leaves_nothing():
    layer, x = Linear(8, 8), torch.randn(4, 8)
    with torch.no_grad(), packed_weights(layer):
        with packed_weights(layer):  # nested: the outer block's copies are used
            before = layer(x)
        layer.weight.mul_(2.0)
        layer.bias.mul_(2.0)
        torch.testing.assert_close(layer(x), 2.0 * before)
        layer.load_state_dict(Linear(8, 8).state_dict())
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not packing.any_packed()
    kept = packed_weights(layer)
    copies = []
    for _ in range(2):
        with torch.no_grad(), kept:
            layer(x)
            copies.append(packing.find_packed(layer.weight.t()))
    assert copies[0] is copies[1]
    with pytest.raises(KeyError, match="left"), packed_weights(layer):
        raise KeyError("left")
    assert not packing.any_packed()


def test_gradients_within_a_block_are_those_without():
    layer, x = Linear(8, 6), torch.randn(4, 8, requires_grad=True)
    expected = torch.autograd.grad(F.linear(x, layer.weight, layer.bias).square().sum(), [x, layer.weight, layer.bias])
    with packed_weights(layer):
        found = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight, layer.bias])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_packed_weights_takes_what_onednn_takes():
    with pytest.raises(ValueError, match=r"takes fp32 and bf16 parameters on the CPU; weight is torch.float64 on cpu"):
        packed_weights(Linear(4, 4).double())
    with pytest.raises(ValueError, match="weight is torch.float32 on meta"):
        packed_weights(Linear(4, 4, device="meta"))


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_linear_gelu_is_linear_and_gelu(dtype, onednn, monkeypatch):
    monkeypatch.setattr(_products, "LEAST", 0)
    monkeypatch.setattr(_products, "onednn_is_faster", lambda: onednn)
    x, weight, bias = (torch.randn(*s).to(dtype) for s in ((2, 5, 24), (40, 24), (40,)))
    expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    for b, truth in ((bias, expected), (None, F.gelu(F.linear(x.double(), weight.double())))):
        found = linear_gelu(x, weight, b)
        assert found.dtype == dtype
        assert found.shape == (2, 5, 40)
        torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=tolerance)
    weight.requires_grad_()
    linear_gelu(x, weight, bias).sum().backward()
    assert weight.grad is not None
    assert linear_gelu(x[:0], weight, bias).shape == (0, 5, 40)


def test_mlp_calls_what_stands_in_the_place_of_its_layers():
    """A hook on fc1, or a layer put there by others (LoRA), is called; the GELU comes after it."""
    mlp, x, seen = MLP(8, 16).eval(), torch.randn(4, 8), []
    with torch.no_grad():
        expected = mlp(x)
        torch.testing.assert_close(expected, mlp.fc2(F.gelu(linear(x, mlp.fc1.weight, mlp.fc1.bias))))
        hook = mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(out))
        torch.testing.assert_close(mlp(x), expected)
        hook.remove()
        assert len(seen) == 1

        class Doubled(nn.Module):
            def __init__(self, base):
                super().__init__()
                self.base = base

            def forward(self, x):
                return 2.0 * self.base(x)

        mlp.fc1 = Doubled(mlp.fc1)
        torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(2.0 * mlp.fc1.base(x))))
