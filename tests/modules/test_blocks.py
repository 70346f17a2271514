"""Embeddings, MLPs, stochastic depth and whole blocks against the torch expressions they stand for, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlp_fast import AttentionPlan
from vlp_fast.modules import (
    MLP,
    DropPath,
    MultiwayFFN,
    MultiwayLayerNorm,
    MultiwayLinear,
    PatchEmbedding,
    PostNormBlock,
    PreNormBlock,
    SelfAttention,
    TextEmbedding,
    VisionTransformer,
    init_transformer,
)
from vlp_fast.ops import multiway_linear

DIM, HEADS, LENGTHS = 12, 3, [4, 1, 6]
ROWS = sum(LENGTHS)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randomise(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


@pytest.fixture
def x():
    return torch.randn(ROWS, DIM)


@pytest.fixture
def plan():
    return AttentionPlan.self_attention(LENGTHS)


# -------------------------------------------------------------------------------------------------------------- embeddings


def test_patch_embedding_is_a_convolution():
    module = randomise(PatchEmbedding(24, 8, 10))
    images = torch.randn(3, 3, 24, 24)
    expected = F.conv2d(images, module.proj.weight.view(10, 3, 8, 8), module.proj.bias, stride=8)
    assert (module.grid, module.num_patches) == (3, 9)
    torch.testing.assert_close(module(images), expected.flatten(2).transpose(1, 2))
    torch.testing.assert_close(module(images.to(memory_format=torch.channels_last)), module(images))
    assert module(images[:0]).shape == (0, 9, 10)


def test_patch_embedding_says_which_images_it_takes():
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size; received 25 and 8."):
        PatchEmbedding(25, 8, 10)
    for shape in ((3, 24, 24), (2, 1, 24, 24), (2, 3, 24, 16)):
        with pytest.raises(ValueError, match=r"images must be \[batch, 3, 24, 24\]; received \["):
            PatchEmbedding(24, 8, 10)(torch.zeros(shape))


def test_text_embedding_adds_words_and_positions():
    module = randomise(TextEmbedding(20, 8, DIM, eps=1e-12))
    ids, positions = torch.tensor([3, 19, 3]), torch.tensor([0, 1, 0])
    total = module.word.weight[ids] + module.position.weight[positions]
    expected = F.layer_norm(total, [DIM], module.norm.weight, module.norm.bias, 1e-12)
    torch.testing.assert_close(module(ids, positions), expected)
    plain = TextEmbedding(20, 8, DIM)
    torch.testing.assert_close(plain(ids, positions), plain.word.weight[ids] + plain.position.weight[positions])


def test_text_embedding_never_trains_its_padding_word():
    module = TextEmbedding(20, 8, DIM, padding_idx=0)
    module(torch.tensor([0, 1]), torch.tensor([0, 1])).sum().backward()
    assert (module.word.weight.grad[0] == 0).all()
    assert (module.word.weight.grad[1] == 1).all()


def test_init_transformer_starts_as_vit_and_bert():
    module = nn.ModuleList([nn.Linear(200, 200), nn.Embedding(200, 200, padding_idx=3), nn.LayerNorm(200)])
    module.apply(init_transformer)
    linear, embedding, norm = module
    for weight in (linear.weight, embedding.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert weight.abs().max() <= 2.0
    assert (linear.bias == 0).all()
    assert (embedding.weight[3] == 0).all()
    assert (norm.weight == 1).all()


# ------------------------------------------------------------------------------------------------------------- feedforward


def test_mlp_uses_the_exact_gelu(x):
    module = randomise(MLP(DIM, 20))
    hidden = x @ module.fc1.weight.T + module.fc1.bias
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(module(x), gelu @ module.fc2.weight.T + module.fc2.bias)


def test_multiway_ffn_is_each_experts_ffn(x):
    module = randomise(MultiwayFFN(DIM, 20, eps=1e-3))
    parts = []
    for e, rows in enumerate((x[:4], x[4:])):
        hidden = F.gelu(F.linear(rows, module.fc1.weight[e], module.fc1.bias[e]))
        hidden = F.layer_norm(hidden, [20], module.norm.weight[e], module.norm.bias[e], 1e-3)
        parts.append(F.linear(hidden, module.fc2.weight[e], module.fc2.bias[e]))
    torch.testing.assert_close(module(x, (0, 4, ROWS)), torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_multiway_ffn_computes_gelu_in_float32(dtype, x):
    module = randomise(MultiwayFFN(DIM, 20)).to(dtype)
    x = x.to(dtype)
    offsets = (0, 4, ROWS)
    hidden = multiway_linear(x, module.fc1.weight, module.fc1.bias, offsets)
    assert hidden.dtype == dtype
    expected = module.fc2(module.norm(F.gelu(hidden.float()).to(dtype), offsets), offsets)
    assert torch.equal(module(x, offsets), expected)


def test_multiway_modules_hold_their_experts_stacked():
    linear, norm = MultiwayLinear(6, 5, 3), MultiwayLayerNorm(6, 3)
    assert (linear.weight.shape, linear.bias.shape) == ((3, 5, 6), (3, 5))
    assert (norm.weight.shape, norm.bias.shape) == ((3, 6), (3, 6))
    assert MultiwayLinear(6, 5, bias=False).bias is None
    assert (linear.bias == 0).all()
    assert (norm.weight == 1).all()


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_drop_path_drops_whole_samples_and_keeps_the_mean(p):
    module = DropPath(p)
    samples = torch.arange(2000).repeat_interleave(3)
    out = module(torch.ones(6000, 4), samples, 2000).view(2000, 3, 4)
    assert ((out == out[:, :1, :1]).all(2).all(1)).all()
    values = out[:, 0, 0]
    torch.testing.assert_close(values[values > 0], torch.full_like(values[values > 0], 1 / (1 - p)))
    assert abs((values > 0).double().mean() - (1 - p)) < 5 * (p * (1 - p) / 2000) ** 0.5


def test_drop_path_does_nothing_where_nothing_is_dropped(x):
    assert DropPath(0.0)(x, None, 0) is x
    assert DropPath(0.5).eval()(x, None, 0) is x


def test_drop_path_drops_the_gradient_too():
    x = torch.ones(100, 1, requires_grad=True)
    out = DropPath(0.5)(x, torch.arange(100), 100)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_drop_path_says_what_it_needs(x):
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"p must be in \[0, 1\); received {p}."):
            DropPath(p)
    with pytest.raises(ValueError, match="DropPath needs the sample of each row while training with p > 0; received None."):
        DropPath(0.5)(x, None, 0)


# ------------------------------------------------------------------------------------------------------------------ blocks


def test_pre_norm_block_is_torchs_encoder_layer(x, plan):
    block = randomise(PreNormBlock(DIM, HEADS, 20, eps=1e-3))
    twin = nn.TransformerEncoderLayer(DIM, HEADS, 20, 0.0, F.gelu, 1e-3, batch_first=True, norm_first=True)
    names = {
        "norm1": "norm1",
        "norm2": "norm2",
        "mlp.fc1": "linear1",
        "mlp.fc2": "linear2",
        "attention.proj": "self_attn.out_proj",
    }
    state = {
        f"{theirs}.{kind}": block.get_submodule(ours).state_dict()[kind]
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
    }
    state |= {"self_attn.in_proj_weight": block.attention.qkv.weight, "self_attn.in_proj_bias": block.attention.qkv.bias}
    twin.load_state_dict(state, strict=True)
    expected = torch.cat([twin(part[None])[0] for part in x.split(LENGTHS)])
    torch.testing.assert_close(block(x, plan), expected)


def test_pre_norm_block_with_context_is_torchs_decoder_layer(x):
    block = randomise(PreNormBlock(DIM, HEADS, 20, eps=1e-3, context_dim=DIM))
    twin = nn.TransformerDecoderLayer(DIM, HEADS, 20, 0.0, F.gelu, 1e-3, batch_first=True, norm_first=True)
    names = {
        "norm1": "norm1",
        "cross_norm": "norm2",
        "norm2": "norm3",
        "mlp.fc1": "linear1",
        "mlp.fc2": "linear2",
        "attention.proj": "self_attn.out_proj",
        "cross_attention.proj": "multihead_attn.out_proj",
    }
    state = {
        f"{theirs}.{kind}": block.get_submodule(ours).state_dict()[kind]
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
    }
    cross = block.cross_attention
    state |= {
        "self_attn.in_proj_weight": block.attention.qkv.weight,
        "self_attn.in_proj_bias": block.attention.qkv.bias,
        "multihead_attn.in_proj_weight": torch.cat([cross.query.weight, cross.key_value.weight]),
        "multihead_attn.in_proj_bias": torch.cat([cross.query.bias, cross.key_value.bias]),
    }
    twin.load_state_dict(state, strict=True)
    images = [7, 2, 3]
    context = torch.randn(sum(images), DIM)
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected = [
        twin(part[None], image[None], tgt_mask=mask[:n, :n])[0]
        for part, image, n in zip(x.split(LENGTHS), context.split(images), LENGTHS, strict=True)
    ]
    out = block(x, AttentionPlan.self_attention(LENGTHS, causal=True), context, AttentionPlan.cross_attention(LENGTHS, images))
    torch.testing.assert_close(out, torch.cat(expected))


def test_pre_norm_block_drops_paths_by_sample(x, plan):
    block = randomise(PreNormBlock(DIM, HEADS, 20, eps=1e-3, drop_path=0.999))
    samples = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
    assert torch.equal(block(x, plan, samples=samples, num_samples=3), x)  # all dropped
    assert not torch.allclose(block.eval()(x, plan), x)


def test_post_norm_block_is_torchs_encoder_layer_for_each_expert(x, plan):
    block = randomise(PostNormBlock(DIM, HEADS, 20, eps=1e-3, context_dim=None, num_experts=2, dropout_p=0.0))
    expected = []
    for e, parts in enumerate((x.split(LENGTHS)[:2], x.split(LENGTHS)[2:])):
        twin = nn.TransformerEncoderLayer(DIM, HEADS, 20, 0.0, F.gelu, 1e-3, batch_first=True)
        state = {
            "self_attn.in_proj_weight": block.attention.qkv.weight[e],
            "self_attn.in_proj_bias": block.attention.qkv.bias[e],
            "self_attn.out_proj.weight": block.attention.proj.weight[e],
            "self_attn.out_proj.bias": block.attention.proj.bias[e],
            "norm1.weight": block.attention_norm.weight[e],
            "norm1.bias": block.attention_norm.bias[e],
        }
        for ours, theirs in {"mlp.fc1": "linear1", "mlp.fc2": "linear2", "mlp_norm": "norm2"}.items():
            state |= {f"{theirs}.{kind}": block.get_submodule(ours).state_dict()[kind] for kind in ("weight", "bias")}
        twin.load_state_dict(state, strict=True)
        expected += [twin(part[None])[0] for part in parts]
    torch.testing.assert_close(block(x, plan, (0, 5, ROWS)), torch.cat(expected))


def test_post_norm_block_cross_attention_comes_between(x, plan):
    block = randomise(PostNormBlock(DIM, HEADS, 20, eps=1e-3, context_dim=5, num_experts=1, dropout_p=0.0))
    context, cross_plan = torch.randn(7, 5), AttentionPlan.cross_attention(LENGTHS, [7], [0, 0, 0])
    offsets = (0, ROWS)
    y = block.attention_norm(x + block.attention(x, plan, offsets), offsets)
    y = block.cross_norm(y + block.cross_attention(y, context, cross_plan))
    expected = block.mlp_norm(y + block.mlp(y))
    torch.testing.assert_close(block(x, plan, offsets, context, cross_plan), expected)
    assert not torch.allclose(block(x, plan, offsets), expected)


def test_post_norm_block_drops_out_only_while_training(x, plan):
    block = randomise(PostNormBlock(DIM, HEADS, 20, eps=1e-3, context_dim=None, num_experts=1, dropout_p=0.3))
    assert not torch.allclose(block(x, plan, (0, ROWS)), block(x, plan, (0, ROWS)))
    block.eval()
    assert torch.equal(block(x, plan, (0, ROWS)), block(x, plan, (0, ROWS)))


# ------------------------------------------------------------------------------------------------------------------ vision

SIZES = {"image_size": 16, "patch_size": 8, "dim": DIM, "depth": 3, "num_heads": HEADS, "hidden_dim": 20, "eps": 1e-6}


@pytest.mark.parametrize("class_token", [True, False])
def test_vision_transformer_is_its_parts(class_token):
    module = randomise(VisionTransformer(**SIZES, class_token=class_token)).eval()
    images = torch.randn(2, 3, 16, 16)
    x = module.patch_embedding(images)
    if class_token:
        x = torch.cat([module.class_token.expand(2, 1, -1), x], 1)
    x = x + module.position_embedding
    alone = AttentionPlan.self_attention([module.num_tokens])
    outputs = []
    for rows in x:
        for block in module.blocks:
            rows = block(rows, alone)
        outputs.append(module.norm(rows))
    assert module.num_tokens == 4 + class_token
    torch.testing.assert_close(module(images), torch.cat(outputs))
    assert module.segments(2).lengths == (module.num_tokens,) * 2
    assert module.describe(images)[:4] == ("image_encoder", 2, 2 * module.num_tokens, 2 * module.num_tokens)


def test_vision_transformer_drop_path_rises_over_the_depth():
    module = VisionTransformer(**SIZES, class_token=True, drop_path=0.2)
    assert [block.drop_path.p for block in module.blocks] == pytest.approx([0.0, 0.1, 0.2])
    images = torch.randn(2, 3, 16, 16)
    assert module(images).shape == (10, DIM)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_modules_hand_their_backend_down(backend, x, plan, device):
    torch.set_default_dtype(torch.float32)
    module = randomise(SelfAttention(48, 3, backend=backend)).to(device)
    x = torch.randn(ROWS, 48, device=device)
    q, k, v = module.qkv(x).view(ROWS, 3, 3, 16).unbind(1)
    mask = torch.block_diag(*(torch.ones(n, n) for n in LENGTHS)).bool().to(device)
    out = F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), mask).transpose(0, 1)
    torch.testing.assert_close(module(x, plan.to(device)), module.proj(out.flatten(1)), rtol=1e-4, atol=1e-4)
