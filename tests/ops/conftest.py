"""Queries, keys and values for a plan."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlp_fast import AttentionPlan


@pytest.fixture
def make_qkv(device) -> Callable[..., list[Tensor]]:
    """make_qkv(plan, heads=2, heads_k=heads, head_dim=16, dtype=float32) -> [q, k, v] on the device."""

    def make(
        plan: AttentionPlan, heads: int = 2, heads_k: int | None = None, head_dim: int = 16, dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        shapes = [(plan.query.rows, heads), *[(plan.key.rows, heads_k or heads)] * 2]
        return [torch.randn(rows, h, head_dim).to(device, dtype) for rows, h in shapes]

    return make


@pytest.fixture
def poison() -> object:
    """What torch.empty returns holds NaN (for whole numbers, the largest) while a test that names this fixture runs."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
