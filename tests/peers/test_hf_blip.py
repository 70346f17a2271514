"""transformers' BLIP with random weights against ours with the same: outputs, losses, and the gradient of every parameter."""

import pytest
import torch
import torch.nn.functional as F

from vlp_fast import Segments
from vlp_fast.models.checkpoints import CheckpointError, hf_blip
from vlp_fast.models.checkpoints._positions import resize_positions
from vlp_fast.models.checkpoints._rules import to_ours
from vlp_fast.ops import linear_cross_entropy
from vlp_fast.passes import TextPass
from vlp_fast.training.blip_tasks import captioning_loss, vqa_loss

transformers = pytest.importorskip("transformers", reason="needs transformers, whose BLIP is the peer")

VOCAB, DEC = 120, 118
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
SIZES = {
    "plain": (
        {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32},
        {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3},
    ),
    "wide heads": (
        {"hidden_size": 96, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 1, "image_size": 40,
         "layer_norm_eps": 1e-3},
        {"hidden_size": 96, "intermediate_size": 72, "num_hidden_layers": 1, "num_attention_heads": 1, "layer_norm_eps": 1e-4},
    ),
    "defaults": (  # 8 heads where the configuration does not say
        {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 16},
        {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3},
    ),
}  # fmt: skip
HEAVY_SIZES = {
    "deep": (
        {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 7, "num_attention_heads": 3, "image_size": 48},
        {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 6, "num_attention_heads": 2},
    ),
    "two heads of 96": (
        {"hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24},
        {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
    "many patches": (
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 128},
        {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 1},
    ),
    "one patch": (
        {"hidden_size": 40, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 5, "image_size": 8},
        {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 6},
    ),
    "base, two layers": (
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 2, "num_attention_heads": 12, "image_size": 32},
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 2, "num_attention_heads": 12},
    ),
}  # fmt: skip
ALL_SIZES = [*SIZES, *(pytest.param(name, marks=pytest.mark.heavy) for name in HEAVY_SIZES)]
# transformers' answer decoder reads rows as wide as images
ANSWERING = [
    "wide heads",
    *(pytest.param(name, marks=pytest.mark.heavy) for name in ("deep", "two heads of 96", "base, two layers")),
]


@pytest.fixture
def blip(torchvision_ops):
    return pytest.importorskip("transformers.models.blip.modeling_blip")


def make_peer(kind, size, dtype, *, text=(), **changes):
    """A model of theirs with random weights everywhere, norms and biases too."""
    vision_config, text_config = ({**part} for part in (SIZES | HEAVY_SIZES)[size])
    text_config.update(vocab_size=VOCAB, max_position_embeddings=24, bos_token_id=DEC, pad_token_id=0, **dict(text))
    vision_config.update(patch_size=8, **changes)
    config = transformers.BlipConfig(
        text_config=text_config, vision_config=vision_config, image_text_hidden_size=20, attn_implementation="eager"
    )
    peer = kind(config)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            wide = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.normal_(0.0, min(0.1, wide**-0.5))
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1.0)
    return peer.to(dtype).eval(), config.to_dict()


def load(fmt, peer, config, dtype, **fields):
    assert hf_blip.format_of(peer.state_dict()) is fmt
    given = {**hf_blip.fields(config), "enc_id": VOCAB - 1, **fields}
    return fmt.load(peer.state_dict(), **given).to(dtype).eval()


def make_captions(lengths, first):
    """Padded ids and mask for theirs, packed ids and segments for ours."""
    ids = torch.randint(5, VOCAB - 2, (len(lengths), max(lengths)))
    ids[:, 0] = first
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 0), mask, ids[mask], Segments(lengths)


def assert_same(actual, expected, what):
    assert actual.shape == expected.shape, what
    allowed = TOLERANCE[actual.dtype] * max(expected.abs().max().item(), 1e-3)
    difference = (actual - expected).abs().max().item()
    assert difference <= allowed, f"{what} differs by {difference:.3g}; {allowed:.3g} is allowed"


def assert_same_gradients(fmt, model, peer):
    """Of every parameter, theirs converted as their weights are: conversions only move numbers."""
    theirs = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in peer.state_dict(keep_vars=True).items()}
    expected = to_ours(theirs, fmt.rules(model.config))
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_same(grad, expected[name], f"the gradient of {name}")
        assert name.startswith("image_encoder") or grad.abs().max() > 0, name


def assert_round_trip(fmt, model, peer):
    saved, state = fmt.save(model), peer.state_dict()
    assert saved.keys() == state.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor, state[name]), name


PADDINGS = [
    pytest.param([9, 4, 7], id="padded"),
    pytest.param([6, 6, 6], id="full"),
    pytest.param([24, 2, 13], id="long", marks=pytest.mark.heavy),
    pytest.param([2, 2, 3], id="short", marks=pytest.mark.heavy),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("size", ALL_SIZES)
@pytest.mark.parametrize("lengths", PADDINGS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_captioning_equals_transformers(blip, dtype, size, lengths, label_smoothing):
    peer, config = make_peer(blip.BlipForConditionalGeneration, size, dtype, text={"label_smoothing": label_smoothing})
    model = load(hf_blip.CAPTIONING, peer, config, dtype)
    side = config["vision_config"]["image_size"]
    images = torch.randn(3, 3, side, side, dtype=dtype)
    ids, mask, packed, segments = make_captions(lengths, DEC)
    theirs = peer(images, ids, mask, labels=ids.masked_fill(~mask, -100))
    image = model.encode_image(images)
    assert_same(image.rows, theirs.image_embeds.flatten(0, 1), "image rows")
    (rows,) = model.text_tower([model.captioning_pass(packed, segments, range(3))], image.rows, image.segments)
    assert_same(model.word_logits(rows), theirs.logits[mask], "logits")
    loss = captioning_loss(model, image, packed, segments, range(3), label_smoothing=label_smoothing)
    assert_same(loss, theirs.loss, "the loss")
    loss.backward()
    theirs.loss.backward()
    assert_same_gradients(hf_blip.CAPTIONING, model, peer)
    if dtype == torch.float32:
        assert_round_trip(hf_blip.CAPTIONING, model, peer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("size", ALL_SIZES)
@pytest.mark.parametrize("lengths", PADDINGS)
def test_retrieval_equals_transformers(blip, dtype, size, lengths):
    peer, config = make_peer(blip.BlipForImageTextRetrieval, size, dtype)
    model = load(hf_blip.RETRIEVAL, peer, config, dtype)
    side = config["vision_config"]["image_size"]
    images = torch.randn(3, 3, side, side, dtype=dtype)
    ids, mask, packed, segments = make_captions(lengths, 101)
    matching = peer(ids, images, use_itm_head=True, attention_mask=mask)
    cosine = peer(ids, images, use_itm_head=False, attention_mask=mask)
    image, text = model.encode_image(images), model.encode_text(packed, segments)
    asked = TextPass("itm", packed, segments, images=range(3))  # [CLS] stays in front, as theirs has it
    (rows,) = model.text_tower([asked], image.rows, image.segments)
    logits = model.matching_logits(rows[segments.first_rows()])
    assert_same(image.rows, matching.last_hidden_state.flatten(0, 1), "image rows")
    pooled = model.image_encoder.norm(image.rows[image.segments.first_rows()])
    assert_same(pooled, peer.vision_model(images).pooler_output, "the pooled image, which theirs normalises twice")
    assert_same(rows, matching.question_embeds[mask], "rows of captions with images")
    assert_same(logits, matching.itm_score, "matching logits")
    (alone,) = model.text_tower([TextPass("itc", packed, segments)])
    assert_same(alone, cosine.question_embeds[mask], "rows of captions")
    text_features = F.normalize(peer.text_proj(cosine.question_embeds[:, 0]), dim=-1)
    assert_same(text, text_features, "text features")
    assert_same(image.features @ text.T, cosine.itm_score, "cosines")
    weights = torch.randn(3, 2, dtype=dtype), torch.randn(3, 3, dtype=dtype)
    ((logits * weights[0]).sum() + (image.features @ text.T * weights[1]).sum()).backward()
    ((matching.itm_score * weights[0]).sum() + (cosine.itm_score * weights[1]).sum()).backward()
    assert_same_gradients(hf_blip.RETRIEVAL, model, peer)
    if dtype == torch.float32:
        assert_round_trip(hf_blip.RETRIEVAL, model, peer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("size", ANSWERING)
@pytest.mark.parametrize("lengths", PADDINGS)
def test_question_answering_equals_transformers(blip, dtype, size, lengths):
    peer, config = make_peer(blip.BlipForQuestionAnswering, size, dtype, text={"label_smoothing": 0.1})
    model = load(hf_blip.QUESTION_ANSWERING, peer, config, dtype)
    side = config["vision_config"]["image_size"]
    images = torch.randn(3, 3, side, side, dtype=dtype)
    ids, _, packed, segments = make_captions(lengths, VOCAB - 1)
    answers, answer_mask, packed_answers, answer_segments = make_captions([5, 3, 2], DEC)
    labels = answers.masked_fill(~answer_mask, -100)
    predicted = answer_mask[:, 1:].sum(1)
    # one at a time: given a batch, transformers 5.18 loses the mask of questions on its way to cross-attention, and answers read padding
    theirs = (
        sum(
            count * peer(ids[[i], :length], images[[i]], decoder_input_ids=answers[[i]], labels=labels[[i]]).loss
            for i, (length, count) in enumerate(zip(lengths, predicted, strict=True))
        )
        / predicted.sum()
    )
    image = model.encode_image(images)
    context = model.encode_questions(packed, segments, image, range(3))
    (rows,) = model.text_tower([model.answer_pass(packed_answers, answer_segments, range(3))], context, segments)
    predicts = answer_segments.rows_before_last(1)
    weight, bias = model.word_weights()
    words = packed_answers[predicts + 1]
    loss = linear_cross_entropy(model.word_hidden(rows[predicts]), weight, words, bias, label_smoothing=0.1)
    assert_same(loss, theirs, "the loss")
    loss.backward()
    theirs.backward()
    assert_same_gradients(hf_blip.QUESTION_ANSWERING, model, peer)
    mean = torch.full((3,), 3 / len(words), dtype=dtype)  # theirs is a mean over words, BLIP's code weighs answers
    ours = vqa_loss(model, images, (packed, segments), (packed_answers, answer_segments), range(3), mean)
    assert_same(ours, theirs, "the weighted loss")
    if dtype == torch.float32:
        assert_round_trip(hf_blip.QUESTION_ANSWERING, model, peer)


@pytest.mark.parametrize(
    ("size", "side"),
    [
        pytest.param("plain", 56, id="larger"),
        pytest.param("plain", 24, id="smaller"),
        *(pytest.param("plain", side, marks=pytest.mark.heavy) for side in (8, 16, 40, 96, 160)),
        *(pytest.param("many patches", side, marks=pytest.mark.heavy) for side in (64, 136, 192)),
    ],
)
def test_positions_of_another_image_size_equal_transformers(blip, size, side):
    dtype = torch.float64
    peer, config = make_peer(blip.BlipForConditionalGeneration, size, dtype)
    model = load(hf_blip.CAPTIONING, peer, config, dtype, image_size=side)
    images = torch.randn(2, 3, side, side, dtype=dtype)
    theirs = peer.vision_model(images, interpolate_pos_encoding=True).last_hidden_state.flatten(0, 1)
    ours = model.encode_image(images).rows
    # weights are held in fp32 when they are interpolated
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
    weights = torch.randn_like(ours)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    positions = peer.vision_model.embeddings.position_embedding
    carried = positions.detach()[0].clone().requires_grad_()
    resize_positions(carried, side // 8).backward(model.image_encoder.position_embedding.grad)
    expected = positions.grad[0]
    assert (carried.grad - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_safetensors_file_without_tied_names_loads(blip):
    peer, config = make_peer(blip.BlipForConditionalGeneration, "plain", torch.float32)
    state = {k: v for k, v in peer.state_dict().items() if not k.startswith("text_decoder.cls.predictions.decoder")}
    state["text_decoder.bert.embeddings.position_ids"] = torch.arange(24)[None]  # files of older versions hold it
    model = hf_blip.CAPTIONING.load(state, **{**hf_blip.fields(config), "enc_id": 119})
    assert_round_trip(hf_blip.CAPTIONING, model, peer)


def test_what_does_not_fit_is_refused_by_name(blip):
    peer, config = make_peer(blip.BlipForConditionalGeneration, "plain", torch.float32)
    given = {**hf_blip.fields(config), "enc_id": 119}
    with pytest.raises(CheckpointError, match="text_encoder.embeddings.word_embeddings.weight is missing"):
        hf_blip.RETRIEVAL.load(peer.state_dict(), **given)
    with pytest.raises(CheckpointError, match=r"vision_heads must be given: .*config\.json"):
        hf_blip.CAPTIONING.load(peer.state_dict())
    state = dict(peer.state_dict())
    state["text_decoder.cls.predictions.decoder.weight"] = state["text_decoder.cls.predictions.decoder.weight"] + 1
    with pytest.raises(CheckpointError, match=r"decoder\.weight should be the same tensor as .*word_embeddings\.weight"):
        hf_blip.CAPTIONING.load(state, **given)
    with pytest.raises(CheckpointError, match="hidden_act of vision_config must be 'gelu'"):
        hf_blip.fields({**config, "vision_config": {**config["vision_config"], "hidden_act": "quick_gelu"}})


def test_fields_have_the_defaults_of_transformers(blip):
    default = transformers.BlipConfig().to_dict()
    assert hf_blip.fields({}) == hf_blip.fields(default)
