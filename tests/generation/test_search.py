"""Searches: the same texts as without a cache, each image's as alone, scores that are the model's, and an end as soon as may be."""

import pytest
import torch

from vlp_fast.generation import generate

START, EOS, VOCAB = 1, 2, 97  # of conftest.py's models


class Uncached:
    """A `Decoder` that runs the model's own forward over the whole text for every word."""

    max_positions, vocab_size = 64, VOCAB

    def __init__(self, model, next_logits):
        self.model, self.next_logits = model, next_logits

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
        return self.next_logits(self.model, self.images, self.texts, self.about)


SEARCHES = {
    "greedy": {"repetition_penalty": 1.2},
    "beams": {"num_beams": 3, "num_captions": 2},
    "long beams": {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0, "min_length": 6},
    "draws": {"sample": True, "num_captions": 3, "top_p": 0.9, "temperature": 1.3},
}


@pytest.mark.parametrize("search", SEARCHES)
def test_every_search_writes_what_it_writes_without_a_cache(make_model, make_images, ids_of, next_logits, name, search):
    model, images = make_model(name, torch.float64), make_images(2, torch.float64)
    options = {**SEARCHES[search], "prompts": [[11], [12, 13]], "max_length": 10}

    def write(writer, **more):
        drawing = {"generator": torch.Generator().manual_seed(3)} if search == "draws" else {}
        return generate(writer, images, **options, **more, **drawing)

    found, expected = write(model, **ids_of(model, range(2))), write(Uncached(model, next_logits), eos_id=EOS, start_id=START)
    assert found.lists() == expected.lists()
    torch.testing.assert_close(found.scores, expected.scores)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.5}], ids=str
)
def test_a_batch_writes_what_each_image_writes_alone(make_model, make_images, ids_of, name, options):
    model, images = make_model(name), make_images(4)
    prompts = [[11], [12, 13, 14], [], [15, 16]]
    options = {**options, "max_length": 14, "repetition_penalty": 1.1, "min_length": 4}

    def write(which):
        chosen = [prompts[i] for i in which]
        return generate(model, images[list(which)], prompts=chosen, **ids_of(model, which), **options)

    together = write(range(4))
    alone = [write([i]) for i in range(4)]
    assert together.lists() == [text for one in alone for text in one.lists()]
    torch.testing.assert_close(together.scores, torch.cat([one.scores for one in alone]), rtol=1e-4, atol=1e-4)
    for text, prompt in zip(together.lists(), prompts, strict=True):
        assert text[: len(prompt) + 1] == [START, *prompt]
        assert len(text) <= 14
        assert EOS not in text[:-1]


def test_n_best_are_sorted_and_different(make_model, make_images):
    model = make_model("blip")
    found = generate(model, make_images(2), eos_id=EOS, num_beams=5, num_captions=4, max_length=9)
    assert found.images == [0] * 4 + [1] * 4
    for i in range(2):
        texts, scores = found.lists()[4 * i : 4 * i + 4], found.scores[4 * i : 4 * i + 4]
        assert len({tuple(text) for text in texts}) == 4
        assert (scores[:-1] >= scores[1:]).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["blip", "blip_vqa", "coca", "coca_palm", "beit3"])
def test_scores_are_log_probabilities_of_the_new_words(make_model, make_images, ids_of, next_logits, name):
    model, images = make_model(name, torch.float64), make_images(2, torch.float64)
    for options, power in (
        ({}, 0.0),
        ({"num_beams": 3, "length_penalty": 0.7}, 0.7),
        ({"sample": True, "temperature": 0.5}, 0.0),
    ):
        found = generate(model, images, **ids_of(model, range(2)), prompts=[[9], [8, 7]], max_length=9, **options)
        for i, (text, start) in enumerate(zip(found.lists(), (2, 3), strict=True)):
            total = 0.0
            for end in range(start, len(text)):
                logits = next_logits(model, images[i : i + 1], [text[:end]], [i])[0] / options.get("temperature", 1.0)
                total += float(logits.log_softmax(-1)[text[end]])
            assert float(found.scores[i]) == pytest.approx(total / (len(text) - start) ** power, rel=1e-4)


def test_beams_find_no_worse_than_greedy_without_length_penalty(make_model, make_images):
    model, images = make_model("blip"), make_images(4)
    common = {"eos_id": EOS, "max_length": 10}
    greedy = generate(model, images, **common).scores
    beams = generate(model, images, num_beams=8, length_penalty=0.0, early_stopping="never", **common).scores
    assert (beams >= greedy - 1e-4).all()


def test_the_same_generator_gives_the_same_captions(make_model, make_images, ids_of):
    model, images = make_model("coca"), make_images(3)

    def draws(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        options = {**ids_of(model, range(3)), "sample": True, "num_captions": 4, "generator": generator, **options}
        return generate(model, images, **options).lists()

    for options in ({}, {"top_p": 0.9}, {"top_k": 5}, {"top_k": 40, "top_p": 0.8, "temperature": 1.5}):
        assert draws(0, **options) == draws(0, **options)
        assert draws(0, **options) != draws(1, **options)
    texts = draws(0)
    assert len({tuple(text) for text in texts}) > len(images), "the captions of an image are drawn one by one"


@pytest.mark.parametrize("options", [{"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_with_no_choice_left_is_greedy(make_model, make_images, options):
    model, images = make_model("blip"), make_images(3)
    drawn = generate(model, images, eos_id=EOS, sample=True, repetition_penalty=1.1, **options)
    assert drawn.lists() == generate(model, images, eos_id=EOS, repetition_penalty=1.1).lists()


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
