"""BEiT-3's multiway layers: our operations against two modules per sub-layer with split and torch.cat.

    python benchmarks/bench_multiway.py [--device cpu] [--dtype fp32] [--seconds 10] [--json F]

Cases: one projection (fc1 of BEiT-3 base with its bias), forward and backward; a whole BEiT-3 base layer, forward and backward, over
images of 197 tokens and ragged captions. Providers: "vlp_fast <backend>"; "two linears + cat", an nn.Linear or nn.LayerNorm per
expert, rows split and put together again for every one, on the same packed rows and with the same attention; "two linears + cat, padded",
the same over [batch, 197 + longest caption], split along the tokens, as torchscale's MultiwayNetwork does, with
scaled_dot_product_attention and a mask; "grouped_mm", torch's own grouped product. A provider that disagrees with the first is shown
as wrong and not timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor, nn

from vlp_fast import AttentionPlan
from vlp_fast.cli._output import output_console
from vlp_fast.environment import stamp
from vlp_fast.measuring import measure, prepare_process
from vlp_fast.models.beit3 import Beit3Layer, beit3_preset
from vlp_fast.ops import attention, backend_status, multiway_linear
from vlp_fast.training import caption_lengths

BATCH, TOKENS, DIM, HIDDEN, HEADS = 8, 197, 768, 3072, 12
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}  # of the largest value
BASELINE = "two linears + cat"
Step = Callable[[], list[Tensor]]  # one forward and backward: out, dx and some gradients of weights


class Two(nn.Module):
    """A module for each of two experts; the rows are split along `dim` and put together again."""

    def __init__(self, make: Callable[[], nn.Module], dim: int = 0) -> None:
        super().__init__()
        self.experts, self.dim = nn.ModuleList([make(), make()]), dim

    def forward(self, x: Tensor, split: int) -> Tensor:
        first, second = torch.split(x, [split, x.shape[self.dim] - split], self.dim)
        return torch.cat([self.experts[0](first), self.experts[1](second)], self.dim)


class TwoLayer(nn.Module):
    """A BEiT-3 layer of `Two`s; `attend` maps q, k, v ``[..., heads, head_dim]`` to their attention."""

    def __init__(self, dim: int) -> None:
        super().__init__()

        def linear(width_in: int, width_out: int) -> Two:
            return Two(lambda: nn.Linear(width_in, width_out), dim)

        def norm(width: int) -> Two:
            return Two(lambda: nn.LayerNorm(width), dim)

        self.attention_norm, self.inner_norm, self.ffn_norm, self.norm = norm(DIM), norm(DIM), norm(DIM), norm(HIDDEN)
        self.q, self.k, self.v, self.proj = (linear(DIM, DIM) for _ in range(4))
        self.fc1, self.fc2 = linear(DIM, HIDDEN), linear(HIDDEN, DIM)

    def forward(self, x: Tensor, split: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        y = self.attention_norm(x, split)
        q, k, v = (layer(y, split).unflatten(-1, (HEADS, -1)) for layer in (self.q, self.k, self.v))
        x = x + self.proj(self.inner_norm(attend(q, k, v).flatten(-2), split), split)
        hidden = self.fc1(self.ffn_norm(x, split), split)
        hidden = F.gelu(hidden.float()).to(hidden.dtype)
        return x + self.fc2(self.norm(hidden, split), split)

    @torch.no_grad()
    def load(self, layer: Beit3Layer) -> None:
        """The weights of our layer."""
        ours = dict(layer.named_parameters())
        for theirs, name in {
            "attention_norm": "attention_norm", "inner_norm": "attention.inner_norm", "ffn_norm": "ffn_norm", "norm": "ffn.norm",
            "proj": "attention.proj", "fc1": "ffn.fc1", "fc2": "ffn.fc2",
        }.items():  # fmt: skip
            for e, expert in enumerate(self.get_submodule(theirs).experts):
                expert.weight.copy_(ours[f"{name}.weight"][e])
                expert.bias.copy_(ours[f"{name}.bias"][e])
        for i, two in enumerate((self.q, self.k, self.v)):
            for e, expert in enumerate(two.experts):
                expert.weight.copy_(ours["attention.qkv.weight"][e].chunk(3)[i])
                expert.bias.copy_(ours["attention.qkv.bias"][e].chunk(3)[i])


class Shape:
    """Rows of a batch: images, then captions; and where each lies in a padded batch."""

    def __init__(self, batch: int, device: str) -> None:
        self.texts = tuple(caption_lengths(batch))
        self.split, self.rows = batch * TOKENS, batch * TOKENS + sum(self.texts)
        self.offsets = (0, self.split, self.rows)
        self.longest = TOKENS + max(self.texts)
        self.padded = (batch, self.longest)
        self.plan = AttentionPlan.joint([TOKENS] * batch, self.texts, torch.device(device))
        place = [b * self.longest + i for b in range(batch) for i in range(TOKENS)]
        place += [b * self.longest + TOKENS + i for b, n in enumerate(self.texts) for i in range(n)]
        self.place = torch.tensor(place, device=device)  # of every packed row among the padded ones
        mask = torch.zeros(batch * self.longest, dtype=torch.bool, device=device)
        mask[self.place] = True
        self.mask = mask.view(batch, 1, 1, self.longest)

    def pad(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.padded[0] * self.padded[1], x.shape[1]).index_copy_(0, self.place, x).view(*self.padded, -1)

    def unpad(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)[self.place]


def step(call: Callable[[Tensor], Tensor], x: Tensor, dout: Tensor, weights: list[Tensor]) -> Step:
    def run() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        out = call(leaf)
        return [out.detach(), *torch.autograd.grad(out, [leaf, *weights], dout)]

    return run


def projection(shape: Shape, device: str, dtype: torch.dtype) -> tuple[dict[str, Step], dict[str, str]]:
    """fc1: every provider gives out, dx, dweight and dbias of both experts; and why others cannot run."""
    x, dout = (torch.randn(shape.rows, n, device=device).to(dtype) for n in (DIM, HIDDEN))
    weight = (0.02 * torch.randn(2, HIDDEN, DIM, device=device)).to(dtype).requires_grad_()
    bias = torch.randn(2, HIDDEN, device=device).to(dtype).requires_grad_()
    two = Two(lambda: nn.Linear(DIM, HIDDEN)).to(device, dtype)
    with torch.no_grad():
        for e, expert in enumerate(two.experts):
            expert.weight.copy_(weight[e])
            expert.bias.copy_(bias[e])
    steps = {BASELINE: step(lambda t: two(t, shape.split), x, dout, list(two.parameters()))}

    def ours(backend: str) -> Step:
        return step(lambda t: multiway_linear(t, weight, bias, shape.offsets, backend=backend), x, dout, [weight, bias])

    absent = {}
    for backend in ("torch", "triton"):
        status = backend_status(backend, device)
        if status.available:
            steps[f"vlp_fast {backend}"] = ours(backend)
        else:
            absent[f"vlp_fast {backend}"] = status.reason
    ends = torch.tensor(shape.offsets[1:], dtype=torch.int32, device=device)
    expert = torch.arange(2, device=device).repeat_interleave(
        torch.tensor([shape.split, shape.rows - shape.split], device=device)
    )
    grouped = step(lambda t: F.grouped_mm(t, weight.transpose(1, 2), offs=ends) + bias[expert], x, dout, [weight, bias])
    try:
        grouped()
        steps["grouped_mm"] = grouped
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        absent["grouped_mm"] = str(error).partition("\n")[0]
    return steps, absent


def layer(shape: Shape, device: str, dtype: torch.dtype) -> tuple[dict[str, Step], dict[str, str]]:
    """A whole layer: every provider gives out and dx, and computes the gradients of all weights."""
    x, dout = (torch.randn(shape.rows, DIM, device=device).to(dtype) for _ in range(2))
    steps: dict[str, Step] = {}
    first = None
    for backend in ("torch", "triton"):
        if backend_status(backend, device).available:
            ours = Beit3Layer(beit3_preset("base", backend=backend), 0.0).to(device, dtype)
            if first is not None:
                ours.load_state_dict(first.state_dict())
            first = first or ours
            steps[f"vlp_fast {backend}"] = step(
                lambda t, m=ours: m(t, shape.plan, {2: shape.offsets}, None, 0), x, dout, list(ours.parameters())
            )
    assert first is not None
    two, padded = (TwoLayer(dim).to(device, dtype) for dim in (0, 1))
    two.load(first)
    padded.load(first)
    packed_step = step(
        lambda t: two(t, shape.split, lambda q, k, v: attention(q, k, v, shape.plan)), x, dout, list(two.parameters())
    )

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=shape.mask).transpose(1, 2)

    padded_step = step(lambda t: padded(t, TOKENS, masked), shape.pad(x), shape.pad(dout), list(padded.parameters()))
    padded_step.unpad = shape.unpad  # type: ignore[attr-defined]
    return {BASELINE: packed_step, f"{BASELINE}, padded": padded_step, **steps}, {}


def wrong(run: Step, expected: list[Tensor], dtype: torch.dtype) -> str:
    """Why out or dx of a provider is wrong, empty where both are right."""
    unpad = getattr(run, "unpad", lambda t: t)
    for name, actual, right in zip(("out", "dx"), run(), expected, strict=False):
        error = ((unpad(actual).float() - right.float()).abs().max() / right.float().abs().max()).item()
        if not error <= TOLERANCE[dtype]:
            return f"{name} differs by {error:.2g} of its largest value; {TOLERANCE[dtype]} is allowed"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare multiway layers with two modules per sub-layer, split and cat.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--batch", type=int, default=BATCH, help=f"pairs (default: {BATCH})")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each case (default: 10)")
    parser.add_argument("--json", type=Path, help="write the numbers, with what they were measured on")
    arguments = parser.parse_args()
    prepare_process()
    torch.manual_seed(0)
    dtype, shape = DTYPES[arguments.dtype], Shape(arguments.batch, arguments.device)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("case, forward + backward", "provider"):
        table.add_column(name, no_wrap=True)
    for name in ("median ms", "quartiles", "n", f"vs {BASELINE}"):
        table.add_column(name, justify="right", no_wrap=True)
    rows, notes, failed = [], [], False
    for case, make in {"one projection": projection, "BEiT-3 base layer": layer}.items():
        steps, absent = make(shape, arguments.device, dtype)
        expected = steps[BASELINE]()[:2]
        reasons = {name: wrong(run, expected, dtype) for name, run in steps.items()}
        failed |= any(reasons.values())
        notes += [f"{name} is wrong at {case} and was not timed: {reason}" for name, reason in reasons.items() if reason]
        notes += [f"{name} does not run at {case}: {reason}" for name, reason in absent.items()]
        right = {name: run for name, run in steps.items() if not reasons[name]}
        timings = measure(right, steps=1000, seconds=arguments.seconds, warmup=2, device=arguments.device)
        for name, timing in timings.items():
            numbers = {"ms_median": timing.median, "ms_q1": timing.q1, "ms_q3": timing.q3, "steps": timing.count}
            rows.append({"case": case, "provider": name, **numbers})
            spread, ratio = f"{timing.q1:.1f}-{timing.q3:.1f}", timings[BASELINE].median / timing.median
            table.add_row(case, name, f"{timing.median:.1f}", spread, str(timing.count), f"x{ratio:.2f}")
        table.add_section()
    about = stamp(arguments.device, dtype=arguments.dtype, batch=arguments.batch, seed=0)
    console = output_console()
    console.print(
        f"{about['device_name']}, {about['threads']} threads, torch {about['torch']}, {arguments.dtype}, {shape.rows} rows"
    )
    console.print(table)
    for line in notes:
        console.print(line)
    if arguments.json is not None:
        report = {"schema": 1, "stamp": about, "rows": rows, "notes": notes}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
