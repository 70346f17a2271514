"""CapFilt: scores are the filter's, draws follow seed and place, and what is written survives an end at any moment."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlp_fast.capfilt import CapFilt, CapFiltSettings, ResumeError, run_capfilt, score_captions
from vlp_fast.capfilt.output import open_output
from vlp_fast.data import ImageTextPair, ImageTransform, WordPieceTokenizer, open_pairs
from vlp_fast.generation import rank_captions
from vlp_fast.models import Blip, Coca, blip_preset, coca_preset
from vlp_fast.models.blip import BlipRetriever
from vlp_fast.segments import Segments

WORDS = ["a photo of a blue circle", "there is a red triangle and no green shape in the picture", "one teal rectangle"]
COLORS = ("red", "green", "blue", "white", "teal", "gray", "black")


@pytest.fixture(scope="module")
def tokenizer():
    return WordPieceTokenizer.train(WORDS, 120)


@pytest.fixture(scope="module")
def blip(tokenizer):
    """Random weights, widened so that captions and scores depend on the image, and a filter that keeps about half."""
    torch.manual_seed(0)
    ids = {"vocab_size": tokenizer.vocab_size, "dec_id": tokenizer.dec_id, "enc_id": tokenizer.enc_id}
    model = Blip(blip_preset("tiny", image_size=32, **ids)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
        model.itm_head.weight.mul_(10)
        images = torch.randn(4, 3, 32, 32)
        own = tokenizer.encode([*WORDS, WORDS[0]], 35)
        ranking = rank_captions(model, images, _packed(own), Segments([len(ids) for ids in own]), [0, 1, 2, 3])
        model.itm_head.bias[0] += (ranking.logits[:, 1] - ranking.logits[:, 0]).median()
    return model


def _packed(lists):
    return torch.tensor([token for ids in lists for token in ids])


@pytest.fixture
def capfilt(blip, tokenizer):
    return CapFilt(blip, blip, tokenizer, CapFiltSettings(batch=3, shard_size=5))


def _picture(number: int) -> bytes:
    image = Image.new("RGB", (32, 32), COLORS[number % len(COLORS)])
    image.paste(COLORS[(number + 2) % len(COLORS)], (number % 9, 4, 24, 28))
    file = io.BytesIO()
    image.save(file, "JPEG" if number % 2 else "PNG")
    return file.getvalue()


@pytest.fixture
def pairs() -> list[ImageTextPair]:
    """Thirteen pairs: the fifth image is broken, the seventh pair has no caption."""
    found = [ImageTextPair(_picture(i), f"A photo of a {COLORS[i % 7]} circle!", f"web/{i:02d}") for i in range(13)]
    found[4] = ImageTextPair(b"no image", "a red circle", "web/04")
    found[6] = ImageTextPair(_picture(6), " ", "web/06")
    return found


@pytest.fixture
def folder(tmp_path, pairs) -> Path:
    """The same pairs as files; names do not say what is in them."""
    place = tmp_path / "data"
    place.mkdir()
    for pair in pairs:
        (place / f"{pair.source[4:]}.jpg").write_bytes(pair.image)
        (place / f"{pair.source[4:]}.txt").write_text(pair.caption)
    return place


def _written(out: Path) -> dict[str, bytes]:
    """Every file but the provenance, which names dates."""
    files = [out] if out.is_file() else sorted(out.iterdir())
    return {path.name: path.read_bytes() for path in files if path.name != "capfilt.json"}


def _samples(out: Path) -> list[tuple[str, dict, bytes]]:
    """(key, record, image) of all shards, in order."""
    found = []
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name, data in members.items():
            if name.endswith(".json"):
                key = name.removesuffix(".json")
                (image,) = (data for other, data in members.items() if other.startswith(f"{key}.") and other != name)
                found.append((key, json.loads(data), image))
    return found


def test_scores_are_those_of_rank_captions_one_by_one(blip, tokenizer):
    images, index = torch.randn(3, 3, 32, 32), [2, 0, 0, 1, 2]
    ids = tokenizer.encode([*WORDS, "blue", "red shape"], 35)
    segments = Segments([len(own) for own in ids])
    scores = score_captions(blip, images, _packed(ids), segments, index)
    for own, image, score in zip(ids, index, scores, strict=True):
        alone, one = Segments([len(own)]), images[image : image + 1]
        ranking = rank_captions(blip, one, _packed([own]), alone)
        assert score.itm == pytest.approx(ranking.scores.item(), rel=1e-4)
        assert score.matches == bool(ranking.logits[0, 1] > ranking.logits[0, 0])
        with torch.no_grad():
            cosine = (blip.encode_text(_packed([own]), alone) * blip.encode_image(one).features).sum().item()
        assert score.cosine == pytest.approx(cosine, rel=1e-4)


def test_captions_follow_from_seed_and_place(blip, tokenizer):
    images = torch.randn(4, 3, 32, 32)

    def written(position, **changes):
        return CapFilt(blip, blip, tokenizer, CapFiltSettings(captions=2, **changes)).captions(images, position)

    first = written(0)
    assert [len(own) for own in first] == [2] * 4
    assert first == written(0)
    assert first != written(4)
    assert first != written(0, seed=1)
    assert all(not text.startswith("a picture of") for own in first for text in own)


def test_a_broken_image_does_not_change_the_words_of_its_neighbours(capfilt, pairs, tmp_path):
    synthetic = []
    for name, fifth in (("broken", pairs[4]), ("whole", ImageTextPair(_picture(4), "a red circle", "web/04"))):
        everything = CapFilt(capfilt.captioner, capfilt.matcher, capfilt.tokenizer, CapFiltSettings(batch=3, threshold=0.0))
        run_capfilt(everything, [*pairs[:4], fifth, *pairs[5:]], tmp_path / name)
        records = [record for _, record, _ in _samples(tmp_path / name)]
        synthetic.append({r["position"]: r["caption"] for r in records if r["source"] == "synthetic"})
    broken, whole = synthetic
    assert whole.pop(4)
    assert broken == whole


def test_thresholds_decide_what_stays(capfilt, blip, tokenizer):
    texts = [[WORDS[0], WORDS[1]], [WORDS[2]]]
    scores = [score for own in capfilt.scores(torch.randn(2, 3, 32, 32), texts) for score in own]
    itm, cosine = sorted(s.itm for s in scores)[1], sorted(s.cosine for s in scores)[1]

    def kept(**changes):
        return [CapFilt(blip, blip, tokenizer, CapFiltSettings(**changes)).keeps(score) for score in scores]

    assert kept() == [score.itm > 0.5 for score in scores]
    assert kept(threshold=itm) == [score.itm >= itm for score in scores]
    assert kept(threshold=0.0, cosine_threshold=cosine) == [score.cosine >= cosine for score in scores]
    assert kept(threshold=itm, cosine_threshold=cosine) == [s.itm >= itm and s.cosine >= cosine for s in scores]


def test_shards_hold_the_files_unchanged_and_are_read_back(capfilt, folder, pairs, tmp_path):
    pytest.importorskip("webdataset")
    out, seen = tmp_path / "out", []
    report = run_capfilt(capfilt, open_pairs(folder), out, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 13), (3, 13), (5, 13), (8, 13), (10, 13), (13, 13)]
    assert (report["pairs"], report["images"], report["chunks"]) == (13, 12, 3)
    assert (report["original"], report["synthetic"]) == (11, 12)
    assert report["skipped"] == [{"reason": "broken image", "count": 1, "names": ["04.jpg"]}]
    samples = _samples(out)
    assert 0 < report["original_kept"] + report["synthetic_kept"] == len(samples) < 23
    for key, record, image in samples:
        position = record["position"]
        assert key == f"{position:09d}-{int(record['source'] == 'synthetic')}"
        assert image == pairs[position].image
        assert record["pair"] == f"{position:02d}.jpg"
        assert record["itm"] > 0.5
        assert -1 <= record["cosine"] <= 1
        if record["source"] == "original":
            assert record["caption"] == pairs[position].caption
    back = list(open_pairs(out))
    assert [(pair.caption, pair.image) for pair in back] == [(record["caption"], image) for _, record, image in samples]
    with tarfile.open(out / "000000.tar") as tar:
        assert {name.rpartition(".")[2] for name in tar.getnames()} == {"png", "jpg", "json"}


def test_lines_name_the_image_files(capfilt, folder, pairs, tmp_path):
    out = tmp_path / "kept.jsonl"
    report = run_capfilt(capfilt, open_pairs(folder), out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    shards = run_capfilt(capfilt, open_pairs(folder), tmp_path / "out")
    assert [{**record, "image": record["pair"]} for _, record, _ in _samples(tmp_path / "out")] == lines
    assert shards == {name: value for name, value in report.items() if name != "root"}
    back = open_pairs(out, root=report["root"])
    assert [ImageTransform(32)(pair.image).shape for pair in back] == [(3, 32, 32)] * len(lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "kept.capfilt.json", "kept.jsonl", "out"]


@pytest.mark.parametrize("name", ["out", "kept.jsonl"])
def test_an_end_at_any_write_loses_and_doubles_nothing(name, capfilt, folder, tmp_path, monkeypatch):
    source, replace = open_pairs(folder), os.replace
    whole = tmp_path / "whole" / name
    whole.parent.mkdir()
    report = run_capfilt(capfilt, source, whole)
    for end in range(1, 100):
        out = tmp_path / f"{end}" / name
        out.parent.mkdir()
        calls = iter(range(1, end))

        def dying(old, new, calls=calls):
            # before a file gets its name, and after the last it would get
            if next(calls, None) is None:
                raise KeyboardInterrupt
            replace(old, new)

        monkeypatch.setattr(os, "replace", dying)
        try:
            run_capfilt(capfilt, source, out)
        except KeyboardInterrupt:
            monkeypatch.setattr(os, "replace", replace)
            assert run_capfilt(capfilt, source, out) == report
            assert _written(out) == _written(whole)
        else:
            break
    assert end == (9 if name == "out" else 10)  # provenance twice, three chunks and their records; and the file of them all


def test_a_stream_goes_on_where_it_stopped(capfilt, pairs, tmp_path):
    pytest.importorskip("webdataset")
    data = tmp_path / "data.tar"
    with tarfile.open(data, "w") as tar:
        for pair in pairs:
            for suffix, content in (("jpg", pair.image), ("txt", pair.caption.encode())):
                member = tarfile.TarInfo(f"{pair.source[4:]}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    def stop(done, total):
        assert total is None
        if done == 8:
            raise KeyboardInterrupt

    report = run_capfilt(capfilt, open_pairs(data), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_capfilt(capfilt, open_pairs(data), tmp_path / "out", progress=stop)
    assert sorted(_written(tmp_path / "out")) == ["000000.json", "000000.tar", "000001.tar.partial"]
    begun = []
    again = run_capfilt(capfilt, open_pairs(data), tmp_path / "out", progress=lambda done, _: begun.append(done))
    assert begun[0] == 5
    assert again == report
    assert _written(tmp_path / "out") == _written(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"a \.jsonl names image files, and data.tar/00 is not one"):
        run_capfilt(capfilt, open_pairs(data), tmp_path / "kept.jsonl")


def test_what_was_begun_otherwise_is_refused(capfilt, pairs, tmp_path):
    out = tmp_path / "out"

    def stop(done, total):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_capfilt(capfilt, pairs, out, provenance={"captioner_sha256": "ab"}, progress=stop)
    before = _written(out)
    other = CapFilt(capfilt.captioner, capfilt.matcher, capfilt.tokenizer, CapFiltSettings(batch=3, shard_size=5, top_p=0.8))
    with pytest.raises(
        ResumeError, match=r"settings: top_p was 0\.9 and is 0\.8; captioner_sha256 was 'ab' and is 'cd'\. Give"
    ):
        run_capfilt(other, pairs, out, provenance={"captioner_sha256": "cd"})
    with pytest.raises(ResumeError, match="pairs was 13 and is 12"):
        run_capfilt(capfilt, pairs[:-1], out, provenance={"captioner_sha256": "ab"})
    with pytest.raises(ResumeError, match="begun with other data: pair 4 was 'web/04' and is 'web/05'"):
        run_capfilt(capfilt, [*pairs[1:], pairs[0]], out, provenance={"captioner_sha256": "ab"})
    assert _written(out) == before
    run_capfilt(capfilt, pairs, out, provenance={"captioner_sha256": "ab"}, notes={"who": "second"})
    runs = json.loads((out / "capfilt.json").read_text())["runs"]
    assert [run["chunks_before"] for run in runs] == [0, 1]
    assert runs[1]["who"] == "second"
    assert {"torch", "commit", "date", "device_name"} <= set(runs[0])


def test_other_files_and_other_processes_are_left_alone(capfilt, pairs, tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(ResumeError, match="holds other files \\(notes.md, ...\\): name a new or empty folder"):
        run_capfilt(capfilt, pairs, tmp_path)
    (tmp_path / "kept.jsonl").write_text("{}")
    with pytest.raises(ResumeError, match=r"kept.jsonl exists, and no kept.capfilt.json beside it"):
        run_capfilt(capfilt, pairs, tmp_path / "kept.jsonl")
    with pytest.raises(ValueError, match=r"out must be a folder, for shards, or a \.jsonl file"):
        run_capfilt(capfilt, pairs, tmp_path / "kept.csv")
    pytest.importorskip("fcntl")
    with (
        open_output(tmp_path / "out").locked(),
        pytest.raises(ResumeError, match="another process is writing to"),
    ):
        run_capfilt(capfilt, pairs, tmp_path / "out")
    run_capfilt(capfilt, pairs, tmp_path / "out")
    (tmp_path / "out" / "000001.tar").unlink()
    with pytest.raises(ResumeError, match="what was written is not all there"):
        run_capfilt(capfilt, pairs, tmp_path / "out")


def test_a_limit_takes_the_first_pairs(capfilt, pairs, tmp_path):
    few = CapFilt(capfilt.captioner, capfilt.matcher, capfilt.tokenizer, CapFiltSettings(batch=3, shard_size=5, limit=5))
    report = run_capfilt(few, pairs, tmp_path / "few")
    run_capfilt(capfilt, pairs, tmp_path / "all")
    assert (report["pairs"], report["chunks"]) == (5, 1)
    assert (tmp_path / "few" / "000000.tar").read_bytes() == (tmp_path / "all" / "000000.tar").read_bytes()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch": 0}, "batch must be at least 1; received 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1; received 0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"min_length": 21}, "min_length must be at most max_length, 20; received 21"),
        ({"threshold": 1.5}, "threshold must be a probability"),
        ({"cosine_threshold": -2.0}, "cosine_threshold must be from -1 to 1"),
        ({"max_length": 4, "min_length": 0}, "max_length must leave room for a word"),
        ({"max_length": 65}, "at most the captioner's 64; received 65"),
    ],
)
def test_settings_that_break_a_rule_get_a_sentence(blip, tokenizer, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        CapFilt(blip, blip, tokenizer, CapFiltSettings(**changes))


def test_models_that_do_not_fit_get_a_sentence(blip, tokenizer, capfilt, tmp_path):
    settings, captioner, retriever = CapFiltSettings(), blip.captioner(), blip.retriever()
    assert CapFilt(captioner, retriever, tokenizer, settings).captions(torch.zeros(1, 3, 32, 32), 0)
    with pytest.raises(TypeError, match="captioner must be a Blip or a BlipCaptioner; received a BlipRetriever"):
        CapFilt(retriever, retriever, tokenizer, settings)
    with pytest.raises(TypeError, match="filter must be a Blip or a BlipRetriever; received a Coca"):
        CapFilt(captioner, Coca(coca_preset("tiny")), tokenizer, settings)
    with pytest.raises(ValueError, match="filter must be in eval mode"):
        CapFilt(captioner, BlipRetriever(blip.config), tokenizer, settings)
    other = WordPieceTokenizer([*tokenizer.vocab, "cat"])
    with pytest.raises(ValueError, match=f"that of the captioner, of {tokenizer.vocab_size} words with dec_id"):
        CapFilt(captioner, retriever, other, settings)
    decoded = [ImageTextPair(Image.new("RGB", (8, 8)), "red", "in memory")]
    with pytest.raises(ValueError, match="the image of in memory is already decoded"):
        run_capfilt(capfilt, decoded, tmp_path / "out")
    with pytest.raises(ValueError, match="workers must be at least 1"):
        run_capfilt(capfilt, decoded, tmp_path / "out", workers=0)


def test_images_of_two_sizes_are_read_once_and_resized_twice(blip, tokenizer, pairs, tmp_path):
    ids = {"vocab_size": tokenizer.vocab_size, "dec_id": tokenizer.dec_id, "enc_id": tokenizer.enc_id}
    matcher = BlipRetriever(blip_preset("tiny", image_size=48, **ids)).eval()
    everything = CapFilt(blip, matcher, tokenizer, CapFiltSettings(threshold=0.0))
    report = run_capfilt(everything, pairs[:4], tmp_path / "out")
    assert report["original_kept"] == report["synthetic_kept"] == 4
    transform = ImageTransform(48)
    scores = everything.scores(
        torch.stack([transform(pair.image) for pair in pairs[:4]]), [[p.caption.lower()] for p in pairs[:4]]
    )
    written = [record["itm"] for _, record, _ in _samples(tmp_path / "out") if record["source"] == "original"]
    assert written == pytest.approx([own[0].itm for own in scores], abs=0.02)
