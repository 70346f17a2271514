"""Suite "generate": writing captions, and ranking them: transformers' BLIP and open_clip's CoCa against `vlp_fast.generation`.

    OMP_WAIT_POLICY=ACTIVE vlp-fast bench --suite generate --dtype fp32 --json generation.json

"vlp_fast, packed" is the same call within `vlp_fast.ops.packed_weights`: the weights kept a second time in oneDNN's layout, as a process
that captions many batches would (the copies are made before the timing starts). Random weights, the same on both sides, and every caption
made as long as the others, so that all do the same work. In fp32 the tokens of greedy and beam search, and the scores of ranking, must be
those of the rival. In bf16 the two round differently and may take other words; there the cases are those that were checked in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vlp_fast.benchmarks.registry import DTYPES, Case, Entry, Options
from vlp_fast.benchmarks.script import run_as_script
from vlp_fast.generation import generate, rank_captions
from vlp_fast.models.checkpoints import hf_blip, open_clip_coca
from vlp_fast.ops import packed_weights
from vlp_fast.profile_peers import torchvision_names
from vlp_fast.segments import Segments

__all__ = ["cases"]

NEW, SEP, DEC, ENC, CAPTIONS = 20, 102, 30522, 30523, 64
SMALLER = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6},
}


def cases(options: Options) -> Iterator[Entry]:
    """Greedy, beams, sampling and ranking with BLIP; sampling with CoCa."""
    nucleus = {"top_p": 0.9, "repetition_penalty": 1.1}
    for title, theirs, ours in (
        ("BLIP greedy", {}, {}),
        ("BLIP beam 3", {"num_beams": 3}, {"num_beams": 3}),
        ("BLIP nucleus 0.9", {**nucleus, "do_sample": True, "top_k": 0}, {**nucleus, "sample": True}),
    ):
        yield Entry(title, lambda theirs=theirs, ours=ours: _captioning(options, theirs, ours))
    yield Entry(f"BLIP ranks {CAPTIONS} captions of an image", lambda: _ranking(options))
    yield Entry("CoCa nucleus 0.9", lambda: _coca(options))


def _quiet(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def _case(options: Options, rivals: dict[str, Callable[[], object]], own: dict[str, Callable[[], object]], **rest) -> Case:
    calls = {name: _quiet(call) for name, call in {**rivals, **own}.items()}
    return Case(calls, facts={"new_tokens": NEW}, **rest)


def _config(transformers, size: str):
    text = {
        "vocab_size": 30524, "num_attention_heads": 12, "encoder_hidden_size": 768, "is_decoder": True, "bos_token_id": DEC,
        "sep_token_id": SEP, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"image_size": 224}
    if size in SMALLER:
        smaller = SMALLER[size]
        text, vision = {**text, **smaller, "encoder_hidden_size": smaller["hidden_size"]}, {**vision, **smaller}
    return transformers.BlipConfig(text_config=text, vision_config=vision)


def _captioning(options: Options, their_options: dict, our_options: dict) -> Case:
    _captioning.library = torchvision_names()  # its names go with it
    import transformers

    torch.manual_seed(options.seed)
    theirs = transformers.BlipForConditionalGeneration(_config(transformers, options.size)).eval()
    ours = hf_blip.CAPTIONING.load(theirs.state_dict(), **hf_blip.fields(theirs.config.to_dict())).eval()
    dtype = DTYPES[options.dtype]
    theirs, ours = theirs.to(options.device, dtype), ours.to(options.device, dtype)
    images = torch.randn(options.batch, 3, 224, 224).to(options.device, dtype)
    length = {"max_length": NEW + 1, "min_length": NEW + 1}  # [DEC] and the new ones

    def rival() -> torch.Tensor:
        return theirs.generate(pixel_values=images, **length, **their_options)

    def own() -> torch.Tensor:
        return generate(ours, images, eos_id=SEP, **length, **our_options).token_ids.view(len(images), -1)

    def wrong() -> dict[str, str]:
        first, second = rival(), own()
        if first.shape != second.shape:
            return dict.fromkeys(
                OWN, f"the captions have shape {list(second.shape)}, those of transformers {list(first.shape)}"
            )
        if "sample" in our_options or dtype != torch.float32 or torch.equal(first, second):
            return {}
        differ = int((first != second).any(1).sum())
        return dict.fromkeys(OWN, f"{differ} of {len(first)} captions differ from those of transformers")

    own_calls = _with_and_without_packing(ours, own)
    return _case(options, {"transformers": rival}, own_calls, wrong=_quiet(wrong), work=options.batch, unit="captions")


OWN = ("vlp_fast", "vlp_fast, packed")


def _with_and_without_packing(model: torch.nn.Module, call: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """The copies of the second call are kept between its turns; the first does not see them. On a GPU there is nothing to pack."""
    if next(model.parameters()).device.type != "cpu":
        return {OWN[0]: call}
    packed = packed_weights(model)

    def with_packing() -> object:
        with packed:
            return call()

    return dict(zip(OWN, (call, with_packing), strict=True))


def _ranking(options: Options) -> Case:
    _ranking.library = torchvision_names()  # its names go with it
    import transformers

    torch.manual_seed(options.seed)
    dtype = DTYPES[options.dtype]
    theirs = transformers.BlipForImageTextRetrieval(_config(transformers, options.size)).eval()
    ours = hf_blip.RETRIEVAL.load(theirs.state_dict(), **hf_blip.fields(theirs.config.to_dict())).eval()
    theirs, ours = theirs.to(options.device, dtype), ours.to(options.device, dtype)
    image = torch.randn(1, 3, 224, 224).to(options.device, dtype)
    lengths = torch.randint(8, 17, (CAPTIONS,))
    mask = torch.arange(16) < lengths[:, None]
    ids = torch.randint(1000, 30000, mask.shape).masked_fill(~mask, 0)
    ids[:, 0] = ENC
    ids, mask = ids.to(options.device), mask.to(options.device)
    packed, segments = ids[mask], Segments(lengths.tolist(), options.device)

    def whole() -> torch.Tensor:
        return theirs(ids, image.expand(len(ids), -1, -1, -1), attention_mask=mask.long(), use_itm_head=True).itm_score

    def once() -> torch.Tensor:
        rows = theirs.vision_model(pixel_values=image)[0].expand(len(ids), -1, -1)
        seen = torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device)
        text = theirs.text_encoder(ids, mask.long(), encoder_hidden_states=rows, encoder_attention_mask=seen)
        return theirs.itm_head(text[0][:, 0])

    def own() -> torch.Tensor:
        return rank_captions(ours, image, packed, segments).logits

    def wrong() -> dict[str, str]:
        first, second, third = whole(), own(), once()
        found = {}
        for providers, other in (((names[1],), third), (OWN, second)):
            worst = float((other - first).abs().max()) / float(first.abs().max())
            if not worst <= (1e-3 if dtype == torch.float32 else 0.1):
                found |= dict.fromkeys(providers, f"matching logits differ by {worst:.1e} of the largest")
        return found

    names = ("transformers, an image per caption", "transformers, the image once")
    note = "the first is its model's forward, which takes an image per caption; the second encodes the image once and repeats its rows"
    rivals = dict(zip(names, (whole, once), strict=True))
    own_calls = _with_and_without_packing(ours, own)
    return _case(options, rivals, own_calls, wrong=_quiet(wrong), work=len(ids), unit="captions", note=note)


def _coca(options: Options) -> Case:
    _coca.library = torchvision_names()  # its names go with it
    import open_clip
    import transformers
    from open_clip import coca_model

    # open_clip 3.3 asks for a class that transformers 5 no longer has and that only its beam search uses, and else refuses to sample
    coca_model._has_transformers = True
    coca_model.GENERATION_TYPES.update(top_k=transformers.TopKLogitsWarper, top_p=transformers.TopPLogitsWarper)
    torch.manual_seed(options.seed)
    dtype = DTYPES[options.dtype]
    settings = dict(open_clip.get_model_config("coca_ViT-B-32"))
    if options.size in SMALLER:
        smaller = SMALLER[options.size]
        width, layers = smaller["hidden_size"], smaller["num_hidden_layers"]
        text = {"layers": layers, "width": width, "heads": width // 64}
        settings["embed_dim"] = width
        settings["vision_cfg"] = {**settings["vision_cfg"], "layers": layers, "width": width}
        settings["text_cfg"] = {**settings["text_cfg"], **text}
        settings["multimodal_cfg"] = {**settings["multimodal_cfg"], **text}
    settings.pop("custom_text", None)
    theirs = open_clip.CoCa(**settings)
    torch.nn.init.normal_(theirs.text_decoder.text_projection, std=0.02)  # open_clip leaves it uninitialised
    theirs = theirs.eval()
    ours = open_clip_coca.FORMAT.load(theirs.state_dict()).eval()
    theirs, ours = theirs.to(options.device, dtype), ours.to(options.device, dtype)
    images = torch.randn(options.batch, 3, 224, 224).to(options.device, dtype)
    start, end = 49406, 49407
    # its last token is the end, which it puts there itself after one more forward: as many forwards on both sides
    length = {"seq_len": NEW + 1, "min_seq_len": NEW}

    def rival() -> torch.Tensor:
        return theirs.generate(images, generation_type="top_p", top_p=0.9, **length)

    def own() -> object:
        return generate(
            ours, images, start_id=start, eos_id=end, sample=True, max_length=NEW + 1, min_length=NEW + 1, top_p=0.9
        )

    def wrong() -> dict[str, str]:
        greedy = theirs.generate(images, generation_type="top_k", top_k=1, **length)[:, :-1]
        found = generate(ours, images, start_id=start, eos_id=end, max_length=NEW, min_length=NEW).token_ids
        if dtype != torch.float32 or torch.equal(greedy, found.view(len(images), -1)):
            return {}
        return dict.fromkeys(OWN, "the most probable words differ from open_clip's")

    note = "ours is OpenClipCoca with the weights of open_clip's model, coca_ViT-B-32"
    own_calls = _with_and_without_packing(ours, own)
    return _case(options, {"open_clip": rival}, own_calls, wrong=_quiet(wrong), work=options.batch, unit="captions", note=note)


if __name__ == "__main__":
    raise SystemExit(run_as_script("generate"))
