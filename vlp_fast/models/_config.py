"""What the models' config dataclasses share: presets by name and checks that speak."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

__all__ = ["check_positive", "make_preset"]

Config = TypeVar("Config")


def make_preset(
    config: type[Config], presets: Mapping[str, Mapping[str, Any]], size: str, changes: Mapping[str, Any]
) -> Config:
    """``config(**presets[size], **changes)`` with errors that name what is wrong.

    Raises: ValueError for an unknown size or field.
    """
    if size not in presets:
        raise ValueError(f"size must be one of {', '.join(presets)}; received {size!r}.")
    fields = {f.name for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    unknown = sorted(set(changes) - fields)
    if unknown:
        raise ValueError(f"{config.__name__} has no field {unknown[0]!r}; its fields are {', '.join(sorted(fields))}.")
    return config(**{**presets[size], **changes})


def check_positive(config: object, *names: str) -> None:
    """Raises: ValueError for a field that is not at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1; received {getattr(config, name)}.")
