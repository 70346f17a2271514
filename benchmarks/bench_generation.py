"""Writing captions, and ranking them, with the same weights: transformers' BLIP and open_clip's CoCa against `vlp_fast.generation`.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/bench_generation.py --dtype fp32 --json generation.json

"vlp_fast, packed" is the same call within `vlp_fast.ops.packed_weights`: the weights kept a second time in oneDNN's layout, as a process
that captions many batches would (the copies are made before the timing starts). Random weights, and every caption made as long as the
others, so that all do the same work. In fp32 the tokens of greedy and beam search, and the scores of ranking, must be those of the rival;
where they are not, the case is shown as wrong and not timed. In bf16 the two round differently and may take other words; there the cases
are those that were checked in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Read when torch loads OpenMP. Waiting threads that spin cost a busy machine a factor of ten; the stamp of every report tells.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich import box
from rich.table import Table

from vlp_fast.cli._output import output_console
from vlp_fast.environment import stamp
from vlp_fast.generation import generate, rank_captions
from vlp_fast.measuring import measure, prepare_process
from vlp_fast.models.checkpoints import hf_blip, open_clip_coca
from vlp_fast.ops import packed_weights
from vlp_fast.profile_peers import torchvision_names
from vlp_fast.segments import Segments

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NEW, SEP, DEC, ENC = 20, 102, 30522, 30523
CASES = ("greedy", "beam", "nucleus", "rank", "coca")
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass
class Case:
    """calls: name -> what to time; the first is the rival. check: None, or what is wrong. note: what the calls do differently."""

    name: str
    calls: dict[str, Callable[[], object]]
    check: Callable[[], str | None]
    note: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Time generation and ranking against transformers and open_clip.")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--size", default="base", choices=("base", "tiny"), help="tiny: to try this file")
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--batch", type=int, default=8, help="images (default: 8)")
    parser.add_argument("--captions", type=int, default=64, help="captions ranked for one image (default: 64)")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each case; 3 rounds at least (default: 30)")
    parser.add_argument("--json", type=Path, help="write the numbers, with what they were measured on")
    arguments = parser.parse_args()
    prepare_process(arguments.threads)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("case", "provider"):
        table.add_column(name)
    for name in ("median ms", "quartiles", "n", "vs first"):
        table.add_column(name, justify="right", no_wrap=True)
    rows, notes = [], []
    library = torchvision_names()
    with torch.no_grad():
        for case in _cases(arguments, notes):
            wrong = case.check()
            if wrong is not None:
                notes.append(f"{case.name} is wrong and was not timed: {wrong}")
                continue
            notes += [f"{case.name}: {case.note}"] if case.note else []
            timings = measure(case.calls, steps=100, seconds=arguments.seconds, warmup=1)
            first = next(iter(timings.values()))
            for name, timing in timings.items():
                ratio, spread = first.median / timing.median, f"{timing.q1:.4g}-{timing.q3:.4g}"
                numbers = {"ms_median": timing.median, "ms_q1": timing.q1, "ms_q3": timing.q3, "steps": timing.count}
                rows.append({"case": case.name, "provider": name, "speedup": ratio, **numbers})
                table.add_row(case.name, name, f"{timing.median:.4g}", spread, str(timing.count), f"x{ratio:.2f}")
            table.add_section()
    del library
    about = stamp("cpu", dtype=arguments.dtype, size=arguments.size, batch=arguments.batch, new_tokens=NEW, seed=0)
    console = output_console()
    console.print(f"{about['device_name']}, {about['threads']} threads, torch {about['torch']}, {arguments.dtype}")
    console.print(table)
    for line in notes:
        console.print(line)
    if arguments.json is not None:
        report = {"schema": 1, "stamp": about, "rows": rows, "notes": notes}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if any(" is wrong and " in line for line in notes) else 0


def _cases(arguments: argparse.Namespace, notes: list[str]) -> Iterator[Case]:
    wanted = set(arguments.cases)
    for names, make, package in (
        ({"greedy", "beam", "nucleus"}, _captioning, "transformers"),
        ({"rank"}, _ranking, "transformers"),
        ({"coca"}, _coca, "open_clip"),
    ):
        if names & wanted:
            try:
                yield from make(arguments)
            except ImportError as error:
                notes.append(f"{', '.join(sorted(names))}: not run, {package} cannot be imported ({error})")


def _config(transformers, size: str):
    text = {
        "vocab_size": 30524, "num_attention_heads": 12, "encoder_hidden_size": 768, "is_decoder": True, "bos_token_id": DEC,
        "sep_token_id": SEP, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"image_size": 224}
    if size == "tiny":
        text, vision = {**text, **TINY, "encoder_hidden_size": 64}, {**vision, **TINY}
    return transformers.BlipConfig(text_config=text, vision_config=vision)


def _captioning(arguments: argparse.Namespace) -> Iterator[Case]:
    import transformers

    torch.manual_seed(0)
    theirs = transformers.BlipForConditionalGeneration(_config(transformers, arguments.size)).eval()
    ours = hf_blip.CAPTIONING.load(theirs.state_dict(), **hf_blip.fields(theirs.config.to_dict())).eval()
    dtype = DTYPES[arguments.dtype]
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    images = torch.randn(arguments.batch, 3, 224, 224).to(dtype)
    length = {"max_length": NEW + 1, "min_length": NEW + 1}  # [DEC] and the new ones
    nucleus = {"top_p": 0.9, "repetition_penalty": 1.1}
    for name, title, their_options, our_options in (
        ("greedy", "greedy", {}, {}),
        ("beam", "beam 3", {"num_beams": 3}, {"num_beams": 3}),
        ("nucleus", "nucleus 0.9", {**nucleus, "do_sample": True, "top_k": 0}, {**nucleus, "sample": True}),
    ):
        if name not in arguments.cases:
            continue

        def rival(options: dict = their_options) -> torch.Tensor:
            return theirs.generate(pixel_values=images, **length, **options)

        def own(options: dict = our_options) -> torch.Tensor:
            return generate(ours, images, eos_id=SEP, **length, **options).token_ids.view(len(images), -1)

        def check(rival: Callable = rival, own: Callable = own, sampled: bool = name == "nucleus") -> str | None:
            first, second = rival(), own()
            if first.shape != second.shape:
                return f"the captions have shape {list(second.shape)}, those of transformers {list(first.shape)}"
            if sampled or dtype != torch.float32 or torch.equal(first, second):
                return None
            return f"{int((first != second).any(1).sum())} of {len(first)} captions differ from those of transformers"

        calls = {"transformers": rival, **_with_and_without_packing(ours, own)}
        yield Case(f"BLIP {title}, {len(images)} images, {NEW} tokens", calls, check)


def _with_and_without_packing(model: torch.nn.Module, call: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """The copies of the second call are kept between its turns; the first does not see them."""
    packed = packed_weights(model)

    def with_packing() -> object:
        with packed:
            return call()

    return {"vlp_fast": call, "vlp_fast, packed": with_packing}


def _ranking(arguments: argparse.Namespace) -> Iterator[Case]:
    import transformers

    torch.manual_seed(0)
    dtype = DTYPES[arguments.dtype]
    theirs = transformers.BlipForImageTextRetrieval(_config(transformers, arguments.size)).eval()
    ours = hf_blip.RETRIEVAL.load(theirs.state_dict(), **hf_blip.fields(theirs.config.to_dict())).eval()
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    image = torch.randn(1, 3, 224, 224).to(dtype)
    lengths = torch.randint(8, 17, (arguments.captions,))
    mask = torch.arange(16) < lengths[:, None]
    ids = torch.randint(1000, 30000, mask.shape).masked_fill(~mask, 0)
    ids[:, 0] = ENC
    packed, segments = ids[mask], Segments(lengths.tolist())

    def whole() -> torch.Tensor:
        return theirs(ids, image.expand(len(ids), -1, -1, -1), attention_mask=mask.long(), use_itm_head=True).itm_score

    def once() -> torch.Tensor:
        rows = theirs.vision_model(pixel_values=image)[0].expand(len(ids), -1, -1)
        seen = torch.ones(rows.shape[:2], dtype=torch.long)
        text = theirs.text_encoder(ids, mask.long(), encoder_hidden_states=rows, encoder_attention_mask=seen)
        return theirs.itm_head(text[0][:, 0])

    def own() -> torch.Tensor:
        return rank_captions(ours, image, packed, segments).logits

    def check() -> str | None:
        first, second, third = whole(), own(), once()
        worst = max(float((other - first).abs().max()) for other in (second, third)) / float(first.abs().max())
        bound = 1e-3 if dtype == torch.float32 else 0.1
        return None if worst <= bound else f"matching logits differ by {worst:.1e} of the largest"

    calls = {
        "transformers, an image per caption": whole,
        "transformers, the image once": once,
        **_with_and_without_packing(ours, own),
    }
    note = "the first is its model's forward, which takes an image per caption; the second encodes the image once and repeats its rows"
    yield Case(f"BLIP ranks {len(ids)} captions of an image", calls, check, note)


def _coca(arguments: argparse.Namespace) -> Iterator[Case]:
    import open_clip
    import transformers
    from open_clip import coca_model

    # open_clip 3.3 asks for a class that transformers 5 no longer has and that only its beam search uses, and else refuses to sample
    coca_model._has_transformers = True
    coca_model.GENERATION_TYPES.update(top_k=transformers.TopKLogitsWarper, top_p=transformers.TopPLogitsWarper)
    torch.manual_seed(0)
    dtype = DTYPES[arguments.dtype]
    settings = dict(open_clip.get_model_config("coca_ViT-B-32"))
    if arguments.size == "tiny":
        settings["embed_dim"] = 64
        settings["vision_cfg"] = {**settings["vision_cfg"], "layers": 2, "width": 64}
        settings["text_cfg"] = {**settings["text_cfg"], "layers": 2, "width": 64, "heads": 1}
        settings["multimodal_cfg"] = {**settings["multimodal_cfg"], "layers": 2, "width": 64, "heads": 1}
    settings.pop("custom_text", None)
    theirs = open_clip.CoCa(**settings)
    torch.nn.init.normal_(theirs.text_decoder.text_projection, std=0.02)  # open_clip leaves it uninitialised
    theirs = theirs.eval()
    ours = open_clip_coca.FORMAT.load(theirs.state_dict()).eval()
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    images = torch.randn(arguments.batch, 3, 224, 224).to(dtype)
    start, end = 49406, 49407
    # its last token is the end, which it puts there itself after one more forward: as many forwards on both sides
    length = {"seq_len": NEW + 1, "min_seq_len": NEW}

    def rival() -> torch.Tensor:
        return theirs.generate(images, generation_type="top_p", top_p=0.9, **length)

    def own() -> object:
        options = {"max_length": NEW + 1, "min_length": NEW + 1, "top_p": 0.9}
        return generate(ours, images, start_id=start, eos_id=end, sample=True, **options)

    def check() -> str | None:
        greedy = theirs.generate(images, generation_type="top_k", top_k=1, **length)[:, :-1]
        found = generate(ours, images, start_id=start, eos_id=end, max_length=NEW, min_length=NEW).token_ids
        if dtype != torch.float32 or torch.equal(greedy, found.view(len(images), -1)):
            return None
        return "the most probable words differ from open_clip's"

    calls = {"open_clip": rival, **_with_and_without_packing(ours, own)}
    note = "ours is OpenClipCoca with the weights of open_clip's model, coca_ViT-B-32"
    yield Case(f"CoCa nucleus 0.9, {len(images)} images, {NEW} tokens", calls, check, note)


if __name__ == "__main__":
    raise SystemExit(main())
