"""``vlp-fast convert``: published weights to ours, back, and from one code base's names to another's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vlp_fast.cli._output import fail
from vlp_fast.models.checkpoints.registry import FORMATS, OWN, load_model, save_model

__all__ = ["config_fields", "convert"]

NAMES = ", ".join((OWN, *FORMATS))


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A .safetensors, .pth, .pt or .bin file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    source_format: Annotated[str, typer.Option("--from", help=f"Format of IN: {NAMES}.")] = OWN,
    target_format: Annotated[str, typer.Option("--to", help=f"Format of OUT: {NAMES}.")] = OWN,
    config: Annotated[Path | None, typer.Option(help="config.json beside the weights (hf-blip): what no tensor shows.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A field of our config, such as num_heads=12.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over OUT where it exists.")] = False,
) -> None:
    """Convert weights between the names of published code and ours. Nothing is written where anything does not fit.

    Sizes are read from the tensors. Heads and eps are not in them: their defaults are those of the published models, --config and
    --set say otherwise. With --set image_size=384 the positions of patches are interpolated.
    """
    if target.exists() and not force:
        fail("convert", f"{target} exists; --force writes over it.", code=2)
    try:
        fields = {**(config_fields(config, source_format) if config is not None else {}), **dict(map(_field, changes or []))}
        model = load_model(source, source_format, **fields)
        save_model(model, target, target_format)
    except (ValueError, OSError) as error:
        fail("convert", error)
    parameters = sum(p.numel() for p in model.parameters())
    typer.echo(f"{type(model).__name__}, {parameters:,} parameters: {source} ({source_format}) -> {target} ({target_format})")


def config_fields(config: Path, source_format: str) -> dict[str, Any]:
    """Fields of our config from the config.json of a code base that has one."""
    if source_format != "hf-blip":
        raise ValueError(
            f"--config is for hf-blip, whose config.json holds what tensors do not show; received {source_format}."
        )
    from vlp_fast.models.checkpoints.hf_blip import fields

    return fields(json.loads(config.read_text(encoding="utf-8")))


def _field(text: str) -> tuple[str, Any]:
    """``num_heads=12`` -> its name and value; numbers, true, false and null as JSON has them, anything else as text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--set must be FIELD=VALUE, such as num_heads=12; received {text!r}.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
