"""README.md and docs/PERFORMANCE.md say what the reports in benchmarks/results/ say, and nothing measured besides."""

import pytest

from vlp_fast.benchmarks import readme_tables


@pytest.mark.parametrize("path", readme_tables.FILES, ids=lambda path: path.name)
def test_tables_are_those_of_the_reports(path):
    text = path.read_text(encoding="utf-8")
    assert readme_tables.rewritten(text) == text, "make readme-tables would change it"


@pytest.mark.parametrize("path", readme_tables.FILES, ids=lambda path: path.name)
def test_every_claim_has_a_source(path):
    assert readme_tables.unsourced(path.read_text(encoding="utf-8")) == []


@pytest.fixture
def results(monkeypatch, tmp_path):
    row = '{"case": "a step", "provider": "vlp_fast", "speedup": 2.314, "ms_median": 417.26, "share": 0.431}'
    (tmp_path / "one.json").write_text(f'{{"rows": [{row}]}}')
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)


SPEED = "<!-- source: one.json, a step, vlp_fast, speedup -->"
TIME = SPEED.replace("speedup", "ms_median")
SHARE = SPEED.replace("speedup", "share")


@pytest.mark.parametrize(
    "claim",
    [
        f"it is x2.31 {SPEED} as fast",
        f"2.3x {SPEED}",
        f"a step takes 417.3 ms {TIME}",
        f"417 ms {TIME}, which is 43 % {SHARE} of it",
        f"twice {SPEED} as fast",
        "versions 2.13.0, 5,000 images of 224 pixels, lr 1e-3, `--seconds 30 s`, nucleus 0.9, half of the captions",
        "| cell | 3 heads |\n```\n12 ms\n```",
        f"{readme_tables.MARKERS[0]}\n| x1.31 |\n{readme_tables.MARKERS[1]}",
    ],
)
def test_what_has_a_source_or_claims_nothing(results, claim):
    assert readme_tables.unsourced(claim) == []


@pytest.mark.parametrize(
    "claim",
    [
        "it is x2.31 as fast",
        f"it is x2.41 {SPEED} as fast",
        "31x",
        "x31",
        f"a step takes 418 ms {TIME}",
        "12.3 s",
        "1.7 GB",
        "3.2 GiB",
        "40 percent",
        f"44 % {SHARE} of it",
        "820 GFLOP/s",
        "1200 images a second",
        "half the time of theirs",
        f"half {SPEED} the time",
        "doubles the speed",
        "the time is halved",
        "three times faster",
        "a factor of ten in memory",
        "ten times the cost",
        f"half the time and x2.31 {SPEED}",
    ],
)
def test_what_has_none_is_found(results, claim):
    (found,) = readme_tables.unsourced(f"a line\n{claim}")
    assert found.startswith("2: ")


def test_a_number_put_into_the_readme_is_found():
    text = readme_tables.FILES[0].read_text(encoding="utf-8")
    line = text.index("\n## Train")
    assert readme_tables.unsourced(f"{text[:line]}\nIt is x98.76 as fast.\n{text[line:]}")


def test_errors_name_what_is_wrong(results):
    with pytest.raises(FileNotFoundError, match=r"benchmarks/results/cpu-steps-fp32\.json is not there"):
        readme_tables.rewritten("<!-- table: steps -->\n<!-- end of table -->")
    with pytest.raises(ValueError, match="a table must be one of steps, .*; received nothing"):
        readme_tables.rewritten("<!-- table: nothing -->\n<!-- end of table -->")
    with pytest.raises(ValueError, match="has 0 rows of nobody at a step; a source needs one"):
        readme_tables.unsourced("x1.00 <!-- source: one.json, a step, nobody, speedup -->")
