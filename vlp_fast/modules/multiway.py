"""BEiT-3's Multiway sub-layers: one set of weights per expert, rows laid out expert after expert (facts of the paper, section 2.1).

Parameters hold all experts stacked, ``[num_experts, ...]``; `expert_offsets` come with every call, so a module has no state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.modules.attention import _check_heads
from vlp_fast.modules.linear import is_plain
from vlp_fast.ops import attention, multiway_layer_norm, multiway_linear, multiway_mlp
from vlp_fast.ops._autocast import autocast_dtype
from vlp_fast.ops._backends import attention_only
from vlp_fast.passes import ReadRows

__all__ = ["MultiwayAttention", "MultiwayFFN", "MultiwayLayerNorm", "MultiwayLinear", "multiway_mlp_of"]


class MultiwayLinear(nn.Module):
    """`vlp_fast.ops.multiway_linear` with its parameters. Shape: ``[rows, in_features]`` -> ``[rows, out_features]``.

    Args:
        in_features, out_features, num_experts, bias. activation: applied to the sums. backend: of the operation; that of a library
            which has attention only means None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int = 2,
        *,
        bias: bool = True,
        activation: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.backend = activation, None if attention_only(backend) else backend
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features)) if bias else None
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, expert_offsets: Sequence[int], residual: Tensor | None = None) -> Tensor:
        return multiway_linear(
            x,
            self.weight,
            self.bias,
            expert_offsets,
            activation=self.activation,
            residual=residual,
            backend=self.backend,
        )


class MultiwayLayerNorm(nn.Module):
    """`vlp_fast.ops.multiway_layer_norm` with its parameters. Shape: ``[rows, dim]`` -> ``[rows, dim]``.

    Args: before_linear: whether a linear layer alone reads the output: then it is rounded at once to autocast's dtype, as that would do.
    """

    def __init__(
        self, dim: int, num_experts: int = 2, *, eps: float = 1e-5, before_linear: bool = False, backend: str | None = None
    ) -> None:
        super().__init__()
        self.eps, self.before_linear = eps, before_linear
        self.backend = None if attention_only(backend) else backend
        self.weight = nn.Parameter(torch.ones(num_experts, dim))
        self.bias = nn.Parameter(torch.zeros(num_experts, dim))

    def forward(self, x: Tensor, expert_offsets: Sequence[int]) -> Tensor:
        out_dtype = autocast_dtype(x.device.type) if self.before_linear and x.dtype != torch.float64 else None
        return multiway_layer_norm(
            x, self.weight, self.bias, expert_offsets, self.eps, out_dtype=out_dtype, backend=self.backend
        )


class MultiwayAttention(nn.Module):
    """Self-attention whose projections belong to the rows' experts while all rows of a sample attend together.

    Args:
        dim, num_heads, num_experts. inner_eps: eps of the LayerNorm over the concatenated heads before the output projection
            (sub-LN); None leaves it out. dropout_p, backend: as in `SelfAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_experts: int = 2,
        *,
        inner_eps: float | None = None,
        dropout_p: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads, self.dropout_p, self.backend = num_heads, dropout_p, backend
        self.qkv = MultiwayLinear(dim, 3 * dim, num_experts, backend=backend)
        self.inner_norm = (
            None
            if inner_eps is None
            else MultiwayLayerNorm(dim, num_experts, eps=inner_eps, before_linear=True, backend=backend)
        )
        self.proj = MultiwayLinear(dim, dim, num_experts, backend=backend)

    def forward(
        self,
        x: Tensor,
        plan: AttentionPlan,
        expert_offsets: Sequence[int],
        residual: Tensor | None = None,
        read: ReadRows | None = None,
    ) -> Tensor:
        """The branch; with `residual`, its sum with the branch. With `read`, of those rows alone, as is `residual` then."""
        q, k, v = self.qkv(x, expert_offsets).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        if read is not None:
            q, plan, expert_offsets = q[read.rows], read.plan, read.expert_offsets
        out = attention(q, k, v, plan, dropout_p=self.dropout_p if self.training else 0.0, backend=self.backend).flatten(1)
        if self.inner_norm is not None:
            out = self.inner_norm(out, expert_offsets)
        return self.proj(out, expert_offsets, residual)


class MultiwayFFN(nn.Module):
    """fc2(LayerNorm(GELU(fc1(x)))) per expert: sub-LN feed-forward; GELU in fp32 as BEiT-3 computes it."""

    def __init__(
        self, dim: int, hidden_dim: int, num_experts: int = 2, *, eps: float = 1e-5, backend: str | None = None
    ) -> None:
        super().__init__()
        self.fc1 = MultiwayLinear(dim, hidden_dim, num_experts, activation="gelu", backend=backend)
        self.norm = MultiwayLayerNorm(hidden_dim, num_experts, eps=eps, before_linear=True, backend=backend)
        self.fc2 = MultiwayLinear(hidden_dim, dim, num_experts, backend=backend)

    def forward(self, x: Tensor, expert_offsets: Sequence[int], residual: Tensor | None = None) -> Tensor:
        """The branch; with `residual`, ``[rows, dim]``, its sum with the branch."""
        return multiway_mlp_of(self.fc1, self.fc2, x, expert_offsets, residual, norm=self.norm)


def multiway_mlp_of(
    fc1: nn.Module,
    fc2: nn.Module,
    x: Tensor,
    expert_offsets: Sequence[int],
    residual: Tensor | None = None,
    *,
    norm: nn.Module | None = None,
) -> Tensor:
    """fc2(norm(fc1(x))) + residual; one operation, `vlp_fast.ops.multiway_mlp`, where the layers are plain and a gradient is wanted."""
    if (
        torch.is_grad_enabled()
        and is_plain(fc1, MultiwayLinear)
        and is_plain(fc2, MultiwayLinear)
        and fc1.activation == "gelu"
        and fc2.activation is None
        and fc1.backend == fc2.backend
    ):
        parts = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        if norm is None:
            return multiway_mlp(x, *parts, expert_offsets, residual=residual, backend=fc1.backend)
        if is_plain(norm, MultiwayLayerNorm) and norm.before_linear and norm.backend == fc1.backend:
            both = (norm.weight, norm.bias)
            return multiway_mlp(x, *parts, expert_offsets, norm=both, eps=norm.eps, residual=residual, backend=fc1.backend)
    hidden = fc1(x, expert_offsets)
    return fc2(hidden if norm is None else norm(hidden, expert_offsets), expert_offsets, residual)
