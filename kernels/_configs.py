"""Every launch number of the kernels, with the compile report that chose it. Nothing is tuned at import.

No row was chosen by a stopwatch. They are what compiles for sm_80, sm_90, sm_100 and gfx942 without running out of registers, with the
oldest and the newest Triton, with and without causal edges and dropout, and with Hopper's and Blackwell's matrix instructions where a
tile has 64 rows. COMPILE.md has all of it, also the few bytes of stack that ptxas trades for one more block per multiprocessor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "backward_query", "backward_key"]
HEAD_DIMS = (16, 32, 64, 80, 96, 128)  # what the compile gate tries; a kernel takes any multiple of 8 from 16 to 128
ANY_LENGTH = 2**31 - 1


@dataclass(frozen=True)
class AttentionConfig:
    """block_m query rows by block_n key rows per tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of a launch. Fused multiply-add is asked for: its default changes between versions of Triton."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class AttentionRow:
    """`config` serves a kernel up to these sizes; the first row that fits is taken."""

    kind: Kind
    itemsize: int  # bytes per element: 2 or 4
    max_head_dim: int
    max_seqlen_q: int
    config: AttentionConfig
    before_sm90: bool = True  # whether also for NVIDIA GPUs older than Hopper


# The figures: registers per thread on sm_80 / sm_90 / sm_100 / gfx942 and shared memory on sm_90, for the widest head with causal edges
# and dropout, Triton 3.9.0; none of these spills, with 3.6.0 neither.
ATTENTION_ROWS = (
    # 152 / 154 / 156 / 246, 24 KB. Captions: a 64-row tile would be half empty.
    AttentionRow("forward", 2, 64, 32, AttentionConfig(32, 64, 4, 2)),
    # 223 / 160 / 222 / 170, 40 KB.
    AttentionRow("forward", 2, 64, 512, AttentionConfig(64, 64, 4, 2)),
    # 207 / 172 / 194 / 171, 64 KB. 64 rows more per key tile read.
    AttentionRow("forward", 2, 64, ANY_LENGTH, AttentionConfig(128, 64, 8, 3)),
    # 168 / 168 / 168 / 188, 26 KB.
    AttentionRow("forward", 2, 128, 32, AttentionConfig(32, 32, 4, 2)),
    # 238 / 176 / 226 / 194, 48 KB.
    AttentionRow("forward", 2, 128, ANY_LENGTH, AttentionConfig(64, 32, 4, 2)),
    # 189 / 196 / 196 / 198, 18 KB.
    AttentionRow("backward_query", 2, 64, 32, AttentionConfig(32, 32, 2, 2)),
    # 248 / 223 / 223 / 280, 64 KB. 64x64 spills on sm_80.
    AttentionRow("backward_query", 2, 128, ANY_LENGTH, AttentionConfig(64, 32, 4, 2)),
    # 222 / 157 / 128 / 146, 24 KB. Pooling and decoding: few queries.
    AttentionRow("backward_key", 2, 64, 16, AttentionConfig(16, 64, 4, 2)),
    # - / 205 / 158 / 289, 32 KB. On sm_80 64x64 spills, and with Triton 3.6.0 this too.
    AttentionRow("backward_key", 2, 64, ANY_LENGTH, AttentionConfig(32, 64, 4, 2), before_sm90=False),
    # As for few queries: 222 on sm_80, with Triton 3.6.0 233.
    AttentionRow("backward_key", 2, 64, ANY_LENGTH, AttentionConfig(16, 64, 4, 2)),
    # 167 / 169 / 179 / 214, 52 KB. 32x64 spills on gfx942, 4 warps on sm_100.
    AttentionRow("backward_key", 2, 128, ANY_LENGTH, AttentionConfig(16, 64, 8, 2)),
    # 222 / 224 / 222 / 200, 26 KB. 32x32 spills everywhere but on gfx942.
    AttentionRow("forward", 4, 128, ANY_LENGTH, AttentionConfig(16, 32, 4, 1)),
    # 203 / 197 / 195 / 202, 24 KB.
    AttentionRow("backward_query", 4, 64, ANY_LENGTH, AttentionConfig(16, 32, 4, 1)),
    # 202 / 170 / 170 / 192, 32 KB. 16x32 spills on NVIDIA.
    AttentionRow("backward_query", 4, 128, ANY_LENGTH, AttentionConfig(16, 16, 8, 1)),
    # 168 / 158 / 152 / 257, 50 KB.
    AttentionRow("backward_key", 4, 128, ANY_LENGTH, AttentionConfig(16, 32, 4, 1)),
)


def attention_config(kind: Kind, head_dim: int, itemsize: int, max_seqlen_q: int, before_sm90: bool) -> AttentionConfig:
    """The launch numbers of one attention kernel.

    Raises:
        ValueError: head_dim or dtype that no kernel takes.
    """
    if 16 <= head_dim <= 128 and head_dim % 8 == 0:
        for row in ATTENTION_ROWS:
            if (
                row.kind == kind
                and row.itemsize == itemsize
                and head_dim <= row.max_head_dim
                and max_seqlen_q <= row.max_seqlen_q
                and (row.before_sm90 or not before_sm90)
            ):
                return row.config
    raise ValueError(
        "attention kernels take head_dim from 16 to 128 in steps of 8 and elements of 2 or 4 bytes; received head_dim "
        f"{head_dim} and {itemsize} bytes."
    )


def attention_configs() -> Iterator[tuple[Kind, AttentionConfig, int, str, bool]]:
    """Every (kind, config, head_dim, Triton dtype) that `attention_config` can choose, and whether before sm_90, for the gate."""
    chosen: dict[tuple[Kind, AttentionConfig, int, str], bool] = {}
    for row in ATTENTION_ROWS:
        for head_dim in HEAD_DIMS:
            for before_sm90 in (False, True):
                if attention_config(row.kind, head_dim, row.itemsize, row.max_seqlen_q, before_sm90) == row.config:
                    key = (row.kind, row.config, head_dim, {2: "bf16", 4: "fp32"}[row.itemsize])
                    chosen[key] = chosen.get(key, False) or before_sm90
    for (kind, config, head_dim, dtype), before_sm90 in chosen.items():
        yield kind, config, head_dim, dtype, before_sm90


@dataclass(frozen=True)
class SmallConfig:
    """Segments of at most `block` rows, one per program and head."""

    block: int
    num_warps: int

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of a launch: there is no loop to pipeline."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


# (kernel, bytes per element, head_dim up to): configurations, smallest block first
SMALL_ROWS: dict[tuple[str, int, int], tuple[SmallConfig, ...]] = {
    ("forward", 2, 64): (SmallConfig(16, 1), SmallConfig(32, 2), SmallConfig(64, 4)),
    ("backward", 2, 64): (SmallConfig(16, 1), SmallConfig(32, 2), SmallConfig(64, 8)),
    ("forward", 2, 128): (SmallConfig(16, 2), SmallConfig(32, 4)),
    ("backward", 2, 128): (SmallConfig(16, 2), SmallConfig(32, 4)),
    ("forward", 4, 64): (SmallConfig(16, 4), SmallConfig(32, 8)),
    ("backward", 4, 64): (SmallConfig(16, 4),),
}


def small_config(kind: Literal["forward", "backward"], head_dim: int, itemsize: int, max_seqlen: int) -> SmallConfig | None:
    """The smallest block that holds whole segments of `max_seqlen` rows, or None where there is none."""
    for (k, size, width), configs in SMALL_ROWS.items():
        if k == kind and size == itemsize and head_dim <= width:
            return next((config for config in configs if max_seqlen <= config.block), None)
    return None


# -------------------------------------------------------------------------------------------------------------------- pooling

POOL_QUERIES = 16  # of one program: the smallest side of a matrix instruction


@dataclass(frozen=True)
class PoolConfig:
    """block_n rows by chunks of block_k columns per program.

    `columns`: how many of the width a program sums over rows. `programs`: in all, where segments are few.
    """

    block_n: int
    block_k: int
    columns: int
    num_warps: int
    programs: int = 264  # two for each of the 132 multiprocessors of an H100

    def cut(self, dim: int) -> tuple[int, int]:
        """Parts of the width, and chunks in each."""
        parts = max(-(-dim // self.columns), 1)
        return parts, -(-dim // (parts * self.block_k))

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of a launch. No pipelining: it would hold the chunks of several tiles in shared memory."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


# (kernel, bytes per element). Registers per thread on sm_80 / sm_90 / sm_100 / gfx942 at all columns, with the norm.
POOL_CONFIGS = {
    ("forward", 2): PoolConfig(32, 128, 768, 8),  # 172 / 176 / 171 / 144
    ("forward", 4): PoolConfig(16, 128, 768, 8),  # 206 / 178 / 166 / 122
    ("backward", 2): PoolConfig(16, 128, 768, 8),  # - / 177 / 177 / 146; 32 rows spill
    ("backward", 4): PoolConfig(16, 32, 128, 8),  # 248 / 250 / 250 / 134; 256 columns spill on sm_90
}
POOL_SM80 = {("backward", 2): PoolConfig(16, 128, 384, 8)}  # before sm_90 the compiler needs more registers: 768 columns spill


def pool_config(kind: Literal["forward", "backward"], itemsize: int, before_sm90: bool = False) -> PoolConfig:
    """The launch numbers of one pooling kernel.

    Raises:
        ValueError: a dtype that no kernel takes.
    """
    if (kind, itemsize) not in POOL_CONFIGS:
        raise ValueError(f"pooling kernels take elements of 2 or 4 bytes; received {itemsize}.")
    config = POOL_CONFIGS[kind, itemsize]
    return POOL_SM80.get((kind, itemsize), config) if before_sm90 else config


# ------------------------------------------------------------------------------------------------------------------- multiway

# Kernels that wait for memory only. At most 40 registers, no shared memory but 1 KB.
GELU_BLOCK = 1024  # columns of one program of the GELU's backward
NORM_REDUCE_ROWS, NORM_REDUCE_COLUMNS = 32, 64  # of the partial sums of a norm's backward
ELEMENTWISE: dict[str, object] = {"num_warps": 4, "enable_fp_fusion": True}


@dataclass(frozen=True)
class LinearConfig:
    """A tile of block_m rows by block_n columns, in steps of block_k. In the gradient of a weight the steps are block_m rows and the
    tile is block_n by block_k. `group`: tiles of rows that go through all columns together.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# (kernel, bytes per element) -> (longest run of an expert, config), the first that fits. The figures: registers per thread on sm_80 /
# sm_90 / sm_100 / gfx942 with the epilogue that needs most, whole tiles, and shared memory on sm_90 / gfx942, Triton 3.9.0; none of these
# spills, with 3.6.0 neither. GELU and residual together would need 242 / 228 / 174 / 136 at once, and with 3.6.0 more than there are.
MULTIWAY_LINEAR_ROWS = {
    ("product", 2): (
        # 185 / 174 / 174 / 150, 72 / 48 KB. Captions alone: a 128-row tile would be half empty.
        (64, LinearConfig(64, 128, 64, 4, 3)),
        # 187 / 170 / 172 / 114, 96 / 64 KB, all that gfx942 has. The gradient of x, without epilogue: 192 / 114 / 98 / 120.
        (ANY_LENGTH, LinearConfig(128, 128, 64, 8, 3)),
    ),
    # 108 / 80 / 80 / 58, 16 / 16 KB.
    ("product", 4): ((ANY_LENGTH, LinearConfig(64, 64, 16, 8, 2)),),
    # 164 / 154 / 120 / 167, 82 / 48 KB.
    ("weight", 2): ((ANY_LENGTH, LinearConfig(64, 128, 128, 8, 3)),),
    # 80 / 63 / 68 / 56, 16 / 8 KB.
    ("weight", 4): ((ANY_LENGTH, LinearConfig(16, 64, 64, 8, 2)),),
}


def multiway_linear_config(kind: Literal["product", "weight"], itemsize: int, longest_run: int) -> LinearConfig:
    """The launch numbers of a grouped product whose longest expert has `longest_run` rows.

    Raises:
        ValueError: a dtype that no kernel takes.
    """
    if (kind, itemsize) not in MULTIWAY_LINEAR_ROWS:
        raise ValueError(f"multiway kernels take elements of 2 or 4 bytes; received {itemsize}.")
    return next(config for most, config in MULTIWAY_LINEAR_ROWS[kind, itemsize] if longest_run <= most)


@dataclass(frozen=True)
class NormConfig:
    """One row per block of num_warps, a row after another; `programs` in all where there are rows enough."""

    num_warps: int
    programs: int = 1056  # eight for each of the 132 multiprocessors of an H100

    def rows_per_program(self, rows: int) -> int:
        """Rows that one program takes; a power of two, so that few values occur."""
        return 1 << max(-(-rows // self.programs) - 1, 0).bit_length()

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of a launch."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


# Widest row of a configuration. Registers of the backward in fp32 at that width: at most 72, 127 and 128 on sm_80, sm_90 and sm_100, 60 on
# gfx942.
MULTIWAY_NORM_ROWS = ((1024, NormConfig(4)), (4096, NormConfig(8)), (8192, NormConfig(16)))


def multiway_norm_config(dim: int) -> NormConfig:
    """The launch numbers of the norms of rows of `dim` columns.

    Raises:
        ValueError: a row that does not fit one block.
    """
    for widest, config in MULTIWAY_NORM_ROWS:
        if dim <= widest:
            return config
    raise ValueError(f"multiway norms take rows of up to {MULTIWAY_NORM_ROWS[-1][0]} columns; received {dim}.")


# ------------------------------------------------------------------------------------------------------- linear_cross_entropy


@dataclass(frozen=True)
class CrossEntropyConfig:
    """`block` words of a row at a time."""

    block: int
    num_warps: int

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of a launch."""
        return {"num_warps": self.num_warps, "num_stages": 3, "enable_fp_fusion": True}


CROSS_ENTROPY_CONFIGS = {
    1024: CrossEntropyConfig(1024, 4),
    ANY_LENGTH: CrossEntropyConfig(8192, 16),
}  # vocabulary up to: config


def cross_entropy_config(vocab_size: int) -> CrossEntropyConfig:
    """The launch numbers for rows of so many words."""
    return next(config for words, config in CROSS_ENTROPY_CONFIGS.items() if vocab_size <= words)


# ----------------------------------------------------------------------------------------------------------- decode_attention


@dataclass(frozen=True)
class DecodeConfig:
    """block_m rows by heads, block_n keys. `programs`: in all, where segments are few; `most_splits`: of the keys of one."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int = 264  # two for each of the 132 multiprocessors of an H100
    most_splits: int = 32

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# (bytes per element, rows by heads up to): configuration
DECODE_CONFIGS = {
    (2, 16): DecodeConfig(16, 64, 4, 2),
    (2, ANY_LENGTH): DecodeConfig(32, 32, 4, 2),  # 64 rows spill on sm_80
    (4, ANY_LENGTH): DecodeConfig(16, 32, 8, 1),  # 4 warps spill
}


def decode_config(itemsize: int, rows: int) -> DecodeConfig:
    """The launch numbers for segments of so many rows by grouped heads.

    Raises:
        ValueError: a dtype that no kernel takes.
    """
    for (size, most), config in DECODE_CONFIGS.items():
        if size == itemsize and rows <= most:
            return config
    raise ValueError(f"decoding kernels take elements of 2 or 4 bytes; received {itemsize}.")


# -------------------------------------------------------------------------------------------- contrastive, hard_negatives

COMBINE_BLOCK = 256  # rows or columns whose parts one program adds up
DRAW_COLUMNS = 32  # columns at a time of a row against one tile of keys


# (kernel, bytes per element). The figures: registers per thread on sm_80 / sm_90 / sm_100 / gfx942 at the most a launch can ask, and
# shared memory on sm_90 / gfx942, Triton 3.9.0.
SIMILARITY_CONFIGS = {
    # 181 / 187 / 255 / 122, 96 / 64 KB.
    ("lse", 2): LinearConfig(128, 128, 64, 8, 3),
    # 114 / 104 / 80 / 60, 8 / 8 KB.
    ("lse", 4): LinearConfig(64, 64, 16, 8, 2),
    # 157 / 155 / 192 / 103, 72 / 48 KB. The sigmoid spills at 128x128, and at 64x128 with 4 warps.
    ("gradient", 2): LinearConfig(128, 64, 64, 8, 3),
    # 120 / 95 / 109 / 92, 16 / 8 KB.
    ("gradient", 4): LinearConfig(64, 64, 16, 8, 2),
}


def similarity_config(kind: Literal["lse", "gradient"], itemsize: int) -> LinearConfig:
    """The launch numbers of tiles of similarities: their log-sum-exps, or the loss's gradient.

    Raises:
        ValueError: a dtype that no kernel takes.
    """
    if (kind, itemsize) not in SIMILARITY_CONFIGS:
        raise ValueError(f"contrastive kernels take elements of 2 or 4 bytes; received {itemsize}.")
    return SIMILARITY_CONFIGS[kind, itemsize]


# keys up to: configuration of the rows of a loss with soft targets. 106 / 106 / 101 / 62 registers; 8192 columns spill.
DISTILLED_CONFIGS = {1024: CrossEntropyConfig(1024, 4), ANY_LENGTH: CrossEntropyConfig(4096, 16)}


def distilled_config(keys: int) -> CrossEntropyConfig:
    """The launch numbers for rows of so many keys."""
    return next(config for most, config in DISTILLED_CONFIGS.items() if keys <= most)
