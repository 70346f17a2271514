"""nn.Modules on packed rows: they hold parameters and call `vlp_fast.ops`; none has state that changes between calls."""

from vlp_fast.modules.attention import CrossAttention, SelfAttention
from vlp_fast.modules.blocks import PostNormBlock, PreNormBlock
from vlp_fast.modules.dropout import Dropout
from vlp_fast.modules.embeddings import PatchDrop, PatchEmbedding, TextEmbedding, WordEmbedding, init_transformer
from vlp_fast.modules.features import unit_features
from vlp_fast.modules.feedforward import MLP, DropPath
from vlp_fast.modules.linear import Linear
from vlp_fast.modules.multiway import MultiwayAttention, MultiwayFFN, MultiwayLayerNorm, MultiwayLinear
from vlp_fast.modules.palm import MultiQueryPooler, ParallelBlock, ParallelCrossBlock, rotary_table
from vlp_fast.modules.pooler import AttentionalPooler
from vlp_fast.modules.vision_transformer import VisionTransformer

__all__ = [
    "MLP",
    "AttentionalPooler",
    "CrossAttention",
    "DropPath",
    "Dropout",
    "Linear",
    "MultiQueryPooler",
    "MultiwayAttention",
    "MultiwayFFN",
    "MultiwayLayerNorm",
    "MultiwayLinear",
    "ParallelBlock",
    "ParallelCrossBlock",
    "PatchDrop",
    "PatchEmbedding",
    "PostNormBlock",
    "PreNormBlock",
    "SelfAttention",
    "TextEmbedding",
    "VisionTransformer",
    "WordEmbedding",
    "init_transformer",
    "unit_features",
    "rotary_table",
]
