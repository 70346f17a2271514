"""The three models train: every loss falls on 64 real image-caption pairs, and reaches exactly what it should train."""

import copy

import pytest
import torch

from vlp_fast.data import BatchLoader, ImageTransform, PatchCodebook, WordPieceTokenizer, open_pairs
from vlp_fast.training import build_pretraining

PAIRS = 64


@pytest.fixture(scope="module")
def real_pairs():
    """64 easy-vqa images with 64 different captions, and a tokenizer trained on them."""
    pytest.importorskip("easy_vqa", reason="needs the real images of pip install 'vlp_fast[demo]'")
    chosen = {}
    for pair in open_pairs("easy-vqa"):
        chosen.setdefault(pair.caption, pair)
        if len(chosen) == PAIRS:
            break
    return list(chosen.values()), WordPieceTokenizer.train(list(chosen), vocab_size=200)


def make(model, real_pairs, batch_size):
    """The tiny pretraining step of a model and its batches of real pairs."""
    pairs, tokenizer = real_pairs
    torch.manual_seed(0)
    loader = BatchLoader(pairs, ImageTransform(64), tokenizer, batch_size, shuffle=True, drop_last=True)
    batches = list(loader.batches(0))
    options = {}
    if model == "beit3":
        images = torch.cat([batch.images for batch in batches])
        options["visual_tokenizer"] = PatchCodebook.fit(images, 16, 32, generator=torch.Generator().manual_seed(0))
    if model == "blip":  # a queue longer than this corpus would hold the very pairs it contrasts with
        options.update(queue_size=1, momentum=0.9)
    return build_pretraining(model, "tiny", tokenizer=tokenizer, **options), batches


def train(objective, batches, steps, lr, **options):
    """Mean of each loss over the first and over the last pass through the batches."""
    optimizer = torch.optim.AdamW(objective.parameters(), lr=lr, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    history = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20)
        losses = objective(objective.prepare(batches[step % len(batches)], generator), **options)
        optimizer.zero_grad(set_to_none=True)
        objective.total(losses).backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})

    def mean(part):
        return {name: sum(losses[name] for losses in part) / len(part) for name in part[0]}

    window = 2 * len(batches)
    return mean(history[: len(batches)]), mean(history[-window:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "batch_size", "steps", "lr", "options", "bounds"),
    [
        # loss after training, as a share of the first: contrast and matching from chance, language from a uniform guess
        ("blip", 16, 560, 2e-3, {"alpha": 0.0}, {"itc": 0.4, "itm": 0.8, "lm": 0.35}),
        ("coca", 32, 350, 1e-3, {}, {"contrastive": 0.2, "caption": 0.1}),
        ("beit3", 32, 200, 2e-3, {}, {"mim": 0.93, "mlm": 0.6, "mvlm": 0.75}),
    ],
)
def test_every_loss_falls_on_real_pairs(real_pairs, model, batch_size, steps, lr, options, bounds):
    objective, batches = make(model, real_pairs, batch_size)
    first, last = train(objective, batches, steps, lr, **options)
    assert set(bounds) == set(first)
    for name, bound in bounds.items():
        assert last[name] < bound * first[name], (
            f"{name} went from {first[name]:.3f} to {last[name]:.3f}, not below {bound} of it"
        )


# what each loss must train, and what it must leave alone, as prefixes of parameter names
REACH = {
    ("blip", "itc"): (
        ["image_encoder", "text_tower.embedding.word", "text_tower.blocks.0.attention.qkv", "text_tower.blocks.1.mlp",
         "image_projection", "text_projection", "temperature"],
        ["text_tower.blocks.0.cross_attention", "itm_head", "lm_transform", "lm_bias"],
    ),
    ("blip", "itm"): (
        ["image_encoder", "text_tower.embedding.word", "text_tower.blocks.0.cross_attention.query",
         "text_tower.blocks.1.cross_attention.key_value", "text_tower.blocks.1.mlp", "itm_head"],
        ["image_projection", "text_projection", "temperature", "lm_transform", "lm_bias"],
    ),
    ("blip", "lm"): (
        ["image_encoder", "text_tower.embedding.word", "text_tower.blocks.0.cross_attention.key_value", "text_tower.blocks.1.mlp",
         "lm_transform", "lm_norm", "lm_bias"],
        ["image_projection", "text_projection", "temperature", "itm_head"],
    ),
    ("coca", "contrastive"): (
        ["image_encoder.encoder", "image_encoder.caption_pooler", "image_encoder.contrastive_pooler", "text_encoder.word",
         "text_encoder.class_token", "text_encoder.norm", "image_projection", "text_projection", "logit_scale"],
        ["text_decoder"],
    ),
    ("coca", "caption"): (
        ["image_encoder.encoder", "image_encoder.caption_pooler", "text_encoder.word", "text_encoder.blocks",
         "text_decoder.blocks.0.cross_attention", "text_decoder.words"],
        ["image_encoder.contrastive_pooler", "text_encoder.class_token", "text_encoder.norm", "image_projection", "logit_scale"],
    ),
    ("beit3", "mim"): (
        ["patch_embedding", "mask_token", "class_token", "image_position", "encoder.layers.0", "visual_head"],
        ["word", "text_position", "word_head"],
    ),
    ("beit3", "mlm"): (
        ["word", "text_position", "encoder.layers.1", "word_head"],
        ["patch_embedding", "mask_token", "class_token", "image_position", "visual_head"],
    ),
    ("beit3", "mvlm"): (
        ["patch_embedding", "mask_token", "word", "text_position", "encoder.layers.0", "visual_head", "word_head"],
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "loss"), REACH)
def test_loss_reaches_what_it_trains_and_nothing_else(real_pairs, model, loss):
    objective, batches = make(model, real_pairs, 8)
    losses = objective(objective.prepare(batches[0], torch.Generator().manual_seed(0)))
    losses[loss].backward()
    trained, untouched = REACH[model, loss]
    gradients = {name: p.grad for name, p in objective.model.named_parameters()}
    for prefix in trained:
        mine = [gradient for name, gradient in gradients.items() if name.startswith(prefix)]
        assert mine, f"no parameter is called {prefix}"
        assert any(g is not None and g.abs().max() > 0 for g in mine), f"{loss} does not train {prefix}"
    for prefix in untouched:
        mine = [gradient for name, gradient in gradients.items() if name == prefix or name.startswith(prefix + ".")]
        assert mine, f"no parameter is called {prefix}"
        assert all(g is None or g.abs().max() == 0 for g in mine), f"{loss} must not train {prefix}"


@pytest.mark.parametrize("loss", ["itc", "itm", "lm"])
def test_blip_losses_train_the_self_attention_of_their_own_expert_only(real_pairs, loss):
    objective, batches = make("blip", real_pairs, 8)
    objective(batches[0])[loss].backward()
    gradient = objective.model.text_tower.blocks[0].attention.qkv.weight.grad
    mine, other = (1, 0) if loss == "lm" else (0, 1)
    assert gradient[mine].abs().max() > 0
    assert gradient[other].abs().max() == 0


@pytest.mark.parametrize(("loss", "expert"), [("mim", 0), ("mlm", 1)])
def test_beit3_single_modality_losses_train_their_own_expert_only(real_pairs, loss, expert):
    objective, batches = make("beit3", real_pairs, 8)
    objective(objective.prepare(batches[0]))[loss].backward()
    for name, parameter in objective.model.encoder.named_parameters():
        assert parameter.grad[expert].abs().max() > 0, name
        assert parameter.grad[1 - expert].abs().max() == 0, name


def test_captions_of_other_images_raise_the_captioning_loss(real_pairs):
    """After a little training the image matters: the same captions against shifted images are harder to predict."""
    objective, batches = make("coca", real_pairs, 32)
    train(objective, batches, 220, 1e-3)
    batch = batches[0]
    shifted = copy.copy(batch)
    object.__setattr__(shifted, "images", batch.images.roll(1, 0))
    with torch.no_grad():
        right, wrong = objective(batch), objective(shifted)
    assert right["caption"] < 0.8 * wrong["caption"]
    assert right["contrastive"] < wrong["contrastive"]
