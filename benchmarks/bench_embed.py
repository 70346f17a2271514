"""Image and text towers alone, without gradients: transformers' BLIP, open_clip's CoCa, torchscale's BEiT-3, CoCa-pytorch, and ours.

Both sides have the same weights, in the dtype that is asked for. Captions are those of `vlp_fast.training.caption_lengths`; peers get them
padded with a mask, to the columns that their own code pads to (transformers: the longest caption of the batch). What is compared is the
contrastive feature of each image and caption; of BEiT-3, which has none, all rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_fast.benchmarks.registry import DTYPES, OURS, Case, Entry, Options
from vlp_fast.models.beit3 import Beit3, Beit3Config
from vlp_fast.models.blip import BlipConfig, BlipRetriever
from vlp_fast.models.checkpoints import hf_blip, lucidrains_coca, open_clip_coca
from vlp_fast.models.checkpoints.beit3 import format_of as beit3_format
from vlp_fast.models.coca_open_clip import OpenClipCoca, OpenClipCocaConfig
from vlp_fast.models.coca_palm import CocaPalm, CocaPalmConfig
from vlp_fast.ops import packed_weights
from vlp_fast.profile_peers import torchvision_names
from vlp_fast.segments import Segments
from vlp_fast.training import caption_lengths

__all__ = ["cases"]

TOLERANCE = {"fp32": 2e-4, "bf16": 0.05, "fp16": 0.01}  # of the largest value
LARGE = 32  # batch, where there is time
PATCH, FEATURES = 16, 256


class Size(NamedTuple):
    image: int
    width: int
    depth: int
    heads: int


SIZES = {"tiny": Size(64, 128, 2, 2), "small": Size(224, 384, 6, 6), "base": Size(224, 768, 12, 12)}


class Captions(NamedTuple):
    """ids: ``[captions, columns]``, padded. there: which of them are tokens. packed: those, and the captions they belong to."""

    ids: Tensor
    there: Tensor
    packed: Tensor
    segments: Segments


class Model(NamedTuple):
    """A model of ours and its peer.

    Attributes:
        peer: the package. ours: a size -> our model. theirs: a size and the weights of ours under the peer's names -> the peer; raises
            ImportError without it. save: our model -> those weights.
        image, text: (ours, theirs), each a model and its inputs -> what is compared, ours packed and theirs padded; None: no such case.
        words, ends, pad: ids of words, of the first and last token, of padding. columns: captions are padded to; None: the longest.
    """

    peer: str
    ours: Callable[[Size], nn.Module]
    theirs: Callable[[Size], nn.Module]
    save: Callable[[nn.Module], Mapping[str, Tensor]]
    image: tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], Tensor]] | None
    text: tuple[Callable[[Any, Captions], Tensor], Callable[[Any, Captions], Tensor]]
    words: range
    ends: tuple[int, int]
    pad: int
    columns: int | None = None


def cases(options: Options) -> Iterator[Entry]:
    """Each tower of each model at several batches; the largest not if it should be quick."""
    batches = sorted({1, options.batch, *(() if options.quick else (LARGE,))})
    for name, model in MODELS.items():
        for tower in ("image", "text"):
            if getattr(model, tower) is None:
                continue
            for batch in batches:
                yield Entry(f"{name} {tower}, batch {batch}", functools.partial(_case, model, tower, batch, options))


def _case(model: Model, tower: str, batch: int, options: Options) -> Case:
    torch.manual_seed(options.seed)
    size, dtype = SIZES[options.size or "base"], DTYPES[options.dtype]
    ours = model.ours(size).eval()
    _unsettle(ours)
    absent: dict[str, str] = {}
    try:
        _torchvision()
        theirs = _with_weights(model.theirs(size), model.save(ours)).eval()
    except ImportError as error:
        theirs, absent[model.peer] = None, f"not installed ({error})"
    held = {OURS: ours, model.peer: theirs}
    held = {name: one.to(options.device, dtype).requires_grad_(False) for name, one in held.items() if one is not None}
    del ours, theirs
    if tower == "image":
        given = torch.randn(batch, 3, size.image, size.image).to(options.device, dtype)
    else:
        given = _captions(model, batch, options.device)
    own, other = getattr(model, tower)

    def call(name: str, run: Callable[[Any, Any], Tensor]) -> Callable[[], Tensor]:
        def once() -> Tensor:
            with torch.inference_mode():
                return run(held[name], given)

        return once

    calls = {} if model.peer in absent else {model.peer: call(model.peer, other)}
    calls[OURS] = call(OURS, own)
    if options.device == "cpu" and options.dtype != "fp16":
        calls[PACKED] = _packed(held[OURS], calls[OURS])

    def wrong() -> dict[str, str]:
        first, *others = calls
        return _wrong(calls, first, others, given if tower == "text" else None, TOLERANCE[options.dtype])

    def release(name: str) -> None:
        kept = OURS if name.startswith(OURS) else name
        for other in [other for other in held if other != kept]:
            del held[other]

    unit = f"{tower}s"
    facts = {"rows": len(given.packed) if tower == "text" else None, "call_batch": batch}
    return Case(calls, wrong, absent, baseline=model.peer, work=batch, unit=unit, facts=facts, release=release)


PACKED = f"{OURS}, packed weights"


def _packed(model: nn.Module, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Copies of the weights are made at the first call and kept between calls; other providers do not see them."""
    weights = packed_weights(model)

    def once() -> Tensor:
        with weights:
            return call()

    return once


def _wrong(
    calls: Mapping[str, Callable[[], Tensor]], first: str, others: list[str], captions: Captions | None, tolerance: float
) -> dict[str, str]:
    def rows(found: Tensor) -> Tensor:
        """Of padded captions those rows that are tokens."""
        return found[captions.there] if captions is not None and found.dim() == 3 else found

    found = {}
    expected = rows(calls[first]()).float()
    if not expected.isfinite().all():
        found[first] = "its results are not finite"
    for name in others:
        actual = rows(calls[name]()).float()
        if actual.numel() != expected.numel():
            found[name] = f"its results have shape {list(actual.shape)}, those of {first} {list(expected.shape)}"
            continue
        error = float((actual.view_as(expected) - expected).abs().max() / expected.abs().max())
        if not error <= tolerance:
            found[name] = f"off from {first} by {error:.2g} of the largest value; {tolerance} is allowed"
    return found


def _captions(model: Model, batch: int, device: str) -> Captions:
    lengths = [min(n, model.columns or n) for n in caption_lengths(batch)]
    there = torch.arange(model.columns or max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(model.words.start, model.words.stop, there.shape)
    ids[:, 0] = model.ends[0]
    ids[torch.arange(batch), torch.tensor(lengths) - 1] = model.ends[1]
    ids = ids.masked_fill(~there, model.pad)
    return Captions(ids.to(device), there.to(device), ids[there].to(device), Segments(lengths, torch.device(device)))


@torch.no_grad()
def _unsettle(module: nn.Module) -> None:
    """Moves biases from 0 and scales from 1, so that leaving one out would show."""
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.02)


def _with_weights(peer: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    missing, unknown = peer.load_state_dict(weights, strict=False)
    left = [name for name in missing if name in dict(peer.named_parameters())]
    if left or unknown:
        raise ValueError(f"the weights of ours do not fit the peer: it lacks {left}, and has no place for {unknown}.")
    return peer


@functools.cache
def _torchvision() -> object:
    return torchvision_names()  # they go with it


# --------------------------------------------------------------------------------------------------------------------- BLIP


def _own_blip(size: Size) -> nn.Module:
    towers = {"vision_dim": size.width, "vision_depth": size.depth, "vision_heads": size.heads, "vision_eps": 1e-5}
    texts = {"dim": size.width, "depth": size.depth, "num_heads": size.heads, "hidden_dim": 4 * size.width}
    return BlipRetriever(BlipConfig(image_size=size.image, embed_dim=FEATURES, dropout_p=0.0, **towers, **texts))


def _transformers_blip(size: Size) -> nn.Module:
    from transformers import BlipConfig as Config
    from transformers import BlipForImageTextRetrieval

    shape = {
        "hidden_size": size.width, "intermediate_size": 4 * size.width, "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
    }  # fmt: skip
    text = {**shape, "vocab_size": 30524, "encoder_hidden_size": size.width, "pad_token_id": 0, "bos_token_id": 30522}
    vision = {**shape, "image_size": size.image, "patch_size": PATCH}
    return BlipForImageTextRetrieval(Config(text_config=text, vision_config=vision, image_text_hidden_size=FEATURES))


def _transformers_image(peer: Any, images: Tensor) -> Tensor:
    return F.normalize(peer.vision_proj(peer.vision_model(pixel_values=images)[0][:, 0]), dim=-1)


def _transformers_text(peer: Any, captions: Captions) -> Tensor:
    rows = peer.text_encoder(captions.ids, captions.there.long())[0]
    return F.normalize(peer.text_proj(rows[:, 0]), dim=-1)


# --------------------------------------------------------------------------------------------------------------------- CoCa

CLIP_WORDS, CLIP_COLUMNS, CLIP_ENDS = 49408, 76, (49406, 49407)


def _own_coca(size: Size) -> nn.Module:
    vision = {
        "vision_dim": size.width, "vision_depth": size.depth, "vision_heads": size.heads, "vision_hidden_dim": 4 * size.width,
    }  # fmt: skip
    text = {"dim": size.width, "unimodal_depth": size.depth, "num_heads": size.heads, "hidden_dim": 4 * size.width}
    decoder = {"multimodal_depth": 1, "decoder_heads": size.heads, "decoder_hidden_dim": 4 * size.width}
    config = OpenClipCocaConfig(
        image_size=size.image, patch_size=PATCH, vocab_size=CLIP_WORDS, context_length=CLIP_COLUMNS, legacy_class_mask=True,
        **vision, **text, **decoder,
    )  # fmt: skip
    return OpenClipCoca(config)


def _open_clip(size: Size) -> nn.Module:
    from open_clip.coca_model import CoCa

    text = {"context_length": CLIP_COLUMNS, "vocab_size": CLIP_WORDS, "width": size.width, "heads": size.heads}
    vision = {
        "image_size": size.image, "layers": size.depth, "width": size.width, "patch_size": PATCH, "attentional_pool": True,
        "attn_pooler_heads": 8, "output_tokens": True,
    }  # fmt: skip
    return CoCa(
        embed_dim=size.width,
        vision_cfg=vision,
        text_cfg={**text, "layers": size.depth, "embed_cls": True, "output_tokens": True},
        multimodal_cfg={**text, "layers": 1, "attn_pooler_heads": 8},  # no part of the towers
    )


def _own_coca_palm(size: Size) -> nn.Module:
    config = CocaPalmConfig(
        image_encoder="given", vision_dim=size.width, dim=size.width, unimodal_depth=size.depth, multimodal_depth=1,
        num_heads=size.heads, hidden_dim=4 * size.width, vocab_size=CLIP_WORDS, embed_dim=size.width,
    )  # fmt: skip
    return CocaPalm(config)


def _coca_pytorch(size: Size) -> nn.Module:
    from coca_pytorch.coca_pytorch import CoCa

    return CoCa(
        dim=size.width, num_tokens=CLIP_WORDS, unimodal_depth=size.depth, multimodal_depth=1, dim_head=64, heads=size.heads,
        image_dim=size.width, dim_latents=size.width,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------- BEiT-3

BEIT3_WORDS = 64010


def _own_beit3(size: Size) -> nn.Module:
    return Beit3(
        Beit3Config(
            image_size=size.image, dim=size.width, depth=size.depth, num_heads=size.heads, hidden_dim=4 * size.width,
            vocab_size=BEIT3_WORDS,
        )
    )  # fmt: skip


class _Torchscale(nn.Module):
    """Under the name that unilm gives it."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        from torchscale.architecture.config import EncoderConfig
        from torchscale.model.BEiT3 import BEiT3

        self.beit3 = BEiT3(
            EncoderConfig(
                img_size=size.image, patch_size=PATCH, vocab_size=BEIT3_WORDS, multiway=True, layernorm_embedding=False,
                normalize_output=True, no_output_layer=True, encoder_embed_dim=size.width, encoder_attention_heads=size.heads,
                encoder_ffn_embed_dim=4 * size.width, encoder_layers=size.depth, max_source_positions=1024,
            )
        )  # fmt: skip


def _save_beit3(model: nn.Module) -> Mapping[str, Tensor]:
    return beit3_format({}).save(model)


def _torchscale_text(peer: Any, captions: Captions) -> Tensor:
    return peer.beit3(textual_tokens=captions.ids, text_padding_position=(~captions.there).long())["encoder_out"]


MODELS = {
    "BLIP": Model(
        "transformers",
        _own_blip,
        _transformers_blip,
        hf_blip.RETRIEVAL.save,
        (lambda m, x: m.encode_image(x).features, _transformers_image),
        (lambda m, c: m.encode_text(c.packed, c.segments), _transformers_text),
        words=range(1000, 30000),
        ends=(101, 102),
        pad=0,
    ),
    "CoCa": Model(
        "open_clip",
        _own_coca,
        _open_clip,
        open_clip_coca.FORMAT.save,
        (lambda m, x: m.encode_image(x).features, lambda m, x: m.encode_image(x)),
        (lambda m, c: m.encode_text(c.packed, c.segments).features, lambda m, c: m.encode_text(c.ids)),
        words=range(1, 49000),
        ends=CLIP_ENDS,
        pad=0,
        columns=CLIP_COLUMNS,
    ),
    "BEiT-3": Model(
        "torchscale",
        _own_beit3,
        _Torchscale,
        _save_beit3,
        (lambda m, x: m.encode_image(x).image, lambda m, x: m.beit3(visual_tokens=x)["encoder_out"].flatten(0, 1)),
        (lambda m, c: m.encode_text(c.packed, c.segments).text, _torchscale_text),
        words=range(3, 64000),
        ends=(0, 2),
        pad=1,
        columns=64,
    ),
    "CoCa-pytorch": Model(
        "coca_pytorch",
        _own_coca_palm,
        _coca_pytorch,
        lucidrains_coca.FORMAT.save,
        None,  # its image encoder is its user's
        (
            lambda m, c: m.encode_text(c.packed, c.segments, CLIP_COLUMNS).features,
            lambda m, c: m.text_to_latents(m.embed_text(c.ids)[0]),
        ),
        words=range(1, 49000),
        ends=CLIP_ENDS,
        pad=0,
        columns=CLIP_COLUMNS,
    ),
}
