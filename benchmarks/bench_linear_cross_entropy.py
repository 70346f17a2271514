"""The vocabulary loss without logits, against F.cross_entropy(F.linear()).

    python benchmarks/bench_linear_cross_entropy.py [--device cpu] [--dtype fp32] [--rows 1024] [--seconds 10] [--json F]

Cases: BLIP's words (30,524, label smoothing 0.1, a bias) and CoCa's (49,408), width 768, forward and backward.
"""

import sys

import torch
import torch.nn.functional as F
from side_by_side import DTYPES, Case, main, own_backends, parser

from vlp_fast.ops import linear_cross_entropy


def cases(arguments):
    """Both vocabularies."""
    device, dtype, rows = arguments.device, DTYPES[arguments.dtype], arguments.rows
    backends, absent = own_backends(device)
    own = getattr(F, "linear_cross_entropy", None)
    if own is None:
        absent["F.linear_cross_entropy"] = f"torch {torch.__version__} has none"
    for name, words, smoothing, has_bias in (("BLIP", 30524, 0.1, True), ("CoCa", 49408, 0.0, False)):
        hidden = torch.randn(rows, 768, device=device).to(dtype).requires_grad_()
        weight = (torch.randn(words, 768, device=device) * 0.02).to(dtype).requires_grad_()
        bias = torch.zeros(words, device=device, dtype=dtype).requires_grad_()
        targets = torch.randint(words, (rows,), device=device)

        def plain(hidden, weight, bias=None, targets=targets, smoothing=smoothing):
            return F.cross_entropy(F.linear(hidden, weight, bias), targets, label_smoothing=smoothing)

        def ours(backend, targets=targets, smoothing=smoothing):
            options = {"label_smoothing": smoothing, "backend": backend}
            return lambda h, w, *rest: linear_cross_entropy(h, w, targets, *rest, **options)

        providers = {"F.cross_entropy(F.linear)": plain, **{f"vlp_fast {backend}": ours(backend) for backend in backends}}
        if own is not None and not smoothing:
            providers["F.linear_cross_entropy"] = lambda h, w, targets=targets: own(h, w, targets)
        inputs = [hidden, weight, *([bias] if has_bias else [])]
        yield Case(f"{name}: {rows} rows x {words} words", inputs, providers, ("fwd+bwd",), dict(absent))


if __name__ == "__main__":
    options = parser("The vocabulary loss without logits in memory.")
    options.add_argument("--rows", type=int, default=1024, help="rows with a word to predict (default: 1024)")
    chosen = options.parse_args()
    sys.exit(main(chosen, lambda: cases(chosen)))
