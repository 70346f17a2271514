"""CoCa on PaLM's blocks against lucidrains' CoCa-pytorch, in float64: outputs, losses, every gradient, the weights both ways."""

import pytest
import torch
from torch import nn

from vlp_fast import Segments, losses
from vlp_fast.data import Batch
from vlp_fast.models.checkpoints import CheckpointError, read_state, write_state
from vlp_fast.models.checkpoints.lucidrains_coca import FORMAT
from vlp_fast.models.coca_palm import CocaPalm, coca_palm_preset
from vlp_fast.training.coca_palm import CocaPalmPretraining

peers = pytest.importorskip("coca_pytorch.coca_pytorch", reason="CoCa-pytorch is not installed")

COLUMNS, VOCAB, SIDE = 9, 53, 12
LENGTHS = {"padded": [4, 1, 8], "full": [COLUMNS] * 3, "mixed": [COLUMNS, 0, 5]}

CONFIGS = {
    "odd_widths": {
        "dim": 40, "image_dim": 24, "heads": 3, "dim_head": 10, "ff_mult": 2, "unimodal_depth": 2, "multimodal_depth": 3,
        "num_img_queries": 5, "dim_latents": 17,
    },
    "head_dim_96": {"dim": 48, "heads": 2, "dim_head": 96, "unimodal_depth": 1, "multimodal_depth": 1, "num_img_queries": 2},
    "one_head": {
        "dim": 64, "image_dim": 32, "heads": 1, "dim_head": 16, "ff_mult": 3, "unimodal_depth": 3, "multimodal_depth": 2,
        "num_img_queries": 12,
    },
}  # fmt: skip
HEAVY_CONFIGS = {
    # the sizes of CoCa-pytorch's introduction, with two layers of six
    "introduction": {"dim": 512, "image_dim": 1024, "unimodal_depth": 2, "multimodal_depth": 2, "num_img_queries": 256},
    "deep": {
        "dim": 32, "image_dim": 16, "heads": 4, "dim_head": 8, "ff_mult": 2, "unimodal_depth": 7, "multimodal_depth": 6,
        "num_img_queries": 3,
    },
    "heads_wider_than_rows": {
        "dim": 24, "image_dim": 40, "heads": 5, "dim_head": 64, "ff_mult": 1, "unimodal_depth": 2, "multimodal_depth": 1,
        "num_img_queries": 4, "dim_latents": 64,
    },
    "three_heads_of_96": {
        "dim": 96, "heads": 3, "dim_head": 96, "unimodal_depth": 2, "multimodal_depth": 3, "num_img_queries": 30, "dim_latents": 8,
    },
}  # fmt: skip
ALL_CONFIGS = [*CONFIGS, *(pytest.param(name, marks=pytest.mark.heavy) for name in HEAVY_CONFIGS)]
HEAVY_LENGTHS = {"short": [2, 1, 3], "six": [3, 9, 1, 7, 2, 8], "two": [6, 9]}
ALL_LENGTHS = [*LENGTHS, *(pytest.param(name, marks=pytest.mark.heavy) for name in HEAVY_LENGTHS)]


class TinyEncoder(nn.Module):
    """Anybody's image encoder: images -> tokens ``[batch, tokens, width]``."""

    def __init__(self, width):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, images):
        return torch.tanh(self.patches(images)).flatten(2).transpose(1, 2) * self.scale


def sizes_of(name):
    return (CONFIGS | HEAVY_CONFIGS)[name]


def make_peer(name, encoder=TinyEncoder, dtype=torch.float64):
    sizes = sizes_of(name)
    peer = peers.CoCa(**sizes, num_tokens=VOCAB, img_encoder=encoder(sizes.get("image_dim", sizes["dim"])))
    randomise(peer)
    return peer.to(dtype)  # float64 with values of float32, in which weights are loaded


def randomise(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.3)
            if name.endswith("gamma"):
                parameter.add_(1.0)


def make_captions(lengths):
    """Token ids padded to COLUMNS with 0, and which of them are words."""
    valid = torch.arange(COLUMNS) < torch.tensor(lengths)[:, None]
    return torch.randint(1, VOCAB, valid.shape) * valid, valid


def packed(text, valid):
    return text[valid], Segments(valid.sum(1))


def make_images(count, dtype=torch.float64):
    return torch.randn(count, 3, SIDE, SIDE, dtype=dtype)


def ours_of(peer, encoder=TinyEncoder, **fields):
    """Our model with the peer's weights in the peer's dtype, around an image encoder of the same class."""
    model = FORMAT.load(peer.state_dict(), image_encoder=encoder(peer.img_attn_pool.to_kv.in_features), **fields)
    return model.to(peer.temperature.dtype)


def assert_close(actual, expected, relative=1e-10):
    """Within `relative` of the largest value of the tensor."""
    assert actual.shape == expected.shape
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * max(scale, 1e-12))


def assert_same_gradients(model, peer, relative=1e-10):
    state = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert not [name for name, gradient in state.items() if gradient is None]
    holder = ours_of(peer)
    holder.load_state_dict(state)
    ours, theirs = FORMAT.save(holder), dict(peer.named_parameters())
    assert ours.keys() >= theirs.keys()
    for name, parameter in theirs.items():
        assert_close(ours[name], parameter.grad, relative)


@pytest.mark.parametrize("lengths", ALL_LENGTHS)
@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_outputs_and_their_gradients_equal_the_peer(name, lengths):
    peer, lengths = make_peer(name), (LENGTHS | HEAVY_LENGTHS)[lengths]
    model, images = ours_of(peer), make_images(len(lengths))
    text, valid = make_captions(lengths)
    theirs_text, words = peer.embed_text(text)
    theirs_image, tokens = peer.embed_image(images)
    theirs_logits = peer(text, images)

    ids, segments = packed(text, valid)
    tower_words, ours_text = model.text_encoder(model.text_decoder.words(ids), segments, COLUMNS)
    rows, ours_image = model.image_encoder(images)
    assert_close(tower_words, words[valid])
    assert_close(ours_text, theirs_text)
    assert_close(rows, tokens.flatten(0, 1))
    assert_close(ours_image, theirs_image)

    encoded, image = model.encode_text(ids, segments, COLUMNS), model.encode_image(images)
    assert_close(encoded.features, peer.text_to_latents(theirs_text))
    assert_close(image.features, peer.img_to_latents(theirs_image))
    logits, kept = model.word_logits(encoded, image)
    assert_close(logits, theirs_logits[valid][kept])

    outputs = [(encoded.features, peer.text_to_latents(theirs_text)), (image.features, peer.img_to_latents(theirs_image))]
    outputs += [(logits, theirs_logits[valid][kept]), (ours_text, theirs_text)]
    weights = [torch.randn_like(theirs) for _, theirs in outputs]
    sum((ours * w).sum() for (ours, _), w in zip(outputs, weights, strict=True)).backward()
    sum((theirs * w).sum() for (_, theirs), w in zip(outputs, weights, strict=True)).backward()
    model.logit_scale.grad, peer.temperature.grad = torch.zeros(()).double(), torch.zeros(1).double()  # no part of these
    assert_same_gradients(model, peer)


def both_losses(peer, text, images):
    """The peer's contrastive and captioning loss, each with its weight of 1."""
    parts = []
    for contrastive, caption in ((1.0, 0.0), (0.0, 1.0)):
        peer.contrastive_loss_weight, peer.caption_loss_weight = contrastive, caption
        parts.append(peer(text, images, return_loss=True))
    return parts


@pytest.mark.parametrize("lengths", ALL_LENGTHS)
@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_losses_and_their_gradients_equal_the_peer(name, lengths):
    """The peer reads all columns but the last, and predicts all but the first."""
    peer, lengths = make_peer(name), (LENGTHS | HEAVY_LENGTHS)[lengths]
    model, images = ours_of(peer), make_images(len(lengths))
    text, valid = make_captions(lengths)
    contrastive, caption = both_losses(peer, text, images)
    (contrastive + caption).backward()

    read = valid[:, :-1]
    image, encoded = model.encode_image(images), model.encode_text(*packed(text[:, :-1], read), COLUMNS - 1)
    ours_contrastive = losses.contrastive_loss(image.features, encoded.features, model.logit_scale.exp())
    hidden = model.text_decoder(encoded.rows, encoded.segments, image.rows, image.segments)
    ours_caption = losses.linear_cross_entropy(
        hidden, model.text_decoder.words.weight, text[:, 1:][read], ignore_index=peer.pad_id
    )
    assert_close(ours_contrastive, contrastive)
    assert_close(ours_caption, caption)
    (ours_contrastive + ours_caption).backward()
    assert_same_gradients(model, peer)


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_pretraining_step_equals_the_peer_where_each_caption_has_padding(name):
    lengths = LENGTHS["padded"]
    peer = make_peer(name)
    model, images = ours_of(peer, class_position=COLUMNS - 1), make_images(len(lengths))
    text, valid = make_captions(lengths)
    step = CocaPalmPretraining(model.config, model.image_encoder.encoder).double()
    step.model.load_state_dict(model.state_dict())
    contrastive, caption = both_losses(peer, text, images)
    ours = step(Batch(images, text[valid], tuple(lengths), ("",) * len(lengths)))
    assert_close(ours["contrastive"], contrastive)
    assert_close(ours["caption"], caption)
    (contrastive + caption).backward()
    step.total(ours).backward()
    assert_same_gradients(step.model, peer)


def test_float32_stays_within_rounding_of_the_peer():
    peer = make_peer("odd_widths", dtype=torch.float32)
    model, images = ours_of(peer), make_images(3, torch.float32)
    text, valid = make_captions(LENGTHS["padded"])
    encoded, image = model.encode_text(*packed(text, valid), COLUMNS), model.encode_image(images)
    logits, kept = model.word_logits(encoded, image)
    assert_close(encoded.features, peer.text_to_latents(peer.embed_text(text)[0]), 1e-5)
    assert_close(image.features, peer.img_to_latents(peer.embed_image(images)[0]), 1e-5)
    theirs = peer(text, images)[valid][kept]
    assert_close(logits, theirs, 1e-5)
    weight = torch.randn_like(theirs)
    (theirs * weight).sum().backward()
    (logits * weight).sum().backward()
    ours, theirs = model.text_decoder.words.weight.grad, peer.token_emb.weight.grad
    assert_close(ours, theirs, 1e-5)


def test_a_caption_alone_equals_the_peer_without_padding():
    """The default position of CLS; in a padded batch the peer gives the same caption other features."""
    peer = make_peer("one_head")
    model = ours_of(peer)
    text, valid = make_captions([4, 1, 8])
    encoded = model.encode_text(*packed(text, valid))
    for i, length in enumerate([4, 1, 8]):
        alone = peer.text_to_latents(peer.embed_text(text[i : i + 1, :length])[0])
        assert_close(encoded.features[i : i + 1], alone)
    in_batch = peer.text_to_latents(peer.embed_text(text)[0])
    assert not torch.allclose(encoded.features, in_batch)


def test_image_tokens_from_elsewhere():
    peer = make_peer("odd_widths", encoder=lambda width: None)
    model = FORMAT.load(peer.state_dict()).double()
    tokens = torch.randn(3, 7, 24, dtype=torch.float64)
    pooled, rows = peer.embed_image(image_tokens=tokens)
    for image in (model.encode_image(tokens), model.encode_tokens(tokens.flatten(0, 1), Segments([7] * 3))):
        assert_close(image.features, peer.img_to_latents(pooled))
        assert_close(image.rows, rows.flatten(0, 1))


def test_vit_pytorch_through_its_extractor(torchvision_ops):
    """The image encoder of the peer's own introduction, as it is."""
    vits = pytest.importorskip("vit_pytorch", reason="vit-pytorch is not installed")
    extractor = pytest.importorskip("vit_pytorch.extractor").Extractor

    def encoder(width):
        vit = vits.ViT(
            image_size=SIDE, patch_size=4, num_classes=2, dim=width, depth=2, heads=2, dim_head=8, mlp_dim=20, dropout=0.0
        )
        return extractor(vit, return_embeddings_only=True, detach=False)

    peer = make_peer("odd_widths", encoder)
    model, images = ours_of(peer, encoder), make_images(2)
    peer.eval(), model.eval()
    pooled, rows = peer.embed_image(images)
    image = model.encode_image(images)
    assert_close(image.features, peer.img_to_latents(pooled))
    assert_close(image.rows, rows.flatten(0, 1))


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_weights_go_there_and_back(name, tmp_path):
    peer = make_peer(name, dtype=torch.float32)
    state = peer.state_dict()
    write_state(tmp_path / "peer.pt", state)
    model = FORMAT.load(read_state(tmp_path / "peer.pt"), image_encoder=TinyEncoder(model_width(name)))
    assert model.config == ours_of(peer).config
    saved = FORMAT.save(model)
    assert saved.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(saved[key], tensor), key
    fresh = make_peer(name, dtype=torch.float32)
    fresh.load_state_dict(saved, strict=True)


def model_width(name):
    return sizes_of(name).get("image_dim", sizes_of(name)["dim"])


def test_our_own_image_encoder_is_known_by_its_names():
    model = CocaPalm(coca_palm_preset("tiny"))
    state = FORMAT.save(model)
    assert "img_encoder.patch_embedding.proj.weight" in state
    again = FORMAT.load(state, vision_heads=4)
    assert again.config == model.config
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_checkpoints_that_do_not_fit_say_why():
    state = make_peer("odd_widths").state_dict()
    encoder = TinyEncoder(24)

    def refuses(match, changes=None, drop=(), **fields):
        changed = {key: tensor for key, tensor in state.items() if key not in drop} | (changes or {})
        with pytest.raises(CheckpointError, match=match):
            FORMAT.load(changed, image_encoder=encoder, **fields)

    refuses("to_logits.1.weight should be the same tensor", {"to_logits.1.weight": state["token_emb.weight"] + 1})
    refuses("beta, which is no weight there, must be zero", {"text_cls_norm.beta": torch.ones(40)})
    refuses(
        "inv_freq must be those of heads of 10 with base 10000", {"unimodal_layers.0.fn.rotary_emb.inv_freq": torch.ones(5)}
    )
    refuses("text_cls_token is missing", drop=["text_cls_token"])
    refuses("text_decoder.blocks.2.fc2.weight|is not part of this model", multimodal_depth=2)
    refuses("this model needs", vocab_size=VOCAB + 1)
    with pytest.raises(CheckpointError, match="img_encoder.patches.weight is not part of this model"):
        FORMAT.load(state)
