import pytest

from vlp_fast.data import ImageTextPair, ListedPairs, PairSource, RootedPath, SkipReport


def test_skip_report_counts_by_reason_and_keeps_the_first_names():
    report = SkipReport(keep=2)
    for name in "abc":
        report.add("broken image", name)
    report.add("empty caption", "d")
    assert report.counts == {"broken image": 3, "empty caption": 1}
    assert report.names == {"broken image": ["a", "b"], "empty caption": ["d"]}
    assert report.total == 4
    assert report.summary() == "Skipped 4: 3 broken image (a, b, ...); 1 empty caption (d)."


def test_skip_report_empty_says_so():
    assert SkipReport().summary() == "Nothing was skipped."


def test_skip_report_merge_adds_counts_and_names():
    first, second = SkipReport(keep=2), SkipReport(keep=2)
    first.add("x", "1")
    for name in "234":
        second.add("x", name)
    assert first.merge(second) is first
    assert first.counts == {"x": 4}
    assert first.names == {"x": ["1", "2"]}
    assert second.counts == {"x": 3}


def test_skip_report_names_cannot_write_to_the_terminal():
    report = SkipReport()
    report.add("broken image", "\x1b[31mred\n.png")
    assert "\x1b" not in report.summary()
    assert "\n" not in report.summary()


def test_listed_pairs_are_a_source_with_lazy_caption_files(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeff  a red square \n", "utf-8")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    source = ListedPairs("x", [("a.png", "a.txt"), ("b.png", "b.txt"), ("c.png", "c.txt")], tmp_path, captions_are_files=True)
    assert isinstance(source, PairSource)
    assert len(source) == 3
    assert source[0] == ImageTextPair(RootedPath(str(tmp_path / "a.png"), str(tmp_path)), "a red square", "a.png")
    assert [pair.caption for pair in source] == ["a red square", "caf\ufffd", ""]
    assert source[-1].source == "c.png"
    with pytest.raises(IndexError):
        source[3]


def test_listed_pairs_read_at_most_64_kib_of_a_caption_file(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 10**6)
    assert len(ListedPairs("x", [("a.png", "a.txt")], tmp_path, captions_are_files=True)[0].caption) == 64 * 1024
