"""What the repository promises about itself: packages, version, commands, and a wheel that works away from the source tree."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import typer

import vlp_fast
import vlp_fast.cli as vlp_fast_cli

ROOT = Path(__file__).parents[2]
LINKS = {"vlp_fast.benchmarks": "benchmarks", "vlp_fast.kernels": "kernels"}
FOLDERS = {"vlp_fast": ROOT / "vlp_fast", **{name: ROOT / folder for name, folder in LINKS.items()}}
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv*", ".*_cache", ".hypothesis", ".benchmarks", "__pycache__", "*.egg-info", "bench-out"
)
TEXT = {"", ".py", ".md", ".toml", ".txt", ".in", ".cfg", ".json", ".csv", ".yml", ".yaml"}
# spelled so that these lines do not match themselves
REGISTRY = re.compile(r"py[p]i\.org|pytho[n]hosted|download\.pytorc[h]\.org|/simple[/]\w", re.IGNORECASE)
MACHINE = re.compile(r"(?<![\w.~>-])/(?:work|root|home|Users|mnt)/[a-z]\w+")


@pytest.fixture(scope="module")
def metadata() -> dict:
    """The arguments that setup.py passes to setuptools."""
    seen: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: seen.update(arguments))
        runpy.run_path(str(ROOT / "setup.py"))
    return seen


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))


def repository_files() -> list[Path]:
    files = []
    for parent, folders, names in os.walk(ROOT):
        folders[:] = [
            name for name in folders if name not in LEFT_OUT(parent, folders) and not (Path(parent) / name).is_symlink()
        ]
        files += [Path(parent) / name for name in names if Path(name).suffix in TEXT and name not in LEFT_OUT(parent, names)]
    return files


def test_packages_are_the_folders_with_code(metadata):
    found = set()
    for name, folder in FOLDERS.items():
        for parent, folders, files in os.walk(folder):
            folders[:] = [f for f in folders if f != "__pycache__" and not (Path(parent) / f).is_symlink()]
            if any(file.endswith(".py") for file in files):
                assert "__init__.py" in files, f"{parent} has code but no __init__.py"
                found.add(".".join([name, *Path(parent).relative_to(folder).parts]))
    assert set(metadata["packages"]) == found
    assert len(metadata["packages"]) == len(found)


def test_package_dir_maps_kernels_into_vlp_fast(metadata):
    assert {name: ROOT / path for name, path in metadata["package_dir"].items()} == FOLDERS


def test_kernels_init_holds_only_a_docstring():
    # run from the repository root, transformers imports this file when it looks for PyPI's `kernels`
    (only,) = ast.parse(read("kernels/__init__.py")).body
    assert isinstance(only, ast.Expr)
    assert isinstance(only.value, ast.Constant)


def test_version_has_one_source(metadata):
    assert metadata["version"] == vlp_fast.__version__ == importlib.metadata.version("vlp_fast")
    assert vlp_fast.__version__ in read("vlp_fast/_version.py")
    assert vlp_fast.__version__ not in read("setup.py") + read("pyproject.toml")
    assert f"## [{vlp_fast.__version__}]" in read("CHANGELOG.md")


def test_command_of_the_cli_exists(metadata):
    (script,) = metadata["entry_points"]["console_scripts"]
    name, target = re.split(r"\s*=\s*", script)
    module, attribute = target.split(":")
    assert name == "vlp-fast"
    code = f"from {module} import {attribute}; assert callable({attribute})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(sys.prefix), timeout=60)


def test_every_extra_of_the_readme_exists(metadata):
    named = re.findall(r"(?:vlp_fast|'\.)\[([a-z,-]+)\]", read("README.md"))
    assert {extra for extras in named for extra in extras.split(",")} <= set(metadata["extras_require"])


def test_readme_commands_exist_in_the_makefile():
    blocks = re.findall(r"```\w*\n(.*?)```", read("README.md"), re.DOTALL)
    named = {target for block in blocks for target in re.findall(r"^(?:\$ )?make ([a-z]+)", block, re.MULTILINE)}
    assert {"test", "bench"} <= named <= makefile_targets()


def test_make_test_leaves_out_what_is_heavy_and_test_all_runs_it():
    recipes = dict(re.findall(r"^(test|test-all):.*\n\t(.*)$", read("Makefile"), re.MULTILINE))
    assert recipes == {"test": '$(PYTEST) -m "not heavy" $(PYTEST_ARGS)', "test-all": "$(PYTEST) $(PYTEST_ARGS)"}
    assert '"heavy: ' in read("pyproject.toml")


def test_readme_command_lines_have_known_options():
    commands = typer.main.get_command(vlp_fast_cli.app).commands
    lines = re.findall(r"^vlp-fast (\w+)(.*)$", read("README.md"), re.MULTILINE)
    assert {"info", "bench", "profile", "convert"} <= {name for name, _ in lines} <= set(commands)
    for name, arguments in lines:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", arguments.partition("#")[0])) <= known, f"vlp-fast {name}{arguments}"


@pytest.mark.parametrize("number", [0, 1, 2], ids=["profile", "train", "attention"])
def test_readme_python_runs(number):
    pytest.importorskip("easy_vqa")
    code = re.findall(r"```python\n(.*?)```", read("README.md"), re.DOTALL)[number]
    seen: dict = {}
    exec(code.replace("steps(100)", "steps(2)"), seen)
    if number == 2:
        assert seen["out"].shape == (34, 12, 64)
    else:
        assert seen["losses"].keys() == ({"contrast"}, {"itc", "itm", "lm"})[number]


def test_continuous_integration_runs_the_readmes_test_command():
    text = read(".ci/run")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    (targets,) = re.findall(r"^for target in ([a-z -]+); do$", text, re.MULTILINE)
    assert {"lint", "test", "compile-gate"} == set(targets.split()) <= makefile_targets()
    assert 'make "$target"' in text


def test_pytest_never_sees_the_repository_root_as_import_path():
    assert "--import-mode=importlib" in read("pyproject.toml")
    assert not (ROOT / "conftest.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    for name in ("Makefile", ".ci/run", "README.md"):
        assert "-m pytest" not in read(name), f"{name} would put the root's kernels/ before PyPI's package of that name"


def test_no_file_names_a_registry_or_a_path_of_one_machine():
    found = []
    for path in repository_files():
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
            if match := REGISTRY.search(line) or MACHINE.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_wheel_built_from_the_sdist_imports_away_from_the_source(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=LEFT_OUT, symlinks=True)
    for folder in LINKS.values():
        if not (source / "vlp_fast" / folder).is_symlink():  # the links of `make dev` must not reach a distribution
            (source / "vlp_fast" / folder).symlink_to(Path("..", folder))
    (archive,) = build(source, "sdist", tmp_path)
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(tmp_path / "unpacked", filter="data")
    assert {"LICENSE", "Makefile", "constraints.txt", ".ci/run", "kernels/__init__.py", "docs/ARCHITECTURE.md"} <= names
    assert f"tests/core/{Path(__file__).name}" in names
    assert not [name for name in names if name.startswith(("vlp_fast/kernels", "vlp_fast/benchmarks")) or "__pycache__" in name]

    (unpacked,) = (tmp_path / "unpacked").iterdir()
    (wheel,) = build(unpacked, "wheel", tmp_path)
    with zipfile.ZipFile(wheel) as file:
        tops = {name.partition("/")[0] for name in file.namelist()}
        assert {"vlp_fast/py.typed", "vlp_fast/kernels/__init__.py", "vlp_fast/benchmarks/runner.py"} <= set(file.namelist())
        assert tops == {"vlp_fast", f"vlp_fast-{vlp_fast.__version__}.dist-info"}  # no top-level kernels, tests, benchmarks
        file.extractall(tmp_path / "installed")
    code = "import vlp_fast, vlp_fast.kernels as k, vlp_fast.benchmarks.runner, vlp_fast.models, vlp_fast.training\n"
    code += "print(vlp_fast.__file__); print(k.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert all(line.startswith(str(tmp_path / "installed")) for line in run.stdout.split())


def build(source: Path, kind: str, folder: Path) -> list[Path]:
    """What pip's build of a distribution does, without its isolated environment."""
    out = folder / kind
    out.mkdir()
    code = f"import sys, setuptools.build_meta as b; b.build_{kind}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return list(out.iterdir())
