"""Attention modules against torch.nn.MultiheadAttention with the same weights, in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlp_fast import AttentionPlan, Segments
from vlp_fast.modules import AttentionalPooler, CrossAttention, MultiwayAttention, SelfAttention

DIM, HEADS, LENGTHS = 12, 3, [4, 1, 6]


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randomise(module):
    """Every parameter random, biases and norms too, so that none can be forgotten."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def padded(rows, lengths):
    """Packed rows -> [batch, longest, dim] filled with large junk, and True where it is padding."""
    longest = max(lengths)
    padding = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    rectangle = torch.full((len(lengths), longest, rows.shape[1]), 1e3)
    return rectangle.index_put((~padding,), rows), padding


def causal_mask(longest, causal):
    return torch.ones(longest, longest, dtype=torch.bool).triu(1) if causal else None


def as_multihead(module):
    """nn.MultiheadAttention with a SelfAttention's parameters: the layouts of both are the same."""
    twin = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    with torch.no_grad():
        twin.in_proj_weight.copy_(module.qkv.weight)
        twin.in_proj_bias.copy_(module.qkv.bias)
    twin.out_proj.load_state_dict(module.proj.state_dict())
    return twin


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_packed_is_multihead_attention_padded(causal):
    module = randomise(SelfAttention(DIM, HEADS))
    twin = as_multihead(module)
    x = torch.randn(sum(LENGTHS), DIM, requires_grad=True)
    dout = torch.randn(sum(LENGTHS), DIM)
    out = module(x, AttentionPlan.self_attention(LENGTHS, causal=causal))
    out.backward(dout)
    dx = x.grad.clone()

    x.grad = None
    rectangle, padding = padded(x, LENGTHS)
    mask = causal_mask(max(LENGTHS), causal)
    expected = twin(rectangle, rectangle, rectangle, key_padding_mask=padding, attn_mask=mask, need_weights=False)[0][~padding]
    expected.backward(dout)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(module.qkv.weight.grad, twin.in_proj_weight.grad)
    torch.testing.assert_close(module.qkv.bias.grad, twin.in_proj_bias.grad)
    torch.testing.assert_close(module.proj.weight.grad, twin.out_proj.weight.grad)
    torch.testing.assert_close(module.proj.bias.grad, twin.out_proj.bias.grad)


def test_self_attention_without_bias_has_none():
    module = SelfAttention(DIM, HEADS, bias=False)
    assert [name for name, _ in module.named_parameters()] == ["qkv.weight", "proj.weight"]


def test_self_attention_drops_out_only_while_training():
    module = randomise(SelfAttention(DIM, HEADS, dropout_p=0.5))
    plan = AttentionPlan.self_attention(LENGTHS)
    x = torch.randn(sum(LENGTHS), DIM)
    assert not torch.allclose(module(x, plan), module(x, plan))
    module.eval()
    without = SelfAttention(DIM, HEADS)
    without.load_state_dict(module.state_dict())
    assert torch.equal(module(x, plan), without(x, plan))


def test_cross_attention_is_multihead_attention():
    context_dim, images = 5, [7, 2, 3]
    module = randomise(CrossAttention(DIM, context_dim, HEADS))
    twin = nn.MultiheadAttention(DIM, HEADS, kdim=context_dim, vdim=context_dim, batch_first=True)
    with torch.no_grad():
        twin.q_proj_weight.copy_(module.query.weight)
        twin.k_proj_weight.copy_(module.key_value.weight[:DIM])
        twin.v_proj_weight.copy_(module.key_value.weight[DIM:])
        twin.in_proj_bias.copy_(torch.cat([module.query.bias, module.key_value.bias]))
    twin.out_proj.load_state_dict(module.proj.state_dict())
    x, context = torch.randn(sum(LENGTHS), DIM), torch.randn(sum(images), context_dim)
    rectangle, padding = padded(x, LENGTHS)
    keys, key_padding = padded(context, images)
    expected = twin(rectangle, keys, keys, key_padding_mask=key_padding, need_weights=False)[0][~padding]
    torch.testing.assert_close(module(x, context, AttentionPlan.cross_attention(LENGTHS, images)), expected)


@pytest.mark.parametrize("on_device", [False, True])
def test_cross_attention_shared_images_are_repeated_images(on_device):
    module = randomise(CrossAttention(DIM, 5, HEADS))
    images, index = Segments([7, 2]), [1, 0, 1]
    rows, repeated = images.take(index)
    shared = AttentionPlan.cross_attention(Segments(LENGTHS), images, index)
    if on_device:
        shared = AttentionPlan._device_cross_attention(Segments(LENGTHS), images, torch.tensor(index))
    results = []
    for plan, gather in ((shared, False), (AttentionPlan.cross_attention(LENGTHS, repeated), True)):
        torch.manual_seed(1)
        module.zero_grad()
        x, context = torch.randn(sum(LENGTHS), DIM, requires_grad=True), torch.randn(images.rows, 5, requires_grad=True)
        out = module(x, context[rows] if gather else context, plan)
        out.backward(torch.randn(out.shape))
        results.append([out, x.grad, context.grad, *(p.grad.clone() for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_cross_attention_context_projected_once_serves_two_calls():
    module = randomise(CrossAttention(DIM, 5, HEADS))
    plan = AttentionPlan.cross_attention(LENGTHS, [7], [0, 0, 0])
    x, context = torch.randn(sum(LENGTHS), DIM), torch.randn(7, 5)
    k, v = module.project_context(context)
    assert k.shape == v.shape == (7, HEADS, DIM // HEADS)
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert torch.equal(module.attend(x, k, v, plan), module(x, context, plan))


@pytest.mark.parametrize(
    "module", [SelfAttention, lambda d, h: CrossAttention(d, 5, h), MultiwayAttention, lambda d, h: AttentionalPooler(d, 5, h)]
)
@pytest.mark.parametrize("heads", [5, 0])
def test_attention_modules_say_when_heads_do_not_divide(module, heads):
    with pytest.raises(ValueError, match=f"num_heads must divide dim; received num_heads={heads} for dim=12."):
        module(12, heads)


# ------------------------------------------------------------------------------------------------------------------ pooler


class OpenClipPooler(nn.Module):
    """An attentional pooler with open_clip's parameter names, on padded rectangles."""

    def __init__(self, d_model, context_dim, n_head, n_queries):
        super().__init__()
        self.query = nn.Parameter(torch.randn(n_queries, d_model))
        self.attn = nn.MultiheadAttention(d_model, n_head, kdim=context_dim, vdim=context_dim, batch_first=True)
        self.ln_q, self.ln_k = nn.LayerNorm(d_model), nn.LayerNorm(context_dim)

    def forward(self, x, padding):
        q = self.ln_q(self.query).expand(len(x), -1, -1)
        k = self.ln_k(x)
        return self.attn(q, k, k, key_padding_mask=padding, need_weights=False)[0]


@pytest.mark.parametrize("n_queries", [1, 4])
@pytest.mark.parametrize("context_dim", [DIM, 5])
def test_pooler_is_open_clips_with_its_state_dict(context_dim, n_queries):
    module = randomise(AttentionalPooler(DIM, context_dim, HEADS, n_queries=n_queries))
    twin = OpenClipPooler(DIM, context_dim, HEADS, n_queries)
    twin.load_state_dict(module.state_dict(), strict=True)
    x = torch.randn(sum(LENGTHS), context_dim, requires_grad=True)
    plan = module.plan(LENGTHS)
    assert (plan.query.lengths, plan.key.lengths) == ((n_queries,) * 3, tuple(LENGTHS))
    out = module(x, plan)
    dout = torch.randn_like(out)
    out.backward(dout)
    dx = x.grad.clone()
    x.grad = None
    rectangle, padding = padded(x, LENGTHS)
    expected = twin(rectangle, padding).flatten(0, 1)
    expected.backward(dout)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(dx, x.grad)
    gradients = dict(module.named_parameters())
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("n_queries", [1, 3])
@pytest.mark.parametrize("norm_layer", [nn.Identity, nn.RMSNorm, lambda d: nn.LayerNorm(d, elementwise_affine=False)])
def test_pooler_takes_any_norm(n_queries, norm_layer):
    module = randomise(AttentionalPooler(DIM, 5, HEADS, n_queries, norm_layer)).double()
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    dim, rows = DIM, module.ln_k(x)
    weight_q, weight_kv = module.attn.weights()
    bias = module.attn.in_proj_bias.split(dim)
    q = nn.functional.linear(module.ln_q(module.query), weight_q, bias[0]).expand(2, -1, -1)
    k = nn.functional.linear(rows, weight_kv[:dim], bias[1])
    v = nn.functional.linear(rows, weight_kv[dim:], bias[2])
    q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    expected = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x), module.attn.out_proj(expected))


@pytest.mark.parametrize("n_queries", [1, 4])
def test_pooler_of_a_dense_batch_is_that_of_packed_rows(n_queries):
    module = randomise(AttentionalPooler(DIM, 5, HEADS, n_queries))
    x = torch.randn(3, 7, 5)
    assert torch.equal(module(x).flatten(0, 1), module(x.flatten(0, 1), module.plan([7, 7, 7])))
    with pytest.raises(ValueError, match="plan must be left out"):
        module(x, module.plan([7, 7, 7]))
    with pytest.raises(ValueError, match="packed rows need a plan"):
        module(x.flatten(0, 1))


def test_pooler_with_one_query_forms_neither_keys_nor_values():
    """Its products are those of one query: far fewer than projecting every token to a key and a value."""
    module = AttentionalPooler(96, 96, 8, 1)
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(2, 200, 96))
    assert counter.get_total_flops() < 0.2 * 2 * (400 * 96 * 2 * 96)


def test_pooler_parameters_have_open_clips_names():
    always = ["attn.in_proj_bias", "attn.out_proj.bias", "attn.out_proj.weight"]
    always += ["ln_k.bias", "ln_k.weight", "ln_q.bias", "ln_q.weight", "query"]
    fused, separate = AttentionalPooler(DIM, DIM, HEADS, 4), AttentionalPooler(DIM, 5, HEADS, 4)
    assert sorted(fused.state_dict()) == sorted([*always, "attn.in_proj_weight"])
    assert sorted(separate.state_dict()) == sorted([*always, *(f"attn.{x}_proj_weight" for x in "qkv")])


@pytest.mark.parametrize("n_queries", [1, 2])
def test_pooler_of_an_empty_segment_gives_the_output_bias(n_queries):
    module = randomise(AttentionalPooler(DIM, 5, HEADS, n_queries))
    out = module(torch.randn(3, 5), module.plan([0, 3]))
    torch.testing.assert_close(out[:n_queries], module.attn.out_proj.bias.expand(n_queries, -1))


def test_pooler_norm_layer_builds_both_norms():
    module = AttentionalPooler(DIM, 5, HEADS, 2, lambda d: nn.LayerNorm(d, eps=1e-3))
    assert (module.ln_q.eps, module.ln_k.eps) == (1e-3, 1e-3)
    assert (module.ln_q.normalized_shape, module.ln_k.normalized_shape) == ((DIM,), (5,))


# ---------------------------------------------------------------------------------------------------------------- multiway


def test_multiway_attention_with_equal_experts_is_self_attention():
    plain = randomise(SelfAttention(DIM, HEADS))
    module = MultiwayAttention(DIM, HEADS)
    with torch.no_grad():
        for ours, theirs in ((module.qkv, plain.qkv), (module.proj, plain.proj)):
            ours.weight.copy_(theirs.weight.expand(2, -1, -1))
            ours.bias.copy_(theirs.bias.expand(2, -1))
    plan = AttentionPlan.joint([3, 1], [2, 5])
    x = torch.randn(11, DIM)
    torch.testing.assert_close(module(x, plan, (0, 4, 11)), plain(x, plan))


@pytest.mark.parametrize("inner_eps", [None, 1e-5])
def test_multiway_attention_projects_with_each_rows_expert(inner_eps):
    module = randomise(MultiwayAttention(DIM, HEADS, inner_eps=inner_eps))
    plan = AttentionPlan.joint([3, 1], [2, 5])
    x = torch.randn(11, DIM)
    expert = torch.tensor([0] * 4 + [1] * 7)

    def linear(layer, rows):
        return torch.einsum("ri,roi->ro", rows, layer.weight[expert]) + layer.bias[expert]

    q, k, v = linear(module.qkv, x).view(11, 3, HEADS, -1).unbind(1)
    sample = torch.tensor([0, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1])
    scores = torch.einsum("qhd,khd->hqk", q, k) * (DIM // HEADS) ** -0.5
    weights = scores.masked_fill(sample[:, None] != sample, -torch.inf).softmax(-1)
    out = torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
    if inner_eps is not None:
        out = (
            nn.functional.layer_norm(out, [DIM], eps=inner_eps) * module.inner_norm.weight[expert]
            + module.inner_norm.bias[expert]
        )
    torch.testing.assert_close(module(x, plan, (0, 4, 11)), linear(module.proj, out))


@pytest.mark.parametrize(
    "module",
    [
        SelfAttention(DIM, HEADS),
        CrossAttention(DIM, 5, HEADS),
        AttentionalPooler(DIM, 5, HEADS, 2),
        MultiwayAttention(DIM, HEADS),
    ],
)
def test_attention_modules_round_trip(module):
    again = copy.deepcopy(module)
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    again.load_state_dict(module.state_dict(), strict=True)
    for (name, a), (_, b) in zip(module.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
