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

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_fast.benchmarks.registry import DTYPES, Case, Entry, NotHere, Options
from vlp_fast.benchmarks.script import run_as_script
from vlp_fast.data.batches import Batch
from vlp_fast.models import beit3_preset, blip_preset, open_clip_coca_preset
from vlp_fast.models.checkpoints import open_clip_coca
from vlp_fast.models.checkpoints.beit3 import format_of
from vlp_fast.profile_peers import torchvision_names
from vlp_fast.training import Beit3Pretraining, BlipPretraining, CocaPretraining, GraphedStep, caption_lengths, salesforce_blip
from vlp_fast.training.beit3 import Beit3Inputs, MaskedImages, MaskedTexts

__all__ = ["RIVALS", "Steps", "cases"]

OWN = ("packed", "published")
TWO = "packed, 2 captions an image"
GRAPH = "packed, CUDA graph"
TITLES = {"blip": "BLIP: ITC, ITM, LM, momentum", "coca": "CoCa: contrastive, caption", "beit3": "BEiT-3: images, texts, pairs"}
RIVALS = {"blip": "salesforce BLIP", "coca": "open_clip", "beit3": "torchscale"}
PADDED = {"blip": 30, "coca": 76, "beit3": 64}
SHAPES = {
    "tiny": {"image_size": 64, "depth": 2, "width": 128, "heads": 2, "hidden": 256},
    "small": {"image_size": 224, "depth": 6, "width": 384, "heads": 6, "hidden": 1536},
    "base": {"image_size": 224, "depth": 12, "width": 768, "heads": 12, "hidden": 3072},
}
TOLERANCE = 2e-4  # of losses and of the norm of all gradients, relative
CLS, SEP, DEC, ENC, BLIP_WORDS = 101, 102, 30522, 30523, 30524
START, END, COCA_WORDS = 49406, 49407, 49408
BOS, EOS, PAD, MASK, BEIT3_WORDS, CODES = 0, 2, 1, 64001, 64010, 8192


@dataclass
class Steps:
    """What is compared. own: our objective. inputs: what its step takes, for one caption an image (1) and, where it may have more, two.

    weights: of the losses. rival: the published code's model with the same weights, and its step -> losses by name; None where it is not
    here, for the reason in `absent`. negatives: given to our step in evaluation: those that the rival drew.
    """

    own: nn.Module
    inputs: dict[int, Any]
    weights: dict[str, float]
    rival: nn.Module | None = None
    rival_step: Callable[[], dict[str, Tensor]] | None = None
    negatives: Callable[[], tuple[Tensor, Tensor]] | None = None
    absent: str = ""

    def own_step(self, provider: str) -> dict[str, Tensor]:
        """Our losses: provider is a schedule, and how many captions an image has."""
        schedule, _, captions = provider.partition(", ")
        self.own.schedule = schedule
        given = {} if self.own.training or self.negatives is None else {"negatives": self.negatives()}
        return self.own(self.inputs[2 if captions else 1], **given)

    def graphed(self, autocast: torch.dtype | None) -> GraphedStep:
        """Our packed step as a CUDA graph, in the mode that our objective is in; its negatives are given."""
        self.own.schedule = "packed"
        given = {} if self.negatives is None else {"negatives": self.negatives()}
        return GraphedStep(self.own, self.inputs[1], autocast=autocast, **given)


def cases(options: Options) -> Iterator[Entry]:
    """A step of each model."""
    for model, title in TITLES.items():
        yield Entry(title, lambda model=model: _case(options, model))


def _case(options: Options, model: str) -> Case:
    torch.manual_seed(options.seed)
    steps = {"blip": _blip, "coca": _coca, "beit3": _beit3}[model](options, SHAPES[options.size])
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


def _salesforce(source: Path | None, sizes: dict[str, int]) -> nn.Module:
    """BLIP_Pretrain of the clone, with the weights of a training's start.

    Raises: NotHere without a clone, or away from this repository, where the file lies that makes the clone importable.
    """
    if source is None:
        raise NotHere("needs a clone of github.com/salesforce/BLIP: --blip-source")
    path = Path(__file__).resolve().parents[1] / "tests/peers/fixtures/make_salesforce_blip.py"
    if not path.is_file() or not (source / "models/blip_pretrain.py").is_file():
        raise NotHere(
            f"needs {path.name} of this repository's tests, and a clone of BLIP with models/blip_pretrain.py in {source}"
        )
    spec = importlib.util.spec_from_file_location("make_salesforce_blip", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    made.make_importable(source)
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
    return rival


def _blip(options: Options, sizes: dict[str, int]) -> Steps:
    rival, absent = None, ""
    try:
        rival = _salesforce(options.blip_source, sizes).to(options.device)
        fields = {"num_heads": sizes["heads"], "vision_heads": sizes["heads"], "dec_id": DEC, "enc_id": ENC}
        own: Any = salesforce_blip.FORMAT.load(rival.state_dict(), dropout_p=0.1, **fields)
    except (NotHere, ImportError) as error:
        absent = str(error)
        config = blip_preset(
            "base", image_size=sizes["image_size"], vision_dim=sizes["width"], vision_depth=sizes["depth"],
            vision_heads=sizes["heads"], dim=sizes["width"], depth=sizes["depth"], num_heads=sizes["heads"],
            hidden_dim=sizes["hidden"],
        )  # fmt: skip
        own = BlipPretraining(config)
    lengths = _lengths(options.batch, PADDED["blip"])
    ids, there = (t.to(options.device) for t in _captions(lengths, PADDED["blip"], CLS, SEP, 0, range(1000, 30000)))
    images = torch.randn(len(lengths), 3, sizes["image_size"], sizes["image_size"]).to(options.device)
    batch = Batch(images, ids[there], tuple(lengths), ("",) * len(lengths))
    # where no rival draws them, each pair's neighbour
    drawn = 2 * [(i + 1) % len(lengths) for i in range(len(lengths))]
    draw = torch.multinomial

    def recorded(weights: Tensor, count: int, *rest: Any, **options: Any) -> Tensor:
        found = draw(weights, count, *rest, **options)
        drawn.append(int(found[0]))
        return found

    def rival_step() -> dict[str, Tensor]:
        assert rival is not None
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
    inputs = {1: batch, 2: _twice(batch)}
    step = None if rival is None else rival_step
    return Steps(own.to(options.device), inputs, weights, rival, step, negatives, absent)


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


def _open_clip(sizes: dict[str, int]) -> tuple[nn.Module, nn.Module]:
    """open_clip's CoCa and its loss."""
    _open_clip.library = torchvision_names()  # its names go with it
    from open_clip.coca_model import CoCa
    from open_clip.loss import CoCaLoss

    width, heads = sizes["width"], sizes["heads"]
    text = {
        "context_length": PADDED["coca"], "vocab_size": COCA_WORDS, "width": width, "heads": heads, "layers": sizes["depth"],
    }  # fmt: skip
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
    return rival, CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=1.0)


def _coca(options: Options, sizes: dict[str, int]) -> Steps:
    rival, absent = None, ""
    try:
        rival, loss = _open_clip(sizes)
        loaded = open_clip_coca.FORMAT.load(rival.state_dict())
        own = CocaPretraining(loaded.config)
        own.model = loaded
        rival = rival.to(options.device)
    except ImportError as error:
        absent = str(error)
        hidden = 4 * sizes["width"]
        config = open_clip_coca_preset(
            "ViT-B-32", patch_size=16, image_size=sizes["image_size"], vision_dim=sizes["width"], vision_depth=sizes["depth"],
            vision_heads=sizes["heads"], vision_hidden_dim=hidden, dim=sizes["width"], unimodal_depth=sizes["depth"],
            num_heads=sizes["heads"], hidden_dim=hidden, multimodal_depth=sizes["depth"], decoder_heads=sizes["heads"],
            decoder_hidden_dim=hidden,
        )  # fmt: skip
        own = CocaPretraining(config)
    lengths = _lengths(options.batch, PADDED["coca"])
    ids, there = (t.to(options.device) for t in _captions(lengths, PADDED["coca"], START, END, 0, range(1, 49000)))
    images = torch.randn(len(lengths), 3, sizes["image_size"], sizes["image_size"]).to(options.device)
    batch = Batch(images, ids[there], tuple(lengths), ("",) * len(lengths))

    def rival_step() -> dict[str, Tensor]:
        assert rival is not None
        return dict(zip(("contrastive", "caption"), loss(**rival(images, ids)), strict=True))

    weights, inputs = {"contrastive": 1.0, "caption": 2.0}, {1: batch, 2: _twice(batch)}
    return Steps(own.to(options.device), inputs, weights, rival, None if rival is None else rival_step, absent=absent)


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


def _beit3(options: Options, sizes: dict[str, int]) -> Steps:
    _beit3.library = torchvision_names()
    rival, absent, positions = None, "", 1022
    try:
        rival = _Torchscale(sizes)
        state = {name: t for name, t in rival.state_dict().items() if name.startswith("beit3.")}
        trunk = format_of(state).load(state, num_heads=sizes["heads"])
        positions = trunk.config.max_positions
    except ImportError as error:
        absent = str(error)
    config = beit3_preset(
        "base", image_size=sizes["image_size"], dim=sizes["width"], depth=sizes["depth"], num_heads=sizes["heads"],
        hidden_dim=sizes["hidden"], vocab_size=BEIT3_WORDS, visual_vocab_size=CODES, max_positions=positions,
    )  # fmt: skip
    own = Beit3Pretraining(config, _Codes(), mask_id=MASK, special_ids=(BOS, PAD, EOS))
    if rival is not None:
        own.model.load_trunk(trunk)
        own.model.word_head.load_state_dict(rival.words.state_dict())
        own.model.visual_head.load_state_dict(rival.codes.state_dict())
        rival = rival.to(options.device)
    patches, size = (sizes["image_size"] // 16) ** 2, options.batch
    kinds = [(_masked_images(size, patches, sizes), _masked_texts(size, share)) for share in (0.15, 0.5)]
    (alone, (text, padded)), (pair_image, (pair_text, pair_padded)) = kinds
    inputs = Beit3Inputs(alone, text, pair_image, pair_text).to(options.device)
    alone, text, pair_image, pair_text = inputs.parts()
    padded, pair_padded = (tuple(t.to(options.device) for t in tensors) for tensors in (padded, pair_padded))

    def rival_step() -> dict[str, Tensor]:
        assert rival is not None
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

    weights = {"mim": 1.0, "mlm": 1.0, "mvlm": 1.0}
    return Steps(own.to(options.device), {1: inputs}, weights, rival, None if rival is None else rival_step, absent=absent)


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
    raise SystemExit(run_as_script("steps"))
