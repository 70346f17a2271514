"""What the compile gate compiles of the losses: the vocabulary's, the contrastive ones, and hard negatives."""

from __future__ import annotations

from collections.abc import Iterator

from ._compile_case import CompileCase
from ._configs import (
    COMBINE_BLOCK,
    CROSS_ENTROPY_CONFIGS,
    DISTILLED_CONFIGS,
    DRAW_COLUMNS,
    ELEMENTWISE,
    SIMILARITY_CONFIGS,
)
from ._similarity import _combine_lse_kernel, _similarity_lse_kernel
from .contrastive import _distilled_rows_kernel, _similarity_gradient_kernel
from .hard_negatives import _hard_negatives_kernel
from .linear_cross_entropy import _cross_entropy_rows_kernel

# ------------------------------------------------------------------------------------------------------ linear_cross_entropy


def linear_cross_entropy_cases() -> Iterator[CompileCase]:
    """Loss with gradient, and the gradient alone."""
    for vocab_size, config in CROSS_ENTROPY_CONFIGS.items():
        for dtype in ("bf16", "fp32"):
            for flags in ("loss gradient", "gradient"):
                yield CompileCase(
                    "linear_cross_entropy",
                    "rows",
                    dtype,
                    f"{min(vocab_size, 49408)} words",
                    f"{config.block} w{config.num_warps} s3",
                    flags,
                    _cross_entropy_rows_kernel,
                    {
                        "logits": f"*{dtype}",
                        "targets": "*i64",
                        **dict.fromkeys(("scale", "given_lse", "loss", "lse"), "*fp32"),
                        "vocab_size": "i32",
                        "row_stride": "i32",
                        "label_smoothing": "fp32",
                    },
                    {"BLOCK": config.block, **({"given_lse": None} if flags == "loss gradient" else {})},
                    config.options,
                    matrix=False,
                )


# -------------------------------------------------------------------------------------------- contrastive, hard_negatives


def contrastive_cases() -> Iterator[CompileCase]:
    """Tiles of similarities with what is made of each, at whole steps and ragged; the kernels of rows; the draw."""
    sizes = dict.fromkeys(
        ("rows_a", "rows_b", "tiles_m", "tiles_n", "first", "parts", "count", "rows_q", "rows_k", "tiles"), "i32"
    )
    strides = dict.fromkeys(("dim", "a_row_stride", "b_row_stride", "query_row_stride", "key_row_stride"), "i32:16")
    statistics = ("scale", "bias", "row_lse", "column_lse", "row_parts", "column_parts", "own", "sums", "values", "lse", "loss")
    rows = ("similarities", "teacher", "parts", "uniform")
    types = {
        **sizes,
        **strides,
        **dict.fromkeys((*statistics, *rows), "*fp32"),
        "index": "*i64",
        "alpha": "fp32",
        "floor": "fp32",
    }
    kernels = {
        "lse": {
            "rows and columns": (_similarity_lse_kernel, {"EXCLUDES_OWN": False}),
            "rows without pairs": (_similarity_lse_kernel, {"EXCLUDES_OWN": True, "column_parts": None}),
        },
        "gradient": {
            "softmax": (_similarity_gradient_kernel, {"bias": None}),
            "sigmoid": (_similarity_gradient_kernel, {"row_lse": None, "column_lse": None}),
        },
    }
    for (kind, itemsize), config in SIMILARITY_CONFIGS.items():
        dtype = {2: "bf16", 4: "fp32"}[itemsize]
        launch = f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}"
        tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group}
        tensors = dict.fromkeys(("a", "b", "gradient", "queries", "keys"), f"*{dtype}")
        for flags, (jit, constexprs) in kernels[kind].items():
            for even in (True, False) if dtype == "bf16" else (True,):
                yield CompileCase(
                    "contrastive", kind, dtype, "whole steps" if even else "ragged", launch, flags, jit,
                    {**types, **tensors}, {**tile, **constexprs, "EVEN_K": even, "INPUT_PRECISION": "ieee"}, config.options,
                    matrix=dtype == "bf16", wide=dtype == "bf16",
                )  # fmt: skip
        if kind == "lse":
            yield CompileCase(
                "hard_negatives", "draw", dtype, "512 tiles", f"{config.block_n}x{DRAW_COLUMNS} w4", "plain", _hard_negatives_kernel,
                {**types, **tensors}, {"BLOCK_T": 512, "BLOCK_N": config.block_n, "BLOCK_K": DRAW_COLUMNS}, ELEMENTWISE, matrix=False,
            )  # fmt: skip
    for keys, rows_config in DISTILLED_CONFIGS.items():
        launch = f"{rows_config.block} w{rows_config.num_warps} s3"
        yield CompileCase(
            "contrastive", "distilled rows", "fp32", f"{min(keys, 57856)} keys", launch, "gradient", _distilled_rows_kernel, types,
            {"HAS_GRADIENT": True, "BLOCK": rows_config.block}, rows_config.options, matrix=False,
        )  # fmt: skip
    yield CompileCase(
        "contrastive", "combine", "fp32", "any", f"{COMBINE_BLOCK} w4", "plain", _combine_lse_kernel,
        {**types, "parts": "i32"}, {"BLOCK": COMBINE_BLOCK}, ELEMENTWISE, matrix=False,
    )  # fmt: skip
