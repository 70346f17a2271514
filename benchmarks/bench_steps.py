"""Suite "steps": pretraining steps, forward and backward: published code against both schedules of ours, with the same weights.

    OMP_WAIT_POLICY=ACTIVE vlp-fast bench --suite steps --dtype bf16 --blip-source BLIP --json steps.json

Rivals run from their own code: open_clip's CoCa with its CoCaLoss, torchscale's BEiT-3 encoder with a linear head on the masked rows, and,
where a clone of github.com/salesforce/BLIP is given, its BLIP_Pretrain. Captions are those of `vlp_fast.training.caption_lengths`; rivals
pad them as their code does (BLIP 30, CoCa 76, BEiT-3 64). First everything runs once in fp32 without dropout; where losses or the norm of
all gradients differ from the rival's, or without one from the published schedule's, the provider is wrong. bf16 is autocast over fp32
weights. On a CUDA device the rival and our published schedule are also there as torch.compile makes them, and our packed schedule as a
CUDA graph, for whose BLIP negatives are given, not drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from vlp_fast.benchmarks.compared_steps import Steps, build
from vlp_fast.benchmarks.registry import DTYPES, Case, Entry, NotHere, Options
from vlp_fast.benchmarks.script import run_as_script
from vlp_fast.training import GraphedStep

__all__ = ["RIVALS", "cases"]

OWN = ("packed", "published")
TWO = "packed, 2 captions an image"
GRAPH = "packed, CUDA graph"
TITLES = {"blip": "BLIP: ITC, ITM, LM, momentum", "coca": "CoCa: contrastive, caption", "beit3": "BEiT-3: images, texts, pairs"}
RIVALS = {"blip": "salesforce BLIP", "coca": "open_clip", "beit3": "torchscale"}
TOLERANCE = 2e-4  # of losses and of the norm of all gradients, relative


def cases(options: Options) -> Iterator[Entry]:
    """A step of each model."""
    for model, title in TITLES.items():
        yield Entry(title, lambda model=model: _case(options, model))


def _case(options: Options, model: str) -> Case:
    torch.manual_seed(options.seed)
    steps = build(options, model)
    rival, graph, calls = RIVALS[model], f"vlp_fast {GRAPH}", {}
    if steps.rival is not None:
        calls[rival] = _training(steps.rival, steps.rival_step, steps.weights, options)
    for name in (*OWN, TWO) if 2 in steps.inputs else OWN:
        calls[f"vlp_fast {name}"] = _training(steps.own, lambda name=name: steps.own_step(name), steps.weights, options)
    if options.device == "cuda":
        compiled = {"vlp_fast published, torch.compile": (steps.own, lambda: steps.own_step("published"))}
        if steps.rival is not None:
            compiled[f"{rival}, torch.compile"] = (steps.rival, steps.rival_step)
        for name, (module, step) in compiled.items():
            calls[name] = _training(module, torch.compile(step), steps.weights, options)
        calls[graph] = _graphed(steps, options)

    def wrong() -> dict[str, str]:
        found = _differences(steps)
        if graph in calls:
            found |= _wrong_graph(steps, calls[graph])
        for module in (steps.own, steps.rival):
            if module is not None:
                module.train()
        if "rival" in found:
            found[rival] = found.pop("rival")
        return {name if name == rival else f"vlp_fast {name}": reason for name, reason in found.items()}

    def release(provider: str) -> None:
        if provider == graph:
            raise NotHere("the allocator does not count what a CUDA graph keeps for its activations as memory of tensors")
        ours = provider.startswith("vlp_fast")
        if ours:
            steps.rival, steps.rival_step, steps.negatives = None, None, None
        else:
            steps.own = nn.Identity()
        (steps.own if ours else steps.rival).train()

    absent = {rival: steps.absent} if steps.absent else {}
    if options.device != "cuda":
        absent[graph] = "needs a CUDA device"
    note = f"{graph}: negatives are given, not drawn" if graph in calls and steps.negatives is not None else ""
    baseline = rival if steps.rival is not None else "vlp_fast published"
    return Case(calls, wrong, absent, baseline, options.batch, "pairs", facts={"model": model}, note=note, release=release)


def _training(
    module: nn.Module, step: Callable[[], dict[str, Tensor]], weights: dict[str, float], options: Options
) -> Callable[[], None]:
    def call() -> None:
        module.zero_grad(set_to_none=True)
        with torch.autocast(options.device, DTYPES[options.dtype], enabled=options.dtype != "fp32"):
            losses = step()
            total = sum(weights[name] * loss for name, loss in losses.items())
        total.backward()

    return call


def _graphed(steps: Steps, options: Options) -> Callable[[], None]:
    """Our packed step as a CUDA graph, which the first call captures."""
    captured: list[GraphedStep] = []

    def call() -> None:
        steps.own.zero_grad(set_to_none=True)
        if not captured:
            captured.append(steps.graphed(None if options.dtype == "fp32" else DTYPES[options.dtype]))
        captured[0](steps.inputs[1])

    return call


def _wrong_graph(steps: Steps, call: Callable[[], None]) -> dict[str, str]:
    """`_differences` of the CUDA graph; then `call` captures the one to be timed. What cannot be captured is wrong, too."""
    try:
        found = _differences(steps, ("published", GRAPH))
        steps.own.train()
        call()
    except RuntimeError as error:
        return {GRAPH: f"it cannot be captured: {error}"}
    return found


def _differences(steps: Steps, names: tuple[str, ...] = OWN) -> dict[str, str]:
    """Provider of ours -> what of its step's losses and norm of gradients is not the rival's, or without one the published schedule's."""
    found = {}
    start = {name: t.clone() for name, t in steps.own.named_buffers()}
    right = "published" if steps.rival is None else "rival"
    for name in (*(() if steps.rival is None else ("rival",)), *names):
        module = steps.rival if name == "rival" else steps.own
        module.eval()
        module.zero_grad(set_to_none=True)
        if name == GRAPH:
            losses = steps.graphed(None)(steps.inputs[1])
        else:
            losses = steps.rival_step() if name == "rival" else steps.own_step(name)
            sum(steps.weights[key] * loss for key, loss in losses.items()).backward()
        norm = torch.stack([p.grad.double().square().sum() for p in module.parameters() if p.grad is not None]).sum().sqrt()
        found[name] = {**{key: float(loss.detach()) for key, loss in losses.items()}, "norm of gradients": float(norm)}
        module.zero_grad(set_to_none=True)
        for buffer, tensor in steps.own.named_buffers():  # queues have moved on
            tensor.copy_(start[buffer])
    wrong = {}
    for name, numbers in found.items():
        for key, expected in found[right].items():
            if not abs(numbers[key] - expected) <= TOLERANCE * abs(expected):
                whose = "the rival's" if right == "rival" else "that of the published schedule"
                wrong[name] = f"{key} is {numbers[key]:.6g} where {whose} is {expected:.6g}"
    return wrong


if __name__ == "__main__":
    raise SystemExit(run_as_script("steps"))
