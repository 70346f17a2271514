"""Which backends exist, which can run here, and which one `backend=None` chooses. Read once at import; a choice never falls back."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

__all__ = [
    "BACKENDS",
    "INTERPRET",
    "BackendStatus",
    "attention_only",
    "backend_status",
    "choose_backend",
    "choose_own_backend",
    "default_backend",
]

BACKENDS = ("triton", "torch", "xformers", "flash_attn")
INTERPRET = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # Triton reads it when a kernel is decorated; later changes have no effect

_MODULES = {"triton": "triton", "torch": "torch", "xformers": "xformers.ops", "flash_attn": "flash_attn"}


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


_FOUND = {name: _found(module) for name, module in _MODULES.items()}


class BackendStatus(NamedTuple):
    """Whether a backend can run on a device, and why not where it cannot."""

    available: bool
    reason: str


def backend_status(backend: str, device_type: str) -> BackendStatus:
    """Whether `backend` runs on tensors of `device_type` ("cpu", "cuda", "meta"), with the reason.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None; received {backend!r}.")
    if backend == "torch":
        return BackendStatus(True, "PyTorch's own kernels")
    if backend == "triton":
        if device_type == "meta":
            return BackendStatus(True, "shapes and FLOPs only, nothing is computed")
        if not _FOUND["triton"]:
            return BackendStatus(False, "triton is not installed")
        if device_type == "cuda":
            return BackendStatus(True, "our kernels")
        if device_type == "cpu" and INTERPRET:
            return BackendStatus(True, "our kernels in the Triton interpreter (TRITON_INTERPRET=1): for tests, slow")
        return BackendStatus(
            False, f"triton kernels need a CUDA device (or TRITON_INTERPRET=1 on the CPU); the tensors are on {device_type}"
        )
    if not _FOUND[backend]:
        return BackendStatus(False, f"{backend} is not installed (pip install 'vlp_fast[{backend.replace('_', '-')}]')")
    if device_type != "cuda":
        return BackendStatus(False, f"{backend} needs a CUDA device; the tensors are on {device_type}")
    return BackendStatus(True, "variable-length attention of the installed library")


def default_backend(device_type: str) -> str:
    """What `backend=None` chooses: our kernels on CUDA and on meta tensors, the torch backend everywhere else."""
    return "triton" if device_type in ("cuda", "meta") else "torch"


def choose_backend(backend: str | None, device_type: str) -> str:
    """The backend to run: the one named, or the default of the device.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: a backend that cannot run on this device; there is no falling back.
    """
    name = default_backend(device_type) if backend is None else backend
    status = backend_status(name, device_type)
    if not status.available:
        raise RuntimeError(f"backend {name!r} is not available: {status.reason}.")
    return name


def choose_own_backend(backend: str | None, device_type: str, operation: str) -> str:
    """As `choose_backend`, for operations that no attention library has: "triton" or "torch".

    Raises:
        ValueError: an unknown backend, or a library of attention.
        RuntimeError: a backend that cannot run on this device.
    """
    if attention_only(backend):
        raise ValueError(f"backend of {operation} must be triton, torch or None; {backend!r} has attention only.")
    return choose_backend(backend, device_type)


def attention_only(backend: str | None) -> bool:
    """Whether `backend` is a library that has attention and nothing else; modules then leave their other operations to the default."""
    return backend in ("xformers", "flash_attn")
