"""Contrastive losses in blocks of rows, against the whole matrix of similarities.

    python benchmarks/bench_contrastive.py [--device cpu] [--batch 1024] [--seconds 4] [--json F]

Cases: CLIP's and CoCa's loss over a batch; BLIP's with a queue of 57,600 and soft targets, both in fp32 as models compute them.
"""

import sys

import torch
import torch.nn.functional as F
from side_by_side import Case, main, parser

from vlp_fast.ops import contrastive_loss, distilled_contrastive_loss


def plain_contrastive(a, b, scale):
    """Both directions over one matrix."""
    s, labels = scale * a @ b.T, torch.arange(len(a), device=a.device)
    return (F.cross_entropy(s, labels) + F.cross_entropy(s.T, labels)) / 2


def cases(arguments):
    """Batch against batch, and batch against queue."""
    device, batch = arguments.device, arguments.batch

    def features(rows, dim):
        return F.normalize(torch.randn(rows, dim, device=device), dim=1)

    scale = torch.tensor(14.0, device=device, requires_grad=True)
    pairs = [features(batch, 512).requires_grad_() for _ in range(2)]
    providers = {"plain": plain_contrastive, "vlp_fast": contrastive_loss}
    yield Case(f"CLIP: {batch} pairs, width 512", [*pairs, scale], providers)

    few = 8
    student, teacher, keys = features(few, 256).requires_grad_(), features(few, 256), features(few + 57600, 256)

    def plain(f, s):
        t, k = teacher.to(f.dtype), keys.to(f.dtype)
        with torch.no_grad():
            targets = 0.4 * torch.softmax(s * t @ k.T, 1)
            targets.diagonal().add_(0.6)
        return -(targets * torch.log_softmax(s * f @ k.T, 1)).sum(1).mean()

    ours = {"plain": plain, "vlp_fast": lambda f, s: distilled_contrastive_loss(f, teacher, keys, s, 0.4)}
    yield Case(f"BLIP: {few} pairs, queue 57600, width 256", [student, scale], ours)


if __name__ == "__main__":
    options = parser("Contrastive losses against the whole matrix of similarities.")
    options.add_argument("--batch", type=int, default=1024, help="pairs (default: 1024)")
    chosen = options.parse_args()
    sys.exit(main(chosen, lambda: cases(chosen)))
