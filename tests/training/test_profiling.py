"""The profile counts what ran: checked against the published steps, against arithmetic, and against torch's own counter."""

import json
import math
from xml.etree import ElementTree

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlp_fast.passes import loss_scope, observe_losses
from vlp_fast.profile_page import profile_page
from vlp_fast.profiling import profile_model, profile_step
from vlp_fast.training import MODELS, SCHEDULES, build_pretraining, caption_lengths, synthetic_batch

BATCH = 6


def rows_of(profile):
    return {(row.loss, row.module): row for row in profile.rows}


def test_blip_runs_the_published_passes():
    profile = profile_model("blip", "tiny", schedule="published", batch=BATCH, backward=True)
    rows, tokens = rows_of(profile), sum(caption_lengths(BATCH))
    assert profile.totals["image_passes"] == 2
    assert profile.totals["text_sequences"] == 6 * BATCH
    # text passes of the published step: contrast, its momentum twin, matching positive and negative (2 B rows), captioning
    counted = {key: (row.passes, row.sequences, row.grad) for key, row in rows.items() if row.passes}
    assert counted == {
        ("itc", "image_encoder"): (1, BATCH, True),
        ("itc", "momentum_image_encoder"): (1, BATCH, False),
        ("itc", "text_encoder"): (1, BATCH, True),
        ("itc", "momentum_text_encoder"): (1, BATCH, False),
        ("itm", "text_encoder"): (2, 3 * BATCH, True),
        ("lm", "text_decoder"): (1, BATCH, True),
    }
    assert rows["itc", "image_encoder"].serves == ["itc", "itm", "lm"]
    assert rows["itc", "text_encoder"].serves == ["itc"]
    assert rows["itm", "text_encoder"].serves == ["itm"]
    assert rows["lm", "text_decoder"].serves == ["lm"]
    assert (
        rows["itm", "text_encoder"].tokens == 3 * tokens
    )  # own caption twice (own image, negative image), a negative caption once
    assert rows["itm", "text_encoder"].padding == 0.0
    assert rows["itc", "momentum_image_encoder"].gflops_backward == 0.0


def test_coca_runs_one_pass_of_each_tower_for_both_losses():
    profile = profile_model("coca", "tiny", batch=BATCH, backward=True)
    rows = rows_of(profile)
    assert {key: row.passes for key, row in rows.items() if row.passes} == {
        ("contrastive", "image_encoder"): 1,
        ("contrastive", "text_encoder"): 1,
        ("caption", "text_decoder"): 1,
    }
    assert sorted(rows["contrastive", "image_encoder"].serves) == ["caption", "contrastive"]
    assert sorted(rows["contrastive", "text_encoder"].serves) == ["caption", "contrastive"]
    assert rows["caption", "text_decoder"].serves == ["caption"]


def test_beit3_runs_three_passes():
    profile = profile_model("beit3", "tiny", schedule="published", batch=BATCH, backward=True)
    totals = profile.totals
    assert (totals["image_passes"], totals["text_passes"], totals["pair_passes"]) == (1, 1, 1)
    assert [(row.loss, row.serves) for row in profile.rows if row.passes] == [
        ("mim", ["mim"]), ("mlm", ["mlm"]), ("mvlm", ["mvlm"]),
    ]  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_and_schedule_profiles_on_meta(model, schedule):
    profile = profile_model(model, "tiny", batch=3, schedule=schedule, backward=True)
    assert profile.totals["passes"] == sum(row.passes - row.shared for row in profile.rows) + len(
        {row.module for row in profile.rows if row.shared}
    )
    assert profile.towers_not_called == []
    assert set(profile.totals["losses"]) == {loss for row in profile.rows for loss in row.serves} - {"step", "all"}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(
    ("model", "loss"), [("blip", "lm"), ("blip", "itm"), ("albef", "itm"), ("vlmo", "itm"), ("beit3", "mlm")]
)
def test_a_profile_of_one_loss_has_rows_of_that_loss(model, loss, device, schedule):
    """Also of matching, whose negatives the contrast would have drawn; other rows have no passes."""
    profile = profile_model(model, "tiny", batch=3, schedule=schedule, losses=[loss], device=device, backward=True)
    assert set(profile.totals["losses"]) == {loss}
    assert {row.loss for row in profile.rows if row.passes} == {loss}


def test_one_pair_is_enough_where_nothing_is_matched():
    assert profile_model("blip", "tiny", batch=1, losses=["lm"]).totals["text_passes"] == 1


def test_blip_base_flops_are_those_of_the_architecture():
    """ViT-B/16 at 224 pixels: 35.1 GFLOPs an image; one caption token through the text tower: 12 layers of 12 d^2 multiply-adds."""
    profile = profile_model("blip", "base", schedule="published", batch=8)
    rows = rows_of(profile)
    layers, d, patches, n = 12, 768, 196, 197
    vit = 2 * (
        patches * d * d + layers * (n * 12 * d * d + 2 * n * n * d)
    )  # projections and MLP, then scores and their products
    assert rows["itc", "image_encoder"].gflops_forward == pytest.approx(8 * vit / 1e9, rel=1e-6)
    lengths = caption_lengths(8)
    text = 2 * layers * sum(t * 12 * d * d + 2 * t * t * d for t in lengths)
    assert rows["itc", "text_encoder"].gflops_forward == pytest.approx(text / 1e9, rel=1e-6)
    triangles = 2 * layers * sum(t * 12 * d * d + t * (t + 1) * d for t in lengths)
    cross = 2 * layers * sum(2 * n * d * d + 2 * t * d * d + 2 * t * n * d for t in lengths)
    assert rows["lm", "text_decoder"].gflops_forward == pytest.approx((triangles + cross) / 1e9, rel=1e-6)


@pytest.mark.parametrize("model", ["blip", "coca", "beit3"])
def test_flops_add_up_to_what_torch_counts(model):
    objective = build_pretraining(model, "tiny", vocab_size=300)
    generator = torch.Generator().manual_seed(0)
    inputs = objective.prepare(synthetic_batch(objective.model.config, caption_lengths(4), generator), generator)
    torch.manual_seed(1)
    with FlopCounterMode(display=False) as counter:
        objective.total(objective(inputs)).backward()
    torch.manual_seed(1)
    _, totals, _ = profile_step(objective, inputs)
    assert totals["gflops_forward"] + totals["gflops_backward"] == pytest.approx(counter.get_total_flops() / 1e9, rel=0.02)
    assert totals["gflops_backward"] > totals["gflops_forward"] * (1.0 if model == "blip" else 1.5)
    assert totals["ms"] > 0


def test_profile_leaves_the_step_as_it_was():
    objective = build_pretraining("coca", "tiny", vocab_size=300)
    generator = torch.Generator().manual_seed(0)
    inputs = objective.prepare(synthetic_batch(objective.model.config, caption_lengths(4), generator))
    plain = objective(inputs)
    _, _, profiled = profile_step(objective, inputs)
    for name in plain:
        assert torch.equal(plain[name], profiled[name])
    assert not any(tower._forward_hooks or tower._forward_pre_hooks for tower in objective.towers().values())


def test_hooks_are_removed_when_the_step_fails():
    objective = build_pretraining("blip", "tiny", vocab_size=300)
    inputs = synthetic_batch(objective.model.config, [5])
    with pytest.raises(ValueError, match="hard negatives need at least 2 pairs"):
        profile_step(objective, inputs)
    assert not any(tower._forward_hooks or tower._forward_pre_hooks for tower in objective.towers().values())


def test_memory_grows_with_the_batch_and_ignores_parameters():
    small, large = (profile_model("beit3", "tiny", batch=batch).totals["mb"] for batch in (4, 8))
    assert 1.5 < large / small < 2.5
    objective = build_pretraining("beit3", "tiny")
    assert small < sum(p.numel() * 4 for p in objective.parameters()) / 2**20 + 50


def test_large_models_profile_on_meta_without_memory():
    profile = profile_model("blip", "large", backward=True)
    assert profile.totals["image_passes"] == 2
    assert profile.totals["ms"] is None
    assert profile.totals["gflops_backward"] > profile.totals["gflops_forward"]


def test_loss_shares_are_consistent():
    profile = profile_model("blip", "base", batch=8, backward=True)
    shares = profile.totals["losses"]
    assert set(shares) == {"itc", "itm", "lm"}
    for share in shares.values():
        assert 0 < share["gflops_alone"] < share["gflops_used"]
    total = profile.totals["gflops_forward"] + profile.totals["gflops_backward"]
    shared = rows_of(profile)["itc", "image_encoder"]
    alone = sum(share["gflops_alone"] for share in shares.values())
    assert alone + shared.gflops_forward + shared.gflops_backward == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "flamingo"}, "model must be one of blip, coca, beit3"),
        ({"size": "giant"}, "size must be one of tiny, base, large"),
        ({"schedule": "fast"}, "schedule must be one of packed, published"),
        ({"losses": ["mlm"]}, r"losses must name some of itc, itm, lm; received \['mlm'\]"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"batch": 1}, "hard negatives need at least 2 pairs"),
        ({"device": "tpu"}, "device must be meta, cpu or cuda|Expected one of"),
        ({"image_size": 100}, "image_size must be a multiple of patch_size"),
    ],
)
def test_profile_model_says_what_is_wrong(options, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        profile_model(**{"model": "blip", "size": "tiny", **options})


def test_json_and_page_hold_every_row():
    profile = profile_model("coca", "tiny", batch=3, backward=True)
    data = json.loads(json.dumps(profile.to_json()))
    assert {"model", "size", "schedule", "batch", "device", "rows", "totals", "calls", "towers_not_called"} == set(data)
    assert set(data["rows"][0]) == {
        "loss", "module", "kind", "passes", "shared", "grad", "sequences", "tokens", "padding", "gflops_forward", "gflops_backward",
        "ms", "mb", "serves", "gflops_repeated", "gflops_padding", "waste", "unread",
    }  # fmt: skip
    page = profile_page(profile)
    assert page.count("<tr") == len(profile.rows) + 2
    for word in ("http", "<script", "@import", "url("):
        assert word not in page


def test_page_of_several_profiles_is_well_formed_and_names_each_once_per_figure():
    profiles = [profile_model("blip", "tiny", batch=3, schedule=name, backward=True) for name in SCHEDULES]
    profiles.append(profile_model("albef", "tiny", batch=3))
    page = profile_page(profiles)
    body = page.replace("<!doctype html>", "").replace('<meta charset="utf-8">', "")
    body = body.replace('<meta name="viewport" content="width=device-width">', "")
    tree = ElementTree.fromstring(body)  # every tag is closed, every attribute quoted
    assert [heading.text for heading in tree.iter("h2")] == [
        "Side by side", "Passes per loss", "GFLOPs per loss", "Padding", "Timeline", "Every row",
    ]  # fmt: skip
    titles = [heading.text for heading in tree.iter("h3")]
    assert all(titles.count(profile.title) == 5 for profile in profiles)
    assert len(list(tree.iter("svg"))) == 4 * len(profiles)
    squares = sum(1 for svg in tree.iter("svg") if svg.get("aria-label") == "passes per loss" for _ in svg.iter("rect"))
    assert squares == sum(row.passes for profile in profiles for row in profile.rows)
    with pytest.raises(ValueError, match="at least one profile"):
        profile_page([])


def test_observer_hears_every_change_of_loss():
    heard = []
    with observe_losses(lambda: heard.append(1)), loss_scope("a"), loss_scope("b"):
        pass
    with loss_scope("c"):
        pass
    assert len(heard) == 4


def test_caption_lengths_have_the_mean_of_web_captions():
    assert math.isclose(sum(caption_lengths(256)) / 256, 14.3, abs_tol=0.5)
    assert caption_lengths(8) == caption_lengths(8)
