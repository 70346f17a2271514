"""Writing captions: steps equal full forwards, beams share images, draws follow the distribution, wrong calls get sentences."""

from __future__ import annotations

import pytest
import torch

from vlp_fast.generation import (
    Beit3Decoder,
    BlipAnswerDecoder,
    BlipDecoder,
    CocaDecoder,
    CocaPalmDecoder,
    Questions,
    Texts,
    generate,
    rank_answers,
    rank_captions,
)
from vlp_fast.generation.cache import TextCache
from vlp_fast.generation.rules import Rules, draw, least_score
from vlp_fast.models import Blip, BlipVqa, Coca, CocaExperts, beit3_preset, blip_preset, coca_preset
from vlp_fast.models.beit3 import Beit3MaskedModel
from vlp_fast.models.beit3_tasks import Beit3Captioner
from vlp_fast.models.blip import BlipCaptioner, BlipRetriever
from vlp_fast.models.coca_open_clip import OpenClipCoca, open_clip_coca_preset
from vlp_fast.models.coca_palm import CocaPalm, coca_palm_preset
from vlp_fast.ops import packed_weights
from vlp_fast.segments import Segments

START, EOS, MASK, VOCAB = 1, 2, 3, 97
SMALL = {"image_size": 32, "vocab_size": VOCAB}
BLIP = {**SMALL, "dec_id": START, "enc_id": 4}


def _blip(kind=Blip):
    return kind(blip_preset("tiny", **BLIP))


def _coca():
    return Coca(coca_preset("tiny", **SMALL, caption_queries=5))


def _open_clip_coca():
    return OpenClipCoca(open_clip_coca_preset("tiny", **SMALL, patch_size=16, decoder_heads=2, decoder_hidden_dim=96))


def _coca_experts():
    return CocaExperts(coca_preset("tiny", **SMALL, caption_queries=5, experts=True))


def _coca_palm(**changes):
    return CocaPalm(coca_palm_preset("tiny", **SMALL, caption_queries=5, **changes))


def _beit3(**changes):
    return Beit3Captioner(beit3_preset("tiny", **SMALL, **changes))


MODELS = {
    "blip": _blip,
    "blip_captioner": lambda: _blip(BlipCaptioner),
    "blip_vqa": lambda: _blip(BlipVqa),
    "coca": _coca,
    "coca_experts": _coca_experts,
    "coca_palm": _coca_palm,
    "open_clip_coca": _open_clip_coca,
    "beit3": _beit3,
    "beit3_masked": lambda: Beit3MaskedModel(beit3_preset("tiny", **SMALL)),
    "beit3_shared_attention": lambda: _beit3(share_attention=True, vl_experts_from_layer=1),
    "beit3_no_last_norm": lambda: _beit3(normalize_output=False),
}


def _model(name, dtype=torch.float32, scale=3.0):
    """Random weights, widened so that next words depend on image and text."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


COCAS = (Coca, CocaExperts, CocaPalm, OpenClipCoca)


def _questions(images):
    """Questions of different lengths, one about each image; of an image alone, the one that it has in a batch."""
    texts = [[4, *range(20, 23 + 2 * i), EOS] for i in images]
    return Questions(*_pack(texts))


def _decoder(model, images):
    if isinstance(model, BlipVqa):
        return BlipAnswerDecoder(model, _questions(images))
    if isinstance(model, Blip | BlipCaptioner):
        return BlipDecoder(model)
    if isinstance(model, CocaPalm):
        return CocaPalmDecoder(model)
    return CocaDecoder(model) if isinstance(model, COCAS) else Beit3Decoder(model, MASK)


def _ids(model, images):
    """What `generate` needs to be told: ids, and the questions about these images."""
    if isinstance(model, BlipVqa):
        return {"eos_id": EOS, "questions": _questions(images)}
    if isinstance(model, Blip | BlipCaptioner):
        return {"eos_id": EOS}
    return {"eos_id": EOS, "start_id": START, **({} if isinstance(model, COCAS) else {"mask_id": MASK})}


def _images(n, dtype=torch.float32, seed=0):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _pack(texts):
    return torch.tensor([word for text in texts for word in text]), Segments([len(text) for text in texts])


def _next_logits(model, images, texts, about):
    """What the model's own forward says of the word after each text, image i (the one numbered ``about[i]``) with text i."""
    index = list(range(len(texts)))
    if isinstance(model, BlipVqa):
        ids, segments = _pack(texts)
        questions = _questions(about)
        context = model.encode_questions(questions.token_ids, questions.segments, model.encode_image(images), index)
        (hidden,) = model.text_tower([model.answer_pass(ids, segments, index)], context, questions.segments)
        return model.word_logits(hidden)[segments.last_rows()]
    if isinstance(model, Blip | BlipCaptioner):
        ids, segments = _pack(texts)
        rows = model.encode_image(images)
        (hidden,) = model.text_tower([model.captioning_pass(ids, segments, index)], rows.rows, rows.segments)
        return model.word_logits(hidden)[segments.last_rows()]
    if isinstance(model, COCAS):
        ids, segments = _pack([[*text, 0] for text in texts])  # the last word has no next: one that is not looked at
        logits, kept = model.word_logits(model.encode_text(ids, segments), model.encode_image(images))
        return logits[torch.searchsorted(kept, segments.last_rows() - 1)]
    ids, segments = _pack([[*text, MASK] for text in texts])
    return model.word_head(model.encode_captioned(images, ids, segments).text[segments.last_rows()])


class Uncached:
    """A `Decoder` that runs the model's own forward over the whole text for every word."""

    max_positions, vocab_size = 64, VOCAB

    def __init__(self, model):
        self.model = model

    def start(self, images, prompts, copies, steps):
        self.images = images.repeat_interleave(copies, 0)
        self.about = [i for i in range(len(images)) for _ in range(copies)]
        parts = prompts.token_ids.split(list(prompts.segments.lengths))
        self.texts = [parts[i].tolist() for i in self.about]
        self.logits = self._next()
        return self

    def step(self, token_ids):
        for text, word in zip(self.texts, token_ids.tolist(), strict=True):
            text.append(word)
        return self._next()

    def reorder(self, index):
        self.texts = [list(self.texts[i]) for i in index.tolist()]

    def _next(self):
        return _next_logits(self.model, self.images, self.texts, self.about)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("copies", [1, 3])
@torch.no_grad()
def test_steps_equal_full_forwards(name, copies):
    model, images = _model(name, torch.float64), _images(3, torch.float64)
    generator = torch.Generator().manual_seed(1)
    for prompts in ([[START], [START], [START]], [[START, 9, 8], [START], [START, 7, 6, 5, 4]]):
        texts = [list(prompt) for prompt in prompts for _ in range(copies)]
        writing = _decoder(model, range(3)).start(images, Texts(*_pack(prompts)), copies, 6)
        logits, about = writing.logits, [i for i in range(3) for _ in range(copies)]
        for step in range(6):
            expected = _next_logits(model, images[about], texts, about)
            torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
            if step % 2:
                # within each image: parents in any order, some twice
                local = torch.randint(copies, (3, copies), generator=generator)
                index = (local + torch.arange(3)[:, None] * copies).flatten()
                writing.reorder(index)
                texts = [list(texts[i]) for i in index.tolist()]
            words = torch.randint(VOCAB, (3 * copies,), generator=generator)
            for text, word in zip(texts, words.tolist(), strict=True):
                text.append(word)
            logits = writing.step(words)


SEARCHES = {
    "greedy": {"repetition_penalty": 1.2},
    "beams": {"num_beams": 3, "num_captions": 2},
    "long beams": {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0, "min_length": 6},
    "draws": {"sample": True, "num_captions": 3, "top_p": 0.9, "temperature": 1.3},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("search", SEARCHES)
def test_every_search_writes_what_it_writes_without_a_cache(name, search):
    model, images = _model(name, torch.float64), _images(2, torch.float64)
    options = {**SEARCHES[search], "prompts": [[11], [12, 13]], "max_length": 10}

    def write(writer, **more):
        drawing = {"generator": torch.Generator().manual_seed(3)} if search == "draws" else {}
        return generate(writer, images, **options, **more, **drawing)

    found, expected = write(model, **_ids(model, range(2))), write(Uncached(model), eos_id=EOS, start_id=START)
    assert found.lists() == expected.lists()
    torch.testing.assert_close(found.scores, expected.scores)


@pytest.mark.parametrize("name", ["blip", "blip_vqa", "coca", "coca_experts", "coca_palm", "beit3"])
def test_beams_share_their_image(name, monkeypatch):
    """Keys and values of images are as many for ten beams as for one; only the texts' slots grow."""
    model, images, prompts = _model(name), _images(2), Texts(*_pack([[START]] * 2))
    held = {}
    with torch.no_grad():
        for copies in (1, 10):
            writing = _decoder(model, range(2)).start(images, prompts, copies, 5)
            cache, contexts = writing._cache, getattr(writing, "_contexts", {})
            held[copies] = cache.shared_rows + sum(len(k) for k, _ in contexts.values())
            for buffer in cache._buffers.values():
                assert buffer.shape[2] == cache.shared_rows + 2 * copies * cache.capacity
                assert buffer.untyped_storage().nbytes() == buffer.numel() * 4
            for k, v in contexts.values():
                for x in (k, v):
                    assert x.untyped_storage().nbytes() == x.numel() * 4
                    assert x.stride(0) == x.shape[2], "the rows of a head follow one another"
    assert held[1] == held[10] > 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN")
@pytest.mark.parametrize("name", MODELS)
def test_packed_weights_write_the_same(name):
    model, images = _model(name), _images(3)
    expected = generate(model, images, **_ids(model, range(3)), num_beams=3, max_length=9)
    with packed_weights(model):
        found = generate(model, images, **_ids(model, range(3)), num_beams=3, max_length=9)
    assert torch.equal(found.token_ids, expected.token_ids)
    torch.testing.assert_close(found.scores, expected.scores)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.5}], ids=str
)
def test_a_batch_writes_what_each_image_writes_alone(name, options):
    model, images = _model(name), _images(4)
    prompts = [[11], [12, 13, 14], [], [15, 16]]
    options = {**options, "max_length": 14, "repetition_penalty": 1.1, "min_length": 4}

    def write(which):
        chosen = [prompts[i] for i in which]
        return generate(model, images[list(which)], prompts=chosen, **_ids(model, which), **options)

    together = write(range(4))
    alone = [write([i]) for i in range(4)]
    assert together.lists() == [text for one in alone for text in one.lists()]
    torch.testing.assert_close(together.scores, torch.cat([one.scores for one in alone]), rtol=1e-4, atol=1e-4)
    for text, prompt in zip(together.lists(), prompts, strict=True):
        assert text[: len(prompt) + 1] == [START, *prompt]
        assert len(text) <= 14
        assert EOS not in text[:-1]


@pytest.mark.parametrize("name", ["blip", "blip_vqa", "coca", "coca_experts", "coca_palm", "open_clip_coca", "beit3"])
@torch.no_grad()
def test_bfloat16_steps_stay_near_float32(name):
    """As near as the model's own forward in bfloat16, which rounds as often."""
    words = torch.randint(5, VOCAB, (4, 3), generator=torch.Generator().manual_seed(3))
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, images = _model(name, scale=1.5).to(dtype), _images(3, dtype)
        writing = _decoder(model, range(3)).start(images, Texts(*_pack([[START], [START, 9], [START]])), 1, 4)
        steps = [writing.logits, *(writing.step(word) for word in words)]
        assert all(step.dtype == dtype for step in steps)
        logits[dtype] = torch.stack(steps).float()
        texts = [[*prompt, *words[:, i].tolist()] for i, prompt in enumerate(([START], [START, 9], [START]))]
        logits[dtype, "forward"] = _next_logits(model, images, texts, range(3)).float()
    bound = 2 * (logits[torch.bfloat16, "forward"] - logits[torch.float32, "forward"]).abs().max()
    assert (logits[torch.bfloat16] - logits[torch.float32]).abs().max() <= bound


def test_n_best_are_sorted_and_different():
    model = _model("blip")
    found = generate(model, _images(2), eos_id=EOS, num_beams=5, num_captions=4, max_length=9)
    assert found.images == [0] * 4 + [1] * 4
    for i in range(2):
        texts, scores = found.lists()[4 * i : 4 * i + 4], found.scores[4 * i : 4 * i + 4]
        assert len({tuple(text) for text in texts}) == 4
        assert (scores[:-1] >= scores[1:]).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["blip", "blip_vqa", "coca", "coca_palm", "beit3"])
def test_scores_are_log_probabilities_of_the_new_words(name):
    model, images = _model(name, torch.float64), _images(2, torch.float64)
    for options, power in (
        ({}, 0.0),
        ({"num_beams": 3, "length_penalty": 0.7}, 0.7),
        ({"sample": True, "temperature": 0.5}, 0.0),
    ):
        found = generate(model, images, **_ids(model, range(2)), prompts=[[9], [8, 7]], max_length=9, **options)
        for i, (text, start) in enumerate(zip(found.lists(), (2, 3), strict=True)):
            total = 0.0
            for end in range(start, len(text)):
                logits = _next_logits(model, images[i : i + 1], [text[:end]], [i])[0] / options.get("temperature", 1.0)
                total += float(logits.log_softmax(-1)[text[end]])
            assert float(found.scores[i]) == pytest.approx(total / (len(text) - start) ** power, rel=1e-4)


def test_beams_find_no_worse_than_greedy_without_length_penalty():
    model, images = _model("blip"), _images(4)
    common = {"eos_id": EOS, "max_length": 10}
    greedy = generate(model, images, **common).scores
    beams = generate(model, images, num_beams=8, length_penalty=0.0, early_stopping="never", **common).scores
    assert (beams >= greedy - 1e-4).all()


def test_the_same_generator_gives_the_same_captions():
    model, images = _model("coca"), _images(3)

    def draws(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        options = {**_ids(model, range(3)), "sample": True, "num_captions": 4, "generator": generator, **options}
        return generate(model, images, **options).lists()

    for options in ({}, {"top_p": 0.9}, {"top_k": 5}, {"top_k": 40, "top_p": 0.8, "temperature": 1.5}):
        assert draws(0, **options) == draws(0, **options)
        assert draws(0, **options) != draws(1, **options)
    texts = draws(0)
    assert len({tuple(text) for text in texts}) > len(images), "the captions of an image are drawn one by one"


@pytest.mark.parametrize("options", [{"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_with_no_choice_left_is_greedy(options):
    model, images = _model("blip"), _images(3)
    drawn = generate(model, images, eos_id=EOS, sample=True, repetition_penalty=1.1, **options)
    assert drawn.lists() == generate(model, images, eos_id=EOS, repetition_penalty=1.1).lists()


def _plain_kept(scores, top_k, top_p):
    """The distribution that sampling draws from, one word after another."""
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    ranked = ranked[: top_k or len(ranked)]
    probability = torch.softmax(torch.tensor([scores[i] for i in ranked], dtype=torch.float64), 0).tolist()
    kept, mass = [], 0.0
    for i, p in zip(ranked, probability, strict=True):
        if top_p is not None and kept and mass >= top_p:
            break
        kept.append((i, p))
        mass += p
    return {i: p / mass for i, p in kept}


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.3), (None, 0.9), (3, None), (500, None), (7, 0.6), (None, 1.0)])
def test_draws_follow_the_filtered_distribution(top_k, top_p):
    scores = torch.randn(3, 400, generator=torch.Generator().manual_seed(2)) * torch.tensor([0.2, 1.0, 3.0])[:, None]
    kept = scores.masked_fill(scores < least_score(scores, top_k, top_p), -float("inf"))
    for row in range(3):
        expected = _plain_kept(scores[row].tolist(), top_k, top_p)
        found = dict(enumerate(torch.softmax(kept[row].double(), 0).tolist()))
        assert {i for i, p in found.items() if p > 0} == set(expected)
        assert all(found[i] == pytest.approx(p, rel=1e-5) for i, p in expected.items())


def test_draw_is_unbiased_and_never_takes_what_was_dropped():
    scores = torch.tensor([[-float("inf"), 1.0, -float("inf"), 0.0, -1.0, -float("inf")]]).expand(200_000, -1)
    words, score = draw(scores, torch.full((len(scores), 1), -1.5), torch.Generator().manual_seed(0))
    torch.testing.assert_close(score, scores.log_softmax(-1).gather(1, words[:, None])[:, 0])
    counts = torch.bincount(words, minlength=6) / len(scores)
    torch.testing.assert_close(counts, scores[0].softmax(0), atol=5e-3, rtol=0)
    assert counts[[0, 2, 5]].sum() == 0
    words, score = draw(scores, torch.full((len(scores), 1), 0.5), torch.Generator().manual_seed(0))
    assert (words == 1).all()  # only one is left
    assert (score == 0.0).all()


def test_rules_penalise_words_of_prompt_and_text_and_hold_back_the_end():
    prompts = torch.tensor([[START, 5, 6], [START, START, START]])
    rules = Rules(prompts, [2, 4], EOS, 2.0)
    scores = torch.tensor([[1.0, 1.0, 1.0, -1.0, 1.0, 4.0, -4.0, 1.0]]).repeat(2, 1)
    at_three = rules(scores.clone(), torch.tensor([[3, 3, 5], [7, 7, 7]]))
    assert at_three[0].tolist() == [1.0, 0.5, 1.0, -2.0, 1.0, 2.0, -8.0, 1.0]
    assert at_three[1].tolist() == [1.0, 0.5, -float("inf"), -1.0, 1.0, 4.0, -4.0, 0.5]
    at_one = rules(scores.clone(), torch.tensor([[3], [7]]))
    assert at_one[:, EOS].tolist() == [-float("inf")] * 2


def test_reordering_moves_texts_and_leaves_shared_rows():
    prompts = Segments([1, 2])
    cache = TextCache(prompts, 3, 2, shared=4)
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        cache.start(layer, torch.randn(3, 2, 2, 4, generator=generator), torch.randn(8, 2, 2, 4, generator=generator))
    cache.advance()
    for layer in range(2):
        cache.write(layer, torch.randn(6, 2, 2, 4, generator=generator))

    def texts():
        return [
            [cache._buffers[layer][:, :, s : s + n].clone() for s, n in zip(plan.host_starts, plan.host_lengths, strict=True)]
            for layer in range(2)
            for plan in cache.plans
        ]

    before, index = texts(), [2, 0, 0, 3, 5, 4]
    cache.reorder(torch.tensor(index))
    for old, new in zip(before, texts(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old[:2], new[:2], strict=True))
        for slot, parent in enumerate(index):
            assert torch.equal(new[2 + slot], old[2 + parent])


@pytest.mark.parametrize("kind", [Blip, BlipRetriever])
def test_ranking_equals_one_caption_after_another(kind):
    torch.manual_seed(0)
    model = _blip(kind).double().eval()
    images = _images(2, torch.float64)
    texts = [[START, *range(5, 5 + n), EOS] for n in (1, 4, 2, 9, 3)]
    ids, segments = _pack(texts)
    index = [1, 0, 1, 1, 0]
    found = rank_captions(model, images, ids, segments, index)
    alone = [rank_captions(model, images[i : i + 1], *_pack([text])).logits for i, text in zip(index, texts, strict=True)]
    torch.testing.assert_close(found.logits, torch.cat(alone), rtol=1e-10, atol=1e-10)
    assert [index[i] for i in found.order.tolist()] == sorted(index)
    for i in range(2):
        mine = [n for n in found.order.tolist() if index[n] == i]
        assert mine == sorted(mine, key=lambda n: -float(found.scores[n]))


def test_questions_about_one_image_encode_it_once():
    model, images = _model("blip_vqa", torch.float64), _images(2, torch.float64)
    texts = [[4, 20, 21, EOS], [4, 30, EOS], [4, 40, 41, 42, 43, EOS]]
    questions = Questions(*_pack(texts), [1, 0, 1])
    encoded = []
    model.image_encoder.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    for options in ({}, {"num_beams": 3, "num_captions": 2}):
        options = {**options, "eos_id": EOS, "max_length": 8}
        found = generate(model, images, questions=questions, **options)
        assert encoded == [2]
        assert found.images == [i for i in range(3) for _ in range(options.get("num_captions", 1))]
        alone = []
        for text, i in zip(texts, [1, 0, 1], strict=True):
            alone += generate(model, images[i : i + 1], questions=Questions(*_pack([text])), **options).lists()
        assert found.lists() == alone
        encoded.clear()


ANSWERS = [
    [START, 9, EOS],
    [START, 33, EOS],
    [START, 70, EOS],
    [START, 7, EOS],
    [START, 7, 8, 9, EOS],
    [START, 50, 51, EOS],
    [START, EOS],
    [START, 60, 8, 61, 62, 63, EOS],
]


def _likelihood(model, image, question, answer):
    """The sum of log probabilities of the words after the first, one forward for each."""
    ids, segments = _pack([question])
    context = model.encode_questions(ids, segments, model.encode_image(image), [0])
    total = 0.0
    for end in range(1, len(answer)):
        part, own = _pack([answer[:end]])
        (rows,) = model.text_tower([model.answer_pass(part, own, [0])], context, segments)
        total += float(model.word_logits(rows)[-1].log_softmax(-1)[answer[end]])
    return total


@torch.no_grad()
def test_answers_are_ranked_by_their_likelihood():
    model, images = _model("blip_vqa", torch.float64, scale=10.0), _images(2, torch.float64)
    texts, about = [[4, 20, 21, EOS], [4, 30, EOS], [4, 40, 41, 42, 43, EOS]], [1, 0, 1]
    questions = Questions(*_pack(texts), about)
    found = rank_answers(model, images, questions, *_pack(ANSWERS))
    expected = torch.tensor(
        [
            [_likelihood(model, images[i : i + 1], text, answer) for answer in ANSWERS]
            for text, i in zip(texts, about, strict=True)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(found.scores, expected)
    assert torch.equal(found.order, expected.argsort(dim=1, descending=True))
    assert len({tuple(order) for order in found.order.tolist()}) > 1, "the weights of this test should make orders differ"
    smoothed = rank_answers(model, images, questions, *_pack(ANSWERS), label_smoothing=0.1)
    assert (smoothed.scores - found.scores).abs().min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 2, 4, 9])
def test_answers_kept_are_those_with_the_most_probable_first_words(keep):
    model, images = _model("blip_vqa", torch.float64), _images(2, torch.float64)
    questions = _questions(range(2))
    everything = rank_answers(model, images, questions, *_pack(ANSWERS))
    found = rank_answers(model, images, questions, *_pack(ANSWERS), keep=keep)
    first = _next_logits(model, images, [[START]] * 2, range(2))
    for i in range(2):
        likely = sorted(range(len(ANSWERS)), key=lambda n: -float(first[i, ANSWERS[n][1]]))[:keep]
        assert set(found.order[i].tolist()) == set(likely)
        assert found.order[i].tolist() == [n for n in everything.order[i].tolist() if n in likely]
        torch.testing.assert_close(found.scores[i, likely], everything.scores[i, likely])
        assert all(found.scores[i, n] == -float("inf") for n in range(len(ANSWERS)) if n not in likely)


def test_no_question_gives_no_answer():
    model, questions = _model("blip_vqa"), Questions(*_pack([]), [])
    questions = questions._replace(token_ids=questions.token_ids.long())
    assert generate(model, _images(2), eos_id=EOS, questions=questions).lists() == []
    assert rank_answers(model, _images(2), questions, *_pack(ANSWERS)).scores.shape == (0, len(ANSWERS))
    none = rank_answers(model, _images(2), _questions(range(2)), torch.zeros(0, dtype=torch.long), Segments([]))
    assert none.order.shape == (2, 0)


def test_palm_writes_as_far_as_it_is_told():
    """Rotary positions have no last, whatever the captions it was trained on; tokens may be given in place of images."""
    model = _model("coca_palm")
    assert len(generate(model, _images(1), eos_id=EOS, start_id=START, min_length=200, max_length=200).token_ids) == 200
    given = _coca_palm(image_encoder="given").eval()
    given.load_state_dict({name: x for name, x in model.state_dict().items() if name in given.state_dict()})
    tokens = model.image_encoder.encoder(_images(2)).unflatten(0, (2, -1))
    options = {"eos_id": EOS, "start_id": START, "num_beams": 2, "max_length": 9}
    assert generate(given, tokens, **options).lists() == generate(model, _images(2), **options).lists()


def test_generated_captions_can_be_ranked():
    model, images = _model("blip"), _images(2)
    found = generate(model, images, eos_id=EOS, sample=True, num_captions=3, max_length=8)
    ranking = rank_captions(model, images, found.token_ids, found.segments, found.images)
    assert ranking.scores.shape == (6,)
    assert sorted(ranking.order.tolist()) == list(range(6))


def test_no_image_gives_no_caption():
    found = generate(_model("blip"), _images(0), eos_id=EOS)
    assert found.lists() == []
    assert found.images == []


def test_generate_takes_any_decoder():
    class Counting:
        """Texts that count upwards."""

        max_positions, vocab_size = 50, VOCAB

        def start(self, images, prompts, copies, steps):
            self.last = prompts.token_ids[prompts.segments.last_rows()].repeat_interleave(copies)
            self.logits = self._logits()
            return self

        def step(self, token_ids):
            self.last = token_ids
            return self._logits()

        def reorder(self, index):
            self.last = self.last[index]

        def _logits(self):
            return torch.nn.functional.one_hot(self.last + 1, VOCAB).float() * 9

    for options in ({}, {"num_beams": 2}):
        found = generate(
            Counting(), torch.zeros(2, 1), start_id=20, prompts=[[30], [40, 50]], eos_id=35, max_length=9, **options
        )
        assert found.lists() == [[20, 30, 31, 32, 33, 34, 35], [20, 40, 50, 51, 52, 53, 54, 55, 56]]


def test_searches_stop_as_soon_as_they_may():
    class Constant:
        """The same favourites after every word, the end first."""

        max_positions, vocab_size = 50, 8

        def start(self, images, prompts, copies, steps):
            self.logits = torch.tensor([0.4, 0.35, 0.25, *[1e-9] * 5]).log().repeat(len(images) * copies, 1)
            self.steps = 0
            return self

        def step(self, token_ids):
            self.steps += 1
            return self.logits.clone()

        def reorder(self, index):
            pass

    steps = {}
    for name, options in {
        "greedy": {},
        "full": {"num_beams": 2, "early_stopping": True, "length_penalty": 5.0},
        "open": {"num_beams": 2, "early_stopping": "never", "length_penalty": 5.0},
    }.items():
        decoder = Constant()
        generate(decoder, torch.zeros(3, 1), start_id=7, eos_id=0, max_length=20, **options)
        steps[name] = decoder.steps
    # one word ends greedy search; two steps fill two beams; a long text could always be better where length is rewarded so
    assert steps == {"greedy": 0, "full": 1, "open": 18}


WRONG = [
    ("blip", {"eos_id": 97}, "eos_id must be a word of the vocabulary of 97; received 97"),
    ("blip", {"num_beams": 0}, "num_beams and num_captions must be at least 1"),
    ("blip", {"num_beams": 49}, "twice the beams at most the vocabulary"),
    ("blip", {"num_captions": 2}, "greedy search finds one caption; received num_captions=2"),
    ("blip", {"num_beams": 2, "num_captions": 3}, "num_captions can be at most num_beams; received 3 and 2"),
    ("blip", {"num_beams": 2, "sample": True}, "sample draws one text at a time"),
    ("blip", {"num_beams": 2, "early_stopping": "soon"}, "early_stopping must be True, False or 'never'; received 'soon'"),
    ("blip", {"length_penalty": 2.0}, "length_penalty and early_stopping are of beam search"),
    ("blip", {"top_p": 0.9}, "give sample=True"),
    ("blip", {"sample": True, "top_p": 0.0}, "top_p must be above 0 and at most 1; received 0.0"),
    ("blip", {"sample": True, "top_k": 0}, "top_k must be at least 1; received 0"),
    ("blip", {"sample": True, "temperature": 0.0}, "temperature and repetition_penalty must be above 0; received 0.0"),
    ("blip", {"repetition_penalty": 0.0}, "temperature and repetition_penalty must be above 0"),
    ("blip", {"max_length": 65}, "max_length at most the model's 64; received 0 and 65"),
    ("blip", {"min_length": 21}, "min_length must be from 0 to max_length"),
    ("blip", {"max_length": 2, "prompts": [[5], [5]]}, "max_length must leave room for a word after start token and prompt; received 2"),
    ("blip", {"prompts": [[5]]}, "prompts must have one list per image; received 1 for 2 images"),
    ("blip", {"prompts": [[5], [97]]}, r"prompts\[1\] holds 97"),
    ("blip", {"mask_id": 3}, "mask_id is BEiT-3's; received 3 for Blip"),
    ("coca", {}, "start_id must be given for Coca"),
    ("blip", {"questions": _questions(range(2))}, "questions are BlipVqa's; received some for Blip"),
    ("blip_vqa", {}, "questions must be given for BlipVqa"),
    ("blip_vqa", {"questions": _questions(range(3))}, "every question needs an image.*received 3 questions and 2 images for them"),
    ("blip_vqa", {"questions": _questions(range(1))._replace(images=[2])}, "about one of the 2 images; received image 2"),
    ("blip_vqa", {"questions": _questions(range(2)), "prompts": [[5]]}, "prompts must have one list per"),
    ("coca_palm", {}, "start_id must be given for CocaPalm"),
    ("coca_experts", {}, "start_id must be given for CocaExperts"),
    ("beit3", {"start_id": START}, "mask_id must be given for Beit3Captioner"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "sentence"), WRONG)
def test_wrong_calls_get_sentences(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        generate(_model(name), _images(2), **{"eos_id": EOS, **options})


def test_models_that_cannot_write_get_sentences():
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        generate(_model("blip").train(), _images(2), eos_id=EOS)
    with pytest.raises(TypeError, match="received BlipRetriever"):
        generate(_blip(BlipRetriever).eval(), _images(2), eos_id=EOS)
    model, (ids, segments) = _model("blip"), _pack([[1, 2]])
    with pytest.raises(ValueError, match="index must say which of the 2 images"):
        rank_captions(model, _images(2), ids, segments)
    with pytest.raises(ValueError, match="one image per caption; received 2 for 1 captions"):
        rank_captions(model, _images(2), ids, segments, [0, 1])
    with pytest.raises(ValueError, match="eval mode"):
        rank_captions(model.train(), _images(1), ids, segments)
    vqa, questions = _model("blip_vqa"), _questions(range(1))
    with pytest.raises(ValueError, match="keep must be at least 1; received 0"):
        rank_answers(vqa, _images(1), questions, ids, segments, keep=0)
    with pytest.raises(ValueError, match="answers need a word after their first token; received one of 1 tokens"):
        rank_answers(vqa, _images(1), questions, *_pack([[1, 2], [1]]))
    with pytest.raises(ValueError, match="call vqa.eval"):
        rank_answers(vqa.train(), _images(1), questions, ids, segments)
