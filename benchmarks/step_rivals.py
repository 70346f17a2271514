"""Other people's models whose pretraining steps are timed beside ours. Each imports its package when it is built."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn

from vlp_fast.benchmarks.registry import NotHere
from vlp_fast.profile_peers import torchvision_names

__all__ = ["Torchscale", "open_clip_coca", "salesforce_blip"]

PATCH = 16
CLS, SEP, DEC, ENC, BLIP_WORDS = 101, 102, 30522, 30523, 30524
START, END, COCA_WORDS = 49406, 49407, 49408
BOS, EOS, PAD, MASK, BEIT3_WORDS, CODES = 0, 2, 1, 64001, 64010, 8192


def salesforce_blip(source: Path | None, sizes: dict[str, int]) -> nn.Module:
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


def open_clip_coca(
    *,
    image_size: int,
    width: int,
    depth: int,
    head_dim: int,
    pooler_queries: int,
    pooler_heads: int,
    vocab_size: int,
    length: int,
) -> nn.Module:
    """open_clip's CoCa whose towers and decoder have one width and one depth; `length`: tokens of a caption without the class token."""
    open_clip_coca.library = torchvision_names()  # its names go with it
    from open_clip.coca_model import CoCa

    heads = width // head_dim
    text = {"context_length": length, "vocab_size": vocab_size, "width": width, "heads": heads, "layers": depth}
    vision = {
        "image_size": image_size, "layers": depth, "width": width, "head_width": head_dim, "patch_size": PATCH,
        "attentional_pool": True, "attn_pooler_queries": pooler_queries, "attn_pooler_heads": pooler_heads,
        "output_tokens": True,
    }  # fmt: skip
    rival = CoCa(
        embed_dim=width,
        vision_cfg=vision,
        text_cfg={**text, "embed_cls": True, "output_tokens": True},
        multimodal_cfg={**text, "attn_pooler_heads": pooler_heads},
    )
    nn.init.normal_(rival.text_decoder.text_projection, std=0.02)  # open_clip leaves it uninitialised
    return rival


class Torchscale(nn.Module):
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
