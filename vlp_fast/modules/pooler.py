"""Attentional pooling: learned queries read the tokens of each image (CoCa, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_fast.modules.attention import _check_heads
from vlp_fast.ops import attention
from vlp_fast.segments import AttentionPlan

__all__ = ["AttentionalPooler"]


class _PoolerAttention(nn.Module):
    """The parameters of `nn.MultiheadAttention` under its names: fused where both widths agree, separate where they differ."""

    def __init__(self, dim: int, context_dim: int) -> None:
        super().__init__()
        self.fused = dim == context_dim
        if self.fused:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
            nn.init.xavier_uniform_(self.in_proj_weight)
        else:
            self.q_proj_weight = nn.Parameter(torch.empty(dim, dim))
            self.k_proj_weight = nn.Parameter(torch.empty(dim, context_dim))
            self.v_proj_weight = nn.Parameter(torch.empty(dim, context_dim))
            for weight in (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
                nn.init.xavier_uniform_(weight)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Query projection ``[dim, dim]``, and key and value projections stacked ``[2 * dim, context_dim]``."""
        if self.fused:
            dim = self.out_proj.in_features
            return self.in_proj_weight[:dim], self.in_proj_weight[dim:]
        return self.q_proj_weight, torch.cat([self.k_proj_weight, self.v_proj_weight])


class AttentionalPooler(nn.Module):
    """n_queries learned queries attend to the tokens of each segment; no residual, no feed-forward.

    Constructor and parameter names are open_clip's. The queries do not depend on the batch: they are normalised and projected once.

    Args:
        d_model: width of the queries and the output. context_dim: width of the tokens. n_head: heads over d_model.
        n_queries: pooled rows per segment. norm_layer: builds the norms of queries and tokens. backend: as in `ops.attention`.

    Shape: x ``[rows, context_dim]``, plan ``AttentionPlan.cross_attention([n_queries] * n, token_lengths)`` ->
    ``[n * n_queries, d_model]``.
    """

    def __init__(
        self,
        d_model: int,
        context_dim: int,
        n_head: int = 8,
        n_queries: int = 256,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _check_heads(d_model, n_head)
        self.n_head, self.n_queries, self.backend = n_head, n_queries, backend
        self.query = nn.Parameter(torch.randn(n_queries, d_model))
        self.attn = _PoolerAttention(d_model, context_dim)
        self.ln_q = norm_layer(d_model)
        self.ln_k = norm_layer(context_dim)

    def plan(self, token_lengths: list[int] | tuple[int, ...], device: torch.device | str | None = None) -> AttentionPlan:
        """The plan this module's forward takes for segments of these lengths."""
        return AttentionPlan.cross_attention([self.n_queries] * len(token_lengths), token_lengths, device=device)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        weight_q, weight_kv = self.attn.weights()
        dim = weight_q.shape[0]
        bias_q, bias_kv = self.attn.in_proj_bias[:dim], self.attn.in_proj_bias[dim:]
        q = F.linear(self.ln_q(self.query), weight_q, bias_q).repeat(len(plan.query), 1)  # [n * n_queries, d_model]
        k, v = F.linear(self.ln_k(x), weight_kv, bias_kv).unflatten(1, (2, self.n_head, -1)).unbind(1)
        out = attention(q.unflatten(1, (self.n_head, -1)), k, v, plan, backend=self.backend)
        return self.attn.out_proj(out.flatten(1))
