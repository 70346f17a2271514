"""CoCa with open_clip's weights against open_clip, in float64: outputs, losses, every gradient, both class masks, both ways."""

import pytest
import torch

from vlp_fast.data import Batch
from vlp_fast.models.checkpoints import CheckpointError, read_state, write_state
from vlp_fast.models.checkpoints._positions import resize_positions
from vlp_fast.models.checkpoints.open_clip_coca import FORMAT
from vlp_fast.models.coca_open_clip import open_clip_coca_preset
from vlp_fast.training import CocaPretraining

CONTEXT, VOCAB = 11, 67
PADDED, FULL, MIXED = [4, 1, 10], [CONTEXT] * 3, [CONTEXT, 2, 7]

# name: (keywords of open_clip's CoCa, fields of ours that no shape shows)
CONFIGS = {
    "pooler_head_dim_96": (
        {
            "embed_dim": 96,
            "vision_cfg": {"image_size": 20, "patch_size": 5, "width": 128, "layers": 3, "attn_pooler_heads": 1},
            "text_cfg": {"width": 96, "heads": 6, "layers": 2},
            "multimodal_cfg": {"width": 96, "heads": 6, "layers": 3},
        },
        {"pooler_heads": 1, "num_heads": 6},
    ),
    "equal_widths_odd_ratios": (
        {
            "embed_dim": 64,
            "vision_cfg": {
                "image_size": 21, "patch_size": 7, "width": 64, "layers": 2, "mlp_ratio": 2.5, "attn_pooler_heads": 8,
                "attn_pooler_queries": 6,
            },
            "text_cfg": {"width": 64, "heads": 1, "layers": 3, "mlp_ratio": 3.0},
            "multimodal_cfg": {"width": 64, "heads": 8, "layers": 1},
        },
        {"decoder_heads": 8},
    ),
    "one_patch": (
        {
            "embed_dim": 40,
            "vision_cfg": {"image_size": 8, "patch_size": 8, "width": 72, "head_width": 24, "layers": 1, "attn_pooler_queries": 3},
            "text_cfg": {"width": 40, "heads": 5, "layers": 1},
            "multimodal_cfg": {"width": 40, "heads": 2, "layers": 2},
        },
        {"vision_heads": 3, "num_heads": 5, "decoder_heads": 2},
    ),
}  # fmt: skip
HEAVY_CONFIGS = {
    "ViT-L-14_two_layers": (
        {
            "embed_dim": 768,
            "vision_cfg": {"image_size": 56, "patch_size": 14, "width": 1024, "layers": 2, "attn_pooler_heads": 8},
            "text_cfg": {"width": 768, "heads": 12, "layers": 2},
            "multimodal_cfg": {"width": 768, "heads": 12, "layers": 2},
        },
        {},
    ),
    "ViT-B-32_two_layers": (
        {
            "embed_dim": 512,
            "vision_cfg": {"image_size": 96, "patch_size": 32, "width": 768, "layers": 2, "attn_pooler_heads": 8},
            "text_cfg": {"width": 512, "heads": 8, "layers": 2},
            "multimodal_cfg": {"width": 512, "heads": 8, "layers": 2},
        },
        {},
    ),
    "deep": (
        {
            "embed_dim": 64,
            "vision_cfg": {"image_size": 24, "patch_size": 6, "width": 64, "layers": 8, "attn_pooler_heads": 2},
            "text_cfg": {"width": 64, "heads": 1, "layers": 6},
            "multimodal_cfg": {"width": 64, "heads": 1, "layers": 6},
        },
        {"pooler_heads": 2},
    ),
    "many_patches_few_queries": (
        {
            "embed_dim": 48,
            "vision_cfg": {
                "image_size": 60, "patch_size": 4, "width": 64, "layers": 1, "attn_pooler_heads": 3, "attn_pooler_queries": 4,
            },
            "text_cfg": {"width": 48, "heads": 3, "layers": 4},
            "multimodal_cfg": {"width": 48, "heads": 4, "layers": 1},
        },
        {"num_heads": 3, "decoder_heads": 4, "pooler_heads": 3},
    ),
}  # fmt: skip
ALL_CONFIGS = [*CONFIGS, *(pytest.param(name, marks=pytest.mark.heavy) for name in HEAVY_CONFIGS)]


def configuration(name):
    return (CONFIGS | HEAVY_CONFIGS)[name]


@pytest.fixture(scope="module")
def open_clip(torchvision_ops):
    return pytest.importorskip("open_clip", reason="open_clip is not installed")


def make_peer(open_clip, keywords, dtype=torch.float64):
    text = {"context_length": CONTEXT, "vocab_size": VOCAB}
    keywords = {
        "embed_dim": keywords["embed_dim"],
        "vision_cfg": {"attentional_pool": True, "output_tokens": True, **keywords["vision_cfg"]},
        "text_cfg": {**text, "embed_cls": True, "output_tokens": True, **keywords["text_cfg"]},
        "multimodal_cfg": {**text, **keywords["multimodal_cfg"]},
    }
    peer = open_clip.coca_model.CoCa(**keywords)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            wide = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.normal_(std=min(0.12, wide**-0.5))  # some of them open_clip leaves as they come from memory
            if name.rpartition(".")[2] == "weight" and parameter.dim() == 1:
                parameter.add_(1.0)  # norms
    return peer.to(dtype)  # float64 with values of float32, in which weights are loaded


def make_batch(lengths, image_size, dtype=torch.float64):
    ids = torch.randint(1, VOCAB, (sum(lengths),))
    padded = torch.zeros(len(lengths), CONTEXT, dtype=torch.int64)
    valid = torch.arange(CONTEXT) < torch.tensor(lengths)[:, None]
    padded[valid] = ids
    images = torch.randn(len(lengths), 3, image_size, image_size, dtype=dtype)
    return Batch(images, ids, tuple(lengths), ("",) * len(lengths)), padded, valid


def assert_close(actual, expected, relative=1e-10):
    """Within `relative` of the largest value of the tensor."""
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * expected.abs().max().item())


def objective_of(model, config):
    """The training objective with the weights of `model`."""
    objective = CocaPretraining(config).to(model.logit_scale.dtype)
    objective.model.load_state_dict(model.state_dict())
    return objective


def gradients(model):
    """Of every parameter, under open_clip's names."""
    state = {name: parameter.grad for name, parameter in model.named_parameters()}
    missing = [name for name, gradient in state.items() if gradient is None]
    assert not missing
    model.load_state_dict(state)
    return FORMAT.save(model)


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy_mask", "correct_mask"])
@pytest.mark.parametrize(
    "lengths",
    [
        PADDED,
        FULL,
        MIXED,
        *(pytest.param(lengths, marks=pytest.mark.heavy) for lengths in ([2, 3, 1], [5, 11], [2, 11, 5, 8, 1, 9])),
    ],
    ids=["padded", "full", "mixed", "short", "two", "six"],
)
@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_outputs_losses_and_gradients_equal_open_clip(open_clip, name, lengths, legacy):
    keywords, fields = configuration(name)
    peer = make_peer(open_clip, keywords)
    peer.text.correct_cls_mask = not legacy
    model = FORMAT.load(peer.state_dict(), legacy_class_mask=legacy, **fields).double()
    batch, padded, valid = make_batch(lengths, model.config.image_size)

    theirs = peer(batch.images, padded)
    _, image_tokens = peer._encode_image(batch.images)
    _, text_tokens = peer._encode_text(padded)
    image, text = model.encode_image(batch.images), model.encode_text(batch.token_ids, batch.segments())
    logits, _ = model.word_logits(text, image)
    assert_close(image.features, theirs["image_features"])
    assert_close(image.rows, image_tokens.flatten(0, 1))
    assert_close(text.features, theirs["text_features"])
    assert_close(text.rows, text_tokens[valid])
    assert_close(logits, theirs["logits"][valid[:, 1:]])  # each word but the last has a label

    contrastive, caption = open_clip.loss.CoCaLoss(2.0, 1.0)(**theirs)
    (contrastive + caption).backward()
    objective = objective_of(model, model.config)
    losses = objective(batch)
    assert_close(losses["contrastive"], contrastive)
    assert_close(2.0 * losses["caption"], caption)
    objective.total(losses).backward()
    ours = gradients(objective.model)
    expected = {name: parameter.grad for name, parameter in peer.named_parameters()}
    assert ours.keys() == expected.keys()
    for key, gradient in expected.items():
        assert_close(ours[key], gradient)


def test_the_masks_differ_where_there_is_padding(open_clip):
    keywords, fields = CONFIGS["pooler_head_dim_96"]
    peer = make_peer(open_clip, keywords)
    batch, _, _ = make_batch(MIXED, 20)
    legacy, correct = (
        FORMAT.load(peer.state_dict(), legacy_class_mask=mask, **fields).double().encode_text(batch.token_ids, batch.segments())
        for mask in (True, False)
    )
    assert_close(legacy.rows, correct.rows)  # words see words before them under both
    same = torch.isclose(legacy.features, correct.features).all(1)
    assert same.tolist() == [n == CONTEXT for n in MIXED]


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_float32_equals_open_clip(open_clip, name):
    keywords, fields = configuration(name)
    peer = make_peer(open_clip, keywords, torch.float32)
    model = FORMAT.load(peer.state_dict(), **fields)  # the legacy mask, as open_clip has it
    batch, padded, valid = make_batch(MIXED, model.config.image_size, torch.float32)
    theirs = peer(batch.images, padded)
    image, text = model.encode_image(batch.images), model.encode_text(batch.token_ids, batch.segments())
    logits, _ = model.word_logits(text, image)
    for actual, expected in (
        (image.features, theirs["image_features"]),
        (text.features, theirs["text_features"]),
        (logits, theirs["logits"][valid[:, 1:]]),
    ):
        assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_round_trip(open_clip, name, tmp_path):
    keywords, fields = configuration(name)
    peer = make_peer(open_clip, keywords, torch.float32)
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in peer.state_dict().items()}}, tmp_path / "trained.pt")
    model = FORMAT.load(read_state(tmp_path / "trained.pt"), **fields)
    write_state(tmp_path / "ours.safetensors", FORMAT.save(model))
    saved = read_state(tmp_path / "ours.safetensors")
    expected = peer.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("pooler_head_dim_96", 15),
        ("pooler_head_dim_96", 30),
        *(pytest.param("pooler_head_dim_96", size, marks=pytest.mark.heavy) for size in (5, 10, 45, 80)),
        *(pytest.param("ViT-L-14_two_layers", size, marks=pytest.mark.heavy) for size in (28, 42, 70, 112)),
        *(pytest.param("ViT-B-32_two_layers", size, marks=pytest.mark.heavy) for size in (32, 64, 128)),
    ],
)
def test_another_image_size_interpolates_positions_as_open_clip(open_clip, name, image_size):
    keywords, fields = configuration(name)
    patch = keywords["vision_cfg"]["patch_size"]
    state = make_peer(open_clip, keywords, torch.float32).state_dict()
    model = FORMAT.load(state, image_size=image_size, **fields)
    peer = make_peer(open_clip, {**keywords, "vision_cfg": {**keywords["vision_cfg"], "image_size": image_size}}, torch.float32)
    resized = dict(state)
    open_clip.model.resize_pos_embed(resized, peer)
    peer.load_state_dict(resized)
    images = torch.randn(2, 3, image_size, image_size)
    assert_close(model.image_encoder.position_embedding.detach(), resized["visual.positional_embedding"], 1e-6)
    assert_close(model.encode_image(images).features, peer.encode_image(images), 1e-5)
    assert not torch.allclose(
        model.image_encoder.position_embedding, resize_positions(state["visual.positional_embedding"], image_size // patch)
    )


def test_the_scale_may_be_a_vector_of_one(open_clip):
    keywords, fields = CONFIGS["one_patch"]
    state = make_peer(open_clip, keywords, torch.float32).state_dict()
    model = FORMAT.load({**state, "logit_scale": state["logit_scale"][None]}, **fields)
    assert torch.equal(model.logit_scale.detach(), state["logit_scale"])


def test_checkpoints_that_do_not_fit_are_refused(open_clip):
    keywords, fields = CONFIGS["one_patch"]
    state = make_peer(open_clip, keywords, torch.float32).state_dict()
    with pytest.raises(CheckpointError, match="visual.attn_pool.query is missing"):
        FORMAT.load({name: tensor for name, tensor in state.items() if "attn_pool" not in name}, **fields)
    with pytest.raises(CheckpointError, match="logit_bias is not part of this model"):
        FORMAT.load({**state, "logit_bias": state["logit_scale"]}, **fields)
    short = "text_decoder.cross_attn.0.attn.in_proj_bias"
    with pytest.raises(CheckpointError, match="key_value.bias would have shape"):
        FORMAT.load({**state, short: state[short][:-1]}, **fields)


@pytest.mark.parametrize(("size", "name"), [("ViT-B-32", "coca_ViT-B-32"), ("ViT-L-14", "coca_ViT-L-14")])
def test_presets_are_open_clip_models(open_clip, size, name):
    keywords = open_clip.get_model_config(name)
    keywords.pop("custom_text")
    with torch.device("meta"):
        state = open_clip.coca_model.CoCa(**keywords).state_dict()
        model = FORMAT.model(open_clip_coca_preset(size))
    ours = FORMAT.save(model)
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in state.items()}
    assert FORMAT.config(state) == open_clip_coca_preset(size, legacy_class_mask=True)
