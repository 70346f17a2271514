"""The suite "kernels": each operation against what it replaces, forward and with its backward."""

from __future__ import annotations

from collections.abc import Iterator

from vlp_fast.benchmarks import (
    bench_attention,
    bench_attention_pool,
    bench_contrastive,
    bench_decode_attention,
    bench_linear_cross_entropy,
    bench_multiway,
    bench_products,
)
from vlp_fast.benchmarks.registry import Entry, Options

__all__ = ["PROVIDERS", "cases"]

OPERATIONS = (
    bench_attention,
    bench_attention_pool,
    bench_decode_attention,
    bench_multiway,
    bench_products,
    bench_linear_cross_entropy,
    bench_contrastive,
)
# operation, as names of cases begin -> all its providers, here or not
PROVIDERS: dict[str, tuple[str, ...]] = {name: known for module in OPERATIONS for name, known in module.PROVIDERS.items()}


def cases(options: Options) -> Iterator[Entry]:
    """Every case of every operation. Size "tiny" shrinks vocabularies, queues and layers: for tests."""
    for module in OPERATIONS:
        yield from module.cases(options)
