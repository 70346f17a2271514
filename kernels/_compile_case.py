"""A compilation of the gate: a kernel, the types and values of its arguments, and how it is launched."""

from __future__ import annotations

from dataclasses import dataclass, field

import triton


@dataclass(frozen=True)
class CompileCase:
    """One compilation: a kernel with the types of its arguments, the values of its constants, and how it is launched.

    Attributes:
        family: the operation, such as "attention". kernel, dtype, shape, config, flags: what tells its cases apart, for people.
        jit: the `triton.jit` function.
        types: Triton's type of every argument that is not a constant. Pointers, and sizes marked ``"i32:16"``, are divisible by 16.
        constexprs: values of the constants; None for an absent pointer, 1 for a size that is 1.
        options: num_warps, num_stages, ... as at a launch.
        matrix: whether it must use matrix instructions. wide: whether these must be Hopper's and Blackwell's own (64-row tiles).
        targets: names of the targets it exists for; empty: all.
    """

    family: str
    kernel: str
    dtype: str
    shape: str
    config: str
    flags: str
    jit: triton.JITFunction = field(repr=False, compare=False)
    types: dict[str, str] = field(repr=False, compare=False)
    constexprs: dict[str, object] = field(repr=False, compare=False)
    options: dict[str, object] = field(repr=False, compare=False)
    matrix: bool = True
    wide: bool = False
    targets: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unique among `compile_cases`."""
        return " | ".join((self.family, self.kernel, self.dtype, self.shape, self.config, self.flags))


NVIDIA = ("sm_80", "sm_90", "sm_100")
