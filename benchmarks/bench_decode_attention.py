"""A decoding step's attention: own caches and shared images, against repeated keys and values.

    python benchmarks/bench_decode_attention.py [--device cpu] [--dtype fp32] [--images 8] [--beams 3] [--seconds 2] [--json F]

Providers: "sdpa, repeated", scaled_dot_product_attention on keys and values repeated for every beam beforehand, as padded models keep
them; "vlp_fast <backend>" on one copy per image.
"""

import sys

import torch
import torch.nn.functional as F
from side_by_side import DTYPES, Case, main, own_backends, parser

from vlp_fast.decode_plan import DecodePlan
from vlp_fast.ops import decode_attention


def cases(arguments):
    """The image of a caption, and each beam's own cache."""
    device, dtype, images, beams = arguments.device, DTYPES[arguments.dtype], arguments.images, arguments.beams
    backends, absent = own_backends(device)
    rows, heads, dim, tokens, capacity, length = images * beams, 12, 64, 577, 32, 20
    q = torch.randn(rows, heads, dim, device=device, dtype=dtype)

    def sdpa(q, k, v, sequences, visible):
        """One row per sequence."""
        k, v = (t.unflatten(0, (sequences, -1))[:, :visible].transpose(1, 2) for t in (k, v))
        return F.scaled_dot_product_attention(q[:, :, None], k, v)[:, :, 0]

    cross = DecodePlan.cross([tokens] * images, beams, device)
    k, v = (torch.randn(images * tokens, heads, dim, device=device, dtype=dtype) for _ in "kv")
    repeated = [t.unflatten(0, (images, tokens)).repeat_interleave(beams, 0).flatten(0, 1) for t in (k, v)]

    def run(plan, backend, k, v):
        return lambda q: decode_attention(q, k, v, plan, backend=backend)

    providers = {"sdpa, repeated": lambda q: sdpa(q, *(t.to(q.dtype) for t in repeated), rows, tokens)}
    providers.update({f"vlp_fast {name}": run(cross, name, k, v) for name in backends})
    yield Case(f"{images} images of {tokens} tokens, {beams} beams", [q], providers, ("fwd",), absent)

    own = DecodePlan.self_cache(rows, capacity, length, device)
    k, v = (torch.randn(rows * capacity, heads, dim, device=device, dtype=dtype) for _ in "kv")
    providers = {"sdpa, repeated": lambda q, k=k, v=v: sdpa(q, k.to(q.dtype), v.to(q.dtype), rows, length)}
    providers.update({f"vlp_fast {name}": run(own, name, k, v) for name in backends})
    yield Case(f"{rows} caches of {length} tokens", [q], providers, ("fwd",), absent)


if __name__ == "__main__":
    options = parser("Attention of a decoding step.")
    options.add_argument("--images", type=int, default=8)
    options.add_argument("--beams", type=int, default=3)
    chosen = options.parse_args()
    sys.exit(main(chosen, lambda: cases(chosen)))
