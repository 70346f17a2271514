"""Suite "changes": what single changes of this library gain: all of it, against all of it but one, in turns in one process.

Each case has what was predicted of the change before it was made, from the profile or the count named in its note; the providers are the
library as it is ("vlp_fast") and without the change. A gain is the time without it over the time with it. Cases that begin with "left out"
are of what was tried and not taken: their provider "tried" is the library with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vlp_fast.benchmarks import bench_steps, compared_steps, step_rivals
from vlp_fast.benchmarks.registry import DTYPES, Case, Entry, NotHere, Options
from vlp_fast.benchmarks.script import run_as_script
from vlp_fast.generation import generate
from vlp_fast.models import BlipCaptioner, blip_preset, open_clip_coca_preset
from vlp_fast.models.coca_open_clip import OpenClipCoca
from vlp_fast.modules import Dropout
from vlp_fast.ops import _attention_bf16, _multiway_torch, _products, linear, packed_weights

__all__ = ["cases"]

Context = Callable[[], AbstractContextManager[Any]]


def cases(options: Options) -> Iterator[Entry]:
    """A change each. Those of one dtype are not there in another."""
    fp32, bf16 = options.dtype == "fp32", options.dtype == "bf16"
    steps = {"blip": "BLIP", "coca": "CoCa", "beit3": "BEiT-3"}
    for model, predicted, why in (
        ("blip", 1.19, "1,908 GFLOPs of a step against 1,600: vlp-fast profile"),
        ("beit3", 1.0, "the same FLOPs in one forward, not three"),
    ):
        yield Entry(f"packed schedule, {steps[model]} step", partial(_schedules, options, model, predicted, why))
    if fp32 and options.device == "cpu":
        why = "oneDNN's products are twice as fast as MKL's on this processor, and are most of a step"
        for model in steps:
            yield Entry(
                f"fp32 products by oneDNN, {steps[model]} step", partial(_step, options, model, _without_onednn, 1.7, why)
            )
    if bf16 and options.device == "cpu":
        why = "29 -> 15 ms of attention, forward and backward, in each of 12 layers of a step of 3.4 s"
        for model in steps:
            yield Entry(
                f"bf16 attention as products, {steps[model]} step",
                partial(_step, options, model, _without_products, 1.06, why),
            )
        why = "of 3.3 s 80 ms are casts of the text tower's weights and gradients a second time, 130 ms tables of zeros for lookups"
        yield Entry(
            "parameters shared by a step's forwards, BLIP step", partial(_step, options, "blip", _nothing_shared, 1.06, why)
        )
        why = "600 of 6,100 ms of a step on a busy machine are norms of wide rows and copies of them to and from fp32"
        yield Entry("norms rounded once and by parts, BEiT-3 step", partial(_step, options, "beit3", _plain_norms, 1.08, why))
        why = "images padded to the longest pair: 27 % more scores, and a mask"
        yield Entry(
            "images apart from pairs in attention, BEiT-3 step", partial(_step, options, "beit3", _padded_together, 1.03, why)
        )
    if options.device == "cpu":
        why = "a GELU more, two tensors of hidden rows fewer that are written for the first time"
        for model in ("blip", "beit3"):
            yield Entry(
                f"feed-forward made again in the backward, {steps[model]} step",
                partial(_step, options, model, _kept_hidden, 1.01, why),
            )
        why = "1.8 -> 0.5 ms of random numbers in each of 46 calls"
        yield Entry("dropout by 16 bits, BLIP step", partial(_step, options, "blip", _plain_dropout, 1.02, why))
        writes = partial(_generation, options)
        why = "oneDNN reorders a weight in every call without: 8 rows read it at 41 GB/s where 24 were reached"
        for model in ("blip", "coca"):
            yield Entry(f"packed weights, {steps[model]} nucleus 0.9", partial(writes, model, "packed", 1.15, why))
        why = "9 of 28 ms of a step are not products: half of them gone"
        for model in ("blip", "coca"):
            yield Entry(
                f"layers bound to their weights, {steps[model]} nucleus 0.9", partial(writes, model, _unbound, 1.15, why)
            )
        why = "sorting a vocabulary and summing it in fp64 are 7 of 190 ms of a step on AVX2, and half of them is not needed"
        for model in ("blip", "coca"):
            yield Entry(f"words drawn without sorting, {steps[model]} nucleus 0.9", partial(writes, model, _sorted, 1.02, why))
        why = "the best six of three vocabularies are 1 of 140 ms of a step on AVX2, and half of it is not needed"
        yield Entry("best words by blocks, BLIP beam 3", partial(writes, "blip", _plain_topk, 1.005, why))
    if fp32 and options.device == "cpu":
        why = "8 rows times a weight read it at 7 to 9 GB/s on AVX2 where 4 to 6 were reached, and are half of a call"
        for model in ("blip", "coca"):
            yield Entry(
                f"products of few rows turned, {steps[model]} nucleus 0.9", partial(writes, model, _not_turned, 1.2, why)
            )
    if options.device == "cpu":
        why = "scores in fp32 by batched products, as bf16 has them, whose forward and backward halve"
        yield Entry("left out: fp32 attention as products, 8 images", partial(_fp32_attention, options, 1.5, why))
        if bf16:
            why = "fewer, larger products"
            yield Entry("left out: bf16 attention with all scores at once, 8 images", partial(_whole_scores, options, 1.1, why))
        why = "one large product for twelve, of the same rows"
        yield Entry("left out: keys and values of 12 layers in one product", partial(_one_product, options, 1.05, why))
        why = "one pass less over the MLP's hidden rows"
        yield Entry("GELU inside the product, BLIP image encoder", partial(_encoder, options, 1.03, why))


def _compared(context: Context, call: Callable[[], object], predicted: float, why: str, name: str, **rest: Any) -> Case:
    """call as it is, and within `context`, where the change is undone."""
    with ExitStack() as stack:
        stack.enter_context(context())  # a name that is not there fails before anything is timed

    def without() -> object:
        with context():
            return call()

    calls = {name: without, "vlp_fast": call}
    return Case(calls, dict, facts={"predicted": predicted}, note=f"predicted: {why}", **rest)


def _built(options: Options, model: str) -> compared_steps.Steps:
    torch.manual_seed(options.seed)
    missing = patch.multiple(step_rivals, open_clip_coca=_not_wanted, Torchscale=_not_wanted)
    with missing:
        steps = compared_steps.build(replace(options, blip_source=None), model)
    steps.own.train()
    return steps


def _not_wanted(*args: object, **options: object) -> None:
    raise ImportError("no rival is wanted")


def _schedules(options: Options, model: str, predicted: float, why: str) -> Case:
    steps = _built(options, model)

    def call(schedule: str) -> Callable[[], object]:
        return bench_steps._training(steps.own, lambda: steps.own_step(schedule), steps.weights, options)

    calls = {"without: published": call("published"), "vlp_fast": call("packed")}
    names = dict(zip(("published", "packed"), calls, strict=True))

    def wrong() -> dict[str, str]:
        found = {names[schedule]: reason for schedule, reason in bench_steps._differences(steps).items()}
        steps.own.train()
        return found

    return Case(calls, wrong, facts={"predicted": predicted}, note=f"predicted: {why}")


def _step(options: Options, model: str, context: Context, predicted: float, why: str) -> Case:
    steps = _built(options, model)
    call = bench_steps._training(steps.own, lambda: steps.own_step("packed"), steps.weights, options)
    return _compared(context, call, predicted, why, "without")


def _nothing_shared() -> AbstractContextManager[Any]:
    return patch("vlp_fast.training.objective.parameters_shared", nullcontext)


def _plain_norms() -> AbstractContextManager[Any]:
    stack = ExitStack()
    stack.enter_context(patch("vlp_fast.modules.multiway.autocast_dtype", lambda device_type: None))
    stack.enter_context(patch.object(_multiway_torch, "CACHED", 2**40))
    return stack


def _kept_hidden() -> AbstractContextManager[Any]:
    stack = ExitStack()
    for module in ("feedforward", "multiway"):
        stack.enter_context(patch(f"vlp_fast.modules.{module}.is_plain", lambda *args: False))
    return stack


def _padded_together() -> AbstractContextManager[Any]:
    return patch("vlp_fast.padding.APART", 2**40)


def _unbound() -> AbstractContextManager[Any]:
    stack = ExitStack()
    for name, layer in (("bind", lambda layer: layer), ("bind_mlp", lambda layer: layer), ("bind_gelu", _gelu_after)):
        stack.enter_context(patch(f"vlp_fast.generation.decoders.{name}", layer))
    stack.enter_context(patch("vlp_fast.modules.bound._by_torch", lambda layer: False))
    stack.enter_context(patch("vlp_fast.ops._decode_attention_torch.bind", lambda *args: None))
    return stack


def _gelu_after(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: F.gelu(layer(x))


def _without_onednn() -> AbstractContextManager[Any]:
    if not _products.onednn_is_faster():
        raise NotHere("the two libraries are the same one on this processor")
    return patch.object(_products, "onednn_is_faster", lambda: False)


def _without_products() -> AbstractContextManager[Any]:
    if not _attention_bf16._products_are_faster():
        raise NotHere("this processor's bf16 attention is PyTorch's fused one in any case")
    return patch.object(_attention_bf16, "_products_are_faster", lambda: False)


def _plain_dropout() -> AbstractContextManager[Any]:
    return patch.object(Dropout, "forward", nn.Dropout.forward)


def _generation(options: Options, model: str, change: str | Context, predicted: float, why: str) -> Case:
    """Captions. change: "packed", or what undoes a change; weights are packed with and without it, but for `_not_turned`."""
    torch.manual_seed(options.seed)
    shape = compared_steps.SHAPES[options.size]
    width, depth, heads = shape["width"], shape["depth"], shape["heads"]
    images = torch.randn(options.batch, 3, 224, 224).to(DTYPES[options.dtype])
    if model == "blip":
        config: Any = blip_preset(
            "base", vision_dim=width, vision_depth=depth, vision_heads=heads, dim=width, depth=depth, num_heads=heads,
            hidden_dim=shape["hidden"],
        )  # fmt: skip
        captioner: nn.Module = BlipCaptioner(config)
        arguments: dict[str, Any] = {"eos_id": 102}
    else:
        captioner = OpenClipCoca(open_clip_coca_preset("tiny" if options.size == "tiny" else "ViT-B-32", image_size=224))
        arguments = {"start_id": 1, "eos_id": 2}
    arguments |= {"num_beams": 3} if change is _plain_topk else {"sample": True, "top_p": 0.9}
    captioner = captioner.eval().to(DTYPES[options.dtype])
    packed = packed_weights(captioner)

    def plain() -> object:
        with torch.no_grad():
            return generate(captioner, images, min_length=21, max_length=21, **arguments)

    def within() -> object:
        with packed:
            return plain()

    if isinstance(change, str):
        return Case({"without": plain, "vlp_fast": within}, dict, facts={"predicted": predicted}, note=f"predicted: {why}")
    return _compared(change, plain if change is _not_turned else within, predicted, why, "without")


def _not_turned() -> AbstractContextManager[Any]:
    if not _products.onednn_is_faster_for_few_rows():
        raise NotHere("products of few rows are turned on AVX2 alone")
    return patch.object(_products, "_is_turned", lambda *args: False)


def _plain_topk() -> AbstractContextManager[Any]:
    return patch("vlp_fast.generation.search.best_scores", torch.topk)


def _sorted() -> AbstractContextManager[Any]:
    return patch("vlp_fast.generation.search.draw", _draw_of_sorted)


def _draw_of_sorted(
    scores: torch.Tensor, top_k: None, top_p: float, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """By NumPy's sort of values alone, and sums of whole vocabularies in fp64."""
    best = torch.from_numpy(np.sort(scores.numpy(), -1))
    held = (best - best[:, -1:]).exp_().cumsum(-1, dtype=torch.float64)
    least = best.gather(1, torch.searchsorted(held, held[:, -1:] * (1.0 - top_p), right=True))
    mass = (scores - best[:, -1:]).exp_().mul_(scores >= least).cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    point = torch.rand(len(scores), 1, dtype=torch.float64, generator=generator) * total
    word = torch.searchsorted(mass, torch.minimum(point, total * (1 - 1e-15)), right=True)
    return word[:, 0], (scores.gather(1, word) - best[:, -1:] - total.log())[:, 0].float()


def _image_heads(options: Options, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, v and a gradient of the output for ViT-B's attention: ``[batch, 12, 197, 64]``, laid out by rows."""
    torch.manual_seed(options.seed)
    return tuple(torch.randn(options.batch, 197, 12, 64).to(dtype).transpose(1, 2) for _ in range(4))


def _gradients(function: Callable[..., torch.Tensor], tensors: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    *inputs, dout = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(function(*leaves), leaves, dout)


def _fp32_attention(options: Options, predicted: float, why: str) -> Case:
    tensors = _image_heads(options, torch.float32)

    def tried(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax((q @ k.transpose(-1, -2)) * 0.125, -1) @ v

    calls = {"vlp_fast": _gradients(F.scaled_dot_product_attention, tensors), "tried": _gradients(tried, tensors)}
    return Case(calls, dict, facts={"predicted": predicted}, note=f"predicted: {why}")


def _whole_scores(options: Options, predicted: float, why: str) -> Case:
    call = _gradients(
        lambda q, k, v: _attention_bf16.attention(q, k, v, None, False, 0.125), _image_heads(options, torch.bfloat16)
    )

    def tried() -> object:
        with patch.object(_attention_bf16, "BLOCK", 2**40):
            return call()

    return Case({"vlp_fast": call, "tried": tried}, dict, facts={"predicted": predicted}, note=f"predicted: {why}")


def _one_product(options: Options, predicted: float, why: str) -> Case:
    """Forward and backward of the cross-attentions' key_value layers of a text tower, each layer's output with its own gradient."""
    torch.manual_seed(options.seed)
    dtype, (layers, width) = DTYPES[options.dtype], (12, 768)
    rows = torch.randn(options.batch * 197, width).to(dtype).requires_grad_()
    weights = [(torch.randn(2 * width, width) * 0.02).to(dtype).requires_grad_() for _ in range(layers)]
    biases = [torch.zeros(2 * width, dtype=dtype, requires_grad=True) for _ in range(layers)]
    gradient = torch.randn(len(rows), 2 * width).to(dtype)
    leaves = [rows, *weights, *biases]
    joined = [torch.cat(list(map(torch.Tensor.detach, parts))).requires_grad_() for parts in (weights, biases)]  # as if kept so

    def apart() -> object:
        outs = [linear(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        return torch.autograd.grad(outs, leaves, [gradient] * layers)

    def tried() -> object:
        outs = linear(rows, *joined).split(2 * width, 1)
        return torch.autograd.grad(outs, [rows, *joined], [gradient] * layers)

    return Case({"vlp_fast": apart, "tried": tried}, dict, facts={"predicted": predicted}, note=f"predicted: {why}")


def _encoder(options: Options, predicted: float, why: str) -> Case:
    steps = _built(options, "blip")
    encoder = steps.own.eval().model.image_encoder.to(DTYPES[options.dtype])
    images = steps.inputs[1].images.to(DTYPES[options.dtype])

    def call() -> object:
        with torch.no_grad():
            return encoder(images)

    def context() -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(patch.object(_multiway_torch, "fuses_gelu", lambda *args: False))
        stack.enter_context(patch.object(_products, "fuses_gelu", lambda *args: False))
        return stack

    return _compared(context, call, predicted, why, "without")


if __name__ == "__main__":
    raise SystemExit(run_as_script("changes"))
