"""A format: whose checkpoints, which model of ours, how its sizes are read from the tensors, and the table of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlp_fast.models.checkpoints._rules import Rule, from_ours, to_ours

__all__ = ["Format"]


@dataclass(frozen=True)
class Format:
    """One kind of published checkpoint.

    Attributes:
        name: on the command line, such as "hf-blip". title: whose it is, for people.
        model: our model class, made from a config alone.
        config: reads a config from the tensors of a checkpoint; further arguments are fields of the config that no shape shows, such
            as the number of heads, and win over what is read.
        rules: the table for a config.
    """

    name: str
    title: str
    model: type[nn.Module]
    config: Callable[..., Any]
    rules: Callable[[Any], Sequence[Rule]]

    def load(self, state: Mapping[str, Tensor], **fields: Any) -> nn.Module:
        """Our model with the weights of a checkpoint.

        Raises:
            CheckpointError: names or shapes that do not fit, all listed; nothing is loaded then.
        """
        config = self.config(state, **fields)
        model = self.model(config)
        own = model.state_dict()
        model.load_state_dict(to_ours(state, self.rules(config), what=f"the {self.title} checkpoint", shapes=own), strict=True)
        return model

    def save(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights of our model under the names of this format.

        Raises:
            CheckpointError: a tensor that this format has no name for.
        """
        return from_ours(model.state_dict(), self.rules(model.config), what=f"this {type(model).__name__}")
