"""Operations on packed rows: each checks its arguments, chooses a backend and runs a registered torch op."""

from vlp_fast.ops._backends import (
    BACKENDS,
    BackendStatus,
    attention_only,
    backend_status,
    choose_backend,
    default_backend,
)
from vlp_fast.ops._flops import register_cpu_flops
from vlp_fast.ops._products import bf16_products, fp32_products
from vlp_fast.ops.attention import attention
from vlp_fast.ops.attention_pool import attention_pool
from vlp_fast.ops.contrastive import (
    contrastive_loss,
    distilled_contrastive_loss,
    hard_negatives,
    sigmoid_contrastive_loss,
)
from vlp_fast.ops.decode_attention import decode_attention
from vlp_fast.ops.linear import linear, linear_gelu
from vlp_fast.ops.linear_cross_entropy import linear_cross_entropy
from vlp_fast.ops.multiway import multiway_layer_norm, multiway_linear
from vlp_fast.ops.multiway_mlp import mlp, multiway_mlp
from vlp_fast.ops.packing import packed_weights

register_cpu_flops()

__all__ = [
    "BACKENDS",
    "BackendStatus",
    "attention",
    "attention_only",
    "attention_pool",
    "backend_status",
    "choose_backend",
    "contrastive_loss",
    "decode_attention",
    "default_backend",
    "distilled_contrastive_loss",
    "bf16_products",
    "fp32_products",
    "hard_negatives",
    "linear",
    "linear_cross_entropy",
    "linear_gelu",
    "mlp",
    "multiway_layer_norm",
    "multiway_linear",
    "multiway_mlp",
    "packed_weights",
    "sigmoid_contrastive_loss",
]
