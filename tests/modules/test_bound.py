"""Bound layers give what the layers give, with and without packed weights; a layer with hooks, or another in its place, is called."""

import contextlib

import pytest
import torch
from torch import nn

from vlp_fast.modules import MLP, Linear, MultiwayLayerNorm, MultiwayLinear
from vlp_fast.modules.bound import bind, bind_expert, bind_gelu, bind_mlp
from vlp_fast.ops import packed_weights

PACKED = [
    (torch.float32, False),
    (torch.float32, True),
    (torch.bfloat16, False),
    (torch.bfloat16, True),
    (torch.float64, False),
]


def _norm():
    norm = nn.LayerNorm(64, 1e-3)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def _experts(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


CASES = {
    "linear": (lambda: Linear(64, 96), bind, lambda layer, x: layer(x)),
    "linear without bias": (lambda: Linear(64, 96, bias=False), bind, lambda layer, x: layer(x)),
    "linear of torch": (lambda: nn.Linear(64, 96), bind, lambda layer, x: layer(x)),
    "layer norm": (_norm, bind, lambda layer, x: layer(x)),
    "gelu": (lambda: Linear(64, 96), bind_gelu, lambda layer, x: nn.functional.gelu(layer(x))),
    "gelu of torch": (lambda: nn.Linear(64, 96), bind_gelu, lambda layer, x: nn.functional.gelu(layer(x))),
    "mlp": (lambda: MLP(64, 128), bind_mlp, lambda layer, x: layer(x)),
    "expert": (lambda: _experts(MultiwayLinear(64, 96, 3)), lambda m: bind_expert(m, 1, 3), lambda m, x: m(x, (0, 0, len(x), len(x)))),
    "expert's gelu": (
        lambda: _experts(MultiwayLinear(64, 96, 2, activation="gelu")),
        lambda m: bind_expert(m, 1, 2),
        lambda m, x: m(x, (0, 0, len(x))),
    ),
    "expert's norm": (lambda: _experts(MultiwayLayerNorm(64, 2)), lambda m: bind_expert(m, 0, 2), lambda m, x: m(x, (0, len(x), len(x)))),
    "expert of the reference": (
        lambda: _experts(MultiwayLinear(64, 96, 2, backend="torch")),
        lambda m: bind_expert(m, 0, 2),
        lambda m, x: m(x, (0, len(x), len(x))),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "packed"), PACKED)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_bound_layer_gives_what_the_layer_gives(case, dtype, packed):
    make, bound, plain = CASES[case]
    torch.manual_seed(0)
    layer = make().to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype]
    with packed_weights(layer) if packed else contextlib.nullcontext():
        function = bound(layer)
        for rows in (1, 7, 300):
            x = torch.randn(rows, 64).to(dtype)
            torch.testing.assert_close(function(x), plain(layer, x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [Linear, nn.LayerNorm, MLP])
@torch.no_grad()
def test_a_layer_with_a_hook_is_called(kind):
    layer = kind(8) if kind is nn.LayerNorm else kind(8, 8)
    calls = []
    handle = layer.register_forward_hook(lambda *args: calls.append(args))
    bind_mlp(layer)(torch.randn(2, 8)) if kind is MLP else bind(layer)(torch.randn(2, 8))
    assert len(calls) == 1
    handle.remove()


@torch.no_grad()
def test_a_layer_put_in_the_place_of_another_is_called():
    class Doubled(Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    torch.manual_seed(0)
    x, mlp = torch.randn(3, 8), MLP(8, 16)
    mlp.fc1 = Doubled(8, 16)
    torch.testing.assert_close(bind_mlp(mlp)(x), mlp(x))
    torch.testing.assert_close(bind(mlp.fc1)(x), mlp.fc1(x))
