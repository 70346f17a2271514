"""What the benchmarks of single operations share: check every provider, time them in turns, print a table, write JSON.

A case has inputs and providers, functions of the inputs; the first is the baseline. A provider whose result or gradients differ from the
baseline's in float64 by more than TOLERANCE of the largest value is shown as wrong and not timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from vlp_fast.cli._output import output_console
from vlp_fast.environment import stamp
from vlp_fast.measuring import measure, prepare_process
from vlp_fast.ops import backend_status

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass
class Case:
    """One row group of the table.

    Attributes:
        name: shapes, for people. inputs: floating tensors; those that require a gradient get one.
        providers: name -> function of the inputs; the first is the baseline. directions: "fwd", "fwd+bwd".
        absent: name -> why it is not there.
    """

    name: str
    inputs: Sequence[Tensor]
    providers: dict[str, Callable[..., Tensor]]
    directions: tuple[str, ...] = ("fwd", "fwd+bwd")
    absent: dict[str, str] = field(default_factory=dict)


def own_backends(device: str) -> tuple[list[str], dict[str, str]]:
    """Backends of ours that run on `device`, and why the others do not."""
    status = {name: backend_status(name, device) for name in ("torch", "triton")}
    return [n for n, s in status.items() if s.available], {
        f"vlp_fast {n}": s.reason for n, s in status.items() if not s.available
    }


def parser(description: str) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case and direction (default: 4)")
    parser.add_argument("--json", type=Path, help="write the numbers, with what they were measured on")
    return parser


def main(arguments: argparse.Namespace, cases: Callable[[], Iterable[Case]]) -> int:
    """Checks and times every case; 1 where a provider is wrong."""
    prepare_process(arguments.threads)
    torch.manual_seed(0)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("case", "direction", "provider"):
        table.add_column(name)
    for name in ("median ms", "quartiles", "n", "vs baseline"):
        table.add_column(name, justify="right", no_wrap=True)
    rows, notes = [], []
    for case in cases():
        right, wrong = _checked(case)
        notes += [f"{name} is wrong at {case.name} and was not timed: {reason}" for name, reason in wrong.items()]
        notes += [f"{name} was not run: {reason}" for name, reason in case.absent.items()]
        baseline = next(iter(case.providers))
        for direction in case.directions:
            wrap = _forward if direction == "fwd" else _forward_backward
            calls = {name: wrap(provider, case.inputs) for name, provider in right.items()}
            timings = measure(calls, steps=1000, seconds=arguments.seconds, warmup=2, device=arguments.device)
            for name, timing in timings.items():
                ratio = timings[baseline].median / timing.median
                numbers = {"ms_median": timing.median, "ms_q1": timing.q1, "ms_q3": timing.q3, "steps": timing.count}
                rows.append({"case": case.name, "direction": direction, "provider": name, "speedup": ratio, **numbers})
                spread = f"{timing.q1:.4g}-{timing.q3:.4g}"
                table.add_row(case.name, direction, name, f"{timing.median:.4g}", spread, str(timing.count), f"x{ratio:.2f}")
            table.add_section()
    about = stamp(arguments.device, dtype=arguments.dtype, seed=0)
    console = output_console()
    console.print(f"{about['device_name']}, {about['threads']} threads, torch {about['torch']}, {arguments.dtype}")
    console.print(table)
    for line in dict.fromkeys(notes):
        console.print(line)
    if arguments.json is not None:
        report = {"schema": 1, "stamp": about, "rows": rows, "notes": list(dict.fromkeys(notes))}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if any(" is wrong at " in line for line in notes) else 0


def _results(provider: Callable[..., Tensor], inputs: Sequence[Tensor], gradients: bool) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    with torch.set_grad_enabled(gradients):
        out = provider(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    if not gradients or not wanted:
        return [out.detach()]
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, wanted, dout.to(out.device, out.dtype))]


def _checked(case: Case) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    gradients = "fwd+bwd" in case.directions
    (_, baseline), *_ = case.providers.items()
    exact = _results(baseline, [x.detach().double().requires_grad_(x.requires_grad) for x in case.inputs], gradients)
    right, wrong = {}, {}
    for name, provider in case.providers.items():
        for actual, expected in zip(_results(provider, case.inputs, gradients), exact, strict=True):
            error = ((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
            if not error <= TOLERANCE[case.inputs[0].dtype]:
                wrong[name] = f"off by {error:.2g} of the largest value"
        if name not in wrong:
            right[name] = provider
    return right, wrong


def _forward(provider: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            provider(*inputs)

    return run


def _forward_backward(provider: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], object]:
    wanted = [x for x in inputs if x.requires_grad]

    def run() -> None:
        out = provider(*inputs)
        torch.autograd.grad(out, wanted, torch.ones_like(out))

    return run
