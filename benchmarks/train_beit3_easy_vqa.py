"""BEiT-3's pretraining from end to end on easy-vqa: visual tokenizer, masked modelling, retrieval of held-out pairs.

    python benchmarks/train_beit3_easy_vqa.py                    # some minutes on two cores
    python benchmarks/train_beit3_easy_vqa.py --steps 3000 --json beit3.json

It trains a small VQ tokenizer on the training images, pretrains a tiny BEiT-3 on the training pairs with its three losses, and then
ranks held-out pairs by what pretraining gives: the likelihood of a caption's hidden words given an image. A gallery is 24 held-out
pairs, one of each colour and shape, so a guess is right once in 24 times. Captions are ranked for an image after each caption's mean
over the gallery's images is taken from it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vlp_fast.data import Batch, ImageTransform, WordPieceTokenizer, collate, easy_vqa_pairs
from vlp_fast.data.easy_vqa import COLORS, SHAPES
from vlp_fast.environment import stamp
from vlp_fast.measuring import prepare_process
from vlp_fast.models import VqTokenizer, VqTokenizerConfig, masked_word_scores
from vlp_fast.training import Beit3Pretraining, build_pretraining, train_visual_tokenizer

IMAGE_SIZE, NUM_CODES = 64, 64
NAMED = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b")
WARM_UP, CLIP = 50, 1.0
WINDOW = 20  # steps of which losses are the mean


@dataclass(frozen=True)
class Options:
    """What a run takes; the defaults are the command's."""

    tokenizer_steps: int = 400
    steps: int = 1600
    batch: int = 64  # pairs
    alone: int = 64  # images, and captions, without a partner
    lr: float = 3e-3
    patch_size: int = 16
    max_words: int = 30  # pairs with longer captions are left out
    galleries: int = 20
    seed: int = 0
    device: str = "cpu"


def load(options: Options) -> tuple[Batch, list[Batch], WordPieceTokenizer]:
    """All training pairs, galleries of held-out pairs (one of each colour and shape), and a tokenizer trained on the former."""
    pairs, held_out = (
        [pair for pair in easy_vqa_pairs(split) if len(pair.caption.split()) <= options.max_words]
        for split in ("train", "test")
    )
    tokenizer = WordPieceTokenizer.train((pair.caption for pair in pairs), vocab_size=200)
    transform = ImageTransform(IMAGE_SIZE, "inception")
    named = defaultdict(list)
    for pair in held_out:
        if found := NAMED.search(pair.caption):
            named[found[0]].append(pair)
    generator = torch.Generator().manual_seed(options.seed)
    galleries = []
    for _ in range(options.galleries):
        drawn = [same[int(torch.randint(len(same), (1,), generator=generator))] for _, same in sorted(named.items())]
        galleries.append(collate(drawn, transform, tokenizer))
    return collate(pairs, transform, tokenizer), galleries, tokenizer


def take(pairs: Batch, index: torch.Tensor) -> Batch:
    """The pairs of these numbers."""
    rows, segments = pairs.segments().take(index.tolist())
    return Batch(pairs.images[index], pairs.token_ids[rows], segments.lengths, tuple(pairs.captions[i] for i in index.tolist()))


def make_tokenizer(images: torch.Tensor, options: Options) -> tuple[VqTokenizer, dict[str, float]]:
    """A small VQ tokenizer trained on these images, and what it makes of them."""
    tokenizer = VqTokenizer(
        VqTokenizerConfig(
            image_size=IMAGE_SIZE,
            patch_size=options.patch_size,
            dim=64,
            encoder_depth=2,
            decoder_depth=1,
            num_heads=4,
            hidden_dim=256,
            num_codes=NUM_CODES,
            code_dim=16,
            decay=0.95,
        )
    ).to(options.device)
    generator = torch.Generator().manual_seed(options.seed)
    drawn = (images[torch.randint(len(images), (32,), generator=generator)] for _ in range(options.tokenizer_steps))
    steps = train_visual_tokenizer(tokenizer, drawn, lr=2e-3)
    used = len(tokenizer.encode(images).unique())
    return tokenizer, {"first_error": steps[0].reconstruction, "last_error": steps[-1].reconstruction, "codes_used": used}


def recall(objective: Beit3Pretraining, galleries: list[Batch]) -> dict[str, float]:
    """How often the right image, and the right caption, is the first of a gallery; of a guess 1 / pairs of a gallery."""
    model, right, count = objective.model.eval(), {"image": 0, "caption": 0}, 0
    device = model.class_token.device
    for gallery in (gallery.to(device) for gallery in galleries):
        ids = {"mask_id": objective.mask_id, "special_ids": objective.special_ids}
        scores = masked_word_scores(model, gallery.images, gallery.token_ids, gallery.segments(), **ids)
        own = torch.arange(len(scores), device=device)
        right["image"] += int((scores.argmax(1) == own).sum())
        right["caption"] += int(((scores - scores.mean(1, keepdim=True)).argmax(0) == own).sum())
        count += len(scores)
    objective.train()
    return {name: value / count for name, value in right.items()}


def pretrain(
    objective: Beit3Pretraining, pairs: Batch, options: Options, report: Callable[[int, dict[str, float]], None]
) -> list[dict[str, float]]:
    """The pretraining: every loss of every step. `report` is told the means of the last steps, eight times."""
    optimizer = torch.optim.AdamW(objective.parameters(), lr=options.lr, weight_decay=0.01, betas=(0.9, 0.98))
    generator, history = torch.Generator().manual_seed(options.seed), []
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / WARM_UP) * max(0.05, 1 - step / options.steps)
        paired, alone = (
            take(pairs, torch.randint(len(pairs.captions), (n,), generator=generator)) for n in (options.batch, options.alone)
        )
        losses = objective(objective.prepare(paired, generator, unpaired=alone).to(options.device))
        optimizer.zero_grad(set_to_none=True)
        objective.total(losses).backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), CLIP)
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
        if (step + 1) % max(options.steps // 8, 1) == 0:
            report(step + 1, mean(history[-WINDOW:]))
    return history


def mean(steps: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(losses[name] for losses in steps) / len(steps) for name in steps[0]}


def run(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The whole of it; what it found, by name."""
    started = time.monotonic()
    pairs, galleries, tokenizer = load(options)
    torch.manual_seed(options.seed)
    visual, found = make_tokenizer(pairs.images, options)
    say("tokenizer: error {first_error:.3f} -> {last_error:.3f}, {codes_used} of ".format(**found) + f"{NUM_CODES} codes used")
    objective = build_pretraining(
        "beit3", "tiny", tokenizer=tokenizer, visual_tokenizer=visual, patch_size=options.patch_size
    ).to(options.device)
    assert isinstance(objective, Beit3Pretraining)
    before = recall(objective, galleries)

    def report(step: int, losses: dict[str, float]) -> None:
        say(f"step {step}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))

    history = pretrain(objective, pairs, options, report)
    after, chance = recall(objective, galleries), 1 / len(galleries[0].captions)
    say(f"recall@1 among {len(galleries[0].captions)} held-out pairs, {len(galleries)} galleries; a guess {chance:.3f}")
    for name in after:
        say(f"  {name} found: {before[name]:.3f} before, {after[name]:.3f} after pretraining")
    return {
        "tokenizer": found,
        "first": mean(history[:WINDOW]),
        "last": mean(history[-WINDOW:]),
        "recall_before": before,
        "recall": after,
        "chance": chance,
        "seconds": time.monotonic() - started,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Pretrain a tiny BEiT-3 on easy-vqa and retrieve held-out pairs.")
    for name, default in asdict(Options()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"default: {default}")
    parser.add_argument("--json", type=Path, help="file for what was found, with the machine and the options")
    arguments = vars(parser.parse_args())
    path = arguments.pop("json")
    options = Options(**arguments)
    prepare_process()
    try:
        found = run(options)
    except (ImportError, ValueError) as error:
        print(f"train_beit3_easy_vqa: {error}", file=sys.stderr)
        return 1
    if path is not None:
        report = {"stamp": stamp(options.device), "options": asdict(options), **found}
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
