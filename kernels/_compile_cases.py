"""What the compile gate compiles: each configuration that `_configs.py` can choose for a kernel, at the most a launch can ask of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from ._compile_case import NVIDIA, CompileCase
from ._compile_cases_losses import contrastive_cases, linear_cross_entropy_cases
from ._configs import (
    DECODE_CONFIGS,
    ELEMENTWISE,
    GELU_BLOCK,
    MULTIWAY_LINEAR_ROWS,
    MULTIWAY_NORM_ROWS,
    NORM_REDUCE_COLUMNS,
    NORM_REDUCE_ROWS,
    POOL_CONFIGS,
    POOL_QUERIES,
    POOL_SM80,
    SMALL_ROWS,
    attention_configs,
)
from .attention_backward import _attention_backward_key_kernel, _attention_backward_query_kernel
from .attention_forward import _attention_forward_kernel
from .attention_pool import _attention_pool_backward_kernel, _attention_pool_forward_kernel
from .attention_small import _attention_small_backward_kernel, _attention_small_forward_kernel
from .decode_attention import _decode_attention_kernel, _decode_combine_kernel
from .multiway_layer_norm import (
    _multiway_layer_norm_backward_kernel,
    _multiway_layer_norm_kernel,
    _multiway_layer_norm_reduce_kernel,
)
from .multiway_linear import _gelu_backward_kernel, _multiway_linear_kernel, _multiway_linear_weight_kernel

SINCE_SM90 = ("sm_90", "sm_100", "gfx942")  # all that `before_sm90` does not mean


def compile_cases() -> Iterator[CompileCase]:
    """Every case of every kernel, in a fixed order."""
    for cases in (
        _attention_cases,
        _attention_small_cases,
        _attention_pool_cases,
        _multiway_linear_cases,
        _multiway_norm_cases,
        linear_cross_entropy_cases,
        contrastive_cases,
        _decode_attention_cases,
    ):
        yield from cases()


# ---------------------------------------------------------------------------------------------------------------- attention

_ATTENTION_KERNELS = {
    "forward": _attention_forward_kernel,
    "backward_query": _attention_backward_query_kernel,
    "backward_key": _attention_backward_key_kernel,
}
_ATTENTION_TENSORS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
_ATTENTION_TYPES = {
    **dict.fromkeys(("lse", "dlse", "delta"), "*fp32"),
    **dict.fromkeys(("query_offsets", "key_offsets", "edge_offsets", "edge_key", "edge_causal"), "*i32"),
    **dict.fromkeys(("key_edge_offsets", "key_edge_query", "key_edge_causal"), "*i32"),
    "seed": "*i64",
    **dict.fromkeys(("num_heads", "num_heads_k", "tiles", "rows_q", "dropout_threshold"), "i32"),
    **dict.fromkeys(("q_row_stride", "q_head_stride", "k_row_stride", "k_head_stride"), "i32:16"),
    "softmax_scale": "fp32",
}


def _attention_cases() -> Iterator[CompileCase]:
    """At the widest head a configuration serves, and at 64: with causal edges and dropout, the most there is, and with neither."""
    chosen = list(attention_configs())
    widest = {(kind, config, dtype): head_dim for kind, config, head_dim, dtype, _ in chosen}
    for kind, config, head_dim, dtype, before_sm90 in chosen:
        if head_dim != widest[kind, config, dtype] and not (dtype == "bf16" and head_dim == 64):
            continue
        variants = [(True, "ieee"), (True, "tf32")] if dtype == "fp32" else [(True, "ieee"), (False, "ieee")]
        tile_rows = config.block_n if kind == "backward_key" else config.block_m
        for full, precision in variants:
            constexprs: dict[str, object] = {
                "group": 1,
                "HEAD_DIM": head_dim,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "HAS_CAUSAL": full,
                "SHARES_QUERIES": False,
                "INPUT_PRECISION": precision,
                **({} if full else {"seed": None}),
            }
            flags = ["causal dropout" if full else "plain", *(["tf32"] if precision == "tf32" else [])]
            yield CompileCase(
                "attention",
                kind,
                dtype,
                f"head_dim {head_dim}",
                f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages}",
                " ".join(flags),
                _ATTENTION_KERNELS[kind],
                {**dict.fromkeys(_ATTENTION_TENSORS, f"*{dtype}"), **_ATTENTION_TYPES},
                constexprs,
                config.options,
                matrix=dtype == "bf16",
                wide=dtype == "bf16" and tile_rows >= 64,
                targets=NVIDIA if precision == "tf32" else () if before_sm90 else SINCE_SM90,
            )


def _attention_small_cases() -> Iterator[CompileCase]:
    """At the widest head a block serves; with causal edges and dropout, and for 16-bit with neither."""
    for (kind, itemsize, head_dim), configs in SMALL_ROWS.items():
        dtype = {2: "bf16", 4: "fp32"}[itemsize]
        for config in configs:
            for full in (True, False) if dtype == "bf16" else (True,):
                yield CompileCase(
                    "attention",
                    f"small_{kind}",
                    dtype,
                    f"head_dim {head_dim}",
                    f"{config.block}x{config.block} w{config.num_warps} s1",
                    "causal dropout" if full else "plain",
                    {"forward": _attention_small_forward_kernel, "backward": _attention_small_backward_kernel}[kind],
                    {**dict.fromkeys(_ATTENTION_TENSORS, f"*{dtype}"), **_ATTENTION_TYPES},
                    {
                        "HEAD_DIM": head_dim,
                        "BLOCK": config.block,
                        "HAS_CAUSAL": full,
                        "INPUT_PRECISION": "ieee",
                        **({} if full else {"seed": None}),
                    },
                    config.options,
                    matrix=dtype == "bf16",
                    wide=dtype == "bf16" and config.block >= 64,
                )


# ------------------------------------------------------------------------------------------------------------------ pooling

_POOL_KERNELS = {"forward": _attention_pool_forward_kernel, "backward": _attention_pool_backward_kernel}
_POOL_TYPES = {
    **dict.fromkeys(("query_sums", "dout_sums", "lse", "delta", "mean", "rstd", "dqueries"), "*fp32"),
    **dict.fromkeys(("num_queries", "segments", "splits"), "i32"),
    "offsets": "*i32",
    "row_stride": "i32:16",
    "eps": "fp32",
}


def _attention_pool_cases() -> Iterator[CompileCase]:
    """At the widest part of a row that a program takes; with the norm, and for 16-bit also without."""
    chosen = [(key, config, SINCE_SM90 if key in POOL_SM80 else ()) for key, config in POOL_CONFIGS.items()]
    chosen += [(key, config, ("sm_80",)) for key, config in POOL_SM80.items()]
    for (kind, itemsize), config, targets in chosen:
        dtype = {2: "bf16", 4: "fp32"}[itemsize]
        for has_norm in (True, False) if dtype == "bf16" else (True,):
            parts, chunks = config.cut(config.columns)
            absent = {} if has_norm else {"mean": None, "rstd": None, "query_sums": None, "dout_sums": None}
            yield CompileCase(
                "attention_pool",
                kind,
                dtype,
                f"dim {config.columns}",
                f"{config.block_n}x{config.block_k} w{config.num_warps} s1",
                "norm" if has_norm else "plain",
                _POOL_KERNELS[kind],
                {**dict.fromkeys(("x", "queries", "out", "dout", "dx"), f"*{dtype}"), **_POOL_TYPES},
                {
                    "DIM": config.columns,
                    "PARTS": parts,
                    "CHUNKS": chunks,
                    "BLOCK_N": config.block_n,
                    "BLOCK_R": POOL_QUERIES,
                    "BLOCK_K": config.block_k,
                    "INPUT_PRECISION": "ieee",
                    **{name: value for name, value in absent.items() if name in _POOL_KERNELS[kind].arg_names},
                },
                config.options,
                matrix=dtype == "bf16",
                targets=targets,
            )


# ----------------------------------------------------------------------------------------------------------------- multiway

_LINEAR_TYPES = {
    **dict.fromkeys(("num_experts", "tiles_m", "tiles_n", "tiles_k"), "i32"),
    **dict.fromkeys(("width", "depth", "x_row_stride", "residual_row_stride", "dout_row_stride"), "i32:16"),
    "offsets": "*i32",
}
_LINEAR_TENSORS = ("x", "weight", "bias", "residual", "out", "pre", "dout", "dweight", "dbias", "dpre")
# what a product does without
_LINEAR_ABSENT: dict[str, tuple[str, ...]] = {
    "forward": (),
    "forward gelu": ("residual",),
    "forward residual": ("pre",),
    "dx": ("bias", "residual", "pre"),
}


def _multiway_linear_cases() -> Iterator[CompileCase]:
    """The forward with every epilogue, the gradient of x, which reads the weight across, and that of the weight with the bias's.

    Sizes that are whole tiles, as those of the models, and for 16-bit also ragged ones, which are masked. The forward with the GELU or
    the residual only, which finishes a whole tile where the one with both takes half of it at a time, at whole tiles.
    """
    for (kind, itemsize), rows in MULTIWAY_LINEAR_ROWS.items():
        dtype = {2: "bf16", 4: "fp32"}[itemsize]
        for _, config in rows:
            for kernel in _LINEAR_ABSENT if kind == "product" else ("dweight",):
                for even, precision in (
                    [(True, "ieee"), (False, "ieee")] if dtype == "bf16" else [(True, "ieee"), (True, "tf32")]
                ):
                    if kernel in ("forward gelu", "forward residual") and not even:
                        continue
                    shape = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
                    constexprs = {**shape, "EVEN_N": even, "EVEN_K": even, "INPUT_PRECISION": precision}
                    types = {**dict.fromkeys(_LINEAR_TENSORS, f"*{dtype}"), **_LINEAR_TYPES}
                    if kind == "weight":
                        constexprs["GROUP_N"] = config.group
                    else:
                        one, other = "weight_depth_stride", "weight_column_stride"
                        if kernel == "dx":
                            one, other = other, one
                        constexprs |= {"GROUP_M": config.group, "IS_GELU": kernel in ("forward", "forward gelu"), one: 1}
                        constexprs |= dict.fromkeys(_LINEAR_ABSENT[kernel])
                        types[other] = "i32:16"
                    yield CompileCase(
                        "multiway_linear",
                        kernel,
                        dtype,
                        "whole tiles" if even else "ragged",
                        f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}",
                        precision,
                        _multiway_linear_weight_kernel if kind == "weight" else _multiway_linear_kernel,
                        types,
                        constexprs,
                        config.options,
                        matrix=dtype == "bf16",
                        wide=dtype == "bf16",
                        targets=NVIDIA if precision == "tf32" else (),
                    )
    yield CompileCase(
        "multiway_linear",
        "gelu backward",
        "bf16",
        "any",
        f"{GELU_BLOCK} w4",
        "plain",
        _gelu_backward_kernel,
        {**dict.fromkeys(_LINEAR_TENSORS, "*bf16"), **_LINEAR_TYPES},
        {"BLOCK": GELU_BLOCK},
        ELEMENTWISE,
        matrix=False,
    )


_NORM_TYPES = {
    **dict.fromkeys(("mean", "rstd", "partial"), "*fp32"),
    **dict.fromkeys(("num_experts", "rows_per_program"), "i32"),
    **dict.fromkeys(("x_row_stride", "dout_row_stride", "dim"), "i32:16"),
    "offsets": "*i32",
    "eps": "fp32",
}


def _multiway_norm_cases() -> Iterator[CompileCase]:
    """The widest row of each configuration, and 768, in the widest dtype; and as autocast has them, with fp32 weights: rows of either dtype
    in, bf16 out."""
    types = {**dict.fromkeys(("x", "weight", "bias", "out", "dout", "dx", "dweight", "dbias"), "*fp32"), **_NORM_TYPES}
    kernels = {"forward": _multiway_layer_norm_kernel, "backward": _multiway_layer_norm_backward_kernel}
    narrow = {**types, **dict.fromkeys(("out", "dout"), "*bf16")}
    dtypes = {"fp32": types, "fp32 to bf16": narrow, "bf16": {**narrow, **dict.fromkeys(("x", "dx"), "*bf16")}}
    for widest, config in MULTIWAY_NORM_ROWS:
        for dim in (768, widest) if widest == 1024 else (widest,):
            for (kind, kernel), (dtype, signature) in itertools.product(kernels.items(), dtypes.items()):
                launch = f"w{config.num_warps} s1"
                yield CompileCase(
                    "multiway_layer_norm", kind, dtype, f"dim {dim}", launch, "plain", kernel, signature, {"DIM": dim}, config.options,
                    matrix=False,
                )  # fmt: skip
    blocks = {"BLOCK_M": NORM_REDUCE_ROWS, "BLOCK_N": NORM_REDUCE_COLUMNS}
    yield CompileCase(
        "multiway_layer_norm", "reduce", "fp32", "any", f"{NORM_REDUCE_ROWS}x{NORM_REDUCE_COLUMNS} w4", "plain",
        _multiway_layer_norm_reduce_kernel, types, blocks, ELEMENTWISE, matrix=False,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- decode_attention


def _decode_attention_cases() -> Iterator[CompileCase]:
    """At the widest head, and for 16-bit also at 64; and the kernel that puts the splits together."""
    for (itemsize, _), config in DECODE_CONFIGS.items():
        dtype = {2: "bf16", 4: "fp32"}[itemsize]
        for head_dim in (64, 128) if dtype == "bf16" else (128,):
            yield CompileCase(
                "decode_attention",
                "split",
                dtype,
                f"head_dim {head_dim}",
                f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages}",
                "plain",
                _decode_attention_kernel,
                {
                    **dict.fromkeys(("q", "k", "v"), f"*{dtype}"),
                    **dict.fromkeys(("query_offsets", "edge_offsets", "edge_key", "key_starts", "key_lengths"), "*i32"),
                    **dict.fromkeys(("out", "lse"), "*fp32"),
                    **dict.fromkeys(("num_heads_k", "group", "tiles", "splits", "rows_q"), "i32"),
                    **dict.fromkeys(("q_row_stride", "q_head_stride", "k_row_stride", "k_head_stride"), "i32:16"),
                    "softmax_scale": "fp32",
                },
                {"HEAD_DIM": head_dim, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "INPUT_PRECISION": "ieee"},
                config.options,
                matrix=dtype == "bf16",
                wide=dtype == "bf16" and config.block_m >= 64,
            )
    yield CompileCase(
        "decode_attention",
        "combine",
        "bf16",
        "head_dim 128",
        "32 splits w4",
        "plain",
        _decode_combine_kernel,
        {**dict.fromkeys(("parts", "part_lse", "lse"), "*fp32"), "out": "*bf16", "rows_by_heads": "i32", "splits": "i32"},
        {"HEAD_DIM": 128, "BLOCK_S": 32},
        {"num_warps": 4, "enable_fp_fusion": True},
        matrix=False,
    )
