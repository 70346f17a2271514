"""generate against transformers: the same weights, the same tokens, for greedy and beam search in their variants."""

from __future__ import annotations

import itertools

import pytest
import torch

from vlp_fast.generation import Questions, generate, rank_answers, rank_captions
from vlp_fast.models.checkpoints import hf_blip
from vlp_fast.segments import Segments

BOS, ENC, SEP, VOCAB, IMAGE = 57, 58, 3, 60, 32


@pytest.fixture(scope="module")
def transformers(torchvision_ops):
    return pytest.importorskip("transformers")


# what differs from the first, in text and vision; the heavy ones run in fp64
SIZES = {
    "plain": ({}, {}),
    "deep": ({"num_hidden_layers": 5}, {"num_hidden_layers": 4}),
    "heads of 96": ({"hidden_size": 96, "num_attention_heads": 1}, {"hidden_size": 96, "num_attention_heads": 1}),
    "wide text": ({"hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 160}, {"num_hidden_layers": 1}),
    "larger images": ({}, {}),
}
SIDES = {"larger images": 48}  # images for which positions are interpolated
ALL_SIZES = ["plain", *(pytest.param(size, marks=pytest.mark.heavy) for size in list(SIZES)[1:])]


def _config(transformers, size="plain", **more):
    text, vision = SIZES[size]
    return transformers.BlipConfig(
        text_config={
            "vocab_size": VOCAB, "hidden_size": 32, "encoder_hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 40, "bos_token_id": BOS, "sep_token_id": SEP, "eos_token_id": 2,
            "pad_token_id": 0, "is_decoder": True, **{**text, **more},
        },
        vision_config={
            "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": IMAGE,
            "patch_size": 8, **vision,
        },
    )  # fmt: skip


def _spread(model, seed, end):
    """Weights under which next words have favourites that depend on image and text, and texts end after a few words or many."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if parameter.dim() > 1 else 0.2
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale * (0.4 if "vision" in name else 1.0))
        if end is not None:
            model.text_decoder.cls.predictions.bias[SEP] += end
    return model.eval()


def _pair(kind, form, config, size, dtype, seed, end):
    """(theirs, ours) with the same weights."""
    torch.manual_seed(seed + 7)  # the first numbers of the model are theirs, and fixtures are made once, at any time
    theirs = _spread(kind(config), seed, end)
    fields = {**hf_blip.fields(theirs.config.to_dict()), "enc_id": ENC, "image_size": SIDES.get(size, IMAGE)}
    return theirs.to(dtype), form.load(theirs.state_dict(), **fields).to(dtype).eval()


@pytest.fixture(scope="module", params=ALL_SIZES)
def captioners(transformers, request):
    """(theirs, ours) three times: texts end early, late or not at all."""
    size, kind = request.param, transformers.BlipForConditionalGeneration
    dtype = torch.float32 if size == "plain" else torch.float64
    return [
        _pair(kind, hf_blip.CAPTIONING, _config(transformers, size), size, dtype, seed, end)
        for seed, end in ((0, 4.0), (1, 2.0), (2, 7.0))
    ]


@pytest.fixture(scope="module", params=ALL_SIZES)
def answerers(transformers, request):
    """(theirs, ours) of question answering, in fp64. Both towers of theirs read rows as wide as images."""
    size, kind = request.param, transformers.BlipForQuestionAnswering
    config = _config(transformers, size, hidden_size=SIZES[size][1].get("hidden_size", 48))
    return [
        _pair(kind, hf_blip.QUESTION_ANSWERING, config, size, torch.float64, seed, end) for seed, end in ((0, 6.0), (1, 9.0))
    ]


def _images(n, seed=0, model=None):
    """Of the size and dtype that a model takes."""
    side = IMAGE if model is None else model.config.image_size
    images = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return images if model is None else images.to(model.lm_bias.dtype)


def _theirs(model, images, prompts, **options):
    """Their tokens with padding cut off, and their scores."""
    ids = None if prompts is None else torch.tensor([[1, *p, 1] for p in prompts])
    return _written(model.generate, pixel_values=images, input_ids=ids, interpolate_pos_encoding=True, **options)


def _written(write, *, num_captions=1, **options):
    out = write(num_return_sequences=num_captions, return_dict_in_generate=True, output_scores=True, **options)
    texts = []
    for row in out.sequences.tolist():
        texts.append(row[: row.index(SEP) + 1] if SEP in row else row)
    return texts, getattr(out, "sequences_scores", None)


def _compare(pair, images, prompts, **options):
    theirs, ours = pair
    expected, scores = _theirs(theirs, images, prompts, **options)
    found = generate(ours, images, eos_id=SEP, prompts=prompts, **options)
    assert found.lists() == expected
    if scores is not None:
        torch.testing.assert_close(found.scores, scores, rtol=1e-4, atol=1e-4)
    return [len(text) for text in expected]


PROMPTS = [None, [[11, 12, 13]] * 4]
BEAMS = [
    {"num_beams": 2},
    {"num_beams": 3},
    {"num_beams": 3, "length_penalty": 0.0},
    {"num_beams": 3, "length_penalty": 2.0},
    {"num_beams": 3, "length_penalty": -1.0},
    {"num_beams": 3, "early_stopping": True},
    {"num_beams": 3, "early_stopping": "never"},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": -1.0},
    {"num_beams": 5, "num_captions": 5},
    {"num_beams": 4, "num_captions": 3, "length_penalty": 0.6, "early_stopping": True},
    {"num_beams": 3, "repetition_penalty": 1.5},
    {"num_beams": 3, "repetition_penalty": 0.7, "min_length": 8},
    {"num_beams": 3, "min_length": 10},
]
GREEDY = [
    {},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.8},
    {"min_length": 10},
    {"min_length": 16, "repetition_penalty": 1.2},
]


def _name(options):
    return ",".join(f"{k}={v}" for k, v in options.items()) or "plain"


GRID = [
    pytest.param(
        {"num_beams": beams, "length_penalty": penalty, "early_stopping": stopping, "num_captions": beams},
        marks=pytest.mark.heavy,
    )
    for beams, penalty, stopping in itertools.product((2, 5), (-1.0, 0.5, 2.0), (True, False, "never"))
]


@pytest.mark.parametrize("options", [*GREEDY, *BEAMS, *GRID], ids=_name)
def test_generate_gives_the_tokens_of_transformers(captioners, options):
    lengths = []
    for pair, prompts, max_length in itertools.product(captioners, PROMPTS, (16, 30)):
        lengths += _compare(pair, _images(4, max_length, pair[1]), prompts, max_length=max_length, **options)
    assert len(set(lengths)) > 2, "the weights of this test should make texts of several lengths"


def test_prompts_of_different_lengths_give_what_transformers_gives_for_each(captioners):
    """transformers pads ragged prompts on the left and counts the padding as positions: it is right one image at a time only."""
    prompts = [[11], [12, 13, 14, 15], [], [16, 17]]
    images = _images(4, 0, captioners[0][1])
    for (theirs, ours), options in itertools.product(
        captioners, ({}, {"num_beams": 3}, {"num_beams": 3, "early_stopping": "never"})
    ):
        alone = [
            _theirs(theirs, images[i : i + 1], prompts[i : i + 1], max_length=20, min_length=8, **options)[0][0]
            for i in range(4)
        ]
        found = generate(ours, images, eos_id=SEP, prompts=prompts, max_length=20, min_length=8, **options)
        assert found.lists() == alone


def _questions(lengths, seed=5):
    """Token ids of each question, which begins with [ENC], as transformers must be told."""
    generator = torch.Generator().manual_seed(seed)
    return [[ENC, *torch.randint(4, BOS, (n - 1,), generator=generator).tolist()] for n in lengths]


def _packed(texts, images=None):
    return Questions(torch.tensor([word for text in texts for word in text]), Segments([len(text) for text in texts]), images)


def _their_answers(model, images, questions, **options):
    given = {"input_ids": torch.tensor(questions), "pixel_values": images, "interpolate_pos_encoding": True}
    return _written(model.generate, **given, **options)


def _their_answers_to_padded(model, images, questions, **options):
    """Their `generate` on a padded batch. It lets answers read padding: a hook gives cross-attention the mask it lacks."""
    longest = max(len(text) for text in questions)
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in questions])
    mask = torch.arange(longest) < torch.tensor([[len(text)] for text in questions])
    hidden = torch.zeros(len(ids), 1, 1, longest).masked_fill(~mask[:, None, None], -1e9)

    def with_mask(module, args, kwargs):
        return args, {**kwargs, "encoder_attention_mask": hidden.repeat_interleave(len(args[0]) // len(hidden), 0)}

    layers = model.text_decoder.bert.encoder.layer
    hooks = [layer.crossattention.self.register_forward_pre_hook(with_mask, with_kwargs=True) for layer in layers]
    try:
        return _their_answers(model, images, ids.tolist(), attention_mask=mask.long(), **options)
    finally:
        for hook in hooks:
            hook.remove()


ANSWERS = [
    {},
    {"repetition_penalty": 1.3, "min_length": 6},
    {"num_beams": 3},
    {"num_beams": 3, "length_penalty": -1.0},
    {"num_beams": 4, "num_captions": 3, "early_stopping": True},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.5, "min_length": 4},
]


@pytest.mark.parametrize("options", [*ANSWERS, *GRID], ids=_name)
def test_answers_are_the_tokens_of_transformers(answerers, options):
    written = set()
    for (theirs, ours), max_length in itertools.product(answerers, (10, 24)):
        images, given = _images(4, max_length, ours), {**options, "max_length": max_length}
        for lengths in ((6, 6, 6, 6), (3, 9, 2, 5)):
            questions = _questions(lengths)
            found = generate(ours, images, eos_id=SEP, questions=_packed(questions), **given)
            if len(set(lengths)) == 1:
                expected, scores = _their_answers(theirs, images, questions, **given)
            else:
                expected, scores = _their_answers_to_padded(theirs, images, questions, **given)
                alone = [_their_answers(theirs, images[[i]], [text], **given)[0] for i, text in enumerate(questions)]
                assert [text for texts in alone for text in texts] == expected
            assert found.lists() == expected
            if scores is not None:
                torch.testing.assert_close(found.scores, scores, rtol=1e-4, atol=1e-4)
            written |= {tuple(text) for text in expected}
    # where length is rewarded most, all may be as long as they may
    least = 1 if options.get("length_penalty", 1.0) >= 2.0 else 2
    assert len({len(text) for text in written}) > least, "the weights of this test should make answers of several lengths"


def test_rank_answers_gives_the_losses_of_transformers(transformers):
    theirs = _spread(transformers.BlipForQuestionAnswering(_config(transformers, hidden_size=48, label_smoothing=0.1)), 3, None)
    ours = hf_blip.QUESTION_ANSWERING.load(theirs.state_dict(), enc_id=ENC, **hf_blip.fields(theirs.config.to_dict())).eval()
    images, questions = _images(2), _questions((4, 7, 3))
    answers = [[BOS, *words, SEP] for words in ([5], [6, 7, 8], [9, 10], [], [11, 12, 13, 14])]
    of = [1, 0, 1]
    found = rank_answers(ours, images, _packed(questions, of), *_packed(answers)[:2], label_smoothing=0.1)
    with torch.no_grad():
        for i, (question, image) in enumerate(zip(questions, of, strict=True)):
            for j, answer in enumerate(answers):
                words = torch.tensor([answer])
                out = theirs(torch.tensor([question]), images[[image]], decoder_input_ids=words, labels=words)
                assert float(found.scores[i, j]) == pytest.approx(-float(out.loss) * (len(answer) - 1), rel=1e-4)


def test_filters_keep_the_words_that_transformers_keeps(transformers, monkeypatch):
    from vlp_fast.generation.rules import draw

    scores = (
        torch.randn(6, 900, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0, 8.0])[:, None]
    )
    for top_k, top_p in itertools.product((None, 1, 7, 300, 2000), (None, 0.05, 0.5, 0.9, 0.999)):
        if top_k is None and top_p is None:
            continue
        expected = scores
        if top_k is not None:
            expected = transformers.TopKLogitsWarper(top_k)(None, expected)
        if top_p is not None:
            expected = transformers.TopPLogitsWarper(top_p)(None, expected)
        least = expected.masked_fill(expected.isinf(), float("inf")).argmin(-1)
        monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, 1.0 - 2**-53, dtype=torch.float64))
        words, score = draw(scores, top_k, top_p, None)  # the last word that stays
        monkeypatch.undo()
        log_probability = expected.double().log_softmax(-1).gather(1, least[:, None])[:, 0]
        seen = log_probability > -34  # what is rarer than 2**-53 no random number reaches
        assert seen[:-1].all()
        assert torch.equal(words[seen], least[seen]), (top_k, top_p)
        torch.testing.assert_close(score[seen], log_probability[seen].float())


def test_rank_captions_gives_the_matching_scores_of_transformers(transformers):
    theirs = transformers.BlipForImageTextRetrieval(_config(transformers))
    theirs = _spread(theirs, 2, None)
    ours = hf_blip.RETRIEVAL.load(theirs.state_dict(), enc_id=ENC, **hf_blip.fields(theirs.config.to_dict())).eval()
    image, length = _images(1), 7
    # transformers asks with the first token as given: [ENC] is put there for both
    ids = torch.randint(4, VOCAB - 4, (5, length), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = ours.config.enc_id
    with torch.no_grad():
        expected = theirs(ids, image.expand(5, -1, -1, -1), use_itm_head=True).itm_score
    found = rank_captions(ours, image, ids.flatten(), Segments([length] * 5))
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    assert found.order.tolist() == expected.softmax(-1)[:, 1].argsort(descending=True).tolist()
