"""``vlp-fast info``: what it reports is what the operations will do."""

import json
import subprocess

from typer.testing import CliRunner

from vlp_fast import environment
from vlp_fast.cli import app
from vlp_fast.ops import BACKENDS, backend_status, default_backend


def test_json_follows_the_documented_schema():
    result = CliRunner().invoke(app, ["info", "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["schema"] == 1
    assert {"vlp_fast", "python", "torch", "triton", "numpy", "xformers", "flash_attn"} <= set(report["versions"])
    assert set(report["cpu"]) == {"name", "cores", "threads", "instructions", "fp32_products", "bf16_products"}
    for dtype in ("fp32", "bf16"):
        assert set(report["cpu"][f"{dtype}_products"]) == {"library", "reason"}
    assert report["cuda"]["available"] == bool(report["cuda"]["devices"])
    assert report["cuda"]["reason"]
    assert {"cpu", "meta"} <= set(report["devices"])
    for device, here in report["devices"].items():
        assert here["default"] == default_backend(device)
        for backend in BACKENDS:
            assert here["backends"][backend] == backend_status(backend, device)._asdict()


def test_tables_fit_100_columns_and_hold_no_escape_codes_in_a_pipe():
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert "\x1b" not in result.stdout
    assert "backend=None chooses torch" in result.stdout


def test_commit_is_that_of_this_package_only(tmp_path, monkeypatch):
    # a package installed inside an unrelated repository must not claim its commit
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    package = tmp_path / "env" / "vlp_fast"
    package.mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    assert environment.git_commit() is None
