"""Pretraining steps, forward and backward with the same weights: published code against `vlp_fast.training`, in both schedules.

    OMP_WAIT_POLICY=ACTIVE python benchmarks/bench_steps.py --dtype bf16 --blip-source BLIP --json steps.json

Rivals run from their own code: open_clip's CoCa with its CoCaLoss, torchscale's BEiT-3 encoder with a linear head on the masked rows, and,
where `--blip-source` names a clone of github.com/salesforce/BLIP, its BLIP_Pretrain. Captions are those of
`vlp_fast.training.caption_lengths`; rivals pad them as their code does (BLIP 30, CoCa 76, BEiT-3 64). First everything runs once in fp32
without dropout, and where losses or the norm of all gradients differ the case is shown as wrong and not timed. Memory is the most resident
memory of a process of its own with that provider alone, at its second step.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Read when torch loads OpenMP. Waiting threads that spin cost a busy machine a factor of ten; the stamp of every report tells.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor, nn

from vlp_fast.cli._output import output_console
from vlp_fast.data.batches import Batch
from vlp_fast.environment import stamp
from vlp_fast.measuring import measure, peak_memory, prepare_process
from vlp_fast.models import beit3_preset
from vlp_fast.models.checkpoints import open_clip_coca
from vlp_fast.models.checkpoints.beit3 import format_of
from vlp_fast.profile_peers import torchvision_names
from vlp_fast.training import Beit3Pretraining, CocaPretraining, caption_lengths, salesforce_blip
from vlp_fast.training.beit3 import Beit3Inputs, MaskedImages, MaskedTexts

OWN = ("packed", "published")
TWO = "packed, 2 captions an image"
RIVALS = {"blip": "salesforce BLIP", "coca": "open_clip", "beit3": "torchscale"}
PADDED = {"blip": 30, "coca": 76, "beit3": 64}
TINY = {"image_size": 64, "depth": 2, "width": 128, "heads": 2, "hidden": 256}
BASE = {"image_size": 224, "depth": 12, "width": 768, "heads": 12, "hidden": 3072}
CLS, SEP, DEC, ENC, BLIP_WORDS = 101, 102, 30522, 30523, 30524
START, END, COCA_WORDS = 49406, 49407, 49408
BOS, EOS, PAD, MASK, BEIT3_WORDS, CODES = 0, 2, 1, 64001, 64010, 8192


@dataclass
class Steps:
    """What is compared. rival: the published code's model, and its step -> losses by name. own: our objective with the same weights.

    inputs: what our step takes, for one caption an image (1) and, where it may have more, for two. negatives: after a step of the rival
    in eval mode, those it drew. weights: of the losses.
    """

    rival: nn.Module
    rival_step: Callable[[], dict[str, Tensor]]
    own: nn.Module
    inputs: dict[int, Any]
    weights: dict[str, float]
    negatives: Callable[[], tuple[Tensor, Tensor]] | None = None

    def own_step(self, provider: str) -> dict[str, Tensor]:
        """Our losses: provider is a schedule, and how many captions an image has."""
        schedule, _, captions = provider.partition(", ")
        self.own.schedule = schedule
        given = {} if self.own.training or self.negatives is None else {"negatives": self.negatives()}
        return self.own(self.inputs[2 if captions else 1], **given)


def main() -> int:
    parser = argparse.ArgumentParser(description="Time pretraining steps against published code.")
    parser.add_argument("--models", nargs="+", default=list(RIVALS), choices=RIVALS)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"), help="bf16: autocast over fp32 weights")
    parser.add_argument("--size", default="base", choices=("base", "tiny"), help="tiny: to try this file")
    parser.add_argument("--batch", type=int, default=8, help="pairs (default: 8)")
    parser.add_argument("--blip-source", type=Path, help="a clone of github.com/salesforce/BLIP")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each model; 3 rounds at least (default: 60)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--json", type=Path, help="write the numbers, with what they were measured on")
    parser.add_argument("--memory-of", nargs=2, metavar=("MODEL", "PROVIDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    prepare_process(arguments.threads)
    if arguments.memory_of:
        print(json.dumps(_memory(arguments, *arguments.memory_of)))
        return 0
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("step", "provider"):
        table.add_column(name)
    for name in ("median ms", "quartiles", "n", "vs rival", "peak MB", "vs rival"):
        table.add_column(name, justify="right", no_wrap=True)
    rows, notes = [], []
    for model in arguments.models:
        try:
            steps = _build(arguments, model)
        except (ImportError, FileNotFoundError) as error:
            notes.append(f"{model}: not run, {RIVALS[model]} cannot be imported ({error})")
            continue
        wrong = _check(steps)
        if wrong is not None:
            notes.append(f"{model} is wrong and was not timed: {wrong}")
            continue
        steps.rival.train()
        steps.own.train()
        calls = {RIVALS[model]: _training(steps.rival, steps.rival_step, steps.weights, arguments.dtype)}
        for name in (*OWN, TWO) if 2 in steps.inputs else OWN:
            calls[f"vlp_fast {name}"] = _own_training(steps, name, arguments.dtype)
        timings = measure(calls, steps=100, seconds=arguments.seconds, warmup=1)
        del calls, steps
        memory = {} if arguments.no_memory else {name: _memory_apart(arguments, model, name) for name in timings}
        first = RIVALS[model]
        for name, timing in timings.items():
            ratio = timings[first].median / timing.median
            used = memory.get(name)
            share = None if used is None else used / memory[first]
            numbers = {"ms_median": timing.median, "ms_q1": timing.q1, "ms_q3": timing.q3, "steps": timing.count}
            rows.append({"case": model, "provider": name, "speedup": ratio, **numbers, "peak_mb": used, "memory_ratio": share})
            cells = ("", "") if used is None else (f"{used:.0f}", f"{share:.2f}")
            spread = f"{timing.q1:.4g}-{timing.q3:.4g}"
            table.add_row(model, name, f"{timing.median:.4g}", spread, str(timing.count), f"x{ratio:.2f}", *cells)
        table.add_section()
    about = stamp("cpu", dtype=arguments.dtype, size=arguments.size, batch=arguments.batch, seed=0)
    console = output_console()
    console.print(f"{about['device_name']}, {about['threads']} threads, torch {about['torch']}, {arguments.dtype}")
    console.print(table)
    for line in notes:
        console.print(line)
    if arguments.json is not None:
        report = {"schema": 1, "stamp": about, "rows": rows, "notes": notes}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if any(" is wrong and " in line for line in notes) else 0


def _training(
    module: nn.Module, step: Callable[[], dict[str, Tensor]], weights: dict[str, float], dtype: str
) -> Callable[[], None]:
    def call() -> None:
        module.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            losses = step()
            total = sum(weights[name] * loss for name, loss in losses.items())
        total.backward()

    return call


def _own_training(steps: Steps, name: str, dtype: str) -> Callable[[], None]:
    return _training(steps.own, lambda: steps.own_step(name), steps.weights, dtype)


def _check(steps: Steps) -> str | None:
    """Losses of one step of the rival and of ours, and the norm of all gradients; None where they agree."""
    found = {}
    start = {name: t.clone() for name, t in steps.own.named_buffers()}
    for name in ("rival", *OWN):
        module = steps.rival if name == "rival" else steps.own
        module.eval()
        module.zero_grad(set_to_none=True)
        losses = steps.rival_step() if name == "rival" else steps.own_step(name)
        sum(steps.weights[key] * loss for key, loss in losses.items()).backward()
        norm = torch.stack([p.grad.double().square().sum() for p in module.parameters() if p.grad is not None]).sum().sqrt()
        found[name] = {**{key: float(loss.detach()) for key, loss in losses.items()}, "gradients": float(norm)}
        module.zero_grad(set_to_none=True)
        for buffer, tensor in steps.own.named_buffers():  # queues have moved on
            tensor.copy_(start[buffer])
    for name, numbers in found.items():
        for key, expected in found["rival"].items():
            if abs(numbers[key] - expected) > 2e-4 * abs(expected):
                return f"{key} is {numbers[key]:.6g} in {name} and {expected:.6g} in the rival"
    return None


def _memory(arguments: argparse.Namespace, model: str, provider: str) -> float | None:
    steps = _build(arguments, model)
    if provider == RIVALS[model]:
        steps.rival.train()
        steps.own = nn.Identity()
        call = _training(steps.rival, steps.rival_step, steps.weights, arguments.dtype)
    else:
        steps.own.train()
        steps.rival, steps.rival_step = nn.Identity(), dict
        call = _own_training(steps, provider.removeprefix("vlp_fast "), arguments.dtype)
    call()
    return peak_memory(call)[0]


def _memory_apart(arguments: argparse.Namespace, model: str, provider: str) -> float | None:
    command = [sys.executable, __file__, "--memory-of", model, provider]
    for name in ("dtype", "size", "batch", "threads", "blip_source"):
        value = getattr(arguments, name)
        command += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _build(arguments: argparse.Namespace, model: str) -> Steps:
    torch.manual_seed(0)
    sizes = BASE if arguments.size == "base" else TINY
    return {"blip": _blip, "coca": _coca, "beit3": _beit3}[model](arguments, sizes)


def _captions(lengths: list[int], padded: int, first: int, last: int, pad: int, words: range) -> tuple[Tensor, Tensor]:
    """Token ids ``[captions, padded]`` and which of them are there."""
    there = torch.arange(padded) < torch.tensor(lengths)[:, None]
    ids = torch.randint(words.start, words.stop, there.shape)
    ids[:, 0] = first
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = last
    return ids.masked_fill(~there, pad), there


def _lengths(batch: int, most: int) -> list[int]:
    lengths = torch.tensor(caption_lengths(batch)).clamp(max=most)
    return lengths[torch.randperm(batch)].tolist()


def _twice(batch: Batch) -> Batch:
    """Every image with a second caption of the same length."""
    ids = batch.token_ids
    described = tuple(range(batch.batch_size))
    return replace(
        batch, token_ids=torch.cat([ids, ids]), text_lengths=2 * batch.text_lengths, captions=2 * batch.captions,
        image_index=2 * described,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------- BLIP


def _blip(arguments: argparse.Namespace, sizes: dict[str, int]) -> Steps:
    if arguments.blip_source is None:
        raise FileNotFoundError("give its clone as --blip-source")
    path = Path(__file__).resolve().parents[1] / "tests/peers/fixtures/make_salesforce_blip.py"
    spec = importlib.util.spec_from_file_location("make_salesforce_blip", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    made.make_importable(arguments.blip_source)
    made.VOCAB, made.DEC, made.ENC, made.CLS, made.SEP = BLIP_WORDS, DEC, ENC, CLS, SEP
    made.HIDDEN, made.POSITIONS, made.PATCH = sizes["hidden"], 512, 16
    made.Texts.enc_token_id, made.Texts.bos_token_id = ENC, DEC
    made.Texts.cls_token_id, made.Texts.sep_token_id = CLS, SEP
    width = {"dim": sizes["width"], "depth": sizes["depth"], "heads": sizes["heads"], "image_size": sizes["image_size"]}
    width |= {"vision_dim": sizes["width"], "vision_depth": sizes["depth"], "vision_heads": sizes["heads"]}
    rival = made.build("blip_pretrain", "BLIP_Pretrain", width, queue_size=57600, image_size=sizes["image_size"]).float()
    _initialise(rival)
    rival.temp.data.fill_(0.07)
    rival.copy_params()
    fields = {"num_heads": sizes["heads"], "vision_heads": sizes["heads"], "dec_id": DEC, "enc_id": ENC}
    own = salesforce_blip.FORMAT.load(rival.state_dict(), dropout_p=0.1, **fields)
    lengths = _lengths(arguments.batch, PADDED["blip"])
    ids, there = _captions(lengths, PADDED["blip"], CLS, SEP, 0, range(1000, 30000))
    images = torch.randn(len(lengths), 3, sizes["image_size"], sizes["image_size"])
    batch = Batch(images, ids[there], tuple(lengths), ("",) * len(lengths))
    drawn: list[int] = []
    draw = torch.multinomial

    def recorded(weights: Tensor, count: int, *rest: Any, **options: Any) -> Tensor:
        found = draw(weights, count, *rest, **options)
        drawn.append(int(found[0]))
        return found

    def rival_step() -> dict[str, Tensor]:
        if rival.training:
            return dict(zip(("itc", "itm", "lm"), rival(images, (ids, there.long()), 0.4), strict=True))
        drawn.clear()
        torch.multinomial = recorded
        try:
            return dict(zip(("itc", "itm", "lm"), rival(images, (ids, there.long()), 0.4), strict=True))
        finally:
            torch.multinomial = draw

    def negatives() -> tuple[Tensor, Tensor]:
        return torch.tensor(drawn[: len(lengths)]), torch.tensor(drawn[len(lengths) :])

    weights = {"itc": 1.0, "itm": 1.0, "lm": 1.0}
    return Steps(rival, rival_step, own, {1: batch, 2: _twice(batch)}, weights, negatives)


def _initialise(module: nn.Module) -> None:
    """Weights as in a model at the start of its training."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
            elif "norm" in name.lower() and name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.zero_()


# --------------------------------------------------------------------------------------------------------------------- CoCa


def _coca(arguments: argparse.Namespace, sizes: dict[str, int]) -> Steps:
    _coca.library = torchvision_names()  # its names go with it
    from open_clip.coca_model import CoCa
    from open_clip.loss import CoCaLoss

    width, heads = sizes["width"], sizes["heads"]
    text = {
        "context_length": PADDED["coca"],
        "vocab_size": COCA_WORDS,
        "width": width,
        "heads": heads,
        "layers": sizes["depth"],
    }
    vision = {
        "image_size": sizes["image_size"], "layers": sizes["depth"], "width": width, "patch_size": 16, "attentional_pool": True,
        "attn_pooler_heads": 8, "output_tokens": True,
    }  # fmt: skip
    rival = CoCa(
        embed_dim=width,
        vision_cfg=vision,
        text_cfg={**text, "embed_cls": True, "output_tokens": True},
        multimodal_cfg={**text, "attn_pooler_heads": 8},
    )
    nn.init.normal_(rival.text_decoder.text_projection, std=0.02)  # open_clip leaves it uninitialised
    loss = CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=1.0)
    loaded = open_clip_coca.FORMAT.load(rival.state_dict())
    own = CocaPretraining(loaded.config)
    own.model = loaded
    lengths = _lengths(arguments.batch, PADDED["coca"])
    ids, there = _captions(lengths, PADDED["coca"], START, END, 0, range(1, 49000))
    images = torch.randn(len(lengths), 3, sizes["image_size"], sizes["image_size"])
    batch = Batch(images, ids[there], tuple(lengths), ("",) * len(lengths))

    def rival_step() -> dict[str, Tensor]:
        return dict(zip(("contrastive", "caption"), loss(**rival(images, ids)), strict=True))

    return Steps(rival, rival_step, own, {1: batch, 2: _twice(batch)}, {"contrastive": 1.0, "caption": 2.0})


# ------------------------------------------------------------------------------------------------------------------- BEiT-3


class _Codes:
    """Stands where a visual tokenizer does: its ids are drawn."""

    num_codes = CODES

    def encode(self, images: Tensor) -> Tensor:
        raise NotImplementedError("targets are drawn")


class _Torchscale(nn.Module):
    """torchscale's encoder and a linear head for each kind of target, on masked rows only."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        from torchscale.architecture.config import EncoderConfig
        from torchscale.model.BEiT3 import BEiT3

        self.beit3 = BEiT3(
            EncoderConfig(
                img_size=sizes["image_size"], patch_size=16, vocab_size=BEIT3_WORDS, multiway=True, layernorm_embedding=False,
                normalize_output=True, no_output_layer=True, encoder_embed_dim=sizes["width"],
                encoder_attention_heads=sizes["heads"], encoder_ffn_embed_dim=sizes["hidden"], encoder_layers=sizes["depth"],
                checkpoint_activations=False, max_source_positions=1024,
            )
        )  # fmt: skip
        self.words, self.codes = nn.Linear(sizes["width"], BEIT3_WORDS), nn.Linear(sizes["width"], CODES)


def _beit3(arguments: argparse.Namespace, sizes: dict[str, int]) -> Steps:
    _beit3.library = torchvision_names()
    rival = _Torchscale(sizes)
    state = {name: t for name, t in rival.state_dict().items() if name.startswith("beit3.")}
    trunk = format_of(state).load(state, num_heads=sizes["heads"])
    config = beit3_preset(
        "base", image_size=sizes["image_size"], dim=sizes["width"], depth=sizes["depth"], num_heads=sizes["heads"],
        hidden_dim=sizes["hidden"], vocab_size=BEIT3_WORDS, visual_vocab_size=CODES, max_positions=trunk.config.max_positions,
    )  # fmt: skip
    own = Beit3Pretraining(config, _Codes(), mask_id=MASK, special_ids=(BOS, PAD, EOS))
    own.model.load_trunk(trunk)
    own.model.word_head.load_state_dict(rival.words.state_dict())
    own.model.visual_head.load_state_dict(rival.codes.state_dict())
    patches, size = (sizes["image_size"] // 16) ** 2, arguments.batch
    kinds = [(_masked_images(size, patches, sizes), _masked_texts(size, share)) for share in (0.15, 0.5)]
    (alone, (text, padded)), (pair_image, (pair_text, pair_padded)) = kinds
    inputs = Beit3Inputs(alone, text, pair_image, pair_text)

    def rival_step() -> dict[str, Tensor]:
        encode, kept = rival.beit3, lambda rows, mask: rows[:, 1:][mask]
        out = encode(visual_tokens=alone.images, vision_masked_position=alone.mask)["encoder_out"]
        mim = F.cross_entropy(rival.codes(kept(out, alone.mask)), alone.targets)
        out = encode(textual_tokens=padded[0], text_padding_position=padded[1])["encoder_out"]
        mlm = F.cross_entropy(rival.words(out[padded[2]]), text.targets)
        found = encode(pair_padded[0], pair_image.images, pair_padded[1], vision_masked_position=pair_image.mask)
        out, split = found["encoder_out"], found["multiway_split_position"]
        mvlm = F.cross_entropy(rival.codes(kept(out[:, :split], pair_image.mask)), pair_image.targets)
        mvlm = mvlm + F.cross_entropy(rival.words(out[:, split:][pair_padded[2]]), pair_text.targets)
        return {"mim": mim, "mlm": mlm, "mvlm": mvlm}

    return Steps(rival, rival_step, own, {1: inputs}, {"mim": 1.0, "mlm": 1.0, "mvlm": 1.0})


def _masked_images(batch: int, patches: int, sizes: dict[str, int]) -> MaskedImages:
    hidden = int(0.4 * patches)
    mask = torch.zeros(batch, patches, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(patches)[:hidden]] = True
    image, patch = mask.nonzero(as_tuple=True)
    rows = image * (patches + 1) + 1 + patch
    images = torch.randn(batch, 3, sizes["image_size"], sizes["image_size"])
    return MaskedImages(images, mask, rows, torch.randint(CODES, (len(rows),)), (hidden,) * batch)


def _masked_texts(batch: int, share: float) -> tuple[MaskedTexts, tuple[Tensor, Tensor, Tensor]]:
    """Ours; and padded ids, where they are padding, and where they are hidden."""
    lengths = _lengths(batch, PADDED["beit3"])
    ids, there = _captions(lengths, PADDED["beit3"], BOS, EOS, PAD, range(3, 64000))
    hidden = (torch.rand(ids.shape) < share) & there
    hidden[:, 0], hidden[:, 1] = False, True
    masked = ids.masked_fill(hidden, MASK)
    rows = hidden[there].nonzero()[:, 0]
    own = MaskedTexts(masked[there], tuple(lengths), rows, ids[hidden], tuple(hidden.sum(1).tolist()))
    return own, (masked, ~there, hidden)


if __name__ == "__main__":
    raise SystemExit(main())
