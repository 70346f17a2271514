"""BEiT-3's other forms, in float64: the paper's shared attention and vision-language experts, and captioning's mask."""

import pytest
import torch

from vlp_fast import Segments
from vlp_fast.models import Beit3, Beit3Config, beit3_preset
from vlp_fast.models.beit3 import Beit3Read
from vlp_fast.models.beit3_tasks import (
    Beit3Captioner,
    Beit3Classifier,
    Beit3ClassifierConfig,
    Beit3QuestionAnswering,
    Beit3Reasoning,
    Beit3Retrieval,
)

LENGTHS = [5, 1, 8]
EXPERT_PARTS = ("ffn_norm", "ffn")


def make(**changes):
    torch.manual_seed(1)
    model = Beit3(beit3_preset("tiny", depth=3, vocab_size=100, **changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, dtype=torch.float64)


@pytest.fixture
def captions():
    return torch.randint(5, 90, (sum(LENGTHS),)), Segments(LENGTHS)


def copied(model, expand, **changes):
    """A decoupled model with the weights of `model`, those of the encoder's layers through ``expand(name, tensor)``."""
    other = make(**changes)
    other.load_state_dict({name: expand(name, tensor) for name, tensor in model.state_dict().items()})
    return other


def backward(model, out, weights):
    ((out.image * weights[0]).sum() + (out.text * weights[1]).sum()).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def weights_of(out):
    return torch.randn_like(out.image), torch.randn_like(out.text)


@pytest.mark.parametrize("mode", ["image", "text", "pair"])
def test_beit3_shared_attention_is_two_equal_copies_whose_gradients_add(images, captions, mode):
    def attends(name):
        return ".attention" in name

    shared = make(share_attention=True)
    apart = copied(shared, lambda name, tensor: tensor.repeat(2, *[1] * (tensor.dim() - 1)) if attends(name) else tensor)
    run = {
        "image": lambda model: model.encode_image(images),
        "text": lambda model: model.encode_text(*captions),
        "pair": lambda model: model.encode_pairs(images, *captions),
    }[mode]
    one, two = run(shared), run(apart)
    torch.testing.assert_close((one.image, one.text), (two.image, two.text))
    weights = weights_of(one)
    mine, theirs = backward(shared, one, weights), backward(apart, two, weights)
    for name, gradient in mine.items():
        wanted = theirs[name].sum(0, keepdim=True) if attends(name) else theirs[name]
        torch.testing.assert_close(gradient, wanted, msg=name)


def of_expert(name, layer=2):
    return any(name.startswith(f"encoder.layers.{layer}.{part}.") for part in EXPERT_PARTS)


@pytest.mark.parametrize("causal", [False, True])
def test_beit3_pairs_use_the_vision_language_expert_and_its_gradient_is_of_both_modalities(images, captions, causal):
    model = make(vl_experts_from_layer=2)
    plain = copied(model, lambda name, tensor: tensor[[1, 1]] if of_expert(name) else tensor)

    def run(m):
        return m.encode_captioned(images, *captions) if causal else m.encode_pairs(images, *captions)

    one, two = run(model), run(plain)
    torch.testing.assert_close((one.image, one.text), (two.image, two.text))
    weights = weights_of(one)
    mine, theirs = backward(model, one, weights), backward(plain, two, weights)
    for name, gradient in mine.items():
        if of_expert(name):
            torch.testing.assert_close(gradient[1], theirs[name].sum(0), msg=name)
            assert gradient[[0, 2]].abs().max() == 0
        else:
            torch.testing.assert_close(gradient, theirs[name], msg=name)


@pytest.mark.parametrize("mode", ["image", "text"])
def test_beit3_single_modalities_never_use_the_vision_language_expert(images, captions, mode):
    model = make(vl_experts_from_layer=2)
    plain = copied(model, lambda name, tensor: tensor[[0, 2]] if of_expert(name) else tensor)

    def run(m):
        return m.encode_image(images) if mode == "image" else m.encode_text(*captions)

    one, two = run(model), run(plain)
    torch.testing.assert_close((one.image, one.text), (two.image, two.text))
    weights = weights_of(one)
    mine, theirs = backward(model, one, weights), backward(plain, two, weights)
    for name, gradient in mine.items():
        if of_expert(name):
            torch.testing.assert_close(gradient[[0, 2]], theirs[name], msg=name)
            assert gradient[1].abs().max() == 0
        else:
            torch.testing.assert_close(gradient, theirs[name], msg=name)


def test_beit3_mixed_samples_equal_separate_calls(images, captions):
    """Two images alone, a pair and two texts alone in one forward of the paper's form."""
    model, (ids, segments) = make(share_attention=True, vl_experts_from_layer=1), captions
    n = model.num_image_tokens
    image, text = model.embed_images(images), model.embed_text(ids, segments)
    rows, texts = model.encoder(image, [n, n, n, 0, 0], text, [0, 0, *LENGTHS])
    torch.testing.assert_close(rows[: 2 * n], model.encode_image(images[:2]).image)
    pair = model.encode_pairs(images[2:], ids[:5], Segments([5]))
    torch.testing.assert_close(rows[2 * n :], pair.image)
    torch.testing.assert_close(texts[:5], pair.text)
    torch.testing.assert_close(texts[5:], model.encode_text(ids[5:], Segments(LENGTHS[1:])).text)
    with pytest.raises(ValueError, match="images alone, then pairs, then texts alone"):
        model.encoder(image, [n, n, n, 0], text, [5, 0, 1, 8])


def test_beit3_giant_has_the_papers_size():
    """1.9 billion parameters (table 2, which does not say whether heads count) and three layers with vision-language experts."""
    with torch.device("meta"):
        model = Beit3(beit3_preset("giant"))
    assert abs(sum(p.numel() for p in model.parameters()) / 1.9e9 - 1) < 0.03
    assert [len(layer.ffn.fc1.weight) for layer in model.encoder.layers] == [2] * 37 + [3] * 3
    assert {len(layer.attention.qkv.weight) for layer in model.encoder.layers} == {1}


def test_beit3_config_says_what_is_wrong():
    with pytest.raises(ValueError, match="vl_experts_from_layer must name one of 2 layers, from 0, or be None; received 2"):
        beit3_preset("tiny", vl_experts_from_layer=2)


def test_beit3_captioning_hides_later_words_and_images_read_no_text(images, captions):
    model, (ids, segments) = make(), captions
    changed = ids.clone()
    changed[-2] = (changed[-2] + 1) % 90
    before, after = (model.encode_captioned(images, x, segments) for x in (ids, changed))
    torch.testing.assert_close(before.image, after.image)
    torch.testing.assert_close(before.image, model.encode_image(images).image)
    same = torch.isclose(before.text, after.text).all(1)
    assert same[:-2].all()
    assert not same[-2:].any()
    with pytest.raises(ValueError, match="one caption per image"):
        model.encode_captioned(images[:2], ids, segments)


COUNTS = (0, 5, 16)  # masked patches of the images


@pytest.fixture
def mask():
    mask = torch.zeros(3, 16, dtype=torch.bool)
    for i, count in enumerate(COUNTS):
        mask[i, torch.randperm(16)[:count]] = True
    return mask


def masked_tokens(mask):
    image, patch = mask.nonzero(as_tuple=True)
    return image * 17 + 1 + patch


@pytest.mark.parametrize("paper", [False, True])
def test_beit3_drops_visible_patches_only(images, captions, mask, paper):
    """All masked patches stay, and what stays is encoded as the encoder encodes those rows, in pairs and alone."""
    form = {"share_attention": True, "vl_experts_from_layer": 1} if paper else {}
    model, lengths = make(patch_drop=0.5, **form), [1 + 8, 1 + 5 + 6, 1 + 16]
    text = model.embed_text(*captions)
    embedded = model.embed_images(images, mask)
    for out, words, counts in (
        (model.encode_image(images, mask, COUNTS), text[:0], [0] * 3),
        (model.encode_image(images, mask), text[:0], [0] * 3),
        (model.encode_pairs(images, *captions, mask, COUNTS), text, LENGTHS),
    ):
        assert list(out.image_segments.lengths) == lengths
        tokens = out.image_tokens
        assert (tokens.diff() > 0).all()
        assert torch.bincount(tokens // 17).tolist() == lengths
        assert torch.isin(torch.tensor([0, 17, 34]), tokens).all()
        assert torch.isin(masked_tokens(mask), tokens).all()
        image, described = model.encoder(embedded[tokens], lengths, words, counts)
        torch.testing.assert_close(out.image, image)
        torch.testing.assert_close(out.text, described)


def test_beit3_reads_the_rows_of_masked_patches(images, captions, mask, monkeypatch):
    """With an encoder that returns what enters, read rows are the embedded masked patches, whatever was left out."""
    model, tokens = make(patch_drop=0.5), masked_tokens(mask)
    embedded = model.embed_images(images, mask)
    read = Beit3Read(tokens, COUNTS, torch.arange(0), [0] * 3)

    def forward(image, image_lengths, text, text_lengths, causal_text=False, *, read=None, parts=()):
        return (image, text) if read is None else (image[read.image], text[read.text])

    monkeypatch.setattr(model.encoder, "forward", forward)
    for _ in range(3):
        assert torch.equal(model.encode_image(images, mask, COUNTS).image_at(tokens), embedded[tokens])
        assert torch.equal(model.encode_pairs(images, *captions, mask, COUNTS).image_at(tokens), embedded[tokens])
        assert torch.equal(model.encode_mixed(images, mask, *captions, 3, read, mask_counts=COUNTS)[0], embedded[tokens])
    assert model.encode_image(images, mask, COUNTS).image.shape[0] == sum(COUNTS) + 3 + 8 + 6
    assert torch.equal(model.eval().encode_image(images, mask, COUNTS).image, embedded)


def test_beit3_heads_with_patches_left_out(images, captions):
    """Fine-tuning has no masks: all patches may be left out, in training only."""
    config = {
        "vocab_size": 100,
        "image_size": 64,
        "dim": 64,
        "depth": 2,
        "num_heads": 4,
        "hidden_dim": 256,
        "max_positions": 64,
    }
    calls = {
        Beit3Classifier: lambda model: model(images),
        Beit3QuestionAnswering: lambda model: model(images, *captions),
        Beit3Reasoning: lambda model: model(images, images.roll(1, 0), *captions),
        Beit3Retrieval: lambda model: model.image_features(images),
        Beit3Captioner: lambda model: model.caption_rows(images, *captions),
    }
    for kind, call in calls.items():
        made, classes = (
            [],
            {"num_classes": 4} if issubclass(kind, Beit3Classifier | Beit3QuestionAnswering | Beit3Reasoning) else {},
        )
        for share in (0.0, 0.5):
            torch.manual_seed(1)
            made.append(
                kind((Beit3ClassifierConfig if classes else Beit3Config)(**config, **classes, patch_drop=share)).double()
            )
        full, dropping = made
        rows = []
        dropping.encoder.layers[0].register_forward_pre_hook(lambda module, args, rows=rows: rows.append(args[1].query.lengths))
        out = call(dropping)
        assert out.isfinite().all()
        assert rows[0][0] == 9
        assert not torch.allclose(out, call(full))
        torch.testing.assert_close(call(dropping.eval()), call(full.eval()))


def test_beit3_says_which_mask_counts_do_not_fit(images, mask):
    model = make(patch_drop=0.5)
    for counts in ((1, 2), (0, 5, 17), (0, -1, 3)):
        with pytest.raises(ValueError, match="mask_counts must be a number from 0 to 16 for each of 3 images"):
            model.encode_image(images, mask, counts)
