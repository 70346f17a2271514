"""The core works where nothing optional is installed, and says so in a sentence where something optional is asked for."""

import os
import subprocess
import sys

BLOCKED = ("triton", "xformers", "flash_attn", "webdataset", "easy_vqa", "matplotlib", "transformers", "torchvision")

BLOCK = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""

USE = """
import torch
import vlp_fast, vlp_fast.ops, vlp_fast.modules, vlp_fast.models, vlp_fast.losses, vlp_fast.data, vlp_fast.training
from vlp_fast import AttentionPlan
from vlp_fast.ops import attention, backend_status, default_backend

plan = AttentionPlan.self_attention([3, 2], causal=True)
q, k, v = (torch.randn(5, 2, 16, requires_grad=True) for _ in range(3))
attention(q, k, v, plan).sum().backward()
assert q.grad.isfinite().all()
print("default:", default_backend("cpu"))
print("on cuda:", backend_status("triton", "cuda").reason)
for backend in ("triton", "xformers", "flash_attn"):
    try:
        attention(q, k, v, plan, backend=backend)
    except RuntimeError as error:
        print(error)
"""


def run(code: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=sys.prefix, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_core_works_without_anything_optional():
    assert run(BLOCK + USE) == [
        "default: torch",
        "on cuda: triton is not installed",
        "backend 'triton' is not available: triton is not installed.",
        "backend 'xformers' is not available: xformers is not installed (pip install 'vlp_fast[xformers]').",
        "backend 'flash_attn' is not available: flash_attn is not installed (pip install 'vlp_fast[flash-attn]').",
    ]


def test_import_brings_in_nothing_optional():
    (line,) = run(
        """
import sys
import torch.utils.flop_counter  # torch itself imports triton here
before = set(sys.modules)
import vlp_fast, vlp_fast.ops, vlp_fast.modules, vlp_fast.models, vlp_fast.losses, vlp_fast.data, vlp_fast.training
print(*{name.split(".")[0] for name in set(sys.modules) - before})
"""
    )
    assert not set(line.split()) & {*BLOCKED, "typer", "rich", "pytest", "hypothesis"}
