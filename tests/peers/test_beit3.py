"""BEiT-3 against torchscale's, in float32: every output and the gradient of every parameter, in odd configurations.

The peer pads texts and computes softmax in float32 whatever its dtype, so nothing is exact in float64.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlp_fast import Segments
from vlp_fast.models.beit3 import BEIT3_PRESETS, Beit3Config, Beit3MaskedModel
from vlp_fast.models.beit3_tasks import Beit3Captioner, Beit3ClassifierConfig, Beit3QuestionAnswering, Beit3Retrieval
from vlp_fast.models.checkpoints._rules import to_ours
from vlp_fast.models.checkpoints.beit3 import FORMATS, format_of

TOLERANCE = 1e-5  # of the largest value of a tensor
VOCAB = 50
SIZES = {
    "square": {"img_size": 32, "patch_size": 8, "encoder_embed_dim": 32, "encoder_attention_heads": 4, "encoder_layers": 2},
    "odd": {"img_size": 42, "patch_size": 14, "encoder_embed_dim": 96, "encoder_attention_heads": 1, "encoder_layers": 3},
    "no_last_norm": {
        "img_size": 16, "patch_size": 16, "encoder_embed_dim": 40, "encoder_attention_heads": 5, "encoder_layers": 1,
        "normalize_output": False,
    },
}  # fmt: skip
HEAVY_SIZES = {
    "deep": {"img_size": 24, "patch_size": 8, "encoder_embed_dim": 48, "encoder_attention_heads": 3, "encoder_layers": 8},
    "two heads of 96": {
        "img_size": 32, "patch_size": 16, "encoder_embed_dim": 192, "encoder_attention_heads": 2, "encoder_layers": 2,
    },
    "base, two layers": {
        "img_size": 48, "patch_size": 16, "encoder_embed_dim": 768, "encoder_attention_heads": 12, "encoder_layers": 2,
    },
    "many patches": {
        "img_size": 60, "patch_size": 4, "encoder_embed_dim": 32, "encoder_attention_heads": 2, "encoder_layers": 1,
        "normalize_output": False,
    },
}  # fmt: skip
ALL_SIZES = [*SIZES, *(pytest.param(name, marks=pytest.mark.heavy) for name in HEAVY_SIZES)]
LENGTHS = {"ragged": [7, 2, 1, 5], "full": [6, 6, 6, 6]}
HEAVY_LENGTHS = {"long": [18, 1, 18, 9], "words": [1, 1, 1, 1], "one": [5]}
ALL_LENGTHS = [*LENGTHS, *(pytest.param(name, marks=pytest.mark.heavy) for name in HEAVY_LENGTHS)]


class Peer(nn.Module):
    """torchscale's model under the name that the released checkpoints give it, with random weights in every parameter."""

    def __init__(self, **size) -> None:
        super().__init__()
        from torchscale.architecture.config import EncoderConfig
        from torchscale.model.BEiT3 import BEiT3

        ffn = size["encoder_embed_dim"] * 3
        self.config = EncoderConfig(
            multiway=True, vocab_size=VOCAB, no_output_layer=True, encoder_ffn_embed_dim=ffn, max_source_positions=20, **size
        )
        self.beit3 = BEiT3(self.config)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                norm = "norm" in name or "_ln." in name
                wide = parameter.dim() > 1 and "embed_positions" not in name and "text_embed" not in name
                std = parameter[0].numel() ** -0.5 if wide else 0.3  # a layer keeps the size of its rows
                parameter.copy_(torch.randn(parameter.shape) * std + float(norm and name.endswith("weight")))

    def forward(self, mode, images, mask, ids, padding):
        """The rows of images and of texts, None for what the mode has not."""
        if mode == "image":
            return self.beit3(visual_tokens=images, vision_masked_position=mask)["encoder_out"], None
        if mode == "text":
            return None, self.beit3(textual_tokens=ids, text_padding_position=padding)["encoder_out"]
        out = self.beit3(ids, images, padding, vision_masked_position=mask)
        split = out["multiway_split_position"]
        return out["encoder_out"][:, :split], out["encoder_out"][:, split:]


@pytest.fixture
def make_peer(torchvision_ops):
    pytest.importorskip("torchscale.model.BEiT3", reason="torchscale or fairscale is not installed", exc_type=ImportError)
    return Peer


def sizes_of(name):
    return (SIZES | HEAVY_SIZES)[name]


def lengths_of(name):
    return (LENGTHS | HEAVY_LENGTHS)[name]


def load(peer, **fields):
    heads = peer.config.encoder_attention_heads
    state = peer.state_dict()
    return format_of(state).load(state, num_heads=heads, **fields)


def format_for(model):
    return next(form for form in FORMATS if form.model is type(model))


def larger_peer(make_peer, size, img_size):
    """The same weights for images of another size, positions interpolated as unilm's loader does: two rows and the class token stay."""
    sizes = sizes_of(size)
    small, peer = make_peer(**sizes), make_peer(**{**sizes, "img_size": img_size})
    state = small.state_dict()
    name = "beit3.encoder.embed_positions.A.weight"
    kept, patches = state[name][:3], state[name][3:]
    side, new_side = round(len(patches) ** 0.5), img_size // sizes["patch_size"]
    image = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    new = F.interpolate(image, size=(new_side, new_side), mode="bicubic", align_corners=False)
    peer.load_state_dict({**state, name: torch.cat([kept, new.permute(0, 2, 3, 1).flatten(0, 2)])})
    return small, peer


def close(ours, theirs, what):
    largest = theirs.abs().max().item()
    worst = (ours - theirs).abs().max().item()
    assert worst <= TOLERANCE * max(largest, 1e-30), f"{what}: differs by {worst:.2e} where the largest value is {largest:.2e}"


def compare(peer, ours, mode, lengths, masked):
    size = peer.config.img_size
    images = torch.randn(len(lengths), 3, size, size)
    patches = (size // peer.config.patch_size) ** 2
    mask = torch.rand(len(lengths), patches) < 0.4 if masked else None
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, VOCAB, valid.shape).masked_fill(~valid, 1)
    padding = ~valid if not valid.all() else None

    image, text = peer(mode, images, mask, ids, padding)
    theirs = {"image": image, "text": None if text is None else text[valid]}
    segments, packed = Segments(lengths), ids[valid]
    if mode == "image":
        out = ours.encode_image(images, mask)
    elif mode == "text":
        out = ours.encode_text(packed, segments)
    else:
        out = ours.encode_pairs(images, packed, segments, mask)
    losses = [torch.zeros(()), torch.zeros(())]
    for name in ("image", "text"):
        rows, wanted = getattr(out, name), theirs[name]
        if wanted is None:
            assert rows.numel() == 0
            continue
        wanted = wanted.reshape(rows.shape)
        close(rows, wanted, name)
        weights = torch.randn(rows.shape)
        losses[0], losses[1] = losses[0] + (rows * weights).sum(), losses[1] + (wanted * weights).sum()
    losses[0].backward()
    losses[1].backward()
    compare_gradients(peer, ours)


def compare_gradients(peer, ours):
    """The peer leaves None where a modality is absent, ours zeros: an expert is a part of a tensor here."""
    theirs = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in peer.named_parameters()}
    theirs = to_ours(theirs, format_for(ours).rules(ours.config))
    for name, parameter in ours.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        close(gradient, theirs[name], f"gradient of {name}")


@pytest.mark.parametrize("lengths", ALL_LENGTHS)
@pytest.mark.parametrize("mode", ["image", "text", "pair"])
@pytest.mark.parametrize("size", ALL_SIZES)
def test_beit3_rows_and_gradients_equal_torchscale(make_peer, size, mode, lengths):
    peer = make_peer(**sizes_of(size))
    compare(peer, load(peer), mode, lengths_of(lengths), masked=mode == "image" or lengths != "full")


@pytest.mark.parametrize(
    ("size", "img_size"),
    [
        ("square", 48),
        ("odd", 28),
        *(pytest.param("square", size, marks=pytest.mark.heavy) for size in (8, 16, 24, 80)),
        *(pytest.param("odd", size, marks=pytest.mark.heavy) for size in (14, 70)),
        *(pytest.param("many patches", size, marks=pytest.mark.heavy) for size in (32, 84)),
        *(pytest.param("base, two layers", size, marks=pytest.mark.heavy) for size in (32, 80)),
    ],
)
def test_beit3_at_another_image_size_equals_torchscale(make_peer, size, img_size):
    small, peer = larger_peer(make_peer, size, img_size)
    compare(peer, load(small, image_size=img_size), "pair", LENGTHS["ragged"], masked=True)


@pytest.mark.parametrize("lengths", ALL_LENGTHS)
@pytest.mark.parametrize("size", ["odd", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("square", *HEAVY_SIZES))])
def test_beit3_captioning_rows_and_gradients_equal_torchscale(make_peer, size, lengths):
    """unilm's mask of captioning: an image sees itself, a word its image and the words up to itself."""
    peer, lengths = make_peer(**sizes_of(size)), lengths_of(lengths)
    ours, side = load(peer), sizes_of(size)["img_size"]
    images, longest = torch.randn(len(lengths), 3, side, side), max(lengths)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    ids, tokens = torch.randint(3, VOCAB, valid.shape).masked_fill(~valid, 1), ours.num_image_tokens
    blocked = torch.ones(tokens + longest, tokens + longest, dtype=torch.long).triu(1)
    blocked[:tokens, :tokens] = 0
    theirs = peer.beit3(ids, images, ~valid, attn_mask=blocked)["encoder_out"]
    out = ours.encode_captioned(images, ids[valid], Segments(lengths))
    image, text = theirs[:, :tokens].flatten(0, 1), theirs[:, tokens:][valid]
    close(out.image, image, "image")
    close(out.text, text, "text")
    weights = torch.randn(image.shape), torch.randn(text.shape)
    ((out.image * weights[0]).sum() + (out.text * weights[1]).sum()).backward()
    ((image * weights[0]).sum() + (text * weights[1]).sum()).backward()
    compare_gradients(peer, ours)


@pytest.mark.parametrize(
    ("size", "model", "fields", "millions"),
    [
        ("base", Beit3MaskedModel, {}, 276),
        ("large", Beit3MaskedModel, {}, 746),
        ("base", Beit3Retrieval, {}, 222),
        ("large", Beit3Retrieval, {}, 674),
        ("base", Beit3Captioner, {"image_size": 480}, 271),
        ("base", Beit3QuestionAnswering, {"image_size": 480, "num_classes": 3129, "normalize_output": False}, 228),
    ],
)
def test_beit3_has_the_released_names_shapes_and_numbers_of_parameters(make_peer, size, model, fields, millions):
    """Without memory; the numbers are those of unilm's README, which rounds some of them up and some down."""
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    preset = BEIT3_PRESETS[size]
    config = (Beit3ClassifierConfig if "num_classes" in fields else Beit3Config)(**preset, **fields)
    released = EncoderConfig(
        multiway=True, img_size=config.image_size, patch_size=16, vocab_size=64010, no_output_layer=True,
        encoder_embed_dim=config.dim, encoder_layers=config.depth, encoder_attention_heads=config.num_heads,
        encoder_ffn_embed_dim=config.hidden_dim, normalize_output=config.normalize_output,
    )  # fmt: skip
    with torch.device("meta"):
        ours, peer = model(config), BEiT3(released)
    ours = format_for(ours).save(ours)
    trunk = {name: tensor.shape for name, tensor in ours.items() if name.startswith("beit3.")}
    assert trunk == {f"beit3.{name}": tensor.shape for name, tensor in peer.state_dict().items()}
    assert abs(sum(tensor.numel() for tensor in ours.values()) / 1e6 - millions) < 1
