"""The torch backend of the contrastive operations: PyTorch's products on blocks of rows. Everything is fp32, or fp64.

Functions of the same names and arguments are in `vlp_fast.kernels.contrastive` and `vlp_fast.kernels.hard_negatives`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_fast.ops._products import mm

__all__ = [
    "contrastive_backward",
    "contrastive_forward",
    "distilled_contrastive_forward",
    "hard_negatives",
    "sigmoid_contrastive_forward",
]

BLOCK_BYTES = 64 * 2**20  # of similarities in memory at once


def _blocks(rows: int, columns: Tensor) -> Iterator[slice]:
    size = max(BLOCK_BYTES // (columns.shape[0] * columns.element_size()), 1)
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def contrastive_forward(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of both directions, and the log-sum-exps of rows and columns."""
    n = a.shape[0]
    row_lse, largest, total = a.new_empty(n), a.new_full((n,), -torch.inf), a.new_zeros(n)
    for rows in _blocks(n, b):
        s = mm(a[rows], b.T).mul_(scale)
        row_lse[rows] = torch.logsumexp(s, 1)
        new = torch.maximum(largest, s.amax(0))
        total = total * torch.exp(largest - new) + s.sub_(new).exp_().sum(0)
        largest = new
    column_lse = largest + total.log()
    matched = (a * b).sum(1).mul_(scale.reshape(()))
    return ((row_lse + column_lse) / 2 - matched).mean(), row_lse, column_lse


def contrastive_backward(
    dloss: Tensor, a: Tensor, b: Tensor, scale: Tensor, row_lse: Tensor, column_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and scale."""
    da, db = a.new_empty(a.shape), b.new_zeros(b.shape)
    for rows in _blocks(a.shape[0], b):
        s = mm(a[rows], b.T).mul_(scale)
        ds = (s - row_lse[rows, None]).exp_().add_(s.sub_(column_lse).exp_())
        ds.diagonal(rows.start).sub_(2.0)
        mm(ds, b, out=da[rows])
        mm(ds.T, a[rows], residual=db, out=db)
    share = dloss / (2 * a.shape[0])
    dscale = ((da * a).sum() * share).reshape(scale.shape)
    share = share * scale.reshape(())
    return da.mul_(share), db.mul_(share), dscale


def distilled_contrastive_forward(
    features: Tensor, teacher: Tensor, keys: Tensor, scale: Tensor, alpha: float, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients by features and scale; an empty tensor and zero where they are not needed."""
    n = features.shape[0]
    losses = features.new_empty(n)
    dfeatures = features.new_empty(features.shape if needs_grad else (0,))
    for rows in _blocks(n, keys):
        s = mm(features[rows], keys.T).mul_(scale)
        own = s.diagonal(rows.start)
        lse = torch.logsumexp(s, 1)
        losses[rows] = lse - (1.0 - alpha) * own
        soft = None
        if alpha > 0.0:
            soft = torch.softmax(mm(teacher[rows], keys.T).mul_(scale), 1)
            losses[rows] -= alpha * torch.linalg.vecdot(soft, s)
        if needs_grad:
            own_gradient = s.sub_(lse[:, None]).exp_().diagonal(rows.start)
            own_gradient.sub_(1.0 - alpha)
            if soft is not None:
                s.sub_(soft, alpha=alpha)
            mm(s, keys, out=dfeatures[rows])
    dscale = ((dfeatures * features).sum() / n if needs_grad else features.new_zeros(())).reshape(scale.shape)
    return losses.mean(), dfeatures.mul_(scale.reshape(()) / n), dscale


def sigmoid_contrastive_forward(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, first: int, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients by a, b, scale and bias; empty tensors and zeros where they are not needed."""
    n = a.shape[0]
    losses, dbias = a.new_empty(n), a.new_zeros(())
    da, db = (x.new_zeros(x.shape if needs_grad else (0,)) for x in (a, b))
    for rows in _blocks(n, b):
        s = mm(a[rows], b.T).mul_(scale).add_(bias)
        s.diagonal(first + rows.start).neg_()  # a pair's loss is softplus(-s), any other's softplus(s)
        losses[rows] = F.softplus(s).sum(1)
        if needs_grad:
            s.sigmoid_().diagonal(first + rows.start).neg_()
            dbias = dbias + s.sum()
            mm(s, b, out=da[rows])
            mm(s.T, a[rows], residual=db, out=db)
    dscale = ((da * a).sum() / n if needs_grad else a.new_zeros(())).reshape(scale.shape)
    share = scale.reshape(()) / n
    return losses.mean(), da.mul_(share), db.mul_(share), dscale, (dbias / n).reshape(bias.shape)


def hard_negatives(queries: Tensor, keys: Tensor, scale: Tensor, uniform: Tensor, floor: float, first: int) -> Tensor:
    """The first column whose running sum of weights passes ``uniform`` times their total: an inverse distribution function."""
    n, m = queries.shape[0], keys.shape[0]
    index = torch.empty(n, dtype=torch.int64, device=queries.device)
    for rows in _blocks(n, keys):
        weights = torch.softmax(mm(queries[rows], keys.T).mul_(scale), 1).add_(floor)
        weights.diagonal(first + rows.start).zero_()
        running = weights.cumsum(1)
        drawn = torch.searchsorted(running, (uniform[rows] * running[:, -1])[:, None], right=True)[:, 0]
        own = torch.arange(first + rows.start, first + rows.stop, device=queries.device)
        # rounding may draw past the end, and a row whose other weights are all 0 its own column: then the neighbour
        drawn = drawn.clamp_(max=m - 1)
        index[rows] = torch.where(drawn == own, torch.where(own == m - 1, own - 1, own + 1), drawn)
    return index
