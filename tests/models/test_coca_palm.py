"""CoCa on PaLM's blocks, on tiny configurations in float64: its modules against their formulas, who sees whom, backends, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlp_fast import AttentionPlan, Segments
from vlp_fast.data import Batch
from vlp_fast.models.coca_palm import CocaPalm, CocaPalmConfig, coca_palm_preset
from vlp_fast.modules import MultiQueryPooler, ParallelBlock, ParallelCrossBlock, rotary_table
from vlp_fast.modules.palm import rotate, swiglu
from vlp_fast.training.coca_palm import CocaPalmPretraining

LENGTHS = [5, 1, 8]


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, dtype=torch.float64)


@pytest.fixture
def captions():
    return torch.randint(1, 90, (sum(LENGTHS),)), Segments(LENGTHS)


@pytest.fixture
def model():
    return CocaPalm(coca_palm_preset("tiny", vocab_size=100)).double()


# ---------------------------------------------------------------------------------------------------------------------- modules


def test_rotary_table_turns_pairs_by_their_position():
    cos, sin = rotary_table(torch.tensor([0, 3, 7]), 4, dtype=torch.float64)
    angles = torch.tensor([[0.0, 0.0], [3.0, 0.03], [7.0, 0.07]], dtype=torch.float64)
    torch.testing.assert_close(cos, angles.cos(), rtol=0, atol=1e-8)  # frequencies are rounded to fp32
    torch.testing.assert_close(sin, angles.sin(), rtol=0, atol=1e-8)
    assert rotary_table(torch.tensor([1]), 4, dtype=torch.bfloat16)[0].dtype == torch.float32
    with pytest.raises(ValueError, match="head_dim must be even, for rotary positions turn pairs; received 5"):
        rotary_table(torch.tensor([1]), 5)


def test_rotate_keeps_lengths_and_scores_depend_on_distance_only():
    q, k = torch.randn(2, 1, 3, 8, dtype=torch.float64)

    def score(at, other):
        tables = (rotary_table(torch.tensor([n]), 8, dtype=torch.float64) for n in (at, other))
        turned = [rotate(x, *table) for x, table in zip((q, k), tables, strict=True)]
        torch.testing.assert_close(turned[0].norm(dim=-1), q.norm(dim=-1))
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(score(9, 4), score(105, 100))
    assert not torch.allclose(score(9, 4), score(9, 5))
    assert rotate(q.bfloat16(), *rotary_table(torch.tensor([1]), 8)).dtype == torch.bfloat16


def softmax_attention(q, k, v, causal=False):
    """q ``[n, heads, head_dim]``, k and v ``[m, head_dim]``."""
    scores = torch.einsum("nhd,md->hnm", q, k) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("hnm,md->nhd", scores.softmax(-1), v).flatten(1)


def test_parallel_block_is_its_formula():
    block = ParallelBlock(20, 3, 6, 14).double()
    x = torch.randn(7, 20, dtype=torch.float64)
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 11])
    rotary = rotary_table(positions, 6, dtype=torch.float64)
    normed = F.layer_norm(x, (20,)) * block.norm.weight
    q, k, v, value, gate = block.fused(normed).split([18, 6, 6, 14, 14], 1)
    q, k = rotate(q.unflatten(1, (3, 6)), *rotary), rotate(k[:, None], *rotary)[:, 0]
    expected = x + block.proj(softmax_attention(q, k, v, causal=True)) + block.fc2(F.silu(gate) * value)
    torch.testing.assert_close(block(x, AttentionPlan.self_attention([7], causal=True), rotary), expected)
    assert not any("bias" in name for name, _ in block.named_parameters())


def test_parallel_cross_block_is_its_formula():
    block = ParallelCrossBlock(20, 9, 3, 6, 14).double()
    x, context = torch.randn(7, 20, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    q, inner = block.fused(F.layer_norm(x, (20,)) * block.norm.weight).split([18, 28], 1)
    k, v = block.key_value(context).chunk(2, 1)
    expected = x + block.proj(softmax_attention(q.unflatten(1, (3, 6)), k, v)) + block.fc2(swiglu(inner))
    torch.testing.assert_close(block(x, context, AttentionPlan.cross_attention([7], [5])), expected)


def test_pooler_is_its_formula_for_images_of_any_length():
    pooler = MultiQueryPooler(20, 9, 3, 6, 4).double()
    lengths = [5, 2]
    x = torch.randn(7, 9, dtype=torch.float64)
    q = pooler.query(pooler.norm(pooler.queries)).unflatten(1, (3, 6))
    parts = [pooler.key_value(pooler.context_norm(part)).chunk(2, 1) for part in x.split(lengths)]
    expected = pooler.proj(torch.cat([softmax_attention(q, k, v) for k, v in parts]))
    torch.testing.assert_close(pooler(x, Segments(lengths)), expected)


# ------------------------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("class_position", [None, 8, 13])
def test_packed_captions_equal_one_at_a_time(model, captions, class_position):
    ids, segments = captions
    together = model.encode_text(ids, segments, class_position)
    for i, part in enumerate(ids.split(LENGTHS)):
        alone = model.encode_text(part, Segments([len(part)]), class_position)
        torch.testing.assert_close(alone.features[0], together.features[i])
        torch.testing.assert_close(alone.rows, together.rows.split(LENGTHS)[i])


def test_permuting_pairs_permutes_results(model, images, captions):
    ids, segments = captions
    order = [2, 0, 1]
    rows, permuted = segments.take(order)
    image, other = model.encode_image(images), model.encode_image(images[order])
    text, moved = model.encode_text(ids, segments), model.encode_text(ids[rows], permuted)
    torch.testing.assert_close(other.features, image.features[order])
    torch.testing.assert_close(moved.features, text.features[order])
    torch.testing.assert_close(moved.rows, text.rows[rows])
    logits, kept = model.word_logits(text, image)
    moved_logits, moved_kept = model.word_logits(moved, other)
    whole = logits.new_zeros(len(ids), logits.shape[1]).index_copy(0, kept, logits)
    torch.testing.assert_close(moved_logits, whole[rows][moved_kept])
    # the permutation may also be named: captions as they were, images moved
    torch.testing.assert_close(model.word_logits(text, other, index=[order.index(i) for i in range(3)])[0], logits)


def test_only_class_rows_depend_on_the_class_position(model, captions):
    ids, segments = captions
    own, padded = model.encode_text(ids, segments), model.encode_text(ids, segments, 20)
    torch.testing.assert_close(own.rows, padded.rows, rtol=0, atol=0)
    assert not torch.allclose(own.features, padded.features)
    longest = model.encode_text(ids, segments, 8)
    torch.testing.assert_close(longest.features[2], own.features[2])
    configured = CocaPalm(coca_palm_preset("tiny", vocab_size=100, class_position=20)).double()
    configured.load_state_dict(model.state_dict())
    torch.testing.assert_close(configured.encode_text(ids, segments).features, padded.features)
    torch.testing.assert_close(configured.encode_text(ids, segments, 8).features, longest.features)


def test_words_see_earlier_words_only_and_their_own_image(model, images, captions):
    ids, segments = captions
    changed = ids.clone()
    changed[-2] = (changed[-2] + 1) % 90
    image = model.encode_image(images)
    before, after = (model.word_logits(model.encode_text(x, segments), image)[0] for x in (ids, changed))
    same = torch.isclose(before, after).all(1)
    assert same[:-1].all()
    assert not same[-1]
    other = model.encode_image(torch.cat([images[:2], images[:1]]))
    logits = model.word_logits(model.encode_text(ids, segments), other)[0]
    assert torch.isclose(before, logits).all(1).tolist() == [True] * 4 + [False] * 7


def test_empty_caption_and_image_tokens_of_other_lengths():
    model = CocaPalm(coca_palm_preset("tiny", vocab_size=100, image_encoder="given")).double()
    ids, segments = torch.randint(1, 90, (4,)), Segments([0, 4])
    lengths = [3, 9]
    tokens = torch.randn(12, 64, dtype=torch.float64)
    text, image = model.encode_text(ids, segments), model.encode_tokens(tokens, Segments(lengths))
    for i, part in enumerate(tokens.split(lengths)):
        torch.testing.assert_close(model.encode_image(part[None]).features[0], image.features[i])
    hidden, kept = model.word_hidden(text, image)
    assert kept.tolist() == [0, 1, 2]
    assert hidden.isfinite().all()
    torch.testing.assert_close(text.features[1], model.encode_text(ids, Segments([4])).features[0])


def test_an_image_encoder_may_return_packed_or_stacked_tokens(images):
    class Stacked(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.inner = encoder

        def forward(self, images):
            return self.inner(images).unflatten(0, (len(images), -1))

    own = CocaPalm(coca_palm_preset("tiny")).double()
    given = CocaPalm(coca_palm_preset("tiny", image_encoder="given"), Stacked(own.image_encoder.encoder)).double()
    given.load_state_dict(
        {name.replace("encoder.encoder.", "encoder.encoder.inner."): x for name, x in own.state_dict().items()}
    )
    torch.testing.assert_close(given.encode_image(images).features, own.encode_image(images).features)
    assert own.image_encoder.describe(images).tokens == 3 * 16
    assert given.image_encoder.describe(images).tokens == 3 * 17


def test_patches_left_out_while_training(images):
    model = CocaPalm(coca_palm_preset("tiny", patch_drop=0.75)).double()
    assert model.image_encoder.describe(images).tokens == 3 * 4
    drawn = [model.encode_image(images) for _ in range(2)]
    assert not torch.allclose(drawn[0].features, drawn[1].features)
    assert drawn[0].rows.shape == model.eval().encode_image(images).rows.shape
    full = CocaPalm(coca_palm_preset("tiny")).double()
    full.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.encode_image(images).features, full.encode_image(images).features)


def test_triton_kernels_give_what_torch_gives(device):
    losses = {}
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        config = coca_palm_preset("tiny", vocab_size=100, caption_queries=3, image_size=32, vision_depth=1, backend=backend)
        step = CocaPalmPretraining(config).to(device)
        batch = Batch(torch.randn(3, 3, 32, 32), torch.randint(1, 90, (sum(LENGTHS),)), tuple(LENGTHS), ("",) * 3).to(device)
        losses[backend] = step(batch)
        step.total(losses[backend]).backward()
        losses[backend] |= {name: parameter.grad for name, parameter in step.named_parameters()}
    for name, expected in losses["torch"].items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(losses["triton"][name], expected, rtol=0, atol=1e-4 * scale, msg=name)


def test_step_weighs_both_losses_alike_and_trains_every_parameter(images, captions):
    step = CocaPalmPretraining(coca_palm_preset("tiny", vocab_size=100)).double()
    ids, _ = captions
    losses = step(Batch(images, ids, tuple(LENGTHS), ("",) * 3))
    total = step.total(losses)
    torch.testing.assert_close(total, losses["contrastive"] + losses["caption"])
    total.backward()
    assert [name for name, parameter in step.named_parameters() if parameter.grad is None] == []
    assert set(step.towers()) == {"image_encoder", "text_encoder", "text_decoder"}


def test_step_without_captioning_leaves_the_decoder_alone(images, captions):
    config, (ids, _) = coca_palm_preset("tiny", vocab_size=100), captions
    step = CocaPalmPretraining(config, losses=["contrastive"]).double()
    step.model.text_decoder.register_forward_pre_hook(lambda module, args: pytest.fail("the decoder runs"))
    assert set(step(Batch(images, ids, tuple(LENGTHS), ("",) * 3))) == {"contrastive"}


def test_state_dict_round_trip_and_one_weight_for_the_words(model):
    again = CocaPalm(model.config)
    again.load_state_dict(model.state_dict(), strict=True)
    words = [name for name, x in model.state_dict().items() if 100 in x.shape]
    assert words == ["text_decoder.words.weight"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 7}, "head_dim must be even, for rotary positions turn pairs; received 7"),
        ({"image_encoder": "resnet"}, "image_encoder must be one of vit, given; received 'resnet'"),
        ({"unimodal_depth": 0}, "unimodal_depth must be at least 1; received 0"),
        ({"caption_queries": 0}, "caption_queries must be at least 1; received 0"),
        (
            {"image_encoder": "given", "patch_drop": 0.5},
            "patch_drop is of the image encoder 'vit'; received 0.5 for one that is given",
        ),
        ({"class_position": 0}, "class_position must be at least 1; received 0"),
    ],
)
def test_configurations_say_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match=message):
        CocaPalmConfig(**fields)


def test_calls_say_what_is_wrong(model, captions):
    ids, segments = captions
    with pytest.raises(
        ValueError, match="class_position must not lie before the end of a caption; received 7 for one of 8 tokens"
    ):
        model.encode_text(ids, segments, 7)
    with pytest.raises(
        ValueError, match=r"image_encoder must be left out where config.image_encoder is 'vit'.*Identity received"
    ):
        CocaPalm(coca_palm_preset("tiny"), nn.Identity())
    given = CocaPalm(coca_palm_preset("tiny", image_encoder="given"))
    with pytest.raises(ValueError, match=r"must return tokens \[batch, tokens, 64\].*it returned \[2, 5, 32\] for 2 images"):
        given.encode_image(torch.randn(2, 5, 32))
    with pytest.raises(ValueError, match="size must be one of tiny, base; received 'large'"):
        coca_palm_preset("large")
