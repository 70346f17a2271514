import json

import pytest

from vlp_fast.data import ImageTransform, collate, decode_image, folder_pairs, open_pairs


@pytest.fixture
def folder(tmp_path, image_bytes):
    """Three images: one with a caption, one in a sub-folder with a caption, one without."""
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.JPG", "lonely.png"):
        (root / name).write_bytes(image_bytes())
    (root / "a.txt").write_text("a red square\n")
    (root / "sub/b.txt").write_text("another red square")
    return root


def captions(source):
    return [(pair.source, pair.caption) for pair in source]


def test_folder_pairs_of_a_folder(folder):
    source = open_pairs(folder)
    assert captions(source) == [("a.png", "a red square"), ("sub/b.JPG", "another red square")]
    assert len(source) == 2
    assert source.skips.counts == {"image without caption": 1}
    assert source.skips.names == {"image without caption": ["lonely.png"]}
    assert decode_image(source[1].image).size == (8, 8)


def test_folder_pairs_relative_path_and_later_change_of_directory(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder.parent)
    source = folder_pairs("data")
    monkeypatch.chdir("/")
    assert decode_image(source[0].image).size == (8, 8)
    assert source[0].caption == "a red square"


def test_folder_pairs_of_an_empty_folder(tmp_path, image_bytes):
    with pytest.raises(ValueError, match=r"folder .* holds no image-caption pairs: 0 images, .* Nothing was skipped"):
        folder_pairs(tmp_path)
    (tmp_path / "a.png").write_bytes(image_bytes())
    with pytest.raises(ValueError, match=r"no image-caption pairs: 1 images.* 1 image without caption \(a.png\)"):
        open_pairs(tmp_path)


def test_folder_pairs_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*nowhere to read image-caption pairs from"):
        open_pairs(tmp_path / "nowhere")


def test_folder_pairs_unknown_file(tmp_path):
    (tmp_path / "x.parquet").write_text("x")
    with pytest.raises(
        ValueError, match=r"a folder, a tar or a .json, .jsonl, .csv, .tsv manifest; received the file .*x.parquet"
    ):
        open_pairs(tmp_path / "x.parquet")


MANIFESTS = {
    "m.json": json.dumps(
        [{"image": "a.png", "caption": "one"}, {"image": "sub/b.JPG", "caption": ["two", " ", "three"], "image_id": 7}]
    ),
    "m.jsonl": '{"image": "a.png", "caption": "one"}\n\n{"image_path": "sub/b.JPG", "text": ["two", "", "three"]}\n',
    "m.csv": 'filepath,title\na.png,one\nsub/b.JPG,two\nsub/b.JPG,""\n\nsub/b.JPG,three\n',
    "m.tsv": "title\tfilepath\none\ta.png\ntwo\tsub/b.JPG\n \tsub/b.JPG\nthree\tsub/b.JPG\n",
    "tabs.csv": "\ufefffilepath\ttitle\r\na.png\tone\r\nsub/b.JPG\ttwo\r\nsub/b.JPG\t\r\nsub/b.JPG\tthree\r\n",
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_folder_pairs_of_a_manifest(folder, name):
    (folder / name).write_text(MANIFESTS[name], "utf-8", newline="")
    source = open_pairs(folder / name)
    assert captions(source) == [("a.png", "one"), ("sub/b.JPG", "two"), ("sub/b.JPG", "three")]
    assert source.skips.counts == {"empty caption": 1}
    assert [decode_image(pair.image).size for pair in source] == [(8, 8)] * 3


def test_folder_pairs_of_a_folder_with_one_manifest(tmp_path, image_bytes):
    (tmp_path / "ann").mkdir()
    (tmp_path / "a.png").write_bytes(image_bytes())
    (tmp_path / "ann/train.json").write_text('[{"image": "a.png", "caption": "one"}]')
    source = open_pairs(tmp_path)
    assert captions(source) == [("a.png", "one")]
    assert decode_image(source[0].image).size == (8, 8)
    (tmp_path / "other.csv").write_text("filepath,title\na.png,x\n")
    with pytest.raises(ValueError, match="2 manifests"):
        open_pairs(tmp_path)


@pytest.mark.parametrize("path", ["../x.png", "sub/../../x.png", "/etc/x.png"])
def test_folder_pairs_does_not_leave_the_data_root(folder, image_bytes, path):
    (folder.parent / "x.png").write_bytes(image_bytes())
    (folder / "m.json").write_text(json.dumps([{"image": path, "caption": "a"}, {"image": "a.png", "caption": "b"}]))
    source = open_pairs(folder / "m.json")
    assert captions(source) == [("a.png", "b")]
    assert source.skips.names == {"path outside the data root": [path]}
    (folder / "m.json").write_text(json.dumps([{"image": path, "caption": "a"}]))
    with pytest.raises(ValueError, match=r"holds no image-caption pairs: 1 records. Skipped 1: 1 path outside the data root"):
        open_pairs(folder / "m.json")


def test_folder_pairs_root_says_where_images_may_lie(folder, tmp_path):
    manifest = tmp_path / "elsewhere" / "m.json"
    manifest.parent.mkdir()
    manifest.write_text(json.dumps([{"image": "a.png", "caption": "one"}]))
    assert decode_image(open_pairs(manifest, root=folder)[0].image).size == (8, 8)
    manifest.write_text(json.dumps([{"image": str(folder / "a.png"), "caption": "one"}]))
    assert decode_image(open_pairs(manifest, root="/")[0].image).size == (8, 8)
    with pytest.raises(ValueError, match="path outside the data root"):
        open_pairs(manifest)


def test_folder_pairs_records_that_are_none_are_counted(folder, tokenizer):
    records = [
        3, None, [], {}, {"image": "a.png"}, {"caption": "x"}, {"image": 5, "caption": "x"}, {"image": "a\0.png", "caption": "x"},
        {"image": "a.png", "caption": 5}, {"image": "a.png", "caption": []}, {"image": "a.png", "caption": {"x": "y"}},
        {"image": "a.png", "caption": "half a \ud800 pair"}, {"image": "a.png", "caption": "fine"},
    ]  # fmt: skip
    (folder / "m.json").write_text(json.dumps(records))
    source = open_pairs(folder / "m.json")
    assert source.skips.counts == {"record without image and caption": 11}
    assert source.skips.names["record without image and caption"][0] == "m.json record 0"
    assert collate(source, ImageTransform(8), tokenizer).captions == ("half a ? pair", "fine")
    (folder / "m.jsonl").write_text('{"image": "a.png"\n{"image": "a.png", "caption": "fine"}\n')
    source = open_pairs(folder / "m.jsonl")
    assert source.skips.names == {"record without image and caption": ["m.jsonl line 1"]}


def test_folder_pairs_table_with_an_unreadable_row(folder):
    (folder / "m.tsv").write_text(f"filepath\ttitle\na.png\t{'x' * 200_000}\na.png\nsub/b.JPG\tfine\n")
    source = open_pairs(folder / "m.tsv")
    assert captions(source) == [("sub/b.JPG", "fine")]
    assert source.skips.counts == {"record without image and caption": 2}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.json", "{", "m.json is not JSON: "),
        ("m.json", "[" * 100_000, "m.json is not JSON: "),
        ("m.json", '{"a": 1}', r'must hold a list of \{"image": ..., "caption": ...\} objects; it holds a dict'),
        ("m.json", "[]", "holds no image-caption pairs: 0 records. Nothing was skipped"),
        ("m.csv", "url,title\nx,y\n", "the header of .*m.csv must name an image column .* it reads 'url,title'"),
        ("m.csv", "", "the header of .* it reads ''"),
        ("m.csv", "filepath,title\n", "holds no image-caption pairs: 0 records"),
        ("m.jsonl", "x\n", "1 records. Skipped 1: 1 record without image and caption"),
    ],
)
def test_folder_pairs_manifest_errors(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        open_pairs(tmp_path / name)
