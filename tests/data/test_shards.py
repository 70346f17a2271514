import gzip
import io
import json
import sys
import tarfile

import pytest

import vlp_fast.data.shards as shards_module
from vlp_fast.data import BatchLoader, ImageTransform, open_pairs, webdataset_pairs

pytest.importorskip("webdataset", reason="webdataset is not installed: pip install 'vlp_fast[data]'")


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def tar(tmp_path, image_bytes):
    return write_tar(
        tmp_path / "00000.tar",
        [
            ("000.jpg", image_bytes(format="JPEG")),
            ("000.txt", b"a red square\n"),
            ("000.json", b'{"caption": "not this one"}'),
            ("001.PNG", image_bytes()),
            ("001.json", json.dumps({"caption": "from the metadata", "url": "x"}).encode()),
        ],
    )


def captions(source):
    return [(pair.source, pair.caption) for pair in source]


def test_webdataset_pairs_reads_images_and_captions(tar, tmp_path):
    source = open_pairs(tar)
    expected = [("00000.tar/000", "a red square"), ("00000.tar/001", "from the metadata")]
    assert captions(source) == expected
    assert captions(source) == expected
    assert source.skips.total == 0
    assert all(isinstance(pair.image, bytes) for pair in source)
    assert not hasattr(source, "__len__")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar"]


def test_webdataset_pairs_never_unpickles(tmp_path, image_bytes):
    bomb = b"cbuiltins\nexec\n(S'raise SystemExit(1)'\ntR."
    tar = write_tar(
        tmp_path / "x.tar",
        [("0.png", image_bytes()), ("0.pickle", bomb), ("0.pyd", bomb), ("0.pth", bomb), ("0.txt", b"fine"), ("README", b"x")],
    )
    source = webdataset_pairs(tar)
    assert captions(source) == [("x.tar/0", "fine")]
    assert source.skips.counts == {"member type not allowed": 4}
    assert source.skips.names["member type not allowed"][0] == "x.tar/0.pickle"


def test_webdataset_pairs_brace_pattern_list_and_folder(tmp_path, image_bytes):
    for index in range(3):
        write_tar(tmp_path / f"{index:05d}.tar", [("a.png", image_bytes()), ("a.txt", f"caption {index}".encode())])
    expected = ["caption 0", "caption 1", "caption 2"]
    assert [pair.caption for pair in open_pairs(f"{tmp_path}/{{00000..00002}}.tar")] == expected
    assert [pair.caption for pair in webdataset_pairs([tmp_path / f"0000{index}.tar" for index in range(3)])] == expected
    source = open_pairs(tmp_path)
    assert [pair.caption for pair in source] == expected
    orders = {tuple(pair.caption for pair in source.shuffled(seed)) for seed in range(20)}
    assert len(orders) > 2
    assert all(sorted(order) == expected for order in orders)
    assert captions(source.shuffled(3)) == captions(source.shuffled(3))


def test_webdataset_pairs_missing_shards(tmp_path, tar):
    with pytest.raises(FileNotFoundError, match=r"2 of 3 shards are missing, the first is .*00001.tar"):
        webdataset_pairs(f"{tmp_path}/{{00000..00002}}.tar")


def test_webdataset_pairs_runs_no_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        webdataset_pairs("pipe:touch evil; cat x.tar")
    assert not list(tmp_path.iterdir())


def test_webdataset_pairs_counts_incomplete_and_repeated_samples(tmp_path, image_bytes):
    tar = write_tar(
        tmp_path / "x.tar",
        [
            ("0.png", image_bytes()),
            ("1.txt", b"no image"),
            ("2.png", image_bytes()),
            ("2.png", image_bytes()),
            ("2.txt", b"good"),
            ("3.png", image_bytes()),
            ("3.json", b"[1]"),
        ],
    )
    source = webdataset_pairs(tar)
    assert captions(source) == [("x.tar/2", "good"), ("x.tar/3", "")]
    assert source.skips.counts == {"image without caption": 1, "caption without image": 1, "duplicate member": 1}


def test_webdataset_pairs_refuses_large_members_before_reading_them(tmp_path, image_bytes, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_MEMBER_BYTES", 1000)
    members = [("0.png", b"\0" * 5000), ("0.txt", b"x"), ("1.png", image_bytes()), ("1.txt", b"y")]
    source = webdataset_pairs(write_tar(tmp_path / "x.tar", members))
    assert captions(source) == [("x.tar/1", "y")]
    assert source.skips.counts == {"over-size member": 1, "caption without image": 1}


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "gzip"])
def test_webdataset_pairs_goes_on_after_a_broken_shard(tmp_path, image_bytes, damage):
    members = [(f"{i}.{kind}", data) for i in range(20) for kind, data in (("png", image_bytes(None, (32, 32))), ("txt", b"x"))]
    whole = write_tar(tmp_path / "0.tar", members).read_bytes()
    damaged = {
        "truncated": whole[:20_000],
        "garbage": b"no tar at all" * 100,
        "empty": b"",
        "gzip": gzip.compress(whole)[: len(gzip.compress(whole)) // 2],
    }[damage]
    (tmp_path / "0.tar").write_bytes(damaged)
    write_tar(tmp_path / "1.tar", [("a.png", image_bytes()), ("a.txt", b"good")])
    source = open_pairs(tmp_path)
    names = [pair.source for pair in source]
    assert names[-1] == "1.tar/a"
    assert len(names) == len(set(names)) < 21
    assert source.skips.counts["broken shard"] == 1
    assert source.skips.names["broken shard"][0].startswith("0.tar: ")


def test_webdataset_pairs_without_pairs(tmp_path):
    tar = write_tar(tmp_path / "x.tar", [("a.pickle", b"x")])
    with pytest.raises(
        ValueError, match=r"1 shards \(.*x.tar\) hold no image-caption pairs. Skipped 1: 1 member type not allowed"
    ):
        webdataset_pairs(tar)


def test_webdataset_pairs_without_webdataset_names_the_extra(tar, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    for name in [name for name in sys.modules if name.startswith("webdataset.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"tar shards need webdataset; install it with: pip install 'vlp_fast\[data\]'"):
        open_pairs(tar)


def test_webdataset_pairs_in_a_loader(tmp_path, image_bytes, bad_images, tokenizer):
    members = [("0.png", image_bytes()), ("0.txt", b"a blue circle"), ("1.png", bad_images["truncated"]), ("1.txt", b"x")]
    members += [("2.png", image_bytes()), ("2.txt", b"  ")]
    members += [(f"{i}.{k}", d) for i in range(3, 9) for k, d in (("webp", image_bytes(format="WEBP")), ("txt", b"a circle"))]
    loader = BatchLoader(open_pairs(write_tar(tmp_path / "x.tar", members)), ImageTransform(8), tokenizer, 3, shuffle=True)
    assert loader.num_batches is None
    for _ in range(2):
        assert [batch.batch_size for batch in loader] == [3, 3, 1]
        assert loader.skips.counts == {"broken image": 1, "empty caption": 1}
        assert loader.skips.names["broken image"] == ["x.tar/1"]
