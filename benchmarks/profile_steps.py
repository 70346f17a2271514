"""What pretraining steps, or writing captions, spend their time on, by kind of operation, ours and the rival's: on a CPU.

    OMP_WAIT_POLICY=ACTIVE python benchmarks/profile_steps.py --dtype bf16 --blip-source BLIP --json profile.json
    OMP_WAIT_POLICY=ACTIVE python benchmarks/profile_steps.py --suite generate --dtype fp32 --json profile.json

Times are torch.profiler's of operations alone, without what they call; "between" is what is left of a call, which is Python and the
profiler itself. The cases are those of the suites; a rival is profiled in the same process, after ours.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from vlp_fast.benchmarks import compared_steps, registry
from vlp_fast.benchmarks.registry import Options
from vlp_fast.environment import stamp
from vlp_fast.measuring import prepare_process

__all__ = ["KINDS", "by_kind"]

KINDS = {
    "products": ("mm", "addmm", "addmm_", "_linear_pointwise", "mkldnn_convolution", "convolution_backward", "_convolution"),
    "attention's products": (
        "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "softmax, masks, random numbers": (
        "_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data", "masked_fill", "masked_fill_", "bernoulli_",
        "random_", "native_dropout", "native_dropout_backward", "ge", "bitwise_xor", "bitwise_xor_", "bitwise_and", "bitwise_and_",
        "__rshift__", "where",
    ),
    "norms and GELU": ("native_layer_norm", "native_layer_norm_backward", "gelu", "gelu_", "gelu_backward"),
    "copies and casts": ("copy_", "cat", "index", "index_select", "index_add_", "scatter_add_", "embedding", "_to_copy", "clone"),
    "zeros": ("fill_", "zero_"),
    # in a step these are the vocabulary loss's
    "choosing words": ("topk", "sort", "cumsum", "exp_", "amax", "max", "logsumexp", "searchsorted", "multinomial", "gather"),
    "sums": ("add", "add_", "sum", "mul", "mul_", "div", "div_", "lerp_", "sub", "neg"),
}  # fmt: skip
OURS = {"steps": "vlp_fast packed", "generate": "vlp_fast, packed"}  # suite -> provider
OTHER, BETWEEN = "other operations", "between"
_KIND = {name: kind for kind, names in KINDS.items() for name in names}
CALLS = 3  # of which the one of median time is told


def by_kind(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of one call by kind of operation, and the whole as "call"."""
    found = []
    for _ in range(CALLS):
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            start = time.perf_counter()
            call()
            whole = (time.perf_counter() - start) * 1e3
        kinds: Counter[str] = Counter()
        for event in recorded.key_averages():
            kinds[_KIND.get(event.key.rpartition("::")[2], OTHER)] += event.self_cpu_time_total / 1e3
        found.append({"call": whole, **{kind: kinds[kind] for kind in (*KINDS, OTHER)}, BETWEEN: whole - sum(kinds.values())})
    return sorted(found, key=lambda times: times["call"])[CALLS // 2]


def main() -> int:
    """Profiles the cases that are wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=tuple(OURS), default="steps")
    parser.add_argument("--only", nargs="+", default=(), metavar="PART", help="parts of cases' names")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--size", choices=tuple(compared_steps.SHAPES), default="base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--blip-source", type=Path, help="a clone of github.com/salesforce/BLIP")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    prepare_process(arguments.threads)
    options = Options(
        dtype=arguments.dtype, size=arguments.size, batch=arguments.batch, blip_source=arguments.blip_source,
        only=tuple(arguments.only),
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for entry in registry.cases_of(arguments.suite, options):
        try:
            case = entry.build()
        except (registry.NotHere, ImportError) as error:
            print(f"{entry.name}: {error}")
            continue
        wrong = case.wrong()  # after which the models of steps train
        rivals = [name for name in (*case.calls, *case.absent) if not name.startswith("vlp_fast")]
        for provider in (OURS[arguments.suite], *rivals):
            if provider not in case.calls or provider in wrong:
                print(f"{entry.name}, {provider}: {wrong.get(provider) or case.absent.get(provider)}")
                continue
            case.calls[provider]()  # warm up
            rows.append({"case": entry.name, "provider": provider, **by_kind(case.calls[provider])})
            print(
                ", ".join(
                    f"{name} {value if isinstance(value, str) else f'{value:,.0f} ms'}" for name, value in rows[-1].items()
                )
            )
        del case
    if arguments.json:
        given = {"suite": f"profile of {arguments.suite}", "dtype": options.dtype, "size": options.size, "batch": options.batch}
        report = {"stamp": stamp("cpu", **given), "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
