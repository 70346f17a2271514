"""Suite "memory": the most resident memory of a process that takes one provider's pretraining steps, at its second step.

The cases are those of suite "steps", each provider in a process of its own; on a CUDA device it is the memory of tensors. "rise" is how
far the peak lies above what is there between steps: the interpreter, weights and their averages, gradients. Times are those of one round.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlp_fast.benchmarks import bench_steps
from vlp_fast.benchmarks.registry import Entry, Options
from vlp_fast.benchmarks.script import run_as_script

__all__ = ["cases"]


def cases(options: Options) -> Iterator[Entry]:
    """A step of each model."""
    yield from bench_steps.cases(options)


if __name__ == "__main__":
    raise SystemExit(run_as_script("memory"))
