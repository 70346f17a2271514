"""Checkpoint files: safetensors, and PyTorch's own with nothing but tensors in it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlp_fast.models.checkpoints._rules import CheckpointError

__all__ = ["read_metadata", "read_state", "write_state"]

_WRAPPERS = ("model", "module", "state_dict")
_METADATA = "vlp_fast"


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU.

    Of a PyTorch file the dictionary "model", "module" or "state_dict" is taken where there is one, and the prefix "module." of
    data-parallel training is cut off. It is read with ``weights_only=True``: nothing in it is executed.

    Raises:
        FileNotFoundError: no such file. CheckpointError: a file that is no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts save their arguments beside the weights
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {str(error).partition(chr(10))[0]}") from None
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise CheckpointError(f"{path} must hold a dictionary of tensors, by itself or as one of {', '.join(_WRAPPERS)}.")
    prefix = "module."
    if loaded and all(name.startswith(prefix) for name in loaded):
        return {name[len(prefix) :]: tensor for name, tensor in loaded.items()}
    return dict(loaded)


def write_state(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Writes safetensors, or PyTorch's format for names that end in .pth, .pt or .bin; `metadata` goes into safetensors only."""
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path, {_METADATA: json.dumps(metadata)} if metadata is not None else {"format": "pt"})
    elif path.suffix in (".pth", ".pt", ".bin"):
        torch.save({"model": tensors}, path)
    else:
        raise ValueError(f"a checkpoint's name must end in .safetensors, .pth, .pt or .bin; received {path.name}.")


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """What `write_state` was given as metadata; None where the file holds none."""
    if Path(path).suffix != ".safetensors":
        return None
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(_METADATA)
    return None if text is None else json.loads(text)
