"""Self- and cross-attention on packed rows."""

from __future__ import annotations

from torch import Tensor, nn

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.modules.linear import Linear
from vlp_fast.ops import attention
from vlp_fast.passes import ReadRows

__all__ = ["CrossAttention", "SelfAttention"]


def _check_heads(dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide dim; received num_heads={num_heads} for dim={dim}.")


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection to q, k and v.

    Args:
        dim: width of the rows. num_heads: heads; head_dim is ``dim // num_heads``. bias: of both projections.
        dropout_p: on the attention weights, while training. backend: as in `vlp_fast.ops.attention`.

    Shape: x ``[rows, dim]``, plan over those rows as queries and keys -> ``[rows, dim]``; with `read`, those rows alone.
    """

    def __init__(
        self, dim: int, num_heads: int, *, bias: bool = True, dropout_p: float = 0.0, backend: str | None = None
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads, self.dropout_p, self.backend = num_heads, dropout_p, backend
        self.qkv = Linear(dim, 3 * dim, bias)
        self.proj = Linear(dim, dim, bias)

    def forward(self, x: Tensor, plan: AttentionPlan, read: ReadRows | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        if read is not None:
            q, plan = q[read.rows], read.plan
        out = attention(q, k, v, plan, dropout_p=self.dropout_p if self.training else 0.0, backend=self.backend)
        return self.proj(out.flatten(1))


class CrossAttention(nn.Module):
    """Multi-head attention of text rows to image rows; any caption may read any image, and several may share one.

    Keys and values are made once per context row by `project_context`, however many query segments read them.

    Args:
        dim: width of the query rows and of the output. context_dim: width of the context rows. num_heads, bias, dropout_p,
            backend: as in `SelfAttention`.

    Shape: x ``[rows, dim]``, context ``[context_rows, context_dim]`` -> ``[rows, dim]``.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        *,
        bias: bool = True,
        dropout_p: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads, self.dropout_p, self.backend = num_heads, dropout_p, backend
        self.query = Linear(dim, dim, bias)
        self.key_value = Linear(context_dim, 2 * dim, bias)
        self.proj = Linear(dim, dim, bias)

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[context_rows, num_heads, head_dim]``, views of one buffer."""
        k, v = self.key_value(context).unflatten(1, (2, self.num_heads, -1)).unbind(1)
        return k, v

    def attend(self, x: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
        """Attention of x's rows to keys and values made by `project_context`."""
        q = self.query(x).unflatten(1, (self.num_heads, -1))
        out = attention(q, k, v, plan, dropout_p=self.dropout_p if self.training else 0.0, backend=self.backend)
        return self.proj(out.flatten(1))

    def forward(self, x: Tensor, context: Tensor, plan: AttentionPlan) -> Tensor:
        return self.attend(x, *self.project_context(context), plan)
