"""PaLM's blocks on packed rows: attention and SwiGLU side by side on one norm, one key and value head, rotary positions, no bias.

Source: Chowdhery et al., PaLM (2022), section 2; the cross-attention block and the pooler as in lucidrains' CoCa.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.modules.linear import Linear
from vlp_fast.ops import attention
from vlp_fast.segments import Segments

__all__ = ["MultiQueryPooler", "ParallelBlock", "ParallelCrossBlock", "rotary_table", "rotate", "swiglu"]

EPS = 1e-5  # of every norm


def rotary_table(
    positions: Tensor, head_dim: int, *, theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles by which `rotate` turns a row at each position.

    Equivalent to: angle j of position p is ``p * theta ** (-2 j / head_dim)``.

    Args:
        positions: ``[rows]``. head_dim: even. dtype: of the rows to turn; angles are formed in fp32, for fp64 rows in fp64 from
            frequencies that were rounded to fp32, as a module made in fp32 and converted has them.

    Returns: cos, sin, ``[rows, head_dim / 2]``.
    Raises: ValueError for an odd head_dim.
    Source: Su et al., RoFormer (2021), equation 34.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, for rotary positions turn pairs; received {head_dim}.")
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    angles = positions.to(precise)[:, None] * (1.0 / theta**exponents).to(precise)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rows turned by their position: element j of a head's first half makes a pair with element j of its second half.

    Args:
        x: ``[rows, heads, head_dim]``. cos, sin: of `rotary_table`.

    Returns: as x, in its dtype.
    """
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def swiglu(x: Tensor) -> Tensor:
    """``value * silu(gate)`` of ``[rows, 2 * n]``: n columns of value, then n of gate.

    Source: Shazeer, GLU Variants Improve Transformer (2020), equation 6.
    """
    value, gate = x.chunk(2, -1)
    return F.silu(gate) * value


class ParallelBlock(nn.Module):
    """x + attention(norm(x)) + SwiGLU(norm(x)): self-attention with rotary positions, all first projections in one product.

    Args:
        dim: width of the rows. num_heads: query heads, which share one key and value head. head_dim: even, of its own: heads need
            not add up to dim. hidden_dim: width inside the SwiGLU. backend: of attention.

    Shape: x ``[rows, dim]``, plan over those rows, rotary (cos, sin) of `rotary_table` -> ``[rows, dim]``.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, hidden_dim: int, *, backend: str | None = None) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.hidden_dim, self.backend = num_heads, head_dim, hidden_dim, backend
        self.norm = nn.LayerNorm(dim, EPS, bias=False)
        # query heads, key, value; then value and gate of the SwiGLU
        self.fused = Linear(dim, (num_heads + 2) * head_dim + 2 * hidden_dim, bias=False)
        self.proj = Linear(num_heads * head_dim, dim, bias=False)
        self.fc2 = Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor, plan: AttentionPlan, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v, inner = self.project(x, rotary)
        return self.join(x, attention(q, k, v, plan, backend=self.backend), inner)

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first half of the block: turned queries ``[rows, num_heads, head_dim]``, the turned key and the value ``[rows, 1,
        head_dim]``, and the SwiGLU's inner rows."""
        n = self.num_heads
        heads, inner = self.fused(self.norm(x)).split([(n + 2) * self.head_dim, 2 * self.hidden_dim], 1)
        heads = heads.unflatten(1, (n + 2, self.head_dim))
        turned = rotate(heads[:, : n + 1], *rotary)  # the key beside the queries: one pass over both
        return turned[:, :n], turned[:, n:], heads[:, n + 1 :], inner

    def join(self, x: Tensor, out: Tensor, inner: Tensor) -> Tensor:
        """The second half: rows, what attention read for them ``[rows, num_heads, head_dim]``, inner rows -> ``[rows, dim]``."""
        return x + self.proj(out.flatten(1)) + self.fc2(swiglu(inner))


class ParallelCrossBlock(nn.Module):
    """x + attention(norm(x), context) + SwiGLU(norm(x)): text rows read image rows through one key and value head.

    Args:
        dim, num_heads, head_dim, hidden_dim, backend: as in `ParallelBlock`. context_dim: width of the context rows, which are
            neither normed nor given positions here.

    Shape: x ``[rows, dim]``, context ``[context_rows, context_dim]``, plan between them -> ``[rows, dim]``.
    """

    def __init__(
        self, dim: int, context_dim: int, num_heads: int, head_dim: int, hidden_dim: int, *, backend: str | None = None
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.hidden_dim, self.backend = num_heads, head_dim, hidden_dim, backend
        self.norm = nn.LayerNorm(dim, EPS, bias=False)
        # query heads; then value and gate of the SwiGLU
        self.fused = Linear(dim, num_heads * head_dim + 2 * hidden_dim, bias=False)
        self.key_value = Linear(context_dim, 2 * head_dim, bias=False)
        self.proj = Linear(num_heads * head_dim, dim, bias=False)
        self.fc2 = Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor, plan: AttentionPlan) -> Tensor:
        q, inner = self.project(x)
        return self.join(x, attention(q, *self.project_context(context), plan, backend=self.backend), inner)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first half of the block: queries ``[rows, num_heads, head_dim]`` and the SwiGLU's inner rows."""
        q, inner = self.fused(self.norm(x)).split([self.num_heads * self.head_dim, 2 * self.hidden_dim], 1)
        return q.unflatten(1, (self.num_heads, self.head_dim)), inner

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The key and the value of context rows, ``[context_rows, 1, head_dim]`` each."""
        k, v = self.key_value(context).unflatten(1, (2, 1, self.head_dim)).unbind(1)
        return k, v

    def join(self, x: Tensor, out: Tensor, inner: Tensor) -> Tensor:
        """The second half, as in `ParallelBlock`."""
        return x + self.proj(out.flatten(1)) + self.fc2(swiglu(inner))


class MultiQueryPooler(nn.Module):
    """Learned queries read the tokens of each segment through one key and value head; no residual, no feed-forward.

    The queries do not depend on the batch: they are normed and projected once, and never repeated per sample.

    Args:
        dim: width of queries and output. context_dim: width of the tokens. num_heads, head_dim: as in `ParallelBlock`.
        num_queries: pooled rows per segment. backend: of attention.

    Shape: x ``[rows, context_dim]``, its `Segments` -> ``[n * num_queries, dim]``, segment after segment.
    """

    def __init__(
        self, dim: int, context_dim: int, num_heads: int, head_dim: int, num_queries: int, *, backend: str | None = None
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.num_queries, self.backend = num_heads, head_dim, num_queries, backend
        self.queries = nn.Parameter(torch.randn(num_queries, dim))
        self.norm = nn.LayerNorm(dim, EPS, bias=False)
        self.context_norm = nn.LayerNorm(context_dim, EPS, bias=False)
        self.query = Linear(dim, num_heads * head_dim, bias=False)
        self.key_value = Linear(context_dim, 2 * head_dim, bias=False)
        self.proj = Linear(num_heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        q = self.query(self.norm(self.queries)).unflatten(1, (self.num_heads, self.head_dim))
        k, v = self.key_value(self.context_norm(x)).unflatten(1, (2, 1, self.head_dim)).unbind(1)
        out = attention(q, k, v, AttentionPlan.pooling(self.num_queries, segments), backend=self.backend)
        return self.proj(out.flatten(1))
