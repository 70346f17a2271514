"""What a measurement ran on: versions, devices, backends, and the stamp that every saved number carries."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from vlp_fast._version import __version__
from vlp_fast.ops import BACKENDS, backend_status, bf16_products, default_backend, fp32_products

__all__ = [
    "backend_report",
    "cpu_report",
    "cuda_report",
    "device_name",
    "device_types",
    "git_commit",
    "load_per_core",
    "stamp",
    "system_report",
    "versions",
]

# import name -> names under which it is distributed
_LIBRARIES = {
    "triton": ("triton", "pytorch-triton", "pytorch-triton-rocm"),
    "numpy": ("numpy",),
    "xformers": ("xformers",),
    "flash_attn": ("flash-attn",),
}


def versions() -> dict[str, str | None]:
    """Library -> installed version, None where it is not installed. Nothing is imported for it."""
    found: dict[str, str | None] = {"vlp_fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return found | {module: _version(module, names) for module, names in _LIBRARIES.items()}


def _version(module: str, distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown" if importlib.util.find_spec(module) is not None else None


def cpu_report() -> dict[str, Any]:
    """The processor: its name, the cores this process may use, torch's threads, the instruction set its kernels use, and how the torch
    backend multiplies matrices of fp32 and bf16.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    products = {"fp32_products": fp32_products(), "bf16_products": bf16_products()}
    return {
        "name": _cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        **{name: {"library": library, "reason": reason} for name, (library, reason) in products.items()},
    }


def load_per_core() -> float | None:
    """Processes that wanted to run during the last minute, per core; above 1 they wait for each other. None where not known."""
    try:
        return round(os.getloadavg()[0] / (os.cpu_count() or 1), 2)
    except (AttributeError, OSError):
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # no Linux
    return platform.processor() or platform.machine() or "unknown"


def cuda_report() -> dict[str, Any]:
    """CUDA (or ROCm) devices, and the reason where there is none."""
    if torch.version.cuda is None and torch.version.hip is None:
        return {"available": False, "reason": f"torch {torch.__version__} is built without CUDA", "devices": []}
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    if not torch.cuda.is_available():
        return {"available": False, "reason": f"torch is built for {built} but finds no device or no driver", "devices": []}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "index": index,
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_mb": properties.total_memory // 2**20,
            }
        )
    return {"available": True, "reason": f"torch is built for {built}", "devices": devices}


def device_types() -> tuple[str, ...]:
    """Kinds of devices that tensors can be on here; "meta" holds shapes only."""
    return ("cpu", "cuda", "meta") if torch.cuda.is_available() else ("cpu", "meta")


def backend_report() -> dict[str, Any]:
    """Device type -> what `backend=None` chooses there, and for each backend whether it can run and why or why not."""
    report = {}
    for device in device_types():
        statuses = {name: backend_status(name, device) for name in BACKENDS}
        report[device] = {"default": default_backend(device), "backends": {n: s._asdict() for n, s in statuses.items()}}
    return report


def system_report() -> dict[str, Any]:
    """All of the above: what ``vlp-fast info`` shows."""
    system = {"system": platform.platform(), "machine": platform.machine(), "cpu": cpu_report(), "cuda": cuda_report()}
    return {"schema": 1, "versions": versions(), **system, "devices": backend_report()}


def device_name(device: torch.device | str) -> str:
    """The name of the processor or of the CUDA device."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def git_commit() -> str | None:
    """The commit this package is run from, with "-dirty" where files differ from it; None outside a checkout of vlp_fast."""
    package = Path(__file__).resolve().parent
    top = _git(package, "rev-parse", "--show-toplevel")
    # an installed copy inside some other repository's environment must not claim that repository's commit
    if top is None or Path(top).resolve() != package.parent:
        return None
    return _git(package, "describe", "--always", "--dirty", "--exclude=*")


def _git(folder: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def stamp(device: torch.device | str, **settings: Any) -> dict[str, Any]:
    """What a number means nothing without: versions, commit, date, machine, device, threads, and the settings given."""
    cpu = cpu_report()
    return {
        **versions(),
        "commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "device": torch.device(device).type,
        "device_name": device_name(device),
        "cpu": cpu["name"],
        "instructions": cpu["instructions"],
        "fp32_products": cpu["fp32_products"]["library"],
        "threads": cpu["threads"],
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        **settings,
    }
