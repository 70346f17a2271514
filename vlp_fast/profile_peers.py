"""Other people's models under the profiler: their own forward with random weights, imported only when asked for.

Each peer is built as its own configuration builds it, is given the images and captions that `vlp_fast.profiling.profile_model`
gives ours, padded as the peer wants them, and makes the losses that its code can make. What a published package leaves out (a
queue, momentum encoders, hard negatives chosen by similarity) is left out here: the profile says what the package runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_fast.profiling import StepProfile, profile
from vlp_fast.training import caption_lengths

__all__ = ["PEERS", "PEER_SIZES", "profile_peer"]

PEER_SIZES = ("tiny", "base")
_WIDTHS = {"tiny": (64, 2, 2, 64), "base": (768, 12, 12, 224)}  # width, layers, heads, image side
_VOCABULARY = {"tiny": 300, "base": 30524}
_PATCH = 16
_CLIP_LENGTH, _BLIP_LENGTH, _BEIT3_LENGTH = 76, 40, 64  # text columns of open_clip's CoCa, of BLIP's pretraining, of BEiT-3's
_BEIT3_MASKED = 0.4  # share of patches
_SEED = 0

Losses = dict[str, Tensor]


class _Peer(NamedTuple):
    """A model, its towers, its step, and the token id that pads captions without a mask."""

    model: nn.Module
    towers: dict[str, str]
    step: Callable[[], Losses]
    pad_id: int | None = None


class _Inputs(NamedTuple):
    images: Tensor
    lengths: list[int]
    device: str
    generator: torch.Generator

    def captions(self, columns: int, words: tuple[int, int], *, ends: tuple[int, int], pad: int) -> tuple[Tensor, Tensor]:
        """Token ids ``[batch, columns]`` from first to last of `ends`, `words` between, and their mask (1: token)."""
        ids = torch.full((len(self.lengths), columns), pad)
        for row, length in zip(ids, self.lengths, strict=True):
            row[:length] = torch.randint(*words, (length,), generator=self.generator)
            row[0], row[length - 1] = ends
        mask = (torch.arange(columns) < torch.tensor(self.lengths)[:, None]).long()
        return ids.to(self.device), mask.to(self.device)


def _hf_blip(size: str, side: int, inputs: _Inputs) -> _Peer:
    """transformers: BlipForImageTextRetrieval for contrast and matching, BlipForConditionalGeneration for captioning.

    Matching calls the model for the pairs and for two sets of mismatched ones; each call encodes its images again.
    """
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval

    dim, layers, heads, _ = _WIDTHS[size]
    vocabulary = _VOCABULARY[size]
    text = {"vocab_size": vocabulary, "bos_token_id": vocabulary - 2, "pad_token_id": 0, "sep_token_id": 1, "eos_token_id": 1}
    shape = {
        "hidden_size": dim,
        "intermediate_size": 4 * dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": dim // 3,
    }
    config = BlipConfig(
        text_config={**text, **shape, "encoder_hidden_size": dim},
        vision_config={**shape, "image_size": side, "patch_size": _PATCH},
        projection_dim=dim // 3,
        image_text_hidden_size=dim // 3,
    )
    both = nn.ModuleDict({"matching": BlipForImageTextRetrieval(config), "captioning": BlipForConditionalGeneration(config)})
    ids, mask = inputs.captions(_BLIP_LENGTH, (3, vocabulary - 3), ends=(2, 1), pad=0)
    images, batch = inputs.images, len(inputs.lengths)
    labels = ids.masked_fill(mask == 0, -100)
    own = torch.arange(batch, device=images.device)
    matched = torch.cat([own.new_ones(batch), own.new_zeros(2 * batch)])

    def step() -> Losses:
        matching, captioning = both["matching"], both["captioning"]
        text = {"input_ids": ids, "attention_mask": mask}
        similarity = matching(pixel_values=images, **text, use_itm_head=False)[0] / 0.07
        itc = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.t(), own)) / 2
        others = {name: value.roll(1, 0) for name, value in text.items()}
        logits = [
            matching(pixel_values=images, **text, use_itm_head=True)[0],
            matching(pixel_values=images.roll(1, 0), **text, use_itm_head=True)[0],
            matching(pixel_values=images, **others, use_itm_head=True)[0],
        ]
        lm = captioning(pixel_values=images, **text, labels=labels).loss
        return {"itc": itc, "itm": F.cross_entropy(torch.cat(logits), matched), "lm": lm}

    towers = {
        "image_encoder": "matching.vision_model",
        "text_encoder": "matching.text_encoder",
        "caption_image_encoder": "captioning.vision_model",
        "text_decoder": "captioning.text_decoder",
    }
    return _Peer(both, towers, step)


def _open_clip_coca(size: str, side: int, inputs: _Inputs) -> _Peer:
    """open_clip's CoCa with its CoCaLoss; captions are padded to its 76 columns."""
    from open_clip.coca_model import CoCa
    from open_clip.loss import CoCaLoss

    dim, layers, heads, _ = _WIDTHS[size]
    vocabulary, columns = (300, _CLIP_LENGTH) if size == "tiny" else (49408, _CLIP_LENGTH)
    text = {"context_length": columns, "vocab_size": vocabulary, "width": dim, "heads": heads, "layers": layers}
    pooler = {"attn_pooler_queries": 16 if size == "tiny" else 256, "output_tokens": True}
    vision = {"image_size": side, "patch_size": _PATCH, "width": dim, "layers": layers, "head_width": dim // heads}
    model = CoCa(
        embed_dim=dim,
        vision_cfg={**vision, "attentional_pool": True, "attn_pooler_heads": heads, **pooler},
        text_cfg={**text, "embed_cls": True, "output_tokens": True},
        multimodal_cfg={**text, "attn_pooler_heads": heads},
    )
    nn.init.normal_(model.text_decoder.text_projection, std=0.02)  # left uninitialised by open_clip 3.3
    ids, _ = inputs.captions(columns, (1, vocabulary - 2), ends=(vocabulary - 2, vocabulary - 1), pad=0)
    loss = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)

    def step() -> Losses:
        contrastive, caption = loss(**model(inputs.images, ids))
        return {"contrastive": contrastive, "caption": caption}

    towers = {"image_encoder": "visual", "text_encoder": "text", "text_decoder": "text_decoder"}
    return _Peer(model, towers, step, pad_id=0)


def _lucidrains_coca(size: str, side: int, inputs: _Inputs) -> _Peer:
    """CoCa-pytorch with vit-pytorch's encoder; its two losses come as one sum, and are profiled as one."""
    from coca_pytorch.coca_pytorch import CoCa
    from vit_pytorch.extractor import Extractor
    from vit_pytorch.vit import ViT

    dim, layers, heads, _ = _WIDTHS[size]
    vocabulary = 300 if size == "tiny" else 49408
    half = max(layers // 2, 1)
    vit = ViT(
        image_size=side, patch_size=_PATCH, num_classes=2, dim=dim, depth=layers, heads=heads, mlp_dim=4 * dim, dim_head=64
    )
    model = CoCa(
        dim=dim,
        img_encoder=Extractor(vit, return_embeddings_only=True, detach=False),
        image_dim=dim,
        num_tokens=vocabulary,
        unimodal_depth=half,
        multimodal_depth=half,
        dim_head=64,
        heads=heads,
        caption_loss_weight=2.0,
        contrastive_loss_weight=1.0,
    )
    ids, _ = inputs.captions(_CLIP_LENGTH + 1, (1, vocabulary - 2), ends=(vocabulary - 2, vocabulary - 1), pad=0)

    def step() -> Losses:
        return {"caption+contrastive": model(text=ids, images=inputs.images, return_loss=True)}

    towers = {"image_encoder": "img_encoder", "text_encoder": "unimodal_layers", "text_decoder": "multimodal_layers"}
    return _Peer(model, towers, step, pad_id=0)


def _torchscale_beit3(size: str, side: int, inputs: _Inputs) -> _Peer:
    """torchscale's BEiT-3 encoder with two linear heads, since its pretraining was not published: masked images, texts and pairs."""
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    dim, layers, heads, _ = _WIDTHS[size]
    vocabulary, codes = (300, 128) if size == "tiny" else (64010, 8192)
    config = EncoderConfig(
        multiway=True,
        vocab_size=vocabulary,
        no_output_layer=True,
        img_size=side,
        patch_size=_PATCH,
        encoder_embed_dim=dim,
        encoder_attention_heads=heads,
        encoder_ffn_embed_dim=4 * dim,
        encoder_layers=layers,
        max_source_positions=1024,
    )
    model = nn.ModuleDict(
        {"beit3": BEiT3(config), "word_head": nn.Linear(dim, vocabulary), "patch_head": nn.Linear(dim, codes)}
    )
    ids, mask = inputs.captions(_BEIT3_LENGTH, (3, vocabulary - 3), ends=(0, 2), pad=1)
    patches = (side // _PATCH) ** 2
    hidden = torch.zeros(len(ids), patches, device=ids.device)
    hidden[:, : max(round(_BEIT3_MASKED * patches), 1)] = 1
    targets = torch.randint(codes, (int(hidden.sum()),), generator=inputs.generator).to(ids.device)
    words = torch.zeros_like(mask, dtype=torch.bool)
    words[:, 1:3] = True  # two words of each caption are predicted
    padding = 1 - mask

    def step() -> Losses:
        encoder, word_head, patch_head = model["beit3"], model["word_head"], model["patch_head"]
        image = encoder(visual_tokens=inputs.images, vision_masked_position=hidden)["encoder_out"][:, 1:]
        mim = F.cross_entropy(patch_head(image[hidden.bool()]), targets)
        text = encoder(textual_tokens=ids, text_padding_position=padding)["encoder_out"]
        mlm = F.cross_entropy(word_head(text[words]), ids[words])
        pair = encoder(textual_tokens=ids, visual_tokens=inputs.images, text_padding_position=padding)
        joint = pair["encoder_out"][:, pair["multiway_split_position"] :]
        return {"mim": mim, "mlm": mlm, "mvlm": F.cross_entropy(word_head(joint[words]), ids[words])}

    return _Peer(model, {"encoder": "beit3"}, step)


# peer -> its builder, and what to install
_BUILDERS: dict[str, tuple[Callable[[str, int, _Inputs], _Peer], str]] = {
    "hf-blip": (_hf_blip, "pip install 'vlp_fast[test-peers]'"),
    "open-clip-coca": (_open_clip_coca, "pip install 'vlp_fast[test-peers]'"),
    "lucidrains-coca": (_lucidrains_coca, "pip install einops && pip install --no-deps coca-pytorch vit-pytorch==1.26.11"),
    "torchscale-beit3": (
        _torchscale_beit3,
        "pip install timm einops && pip install --no-deps torchscale==0.3.0 fairscale==0.4.0",
    ),
}
PEERS = tuple(_BUILDERS)


def profile_peer(
    peer: str,
    size: str = "base",
    *,
    image_size: int | None = None,
    batch: int = 8,
    device: str = "cpu",
    backward: bool = False,
) -> StepProfile:
    """Profiles one step of a published implementation, unchanged, with random weights; one step runs first to warm up.

    Args:
        peer: one of `PEERS`. size: "tiny" or "base". image_size: side in pixels; default: 64 (tiny), 224 (base). batch: pairs.
        device: "cpu" or "cuda": peers read values while they run, which "meta" does not have. backward: profile the backward too.

    Raises:
        ValueError: an unknown name, a batch below 2 or a device without values. RuntimeError: the peer is not installed (the message
            says what to install), or the device is not there.
    """
    if peer not in _BUILDERS:
        raise ValueError(f"peer must be one of {', '.join(PEERS)}; received {peer!r}.")
    if size not in PEER_SIZES:
        raise ValueError(f"size must be one of {', '.join(PEER_SIZES)} for a peer; received {size!r}.")
    if batch < 2:
        raise ValueError(f"batch must be at least 2 for a peer, whose losses compare pairs; received {batch}.")
    if torch.device(device).type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda for a peer, which reads values while it runs; received {device!r}.")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device 'cuda' is not available: PyTorch sees no CUDA device here.")
    side = image_size or _WIDTHS[size][3]
    if side % _PATCH:
        raise ValueError(f"image_size must be a multiple of the patch size, {_PATCH}; received {side}.")
    build, install = _BUILDERS[peer]
    generator = torch.Generator().manual_seed(_SEED)
    torch.manual_seed(_SEED)
    images = torch.randn(batch, 3, side, side, generator=generator).to(device)
    inputs = _Inputs(images, caption_lengths(batch), device, generator)
    library = torchvision_names()
    try:
        made = build(size, side, inputs)
    except ImportError as error:
        raise RuntimeError(f"peer {peer!r} cannot be imported ({error}); it needs: {install}.") from error
    made.model.to(device).train()
    warm = _total(made.step())
    if backward:
        warm.backward()
        made.model.zero_grad(set_to_none=True)
    with profile(made.model, made.towers, pad_id=made.pad_id) as found:
        losses = made.step()
        found.attribute(losses)
        if backward:
            _total(losses).backward()
    del library
    return found.report(peer, size=size, batch=batch)


def _total(losses: Losses) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def torchvision_names() -> object:
    """Names that torchvision lacks where its binary is of another device than torch; transformers, open_clip and torchscale import it.

    They go with what is returned: keep it.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # operator torchvision::nms does not exist
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    except ImportError:
        pass
    return None
