"""Attentional pooling with one query: K and V never formed, against nn.MultiheadAttention.

    python benchmarks/bench_attention_pool.py [--device cpu] [--dtype fp32] [--batch 32] [--seconds 4] [--json F]

Providers: "nn.MultiheadAttention" after a LayerNorm of the tokens, its query expanded to the batch, as open_clip's pooler does;
"vlp_fast <backend>", `AttentionalPooler` with the same weights. Tokens need a gradient, and so do the weights (not asked for here: their
products are small in ours and as large as the tokens' in the other). Shapes: CoCa and MAP poolers at 576 tokens.
"""

import sys

import torch
from side_by_side import DTYPES, Case, main, own_backends, parser
from torch import nn

from vlp_fast.modules import AttentionalPooler


def cases(arguments):
    """One query and 256 queries."""
    device, dtype = arguments.device, DTYPES[arguments.dtype]
    backends, absent = own_backends(device)
    for queries, batch in ((1, arguments.batch), (256, max(arguments.batch // 4, 1))):
        x = torch.randn(batch, 576, 768, device=device, dtype=dtype).requires_grad_()
        module = AttentionalPooler(768, 768, 8, queries).to(device, dtype)
        twin = nn.MultiheadAttention(768, 8, batch_first=True).to(device, dtype)
        twin.load_state_dict(module.attn.state_dict())

        def other(x, module=module, twin=twin):
            m, t = (module, twin) if x.dtype != torch.float64 else (_double(module), _double(twin))
            tokens = m.ln_k(x)
            return t(m.ln_q(m.query).expand(len(x), -1, -1), tokens, tokens, need_weights=False)[0]

        def ours(backend, module=module):
            def run(tokens):
                module.backend = backend
                return module(tokens)

            return run

        providers = {"nn.MultiheadAttention": other, **{f"vlp_fast {name}": ours(name) for name in backends}}
        yield Case(f"{batch} x 576 tokens, {queries} queries", [x], providers, absent=absent)


def _double(module):
    copy = (
        type(module)(768, 768, 8, module.n_queries)
        if isinstance(module, AttentionalPooler)
        else nn.MultiheadAttention(768, 8, batch_first=True)
    )
    copy.load_state_dict(module.state_dict())
    return copy.to(next(module.parameters()).device, torch.float64)


if __name__ == "__main__":
    options = parser("Attentional pooling against nn.MultiheadAttention.")
    options.add_argument("--batch", type=int, default=32, help="images (default: 32)")
    chosen = options.parse_args()
    sys.exit(main(chosen, lambda: cases(chosen)))
