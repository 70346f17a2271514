"""generate against open_clip's CoCa: the same weights, the same most probable words."""

from __future__ import annotations

import pytest
import torch

from vlp_fast.generation import generate
from vlp_fast.models.checkpoints.open_clip_coca import FORMAT

START, END, VOCAB, CONTEXT = 65, 66, 67, 19


@pytest.fixture(scope="module")
def pair(torchvision_ops):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    theirs = open_clip.CoCa(
        embed_dim=48,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "attentional_pool": True, "output_tokens": True,
                    "attn_pooler_heads": 4, "attn_pooler_queries": 6},
        text_cfg={"width": 48, "heads": 3, "layers": 2, "context_length": CONTEXT, "vocab_size": VOCAB, "embed_cls": True,
                  "output_tokens": True},
        multimodal_cfg={"width": 48, "heads": 6, "layers": 2, "context_length": CONTEXT, "vocab_size": VOCAB},
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.25)
        # to open_clip word 0 is padding, which no text of this test must hold
        theirs.text_decoder.text_projection[:, 0] = 0.0
    ours = FORMAT.load(theirs.state_dict(), num_heads=3, decoder_heads=6, pooler_heads=4).eval()
    # open_clip 3.3 asks for a class that transformers 5 no longer has and that only its beam search uses, and else refuses to sample
    patch = pytest.MonkeyPatch()
    patch.setattr(open_clip.coca_model, "_has_transformers", True)
    kinds = {"top_k": transformers.TopKLogitsWarper, "top_p": transformers.TopPLogitsWarper}
    patch.setattr(open_clip.coca_model, "GENERATION_TYPES", kinds)
    yield theirs, ours
    patch.undo()


@pytest.mark.parametrize("prompt", [[], [4, 9, 30]], ids=["no_prompt", "prompt"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.4}, {"min_length": 12}], ids=str)
def test_the_most_probable_words_are_those_of_open_clip(pair, prompt, options):
    theirs, ours = pair
    images, length = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1)), 17
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
