"""Rules between the names and shapes of two checkpoints, each of which works both ways; and sentences where a file does not fit.

A table is a list of rules. Converting takes each rule's tensors from one side to the other and refuses what is missing, left over or of
another shape, all of it at once and before anything is changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "CheckpointError",
    "Rule",
    "cut_rows",
    "from_ours",
    "joined",
    "reshaped",
    "same",
    "split",
    "stacked",
    "to_ours",
    "transposed",
    "unused",
]

State = Mapping[str, Tensor]


class CheckpointError(ValueError):
    """A checkpoint that does not fit; the message lists every name with the likely cause."""


@dataclass(frozen=True)
class Rule:
    """One tensor of ours and the tensors of theirs that hold the same numbers.

    Attributes:
        ours: name, or None for tensors of theirs that we have no use for (buffers made anew, copies that nobody reads).
        theirs: names, in the order that `load` takes and `save` gives.
        load: theirs -> ours. save: ours -> theirs.
        tied: further names of theirs for the same tensors, in the order of `theirs` and over again: ``tied[i]`` holds the tensor of
            ``theirs[i % len(theirs)]``. Asserted equal when loading, written again when saving.
        optional: whether a file may lack the tensors of `theirs` (all of them); then ours is left out too.
    """

    ours: str | None
    theirs: tuple[str, ...]
    load: Callable[[Sequence[Tensor]], Tensor] = lambda tensors: tensors[0]
    save: Callable[[Tensor], Sequence[Tensor]] = lambda tensor: [tensor]
    tied: tuple[str, ...] = ()
    optional: bool = False


def same(ours: str, theirs: str, *, tied: Iterable[str] = (), optional: bool = False) -> Rule:
    """The same tensor under another name."""
    return Rule(ours, (theirs,), tied=tuple(tied), optional=optional)


def reshaped(ours: str, theirs: str, ours_shape: Sequence[int], theirs_shape: Sequence[int]) -> Rule:
    """The same numbers in the same order: ours has `ours_shape`, theirs `theirs_shape` (-1 for one side that follows)."""
    return Rule(ours, (theirs,), lambda t: t[0].reshape(tuple(ours_shape)), lambda t: [t.reshape(tuple(theirs_shape))])


def transposed(ours: str, theirs: str) -> Rule:
    """A matrix that they multiply from the other side."""
    return Rule(ours, (theirs,), lambda t: t[0].T.contiguous(), lambda t: [t.T.contiguous()])


def joined(ours: str, theirs: Sequence[str], *, tied: Iterable[str] = ()) -> Rule:
    """Ours is theirs, one after the other along dim 0, in equal parts: query, key and value as one projection."""
    return Rule(ours, tuple(theirs), lambda t: torch.cat(list(t)), lambda t: t.chunk(len(theirs)), tied=tuple(tied))


def split(theirs: str, ours: Mapping[str, int]) -> list[Rule]:
    """Several of ours, with so many rows each, are parts of theirs, one after the other along dim 0."""

    def part(first: int, last: int | None) -> Callable[[Sequence[Tensor]], Tensor]:
        return lambda tensors: tensors[0][first:last]

    # the last part takes what is left, so that a tensor of another size shows
    ends = list(itertools.accumulate(ours.values()))
    bounds = zip([0, *ends], [*ends[:-1], None], strict=False)
    return [Rule(name, (theirs,), part(*bound)) for name, bound in zip(ours, bounds, strict=False)]


def stacked(ours: str, theirs: Sequence[str]) -> Rule:
    """Ours has a dimension more, of experts: ``[len(theirs), ...]``."""
    return Rule(ours, tuple(theirs), lambda t: torch.stack(list(t)), lambda t: t.unbind())


def cut_rows(ours: str, theirs: str, first: int) -> Rule:
    """Theirs begins with `first` rows that nobody reads; they are zero when saved."""

    def save(tensor: Tensor) -> Sequence[Tensor]:
        return [torch.cat([tensor.new_zeros(first, *tensor.shape[1:]), tensor])]

    return Rule(ours, (theirs,), lambda t: t[0][first:], save)


def unused(*theirs: str) -> Rule:
    """Tensors of theirs that are not weights of the model: left out when loading, not written when saving."""
    return Rule(None, theirs, optional=True)


# ------------------------------------------------------------------------------------------------------------------ converting


def to_ours(
    state: State, rules: Sequence[Rule], *, what: str = "the checkpoint", shapes: State | None = None
) -> dict[str, Tensor]:
    """A checkpoint of theirs under our names.

    Args:
        rules: each name of theirs belongs to one. what: names the checkpoint in errors. shapes: tensors whose shapes the result
            must have, such as ``model.state_dict()``; default: shapes are not compared.

    Raises:
        CheckpointError: names missing or left over, tied tensors that differ, or shapes that do not fit; all of them are listed.
    """
    problems: list[str] = []
    known = {name for rule in rules for name in (*rule.theirs, *rule.tied)}
    left_over = sorted(set(state) - known)
    problems += [f"{name} is not part of this model" for name in left_over]
    found: dict[str, Tensor] = {}
    for rule in rules:
        if rule.ours is None:
            continue
        missing = [name for name in rule.theirs if name not in state]
        if missing:
            if not (rule.optional and len(missing) == len(rule.theirs)):
                problems += [f"{name} is missing" for name in missing]
            continue
        for name, original in zip(rule.tied, itertools.cycle(rule.theirs)):
            if name in state and not torch.equal(state[name], state[original]):
                problems.append(f"{name} should be the same tensor as {original} and differs from it")
        try:
            found[rule.ours] = rule.load([state[name] for name in rule.theirs]).contiguous()
        except (RuntimeError, ValueError, IndexError) as error:
            received = ", ".join(f"{name} {list(state[name].shape)}" for name in rule.theirs)
            problems.append(f"{received} cannot become {rule.ours}: {str(error).partition(chr(10))[0]}")
    if shapes is not None:
        problems += _unlike(found, shapes)
    _refuse(problems, what)
    return found


def from_ours(state: State, rules: Sequence[Rule], *, what: str = "the model") -> dict[str, Tensor]:
    """Our tensors under their names, tied ones once for each name.

    Raises:
        CheckpointError: a name of ours that no rule knows, or one that a rule needs and is not there.
    """
    known = {rule.ours for rule in rules}
    problems = [f"{name} has no counterpart there" for name in sorted(set(state) - known)]
    found: dict[str, Tensor] = {}
    for rule in rules:
        if rule.ours is None:
            continue
        if rule.ours not in state:
            if not rule.optional:
                problems.append(f"{rule.ours} is missing")
            continue
        for name, tensor in zip(rule.theirs, rule.save(state[rule.ours]), strict=True):
            # several rules that give one name give its parts, in order
            found[name] = torch.cat([found[name], tensor]) if name in found else tensor.contiguous().clone()
        for name, original in zip(rule.tied, itertools.cycle(rule.theirs)):
            found[name] = found[original].clone()
    _refuse(problems, what)
    return found


def _unlike(found: State, shapes: State) -> list[str]:
    problems = [f"nothing there becomes {name}" for name in sorted(set(shapes) - set(found))]
    for name in sorted(set(found) & set(shapes)):
        if found[name].shape != shapes[name].shape:
            problems.append(f"{name} would have shape {list(found[name].shape)}; this model needs {list(shapes[name].shape)}")
    return problems


def _refuse(problems: Sequence[str], what: str) -> None:
    if problems:
        listed = "\n  ".join(dict.fromkeys(problems))
        raise CheckpointError(f"{what} does not fit, and nothing was loaded:\n  {listed}\n{_likely_cause(problems)}")


def _likely_cause(problems: Sequence[str]) -> str:
    """What most often gives such a list."""
    text = "\n".join(problems)
    if "would have shape" in text or "cannot become" in text:
        return "Likely cause: another size of the model, image size or vocabulary than its configuration says."
    if "_m." in text or "queue" in text:
        if "is not part" not in text:
            return "Likely cause: a checkpoint without momentum copies or queues; load the model alone."
        return "Likely cause: a pretraining checkpoint with momentum copies or queues; load it as a pretraining checkpoint."
    if "head" in text or "cls." in text:
        return "Likely cause: a checkpoint of another task: its head is not that of this model."
    if "is missing" in text and "is not part" in text:
        return "Likely cause: a checkpoint of another model or code base; name its format."
    return "Likely cause: a file that was cut, or another version of its code."
