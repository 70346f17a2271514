import importlib.util
import sys

import pytest

from vlp_fast.data import BatchLoader, ImageTransform, WordPieceTokenizer, decode_image, easy_vqa_pairs, open_pairs
from vlp_fast.data.easy_vqa import _caption, _facts

needs_easy_vqa = pytest.mark.skipif(
    importlib.util.find_spec("easy_vqa") is None, reason="easy-vqa is not installed: pip install 'vlp_fast[demo]'"
)


@needs_easy_vqa
@pytest.mark.parametrize(("split", "images"), [("train", 4000), ("test", 1000)])
def test_easy_vqa_pairs_has_every_image_once(split, images):
    source = easy_vqa_pairs(split)
    assert len(source) == images
    assert len({pair.source for pair in source}) == images
    assert source.skips.total == 0
    lengths = {len(pair.caption.split()) for pair in source}
    assert min(lengths) == 2
    assert max(lengths) > 12
    assert len({pair.caption for pair in source}) > images // 4
    assert [pair.caption for pair in source] == [pair.caption for pair in easy_vqa_pairs(split)]


@needs_easy_vqa
def test_easy_vqa_pairs_captions_say_what_is_in_the_picture():
    hues = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "yellow": (255, 255, 0)}
    checked = 0
    for pair in easy_vqa_pairs("test"):
        present = pair.caption.partition(" and no ")[0].split()
        color = next((word for word in present if word in hues), None)
        if color is None:
            continue
        colors = decode_image(pair.image).getcolors(64 * 64)
        # the background is the most frequent colour or the shape is; the named one must be among the two
        common = [color for _, color in sorted(colors)[-2:]]
        assert min(sum(abs(a - b) for a, b in zip(seen, hues[color], strict=True)) for seen in common) < 160, pair
        checked += 1
    assert checked > 300


@needs_easy_vqa
def test_easy_vqa_pairs_in_a_loader_are_ragged():
    source = open_pairs("easy-vqa:test")
    tokenizer = WordPieceTokenizer.train([pair.caption for pair in source], 256)
    loader = BatchLoader(source, ImageTransform(32, train=True), tokenizer, 100, shuffle=True, num_threads=2)
    batches = list(loader)
    assert [batch.batch_size for batch in batches] == [100] * 10
    assert loader.skips.total == 0
    assert all(len(set(batch.text_lengths)) > 5 for batch in batches)
    assert tokenizer.unk_id not in batches[0].token_ids
    assert all(batch.images.isfinite().all() for batch in batches)


@needs_easy_vqa
def test_easy_vqa_pairs_does_not_import_the_package():
    sys.modules.pop("easy_vqa", None)
    easy_vqa_pairs("test")
    assert "easy_vqa" not in sys.modules


def test_easy_vqa_pairs_without_the_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"easy-vqa is not installed; install it with: pip install 'vlp_fast\[demo\]'"):
        open_pairs("easy-vqa")


def test_easy_vqa_pairs_unknown_split():
    with pytest.raises(ValueError, match="split must be one of train, test; received 'val'"):
        open_pairs("easy-vqa:val")


def test_easy_vqa_facts_follow_from_answers_and_negations():
    answers = [
        ("what color is the shape?", "blue"),
        ("is there a triangle?", "no"),
        ("is there not a red shape in the image?", "yes"),
        ("is no red shape present?", "yes"),
        ("does the image not contain a circle?", "no"),
        ("is a blue shape present?", "yes"),
    ]
    assert _facts(answers) == ("blue", "circle", ["triangle", "red shape"])


def test_easy_vqa_caption_says_only_what_is_known():
    unknown = [("is there a red shape?", "no"), ("is there a teal shape?", "no"), ("is no circle present?", "yes")]
    assert _caption(0, unknown) == "a shape and no red shape"
    assert _caption(11, unknown) == "a photo of a shape and no red shape and no teal shape"
    assert _caption(17, unknown) == "there is a shape in the picture and no red shape, no teal shape and no circle"
    assert _caption(1, [("what shape is present?", "circle")]) == "a photo of a circle"
    assert _caption(4, [("what is the color of the shape?", "teal")]) == "one teal shape on a plain background"
