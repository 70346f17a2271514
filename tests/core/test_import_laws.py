"""Which room may import which: read from the source, so that a forbidden import fails even where it is never reached."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY, KERNELS = ROOT / "vlp_fast", ROOT / "kernels"

# What the files of a room may import from vlp_fast; their own room is always allowed. A new file must find its place here.
FOUNDATION = {"_version", "segments", "attention_plan", "padding", "passes", "decode_plan"}
UP_TO_OPS = FOUNDATION | {"ops"}
UP_TO_MODULES = UP_TO_OPS | {"modules"}
UP_TO_TRAINING = UP_TO_MODULES | {"models", "losses", "distributed", "data", "training"}
ROOMS = {
    "__init__": {"_version", "segments", "attention_plan"},
    "_version": set(),
    "segments": set(),
    "attention_plan": {"segments", "padding"},
    "padding": {"segments", "attention_plan"},
    "passes": {"segments", "attention_plan"},
    "decode_plan": {"segments"},
    "testing": set(),
    "kernels": set(),
    "reference": {"segments", "attention_plan", "decode_plan"},
    "ops": FOUNDATION | {"kernels"},
    "modules": UP_TO_OPS,
    "models": UP_TO_MODULES,
    "generation": UP_TO_MODULES | {"models"},
    "distributed": set(),
    "losses": UP_TO_OPS | {"distributed"},
    "data": {"segments"},
    "training": UP_TO_TRAINING - {"training"},
    "environment": {"_version", "ops"},
    "capfilt": UP_TO_MODULES | {"models", "generation", "data", "environment"},
    "evidence": set(),
    "measuring": set(),
    "profiling": UP_TO_TRAINING | {"environment", "measuring"},
    "profile_page": {"profiling"},
    "profile_peers": UP_TO_TRAINING | {"profiling"},
    "bench": UP_TO_TRAINING | {"environment", "measuring", "reference", "testing"},
    "benchmarks": set(),  # a folder beside vlp_fast/, above all rooms: what it imports is not held to anything
    "cli": UP_TO_TRAINING
    | {
        "_version",
        "environment",
        "measuring",
        "profiling",
        "profile_page",
        "profile_peers",
        "bench",
        "benchmarks",
        "evidence",
        "capfilt",
    },
}
EXTERNAL = {
    "kernels": {"torch", "triton"},
    "reference": {"torch"},
    "losses": {"torch"},
    "distributed": {"torch"},
    "testing": {"torch"},
    "segments": {"torch", "numpy"},
    "attention_plan": {"torch", "numpy"},
    "padding": {"torch", "numpy"},
    "passes": {"torch", "numpy"},
    "decode_plan": {"torch", "numpy"},
    "modules": {"torch"},
    "models": {"torch", "safetensors"},
    "generation": {"torch", "numpy"},
    "ops": {"torch", "flash_attn", "xformers"},
}


def python_files(folder: Path) -> Iterator[Path]:
    """The files below, without following links: `make dev` links kernels/ into vlp_fast/."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from python_files(path)
        elif path.suffix == ".py":
            yield path


def module_name(path: Path) -> str:
    inside = path.relative_to(KERNELS if path.is_relative_to(KERNELS) else LIBRARY).with_suffix("")
    parts = ("vlp_fast", "kernels", *inside.parts) if path.is_relative_to(KERNELS) else ("vlp_fast", *inside.parts)
    return ".".join(parts)


def imported(source: str, module: str) -> Iterator[str]:
    """Every module that `source` names in an import statement, at any depth, in full."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            if base == "vlp_fast":
                yield from (f"vlp_fast.{alias.name}" for alias in node.names)
            else:
                yield base


def room(module: str) -> str:
    """`vlp_fast.ops.attention` -> ops; `vlp_fast` and the names it re-exports -> __init__."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "__init__"
    return "__init__" if name[0].isupper() or name == "__version__" else name


FILES = [*python_files(LIBRARY), *python_files(KERNELS)]
IDS = [str(path.relative_to(ROOT)) for path in FILES]


def violations(source: str, module: str) -> list[str]:
    own = room(module)
    found = []
    for name in imported(source, module):
        top = name.split(".")[0]
        if top == "vlp_fast":
            target = room(name)
            # what vlp_fast itself re-exports comes from segments and attention_plan
            re_exported = target == "__init__" and {"segments", "attention_plan"} <= ROOMS[own]
            if target != own and target not in ROOMS[own] and not re_exported:
                found.append(f"{module} imports {name}: room {own} may import {sorted(ROOMS[own])} only")
        elif top not in sys.stdlib_module_names and own in EXTERNAL and top not in EXTERNAL[own]:
            found.append(f"{module} imports {name}: room {own} may use {sorted(EXTERNAL[own])} only")
    return found


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_obey_the_order_of_rooms(path):
    module = module_name(path)
    assert room(module) in ROOMS, (
        f"{path.relative_to(ROOT)} needs a place among the rooms of this test and of docs/ARCHITECTURE.md"
    )
    assert not violations(path.read_text(encoding="utf-8"), module)


def test_laws_hold_together():
    assert all(allowed <= set(ROOMS) for allowed in ROOMS.values())
    assert [name for name, allowed in ROOMS.items() if "kernels" in allowed] == ["ops"]
    assert [name for name, allowed in ROOMS.items() if "reference" in allowed] == ["bench"]
    assert not any("cli" in allowed for allowed in ROOMS.values())
    assert "losses" not in ROOMS["models"]
    assert "models" not in ROOMS["losses"]
    for name in ROOMS:
        reached: set[str] = set()
        todo = [name]
        while todo:
            new = ROOMS[todo.pop()] - reached
            reached |= new
            todo += new
        behind = {other for other in reached - {name} if name in ROOMS[other]}
        assert not behind or {name, *behind} == {"attention_plan", "padding"}, f"{name} and {behind} import each other"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vlp_fast.kernels.attention_forward", "from vlp_fast.attention_plan import AttentionPlan"),
        ("vlp_fast.kernels.attention_forward", "import numpy"),
        ("vlp_fast.kernels.attention_forward", "from ..segments import Segments"),
        ("vlp_fast.reference", "def f():\n    from vlp_fast.kernels.attention_forward import attention_forward"),
        ("vlp_fast.reference", "import vlp_fast.ops"),
        ("vlp_fast.modules.attention", "from vlp_fast.kernels import attention_forward"),
        ("vlp_fast.modules.attention", "from vlp_fast import kernels"),
        ("vlp_fast.models.blip", "from vlp_fast.losses import contrastive_loss"),
        ("vlp_fast.losses", "from vlp_fast.models import Blip"),
        ("vlp_fast.data.batches", "from vlp_fast.passes import TextPass"),
        ("vlp_fast.data.batches", "from vlp_fast import AttentionPlan"),
        ("vlp_fast.segments", "from vlp_fast.attention_plan import AttentionPlan"),
        ("vlp_fast.training.blip", "from vlp_fast.cli import app"),
        ("vlp_fast.models.blip", "import transformers"),
        ("vlp_fast.ops.attention", "import triton"),
    ],
)
def test_laws_catch_a_forbidden_import(module, source):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "vlp_fast.kernels.attention_forward",
            "import math, torch, triton.language as tl\nfrom ._configs import attention_config",
        ),
        ("vlp_fast.ops.attention", "from vlp_fast.kernels.attention_forward import attention_forward"),
        ("vlp_fast.modules.attention", "from vlp_fast import AttentionPlan, Segments"),
        ("vlp_fast.data.batches", "from vlp_fast.segments import Segments\nimport PIL"),
    ],
)
def test_laws_allow_what_the_rooms_allow(module, source):
    assert not violations(source, module)
