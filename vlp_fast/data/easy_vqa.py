"""The easy-VQA images with captions made from their questions and answers: real files to try everything on, offline.

easy-VQA (Victor Zhou, 2019, MIT licence) ships 5,000 PNG files of 64 x 64 pixels, each one shape in one colour, with questions
such as "what color is the triangle?" and "is there not a red shape?". Captions say what the answers tell and nothing else.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections import defaultdict
from pathlib import Path

from vlp_fast.data.pairs import ListedPairs, SkipReport

__all__ = ["easy_vqa_pairs"]

SPLITS = ("train", "test")
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
THING = re.compile(rf"\b(?:({'|'.join(COLORS)}) shape|({'|'.join(SHAPES)}))\b")
NEGATION = re.compile(r"\b(?:not|no)\b")

PRESENT = (
    "a {thing}",
    "a photo of a {thing}",
    "there is a {thing} in the picture",
    "the image contains a {thing}",
    "one {thing} on a plain background",
)


def easy_vqa_pairs(split: str = "train") -> ListedPairs:
    """One captioned image per easy-VQA image: 4,000 in "train", 1,000 in "test".

    Captions have from two to some fifteen words: the sentence, and how many absent things it adds, follow from the image's
    number, so they are the same in every run. "a photo of a blue circle", "there is a red shape in the picture and no circle".

    Raises:
        ImportError: the package easy-vqa, extra ``vlp_fast[demo]``, is not installed.
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; received {split!r}.")
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise ImportError("easy-vqa is not installed; install it with: pip install 'vlp_fast[demo]'.")
    root = Path(spec.origin).parent / "data" / split
    answers: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image in json.loads((root / "questions.json").read_text("utf-8")):
        answers[image].append((question, answer))
    skips, entries = SkipReport(), []
    for path in sorted((root / "images").glob("*.png"), key=lambda path: int(path.stem)):
        known = answers.get(int(path.stem))
        if known:
            entries.append((f"images/{path.name}", _caption(int(path.stem), known)))
        else:
            skips.add("image without caption", path.name)
    return ListedPairs(f"easy-vqa:{split}", entries, root, skips=skips)


def _caption(image: int, answers: list[tuple[str, str]]) -> str:
    color, shape, absent = _facts(answers)
    thing = f"{color or ''} {shape or 'shape'}".strip()
    caption = PRESENT[image % len(PRESENT)].format(thing=thing)
    wanted = image // len(PRESENT) % 4
    if thing == "shape" and absent:
        wanted = max(wanted, 1)
    return caption + _without(absent[:wanted])


def _facts(answers: list[tuple[str, str]]) -> tuple[str | None, str | None, list[str]]:
    """(colour, shape, absent things in the order asked) as far as the answers tell."""
    color, shape, absent = None, None, []
    for question, answer in answers:
        if answer in COLORS:
            color = answer
            continue
        if answer in SHAPES:
            shape = answer
            continue
        asked = THING.search(question)
        if asked is None:
            continue
        if (answer == "yes") != bool(NEGATION.search(question)):
            color, shape = asked[1] or color, asked[2] or shape
        elif asked[0] not in absent:
            absent.append(asked[0])
    return color, shape, absent


def _without(absent: list[str]) -> str:
    """ " and no red shape", " and no red shape, no circle and no teal shape", or nothing."""
    if not absent:
        return ""
    *first, last = [f"no {thing}" for thing in absent]
    return f" and {', '.join(first)} and {last}" if first else f" and {last}"
