"""The suite "kernels" for pytest-benchmark: a benchmark for each case and provider.

    pytest benchmarks/ --benchmark-json kernels.json

On CUDA in bf16, else in fp32. A provider that is not here is skipped with the reason; one that is wrong fails. Cases and checks are those
of `vlp-fast bench --suite kernels`, which times providers in turns; here each is timed by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch

from vlp_fast.benchmarks.bench_kernels import PROVIDERS
from vlp_fast.benchmarks.registry import Entry, NotHere, Options, cases_of

pytest.importorskip("pytest_benchmark")

CUDA = torch.cuda.is_available()
OPTIONS = Options(device="cuda" if CUDA else "cpu", dtype="bf16" if CUDA else "fp32")
ENTRIES = {entry.name: entry for entry in cases_of("kernels", OPTIONS)}


class Built(NamedTuple):
    """calls: of those that are right. wrong, absent: provider -> reason. missing: why there is no case, or ""."""

    calls: dict[str, Callable[[], object]]
    wrong: dict[str, str]
    absent: dict[str, str]
    missing: str = ""


@lru_cache(maxsize=1)  # providers of a case follow each other
def built(entry: Entry) -> Built:
    try:
        case = entry.build()
    except (NotHere, ImportError) as error:
        return Built({}, {}, {}, str(error))
    return Built(case.calls, case.wrong(), case.absent)


@pytest.fixture(scope="module", autouse=True)
def no_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    ("case", "provider"),
    [pytest.param(name, p, id=f"{name}: {p}") for name in ENTRIES for p in PROVIDERS[name.partition(":")[0]]],
)
def test_kernel(benchmark, case: str, provider: str) -> None:
    found = built(ENTRIES[case])
    reason = found.missing or found.absent.get(provider)
    if reason:
        pytest.skip(reason)
    assert provider not in found.wrong, f"{provider} is wrong: {found.wrong[provider]}"
    call = found.calls[provider]
    benchmark.group = case
    benchmark.extra_info.update(provider=provider, device=OPTIONS.device, dtype=OPTIONS.dtype, torch=torch.__version__)

    def waited() -> None:
        call()
        if CUDA:
            torch.cuda.synchronize()

    benchmark(waited)
