"""Attentional pooling: learned queries read the tokens of each image (CoCa, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor, nn

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.modules.attention import _check_heads
from vlp_fast.modules.linear import Linear
from vlp_fast.ops import attention, attention_only, attention_pool, linear
from vlp_fast.segments import Segments

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
        self.out_proj = Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Query projection ``[dim, dim]``, and key and value projections stacked ``[2 * dim, context_dim]``."""
        if self.fused:
            dim = self.out_proj.in_features
            return self.in_proj_weight[:dim], self.in_proj_weight[dim:]
        return self.q_proj_weight, torch.cat([self.k_proj_weight, self.v_proj_weight])


class AttentionalPooler(nn.Module):
    """n_queries learned queries attend to the tokens of each segment; no residual, no feed-forward.

    Constructor and parameter names are open_clip's. The queries do not depend on the batch: they are normalised and projected once,
    and never repeated per sample. With one query, keys and values are never formed: key projection and norm fold into the query,
    value projection and norm into its result (`vlp_fast.ops.attention_pool`), exactly.

    Args:
        d_model: width of the queries and the output. context_dim: width of the tokens. n_head: heads over d_model.
        n_queries: pooled rows per segment. norm_layer: builds the norms of queries and tokens. backend: as in `ops.attention`.

    Shape: x ``[rows, context_dim]`` with ``plan(token_lengths)`` -> ``[n * n_queries, d_model]``; or, as open_clip calls it,
        x ``[batch, tokens, context_dim]`` alone -> ``[batch, n_queries, d_model]``.
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

    def plan(self, token_lengths: Segments | Iterable[int], device: torch.device | str | None = None) -> AttentionPlan:
        """The plan this module's forward takes for segments of these lengths."""
        return AttentionPlan.pooling(self.n_queries, token_lengths, device)

    def forward(self, x: Tensor, plan: AttentionPlan | None = None) -> Tensor:
        if x.dim() == 3:
            if plan is not None:
                raise ValueError("plan must be left out for x of [batch, tokens, context_dim]; it belongs to packed rows.")
            dense = _dense_plan(self.n_queries, x.shape[0], x.shape[1], x.device)
            return self(x.flatten(0, 1), dense).unflatten(0, (x.shape[0], self.n_queries))
        if plan is None:
            raise ValueError("packed rows need a plan: pooler(x, pooler.plan(token_lengths)).")
        weight_q, weight_kv = self.attn.weights()
        dim = weight_q.shape[0]
        bias_q, bias_kv = self.attn.in_proj_bias[:dim], self.attn.in_proj_bias[dim:]
        q = linear(self.ln_q(self.query), weight_q, bias_q).unflatten(1, (self.n_head, -1))  # [n_queries, n_head, head_dim]
        if self.n_queries == 1:
            pooled = self._pool_one(x, plan, q[0], weight_kv[:dim], weight_kv[dim:], bias_kv[dim:])
        else:
            k, v = linear(self.ln_k(x), weight_kv, bias_kv).unflatten(1, (2, self.n_head, -1)).unbind(1)
            pooled = attention(q, k, v, plan, backend=self.backend).flatten(1)
        return self.attn.out_proj(pooled)

    def _pool_one(
        self, x: Tensor, plan: AttentionPlan, q: Tensor, weight_k: Tensor, weight_v: Tensor, bias_v: Tensor
    ) -> Tensor:
        """Attention of one query ``[n_head, head_dim]`` -> ``[segments, d_model]``.

        A key is ``W_k n(x) + b_k`` with ``n(x) = gamma * normal(x) + beta``: of the score, ``gamma * W_k^T q`` meets the row and the
        rest is the same for all rows. The weights sum to 1, so the value projection and the norm's affine part follow the average.
        """
        norm = self.ln_k if isinstance(self.ln_k, nn.LayerNorm) else None
        gamma, beta = (None, None) if norm is None else (norm.weight, norm.bias)
        queries = torch.einsum("he,hec->hc", q * q.shape[1] ** -0.5, weight_k.unflatten(0, q.shape))  # [n_head, context_dim]
        backend = None if attention_only(self.backend) else self.backend
        pooled = attention_pool(
            x if norm is not None else self.ln_k(x),
            (queries if gamma is None else queries * gamma).to(x.dtype),
            plan.key,
            eps=None if norm is None else norm.eps,
            backend=backend,
        )  # [segments, n_head, context_dim]
        pooled = pooled if gamma is None else pooled * gamma
        pooled = pooled if beta is None else pooled + beta
        values = torch.einsum("nhc,hec->nhe", pooled.to(weight_v.dtype), weight_v.unflatten(0, q.shape)).flatten(1) + bias_v
        if 0 in plan.key.lengths:  # nothing is read there, not even beta and the bias
            values = values.masked_fill(plan.key.offsets.diff()[:, None] == 0, 0.0)
        return values


@lru_cache(maxsize=32)
def _dense_plan(n_queries: int, batch: int, tokens: int, device: torch.device) -> AttentionPlan:
    return AttentionPlan.pooling(n_queries, [tokens] * batch, device)
