"""generate against open_clip's CoCa: the same weights, the same most probable words."""

from __future__ import annotations

import pytest
import torch

from vlp_fast.generation import generate
from vlp_fast.models.checkpoints.open_clip_coca import FORMAT

START, END, VOCAB, CONTEXT = 65, 66, 67, 19


# name: (embed_dim, vision, text, multimodal), and how ours is told the heads; the heavy ones run in fp64
SIZES = {
    "plain": (
        48, {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "attn_pooler_heads": 4, "attn_pooler_queries": 6},
        {"width": 48, "heads": 3, "layers": 2}, {"width": 48, "heads": 6, "layers": 2},
    ),
    "deep": (
        32, {"image_size": 16, "patch_size": 8, "width": 64, "layers": 5, "attn_pooler_heads": 2, "attn_pooler_queries": 4},
        {"width": 32, "heads": 2, "layers": 6}, {"width": 32, "heads": 1, "layers": 5},
    ),
    "heads_of_96": (
        96, {"image_size": 24, "patch_size": 8, "width": 64, "layers": 1, "attn_pooler_heads": 1, "attn_pooler_queries": 9},
        {"width": 96, "heads": 1, "layers": 2}, {"width": 96, "heads": 1, "layers": 3},
    ),
    "ViT-L-14_two_layers": (
        768, {"image_size": 42, "patch_size": 14, "width": 1024, "layers": 2, "attn_pooler_heads": 8, "attn_pooler_queries": 256},
        {"width": 768, "heads": 12, "layers": 2}, {"width": 768, "heads": 12, "layers": 2},
    ),
    "many_patches": (
        48, {"image_size": 80, "patch_size": 8, "width": 64, "layers": 2, "attn_pooler_heads": 4, "attn_pooler_queries": 20},
        {"width": 48, "heads": 4, "layers": 1}, {"width": 48, "heads": 3, "layers": 1},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=["plain", *(pytest.param(n, marks=pytest.mark.heavy) for n in list(SIZES)[1:])])
def pair(torchvision_ops, request):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    embed_dim, vision, text, multimodal = SIZES[request.param]
    words = {"context_length": CONTEXT, "vocab_size": VOCAB}
    theirs = open_clip.CoCa(
        embed_dim=embed_dim,
        vision_cfg={"attentional_pool": True, "output_tokens": True, **vision},
        text_cfg={"embed_cls": True, "output_tokens": True, **words, **text},
        multimodal_cfg={**words, **multimodal},
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            wide = parameter[0].numel() if parameter.dim() > 1 else 1
            torch.nn.init.normal_(parameter, std=min(0.25, 2 * wide**-0.5))
        # to open_clip word 0 is padding, which no text of this test must hold
        theirs.text_decoder.text_projection[:, 0] = 0.0
    heads = {"num_heads": text["heads"], "decoder_heads": multimodal["heads"], "pooler_heads": vision["attn_pooler_heads"]}
    ours = FORMAT.load(theirs.state_dict(), **heads).eval()
    if request.param != "plain":
        theirs, ours = theirs.double(), ours.double()
    # open_clip 3.3 asks for a class that transformers 5 no longer has and that only its beam search uses, and else refuses to sample
    patch = pytest.MonkeyPatch()
    patch.setattr(open_clip.coca_model, "_has_transformers", True)
    kinds = {"top_k": transformers.TopKLogitsWarper, "top_p": transformers.TopPLogitsWarper}
    patch.setattr(open_clip.coca_model, "GENERATION_TYPES", kinds)
    yield theirs, ours
    patch.undo()


@pytest.mark.parametrize("prompt", [[], [4, 9, 30], pytest.param([7] * 11, marks=pytest.mark.heavy)], ids=len)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.4},
        {"min_length": 12},
        pytest.param({"repetition_penalty": 0.8}, marks=pytest.mark.heavy),
        pytest.param({"repetition_penalty": 1.2, "min_length": 15}, marks=pytest.mark.heavy),
    ],
    ids=str,
)
def test_the_most_probable_words_are_those_of_open_clip(pair, prompt, options):
    theirs, ours = pair
    side, length = ours.config.image_size, 17
    images = torch.randn(5, 3, side, side, generator=torch.Generator().manual_seed(1)).to(ours.logit_scale.dtype)
    text = torch.tensor([[START, *prompt]] * 5)
    rows = theirs.generate(
        images, text, seq_len=length, generation_type="top_k", top_k=1, sot_token_id=START, eos_token_id=END,
        min_seq_len=options.get("min_length", 0), repetition_penalty=options.get("repetition_penalty", 1.0),
    ).tolist()  # fmt: skip
    # open_clip puts the end in its last place whatever the model says
    expected = [row[: row.index(END) + 1] if END in row[:-1] else row[:-1] for row in rows]
    found = generate(ours, images, start_id=START, eos_id=END, prompts=[prompt] * 5, max_length=length - 1, **options)
    assert found.lists() == expected
    assert 0 not in found.token_ids
