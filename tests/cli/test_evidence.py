"""``vlp-fast evidence``: what the reports of GPU checks say, and that README says the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlp_fast import evidence
from vlp_fast.cli import app
from vlp_fast.evidence import FAMILIES, MARKERS, kernel_files, kernels_folder, source_hash

README = Path(__file__).parents[2] / "README.md"


def run(*arguments):
    return CliRunner().invoke(app, ["evidence", *map(str, arguments)])


@pytest.fixture
def kernels(tmp_path):
    """A folder of kernels: pool imports a helper, which imports the launch numbers; the product imports nothing."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "__init__.py").write_text('"""Kernels."""\n')
    (folder / "attention_pool.py").write_text("import torch\n\n\ndef f():\n    from ._common import g\n")
    (folder / "_common.py").write_text("from . import _configs\n")
    (folder / "_configs.py").write_text("BLOCK = 16\n")
    (folder / "multiway_linear.py").write_text("x = 1\n")
    return folder


def report(date="2027-01-02T03:04:05+00:00", family="attention", status="passed", source="today", **changes):
    """A report of gpu_check.py with one family."""
    row = {"family": family, "case": "ViT", "direction": "forward", "dtype": "bf16"}
    timings = [
        {**row, "provider": "triton", "ours": True, "us_median": 50.0},
        {**row, "provider": "sdpa", "ours": False, "us_median": 80.0},
        {**row, "provider": "flex", "ours": False, "us_median": 100.0},
        {**row, "case": "no rival", "provider": "triton", "ours": True, "us_median": 1.0},
    ]
    whole = {
        "schema": 1,
        "kind": "gpu_check",
        "tiny": False,
        "stamp": {"device": "cuda", "device_name": "NVIDIA H100", "date": date, "commit": "0123abc"},
        "families": {family: {"source": source, "status": status, "passed": 31, "failed": 0, "not_run": 0}},
        "timings": timings,
    }
    return {**whole, **changes}


@pytest.fixture
def results(tmp_path):
    """write(report, ...) -> a folder with these reports."""

    def write(*reports):
        folder = tmp_path / "results"
        folder.mkdir(exist_ok=True)
        for i, content in enumerate(reports):
            (folder / f"run-{i}.json").write_text(json.dumps(content))
        return folder

    return write


def states(folder, *names):
    rows = {row["family"]: row for row in json.loads(run("--json", "--results", folder).stdout)["families"]}
    return [rows[name]["state"] for name in names]


def test_hash_changes_with_a_helper_of_a_helper_and_not_with_another_family(kernels):
    before = {family: source_hash(family, kernels) for family in ("attention_pool", "multiway")}
    assert [path.name for path in kernel_files("attention_pool", kernels)] == ["_common.py", "_configs.py", "attention_pool.py"]
    (kernels / "_configs.py").write_text("BLOCK = 32\n")
    assert source_hash("attention_pool", kernels) != before["attention_pool"]
    assert source_hash("multiway", kernels) == before["multiway"]
    assert source_hash("attention", kernels) is None


def test_hash_does_not_depend_on_line_ends(kernels):
    before = source_hash("multiway", kernels)
    (kernels / "multiway_linear.py").write_bytes(b"x = 1\r\n")
    assert source_hash("multiway", kernels) == before


def test_hash_refuses_an_import_of_a_file_that_is_not_there(kernels):
    (kernels / "_common.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"attention_pool.py imports _common.py"):
        source_hash("attention_pool", kernels)


def test_every_kernel_file_belongs_to_a_family():
    belongs = {path.name for family in FAMILIES for path in kernel_files(family)}
    tools = {"__init__.py", "_compile.py", "_compile_case.py", "_compile_cases.py", "_compile_cases_losses.py"}
    assert {path.name for path in kernels_folder().glob("*.py")} - tools <= belongs


def test_families_are_read_without_triton_or_kernels():
    code = "import sys; import vlp_fast.evidence as e; e.evidence([]); print('triton' in sys.modules, 'vlp_fast.kernels' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_not_run_yet_without_reports(results):
    folder = results()
    assert set(states(folder, "attention", "attention_pool", "multiway")) == {"not run yet"}
    assert "not run yet" in run("--results", folder).stdout


def test_verified_only_while_the_source_is_the_same(results):
    folder = results(report(source=source_hash("attention")), report(family="multiway", source="another"))
    assert states(folder, "attention", "multiway", "attention_pool") == ["verified", "changed", "not run yet"]
    row = json.loads(run("--json", "--results", folder).stdout)["families"][0]
    assert (row["device"], row["date"][:10], row["commit"], row["cases"]) == ("NVIDIA H100", "2027-01-02", "0123abc", 31)
    assert (row["is_todays_source"], row["report"]) == (True, "run-0.json")
    assert row["speed"] == pytest.approx({"shapes": 1, "mean": 1.6, "least": 1.6, "most": 1.6})


def test_a_failure_after_a_success_is_what_counts(results):
    today = source_hash("attention")
    good, bad = report(source=today), report(source=today, status="failed", date="2027-02-01T00:00:00+00:00")
    assert states(results(bad, good), "attention") == ["failed"]
    later = report(source=today, date="2027-03-01T00:00:00+00:00")
    assert states(results(bad, good, later), "attention") == ["verified"]


def test_a_newer_check_that_timed_nothing_keeps_the_timings_of_the_same_source(results):
    today, later = source_hash("attention"), "2027-02-01T00:00:00+00:00"
    folder = results(report(source=today), report(source=today, date=later, timings=[]))
    row = json.loads(run("--json", "--results", folder).stdout)["families"][0]
    assert (row["date"], row["speed"]["mean"]) == (later, pytest.approx(1.6))
    folder = results(report(source="before"), report(source=today, date=later, timings=[]))
    assert json.loads(run("--json", "--results", folder).stdout)["families"][0]["speed"] is None


@pytest.mark.parametrize(
    "changes",
    [{"tiny": True}, {"kind": "bench"}, {"stamp": {"device": "cpu", "device_name": "x", "date": "2027", "commit": "1"}}],
    ids=["tiny", "another kind of report", "not a GPU"],
)
def test_runs_that_say_nothing_of_a_gpu_are_no_evidence(results, changes):
    assert states(results(report(**changes)), "attention") == ["not run yet"]


def test_a_run_cut_short_is_no_evidence(results):
    assert states(results(report(status="partial")), "attention") == ["not run yet"]


def test_table_fits_100_columns_in_a_pipe(results):
    printed = run("--results", results(report(source=source_hash("attention"))))
    assert printed.exit_code == 0
    assert max(map(len, printed.stdout.splitlines())) <= 100
    assert "verified" in printed.stdout


@pytest.mark.parametrize(("text", "sentence"), [("{", "is not JSON"), (json.dumps(report(schema=7)), "has schema 7")])
def test_a_broken_report_is_an_error(tmp_path, text, sentence):
    (tmp_path / "a.json").write_text(text)
    printed = run("--results", tmp_path)
    assert printed.exit_code == 1
    assert sentence in printed.stderr


def test_results_must_be_a_folder(tmp_path):
    printed = run("--results", tmp_path / "nowhere")
    assert printed.exit_code == 2
    assert "--results must name a folder" in printed.stderr


def test_readme_option_rewrites_what_is_between_the_markers_only(results, tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n")
    untimed = report(family="multiway", source="another", timings=[])
    folder = results(report(source=source_hash("attention")), untimed)
    assert run("--results", folder, "--readme", page).exit_code == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| attention | NVIDIA H100 | 2027-01-02 | `0123abc` | the one verified | x1.60 (x1.60 to x1.60, shapes: 1) |" in text
    assert "| multiway | NVIDIA H100 | 2027-01-02 | `0123abc` | changed since | not timed |" in text
    assert "| attention_pool | not run yet | - | - | - | - |" in text
    page.write_text("no markers")
    refused = run("--results", folder, "--readme", page)
    assert refused.exit_code == 1
    assert "the file must hold" in refused.stderr
    assert page.read_text() == "no markers"


def test_table_of_the_readme_is_what_the_reports_give():
    text = README.read_text(encoding="utf-8")
    rows = evidence.evidence(evidence.read_reports(evidence.default_results()))
    assert text == evidence.rewrite_readme(text, rows), "run: vlp-fast evidence --readme README.md"
