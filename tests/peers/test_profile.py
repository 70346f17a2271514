"""Published code under the profiler, unchanged: what its step runs, whom it serves, what it pads and what it does again."""

import pytest
import torch
import torch.nn.functional as F

import vlp_fast
from vlp_fast.profile_peers import profile_peer
from vlp_fast.training import caption_lengths

BATCH = 4
TOKENS = sum(caption_lengths(BATCH))


@pytest.fixture(autouse=True)
def _importable(torchvision_ops):
    pass


def calls(report):
    return {
        (row.loss, row.module): (row.passes, row.sequences, row.tokens, row.grad, row.serves)
        for row in report.rows
        if row.passes
    }  # fmt: skip


def row(report, loss, module):
    return next(row for row in report.rows if (row.loss, row.module) == (loss, module))


def test_hf_blip_encodes_the_same_images_again_for_each_call():
    pytest.importorskip("transformers", reason="needs transformers, whose BLIP is the peer")
    report = profile_peer("hf-blip", "tiny", batch=BATCH, backward=True)
    patches = 17
    assert calls(report) == {
        ("itc", "image_encoder"): (1, BATCH, patches * BATCH, True, ["itc"]),
        ("itc", "text_encoder"): (1, BATCH, TOKENS, True, ["itc"]),
        ("itm", "image_encoder"): (3, 3 * BATCH, 3 * patches * BATCH, True, ["itm"]),
        ("itm", "text_encoder"): (3, 3 * BATCH, 3 * TOKENS, True, ["itm"]),
        ("lm", "caption_image_encoder"): (1, BATCH, patches * BATCH, True, ["lm"]),
        ("lm", "text_decoder"): (1, BATCH, TOKENS, True, ["lm"]),
    }
    assert row(report, "itc", "text_encoder").padding == pytest.approx(1 - TOKENS / (40 * BATCH))
    image, again = row(report, "itc", "image_encoder"), row(report, "itm", "image_encoder")
    assert image.gflops_repeated == 0.0
    assert again.gflops_repeated == pytest.approx(2 * image.gflops_forward)  # of three calls, two have the images of the first
    assert "matching.vision_model.encoder.layers.0.mlp.fc1" in report.totals["repeated"]
    assert image.unread == pytest.approx(16 / 17)  # only the class token is contrasted
    assert report.totals["losses"]["itm"]["gflops_used"] > report.totals["losses"]["lm"]["gflops_used"]


def test_hf_blip_without_gradient_is_shown_as_such():
    transformers = pytest.importorskip("transformers", reason="needs transformers, whose BLIP is the peer")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16}
    config = transformers.BlipConfig(
        text_config={
            **shape,
            "vocab_size": 50,
            "bos_token_id": 1,
            "pad_token_id": 0,
            "sep_token_id": 2,
            "encoder_hidden_size": 32,
        },
        vision_config={**shape, "image_size": 32, "patch_size": 16},
        image_text_hidden_size=16,
    )
    model, slow = (transformers.BlipForImageTextRetrieval(config).train() for _ in range(2))
    ids, images = torch.randint(3, 50, (BATCH, 6)), torch.randn(BATCH, 3, 32, 32)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    both = torch.nn.ModuleDict({"model": model, "slow": slow})
    with vlp_fast.profile(both) as p:
        with torch.no_grad():
            soft = slow(pixel_values=images, **text, use_itm_head=False)[0].softmax(1)
        loss = F.cross_entropy(model(pixel_values=images, **text, use_itm_head=False)[0], soft)
        p.attribute({"itc": loss})
    found = {row.module: (row.loss, row.passes, row.grad) for row in p.rows if row.passes}
    assert found == {
        "model.vision_model": ("itc", 1, True),
        "model.text_encoder": ("itc", 1, True),
        "slow.vision_model": ("itc", 1, False),
        "slow.text_encoder": ("itc", 1, False),
    }


def test_open_clip_coca_pads_its_text_and_shares_its_towers():
    pytest.importorskip("open_clip", reason="needs open_clip, whose CoCa is the peer")
    report = profile_peer("open-clip-coca", "tiny", batch=BATCH, backward=True)
    found = calls(report)
    assert found["contrastive", "image_encoder"] == (1, BATCH, 17 * BATCH, True, ["contrastive", "caption"])
    assert found["contrastive", "text_encoder"] == (1, BATCH, TOKENS + BATCH, True, ["contrastive", "caption"])  # and CLS
    loss, module = next(key for key in found if key[1] == "text_decoder")
    assert (loss, found[loss, module][0], found[loss, module][4]) == ("caption", 1, ["caption"])
    assert row(report, "contrastive", "text_encoder").padding == pytest.approx((76 * BATCH - TOKENS) / (77 * BATCH))
    # the decoder is given rows, not ids: it has the padding of the tower that returned them
    assert row(report, "caption", "text_decoder").padding > 0.7
    assert report.totals["waste"] > 0.5 * report.totals["gflops_forward"]


def test_torchscale_beit3_runs_three_passes_with_padding():
    pytest.importorskip("torchscale", reason="needs torchscale, whose BEiT-3 is the peer")
    report = profile_peer("torchscale-beit3", "tiny", batch=BATCH, backward=True)
    assert calls(report) == {
        ("mim", "encoder"): (1, BATCH, 17 * BATCH, True, ["mim"]),
        ("mlm", "encoder"): (1, BATCH, TOKENS, True, ["mlm"]),
        ("mvlm", "encoder"): (1, BATCH, 17 * BATCH + TOKENS, True, ["mvlm"]),
    }
    padding = {loss: row(report, loss, "encoder").padding for loss in ("mim", "mlm", "mvlm")}
    assert padding == {
        "mim": 0.0,
        "mlm": pytest.approx(1 - TOKENS / (64 * BATCH)),
        "mvlm": pytest.approx((64 * BATCH - TOKENS) / (81 * BATCH)),
    }
    totals = report.totals
    assert (totals["image_passes"], totals["text_passes"], totals["pair_passes"]) == (1, 1, 1)
    assert list(totals["repeated"]) == ["beit3.vision_embed.proj"]  # the same images, alone and in the pairs


def test_lucidrains_coca_has_lists_of_layers_for_towers():
    pytest.importorskip("coca_pytorch", reason="needs CoCa-pytorch")
    report = profile_peer("lucidrains-coca", "tiny", batch=BATCH)
    assert {row.module: row.passes for row in report.rows if row.passes} == {
        "text_encoder": 1, "image_encoder": 1, "text_decoder": 1,
    }  # fmt: skip
    text = row(report, "caption+contrastive", "text_encoder")
    assert (text.sequences, text.tokens) == (BATCH, TOKENS + BATCH)
    assert text.gflops_backward is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peer": "flamingo"}, "peer must be one of hf-blip, open-clip-coca, lucidrains-coca, torchscale-beit3"),
        ({"size": "large"}, "size must be one of tiny, base for a peer"),
        ({"batch": 1}, "batch must be at least 2"),
        ({"device": "meta"}, "device must be cpu or cuda for a peer, which reads values"),
        ({"image_size": 50}, "image_size must be a multiple of the patch size, 16; received 50"),
    ],
)
def test_profile_peer_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        profile_peer(**{"peer": "hf-blip", "size": "tiny", **options})


def test_a_peer_that_is_not_installed_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "coca_pytorch", None)
    monkeypatch.delitem(__import__("sys").modules, "coca_pytorch.coca_pytorch", raising=False)
    with pytest.raises(RuntimeError, match="peer 'lucidrains-coca' cannot be imported .* it needs: pip install"):
        profile_peer("lucidrains-coca", "tiny")
