"""Calls of `generate` and of the rankings: questions that share an image, no image at all, and sentences for what is wrong."""

import pytest
import torch

from vlp_fast.generation import Questions, generate, rank_answers, rank_captions
from vlp_fast.models import blip_preset
from vlp_fast.models.blip import BlipRetriever
from vlp_fast.segments import Segments

START, EOS = 1, 2  # of conftest.py's models
ABOUT = {n: Questions(torch.tensor([4, 20, EOS] * n), Segments([3] * n)) for n in (1, 2, 3)}  # as many questions


def test_questions_about_one_image_encode_it_once(make_model, make_images, pack):
    model, images = make_model("blip_vqa", torch.float64), make_images(2, torch.float64)
    texts = [[4, 20, 21, EOS], [4, 30, EOS], [4, 40, 41, 42, 43, EOS]]
    questions = Questions(*pack(texts), [1, 0, 1])
    encoded = []
    model.image_encoder.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    for options in ({}, {"num_beams": 3, "num_captions": 2}):
        options = {**options, "eos_id": EOS, "max_length": 8}
        found = generate(model, images, questions=questions, **options)
        assert encoded == [2]
        assert found.images == [i for i in range(3) for _ in range(options.get("num_captions", 1))]
        alone = []
        for text, i in zip(texts, [1, 0, 1], strict=True):
            alone += generate(model, images[i : i + 1], questions=Questions(*pack([text])), **options).lists()
        assert found.lists() == alone
        encoded.clear()


def test_no_image_gives_no_caption(make_model, make_images):
    found = generate(make_model("blip"), make_images(0), eos_id=EOS)
    assert found.lists() == []
    assert found.images == []


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
    ("blip", {"questions": ABOUT[2]}, "questions are BlipVqa's; received some for Blip"),
    ("blip_vqa", {}, "questions must be given for BlipVqa"),
    ("blip_vqa", {"questions": ABOUT[3]}, "every question needs an image.*received 3 questions and 2 images for them"),
    ("blip_vqa", {"questions": ABOUT[1]._replace(images=[2])}, "about one of the 2 images; received image 2"),
    ("blip_vqa", {"questions": ABOUT[2], "prompts": [[5]]}, "prompts must have one list per"),
    ("coca_palm", {}, "start_id must be given for CocaPalm"),
    ("coca_experts", {}, "start_id must be given for CocaExperts"),
    ("beit3", {"start_id": START}, "mask_id must be given for Beit3Captioner"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "sentence"), WRONG)
def test_wrong_calls_get_sentences(make_model, make_images, name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        generate(make_model(name), make_images(2), **{"eos_id": EOS, **options})


def test_models_that_cannot_write_get_sentences(make_model, make_images, pack, make_questions):
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        generate(make_model("blip").train(), make_images(2), eos_id=EOS)
    with pytest.raises(TypeError, match="received BlipRetriever"):
        generate(BlipRetriever(blip_preset("tiny")).eval(), make_images(2), eos_id=EOS)
    model, (ids, segments) = make_model("blip"), pack([[1, 2]])
    with pytest.raises(ValueError, match="index must say which of the 2 images"):
        rank_captions(model, make_images(2), ids, segments)
    with pytest.raises(ValueError, match="one image per caption; received 2 for 1 captions"):
        rank_captions(model, make_images(2), ids, segments, [0, 1])
    with pytest.raises(ValueError, match="eval mode"):
        rank_captions(model.train(), make_images(1), ids, segments)
    vqa, questions = make_model("blip_vqa"), make_questions(range(1))
    with pytest.raises(ValueError, match="keep must be at least 1; received 0"):
        rank_answers(vqa, make_images(1), questions, ids, segments, keep=0)
    with pytest.raises(ValueError, match="answers need a word after their first token; received one of 1 tokens"):
        rank_answers(vqa, make_images(1), questions, *pack([[1, 2], [1]]))
    with pytest.raises(ValueError, match="call vqa.eval"):
        rank_answers(vqa.train(), make_images(1), questions, ids, segments)
