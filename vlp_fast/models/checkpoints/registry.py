"""Every format by name, and our own: models from files and files from models."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlp_fast.models.checkpoints import albef, beit3, hf_blip, lucidrains_coca, open_clip_coca, salesforce_blip, vlmo
from vlp_fast.models.checkpoints._files import read_metadata, read_state, write_state
from vlp_fast.models.checkpoints._format import Format
from vlp_fast.models.checkpoints._rules import CheckpointError, same
from vlp_fast.models.coca import Coca

__all__ = ["FORMATS", "OWN", "load_model", "save_model"]

OWN = "vlp-fast"  # safetensors with our names, and the model's class and config as metadata
FORMATS: dict[str, tuple[Format, ...]] = {
    "hf-blip": hf_blip.FORMATS,
    "salesforce-blip": salesforce_blip.FORMATS,
    "open-clip-coca": (open_clip_coca.FORMAT,),
    "lucidrains-coca": (lucidrains_coca.FORMAT,),
    "beit3": beit3.FORMATS,
    "albef": (albef.FORMAT,),
    "vlmo": (vlmo.FORMAT,),
}
_CHOICES = {
    "hf-blip": hf_blip.format_of,
    "salesforce-blip": salesforce_blip.format_of,
    "beit3": beit3.format_of,
}  # by what a file holds
_CLASSES: list[type[nn.Module]] = [Coca]
_CLASSES += [form.model for forms in FORMATS.values() for form in forms]
_MODELS = {model.__name__: model for model in _CLASSES}


def load_model(path: str | Path, source: str = OWN, **fields: Any) -> nn.Module:
    """A model with the weights of a file.

    Args:
        path: .safetensors, .pth, .pt or .bin. source: the file's format, a name of `FORMATS`, or "vlp-fast" for what `save_model` wrote.
        fields: of the model's config that no tensor shows (heads, eps; of transformers' BLIP see
            `vlp_fast.models.checkpoints.hf_blip.fields`), or that shall differ (``image_size``: positions are interpolated).

    Raises:
        FileNotFoundError: no such file. ValueError: an unknown format or field. CheckpointError: a file that does not fit; every
            problem is listed, and nothing is loaded.
    """
    _check_name("source", source)
    state = read_state(path)
    if source == OWN:
        return _load_own(path, state, fields)
    choose = _CHOICES.get(source)
    form = FORMATS[source][0] if choose is None else choose(state)
    try:
        return form.load(state, **fields)
    except TypeError as error:  # the config class refuses an argument
        raise ValueError(f"a config of {form.title} does not take these fields: {error}.") from None


def _load_own(path: str | Path, state: Mapping[str, Tensor], fields: Mapping[str, Any]) -> nn.Module:
    metadata = read_metadata(path)
    if metadata is None:
        raise CheckpointError(f"{path} does not say which model it holds, as files of vlp_fast do: name its format.")
    if metadata["model"] not in _MODELS:
        raise CheckpointError(f"{path} holds a {metadata['model']}; this version knows {', '.join(sorted(_MODELS))}.")
    model_class = _MODELS[metadata["model"]]
    config_class = typing.get_type_hints(model_class.__init__)["config"]
    try:
        config = config_class(**{**metadata["config"], **fields})
    except TypeError as error:
        raise ValueError(f"{config_class.__name__} does not take these fields: {error}.") from None
    model = model_class(config)
    own = Format(
        OWN, "vlp_fast", model_class, lambda state: config, lambda config: [same(name, name) for name in model.state_dict()]
    )
    return own.load(state)


def save_model(model: nn.Module, path: str | Path, target: str = OWN) -> None:
    """Writes a model's weights to a file in a format.

    Args:
        path: .safetensors, .pth, .pt or .bin; in our own format .safetensors. target: a name of `FORMATS`, or "vlp-fast".

    Raises:
        ValueError: an unknown format or ending. CheckpointError: a model that the format has no names for.
    """
    _check_name("target", target)
    if target == OWN:
        if Path(path).suffix != ".safetensors":
            raise ValueError(
                f"a file of vlp_fast must end in .safetensors, which can hold the config; received {Path(path).name}."
            )
        config = dataclasses.asdict(model.config)  # type: ignore[call-overload]
        write_state(
            path, model.state_dict(), {"schema": 1, "model": type(model).__name__, "config": {**config, "backend": None}}
        )
        return
    for form in FORMATS[target]:
        if type(model) is form.model:
            write_state(path, form.save(model))
            return
    fitting = ", ".join(dict.fromkeys(form.model.__name__ for form in FORMATS[target]))
    raise CheckpointError(f"{target} has names for {fitting}; this model is a {type(model).__name__}.")


def _check_name(argument: str, name: str) -> None:
    if name != OWN and name not in FORMATS:
        raise ValueError(f"{argument} must be one of {', '.join([OWN, *FORMATS])}; received {name!r}.")
