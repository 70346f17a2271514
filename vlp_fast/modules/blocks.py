"""Transformer blocks on packed rows: pre-norm (ViT, CoCa) and the post-norm block of BLIP's text tower."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.modules.attention import CrossAttention, SelfAttention
from vlp_fast.modules.dropout import Dropout
from vlp_fast.modules.feedforward import MLP, DropPath
from vlp_fast.modules.multiway import MultiwayAttention, MultiwayLayerNorm
from vlp_fast.passes import ReadRows

__all__ = ["PostNormBlock", "PreNormBlock"]


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then cross-attention where there is a context, then x + MLP(norm(x)).

    Args:
        dim, num_heads. hidden_dim: width inside the MLP. eps: of the norms. context_dim: width of the rows read by
            cross-attention, None for a block without. drop_path: stochastic depth of each branch. backend: of attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        *,
        eps: float,
        context_dim: int | None = None,
        drop_path: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attention = SelfAttention(dim, num_heads, backend=backend)
        if context_dim is not None:
            self.cross_norm = nn.LayerNorm(dim, eps)
            self.cross_attention = CrossAttention(dim, context_dim, num_heads, backend=backend)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = MLP(dim, hidden_dim)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        plan: AttentionPlan,
        context: Tensor | None = None,
        cross_plan: AttentionPlan | None = None,
        *,
        samples: Tensor | None = None,
        num_samples: int = 0,
        read: ReadRows | None = None,
    ) -> Tensor:
        """All rows, or with `read` those that are read afterwards."""
        branch = self.attention(self.norm1(x), plan, read)
        if read is not None:
            x, cross_plan, samples = x[read.rows], read.cross_plan, None if samples is None else samples[read.rows]
        x = x + self.drop_path(branch, samples, num_samples)
        if context is not None:
            assert cross_plan is not None
            branch = self.cross_attention(self.cross_norm(x), context, cross_plan)
            x = x + self.drop_path(branch, samples, num_samples)
        return x + self.drop_path(self.mlp(self.norm2(x)), samples, num_samples)


class PostNormBlock(nn.Module):
    """BLIP's text layer (BERT order): self-attention of the row's expert, cross-attention, MLP, a norm after each residual.

    The experts are BLIP's two sets of self-attention weights (encoder, decoder); cross-attention and MLP are shared.

    Args:
        dim, num_heads, hidden_dim, eps: as in BERT. context_dim: width of the image rows; None leaves cross-attention out.
        num_experts: sets of self-attention weights. dropout_p: on attention weights and on each branch. backend: of attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        *,
        eps: float,
        context_dim: int | None,
        num_experts: int,
        dropout_p: float,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.attention = MultiwayAttention(dim, num_heads, num_experts, dropout_p=dropout_p, backend=backend)
        self.attention_norm = MultiwayLayerNorm(dim, num_experts, eps=eps, backend=backend)
        if context_dim is not None:
            self.cross_attention = CrossAttention(dim, context_dim, num_heads, dropout_p=dropout_p, backend=backend)
            self.cross_norm = nn.LayerNorm(dim, eps)
        self.mlp = MLP(dim, hidden_dim)
        self.mlp_norm = nn.LayerNorm(dim, eps)
        self.dropout = Dropout(dropout_p)

    def forward(
        self,
        x: Tensor,
        plan: AttentionPlan,
        expert_offsets: Sequence[int],
        context: Tensor | None = None,
        cross_plan: AttentionPlan | None = None,
        *,
        read: ReadRows | None = None,
    ) -> Tensor:
        """All rows, or with `read` those that are read afterwards."""
        residual, offsets = x, expert_offsets
        if read is not None:
            residual, cross_plan, offsets = x[read.rows], read.cross_plan, read.expert_offsets
        if self.training and self.dropout.p > 0.0:
            x = residual + self.dropout(self.attention(x, plan, expert_offsets, read=read))
        else:
            x = self.attention(x, plan, expert_offsets, residual, read)
        x = self.attention_norm(x, offsets)
        if context is not None:
            assert cross_plan is not None
            x = self.cross_norm(x + self.dropout(self.cross_attention(x, context, cross_plan)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))
