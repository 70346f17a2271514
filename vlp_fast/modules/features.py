"""Features for contrast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["unit_features"]


def unit_features(features: Tensor) -> Tensor:
    """L2-normalised along the last dimension, in fp32 at least."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
