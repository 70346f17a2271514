"""generate against transformers: the same weights, the same tokens, for greedy and beam search in their variants."""

from __future__ import annotations

import itertools

import pytest
import torch

from vlp_fast.generation import generate, rank_captions
from vlp_fast.models.checkpoints import hf_blip
from vlp_fast.segments import Segments

BOS, ENC, SEP, VOCAB, IMAGE = 57, 58, 3, 60, 32


@pytest.fixture(scope="module")
def transformers(torchvision_ops):
    return pytest.importorskip("transformers")


def _config(transformers):
    return transformers.BlipConfig(
        text_config={
            "vocab_size": VOCAB, "hidden_size": 32, "encoder_hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 40, "bos_token_id": BOS, "sep_token_id": SEP, "eos_token_id": 2,
            "pad_token_id": 0, "is_decoder": True,
        },
        vision_config={
            "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": IMAGE,
            "patch_size": 8,
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


@pytest.fixture(scope="module")
def captioners(transformers):
    """(theirs, ours) three times: texts end early, late or not at all."""
    made = []
    for seed, end in ((0, 4.0), (1, 2.0), (2, 7.0)):
        torch.manual_seed(seed + 7)  # the first numbers of the model are theirs, and this fixture is made once, at any time
        theirs = _spread(transformers.BlipForConditionalGeneration(_config(transformers)), seed, end)
        ours = hf_blip.CAPTIONING.load(theirs.state_dict(), enc_id=ENC, **hf_blip.fields(theirs.config.to_dict())).eval()
        made.append((theirs, ours))
    return made


def _images(n, seed=0):
    return torch.randn(n, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed))


def _theirs(model, images, prompts, **options):
    """Their tokens with padding cut off, and their scores."""
    ids = None if prompts is None else torch.tensor([[1, *p, 1] for p in prompts])
    copies = options.pop("num_captions", 1)
    out = model.generate(
        pixel_values=images,
        input_ids=ids,
        num_return_sequences=copies,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
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


@pytest.mark.parametrize("options", [*GREEDY, *BEAMS], ids=_name)
def test_generate_gives_the_tokens_of_transformers(captioners, options):
    lengths = []
    for pair, prompts, max_length in itertools.product(captioners, PROMPTS, (16, 30)):
        lengths += _compare(pair, _images(4, max_length), prompts, max_length=max_length, **options)
    assert len(set(lengths)) > 2, "the weights of this test should make texts of several lengths"


def test_prompts_of_different_lengths_give_what_transformers_gives_for_each(captioners):
    """transformers pads ragged prompts on the left and counts the padding as positions: it is right one image at a time only."""
    prompts = [[11], [12, 13, 14, 15], [], [16, 17]]
    images = _images(4)
    for (theirs, ours), options in itertools.product(
        captioners, ({}, {"num_beams": 3}, {"num_beams": 3, "early_stopping": "never"})
    ):
        alone = [
            _theirs(theirs, images[i : i + 1], prompts[i : i + 1], max_length=20, min_length=8, **options)[0][0]
            for i in range(4)
        ]
        found = generate(ours, images, eos_id=SEP, prompts=prompts, max_length=20, min_length=8, **options)
        assert found.lists() == alone


def test_filters_keep_the_words_that_transformers_keeps(transformers):
    from vlp_fast.generation.rules import keep_probable

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
        assert torch.equal(keep_probable(scores, top_k, top_p), expected), (top_k, top_p)


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
