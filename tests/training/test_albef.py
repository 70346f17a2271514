"""ALBEF's pretraining step on a tiny model: what each loss trains, what masks hide, what the momentum model follows."""

import pytest
import torch
import torch.nn.functional as F

from vlp_fast import losses as loss_functions
from vlp_fast.data import Batch, WordPieceTokenizer
from vlp_fast.models.albef import albef_preset
from vlp_fast.profiling import profile_model
from vlp_fast.training import build_pretraining, caption_lengths
from vlp_fast.training.albef import AlbefInputs, AlbefPretraining

PAD, CLS, SEP, MASK = 0, 1, 2, 3
LENGTHS = (6, 9, 4, 12)


def make_step(**changes):
    torch.manual_seed(0)
    return AlbefPretraining(
        albef_preset("tiny", vocab_size=60, pad_id=PAD, cls_id=CLS, mask_id=MASK, **{"queue_size": 8, **changes})
    )


def make_batch(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    words = [torch.randint(4, 60, (length - 2,), generator=generator).tolist() for length in lengths]
    ids = torch.tensor([token for caption in words for token in (CLS, *caption, SEP)])
    return Batch(torch.randn(len(lengths), 3, 64, 64, generator=generator), ids, tuple(lengths), ("",) * len(lengths))


def make_inputs(step, batch=None):
    return step.prepare(batch or make_batch(), torch.Generator().manual_seed(2))


# what each loss must train, and what it must leave alone, as prefixes of parameter names
REACH = {
    "itc": (
        ["image_encoder.patch_embedding", "text_encoder.embedding.word", "text_encoder.embedding.token_type",
         "text_encoder.blocks.1.mlp", "image_projection", "text_projection", "temperature"],
        ["fusion_encoder", "word_head", "itm_head"],
    ),
    "itm": (
        ["image_encoder.patch_embedding", "text_encoder.embedding.word", "text_encoder.blocks.0.attention.qkv",
         "fusion_encoder.blocks.0.cross_attention.key_value", "fusion_encoder.blocks.1.mlp", "itm_head"],
        ["image_projection", "text_projection", "temperature", "word_head"],
    ),
    "mlm": (
        ["image_encoder.patch_embedding", "text_encoder.embedding.word", "text_encoder.blocks.0.attention.qkv",
         "fusion_encoder.blocks.0.cross_attention.query", "fusion_encoder.blocks.1.mlp", "word_head.transform", "word_head.bias"],
        ["image_projection", "text_projection", "temperature", "itm_head"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("loss", REACH)
def test_loss_reaches_what_it_trains_and_nothing_else(loss):
    step = make_step()
    losses = step(make_inputs(step))
    assert set(losses) == set(REACH) == set(step.loss_weights)
    assert all(value.dim() == 0 and value.isfinite() for value in losses.values())
    losses[loss].backward()
    gradients = {name: p.grad for name, p in step.model.named_parameters()}
    trained, untouched = REACH[loss]
    for prefix in trained:
        mine = [gradient for name, gradient in gradients.items() if name.startswith(prefix)]
        assert any(g is not None and g.abs().max() > 0 for g in mine), f"{loss} does not train {prefix}"
    for prefix in untouched:
        mine = [gradient for name, gradient in gradients.items() if name.startswith(prefix)]
        assert mine, f"no parameter is called {prefix}"
        assert all(g is None or g.abs().max() == 0 for g in mine), f"{loss} must not train {prefix}"
    assert all(p.grad is None for p in step.momentum.parameters())


def test_permuting_pairs_changes_nothing():
    order = [2, 0, 3, 1]
    images, texts = torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2])

    def run(inputs, negatives):
        step = make_step().double()
        losses = step(inputs, negatives=negatives)
        step.total(losses).backward()
        return losses, {name: p.grad for name, p in step.model.named_parameters()}

    step, batch = make_step(), make_batch()
    batch = Batch(batch.images.double(), batch.token_ids, batch.text_lengths, batch.captions)
    inputs = make_inputs(step, batch)
    rows, segments = batch.segments().take(order)
    hidden = torch.zeros(len(batch.token_ids), dtype=torch.bool)
    hidden[inputs.masked_rows] = True
    permuted = AlbefInputs(
        Batch(batch.images[order], batch.token_ids[rows], segments.lengths, batch.captions),
        inputs.masked_ids[rows],
        hidden[rows].nonzero()[:, 0],
    )
    place = torch.tensor(order).argsort()  # where each old pair lies now
    first = run(inputs, (images, texts))
    second = run(permuted, (place[images[order]], place[texts[order]]))
    torch.testing.assert_close(first, second)


def test_momentum_follows_the_whole_model_and_queues_take_its_features():
    step = make_step()
    step.momentum.update(step.model, momentum=0.0)
    names = dict(step.momentum.named_parameters())
    assert set(dict(step.model.named_parameters())) - set(names) == {"temperature", "itm_head.weight", "itm_head.bias"}
    with torch.no_grad():
        for parameter in step.model.parameters():
            parameter += 1.0
    before = {name: p.clone() for name, p in names.items()}
    inputs = make_inputs(step)
    queue = step.momentum.image_queue.clone()
    step(inputs)
    for name, parameter in names.items():
        wanted = 0.995 * before[name] + 0.005 * step.model.get_parameter(name)
        torch.testing.assert_close(parameter, wanted, msg=name)
    with torch.no_grad():
        features = step.momentum.encode_image(inputs.pairs.images).features
    torch.testing.assert_close(step.momentum.image_queue[:4], features)
    assert torch.equal(step.momentum.image_queue[4:], queue[4:])
    assert step.momentum.queue_position == 4
    step(inputs)
    assert step.momentum.queue_position == 0


def test_temperature_stays_in_its_range():
    step = make_step()
    with torch.no_grad():
        step.model.temperature.fill_(3.0)
    step(make_inputs(step))
    assert step.model.temperature.item() == 0.5


def test_prepare_hides_words_and_separators_and_never_the_first_token():
    step, batch = make_step(), make_batch((20,) * 50)
    inputs = make_inputs(step, batch)
    assert len(inputs.masked_rows) == 50 * round(0.15 * 19)
    hidden = batch.token_ids[inputs.masked_rows]
    assert (hidden == SEP).any()
    assert not (hidden == CLS).any()
    changed = (inputs.masked_ids != batch.token_ids).nonzero()[:, 0]
    assert set(changed.tolist()) <= set(inputs.masked_rows.tolist())
    share = (inputs.masked_ids[inputs.masked_rows] == MASK).float().mean()
    assert 0.7 < share < 0.9


def test_words_are_predicted_where_they_are_hidden():
    step, batch = make_step(), make_batch()
    none = AlbefInputs(batch, batch.token_ids, torch.empty(0, dtype=torch.int64))
    losses = step(none)
    assert losses["mlm"] == 0
    losses["mlm"].backward()
    row = torch.tensor([7])
    masked = batch.token_ids.index_fill(0, row, MASK)
    step = make_step()
    loss = step(AlbefInputs(batch, masked, row), alpha=0.0)["mlm"]
    model, captions = step.model, batch.segments()
    rows = model.fuse(model.encode_words(masked, captions), captions, model.encode_image(batch.images), range(4))
    torch.testing.assert_close(loss, F.cross_entropy(model.word_logits(rows)[row], batch.token_ids[row]))


def test_one_pair_has_no_negative():
    step = make_step()
    with pytest.raises(ValueError, match="hard negatives need at least 2 pairs in the batch; received 1"):
        step(make_inputs(step, make_batch((5,))))


def test_unknown_schedule():
    with pytest.raises(ValueError, match="schedule must be one of packed, published; received 'fast'"):
        AlbefPretraining(albef_preset("tiny"), schedule="fast")


# ------------------------------------------------------------------------------------------------- the loss of masked words


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_distilled_cross_entropy_equals_cross_entropy_with_mixed_targets(alpha):
    logits = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (7,))
    mixed = (1 - alpha) * F.one_hot(targets, 11) + alpha * teacher.detach().softmax(1)
    results = [loss_functions.distilled_cross_entropy(logits, teacher, targets, alpha), F.cross_entropy(logits, mixed)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(result, logits)[0] for result in results))
    assert not loss_functions.distilled_cross_entropy(logits.detach(), teacher, targets, alpha).requires_grad
    assert loss_functions.distilled_cross_entropy(logits.bfloat16(), teacher.bfloat16(), targets, alpha).dtype == torch.float32


@pytest.mark.parametrize(
    ("teacher", "targets", "alpha", "message"),
    [
        ((7, 10), 7, 0.4, "logits and teacher_logits must have one shape"),
        ((7, 11), 6, 0.4, r"targets must be \[7\], one per row of logits; received shape \[6\]"),
        ((7, 11), 7, 1.5, r"alpha must be in \[0, 1\]; received 1.5"),
    ],
)
def test_distilled_cross_entropy_says_what_is_wrong(teacher, targets, alpha, message):
    with pytest.raises(ValueError, match=message):
        loss_functions.distilled_cross_entropy(
            torch.randn(7, 11), torch.randn(teacher), torch.zeros(targets, dtype=torch.int64), alpha
        )


# ------------------------------------------------------------------------------------------------------- by name, and profiled


def test_profile_counts_the_passes_of_the_published_step():
    batch = 6
    profile = profile_model("albef", "tiny", schedule="published", batch=batch, backward=True)
    tokens = sum(caption_lengths(batch))
    counted = {(row.loss, row.module): (row.passes, row.sequences, row.grad) for row in profile.rows if row.passes}
    # captions alone: contrast and masked, each with its momentum twin; fused: matching positive and negative (2 B rows), masked
    assert counted == {
        ("itc", "image_encoder"): (1, batch, True),
        ("itc", "momentum_image_encoder"): (1, batch, False),
        ("itc", "text_encoder"): (1, batch, True),
        ("itc", "momentum_text_encoder"): (1, batch, False),
        ("itm", "pair_encoder"): (2, 3 * batch, True),
        ("mlm", "text_encoder"): (1, batch, True),
        ("mlm", "momentum_text_encoder"): (1, batch, False),
        ("mlm", "pair_encoder"): (1, batch, True),
        ("mlm", "momentum_pair_encoder"): (1, batch, False),
    }
    rows = {(row.loss, row.module): row for row in profile.rows}
    assert rows["itc", "text_encoder"].serves == ["itc", "itm"]  # matching starts from the rows that contrast has made
    assert rows["itc", "image_encoder"].serves == ["itc", "itm", "mlm"]
    assert rows["itm", "pair_encoder"].tokens == 3 * tokens
    assert rows["mlm", "pair_encoder"].padding == 0.0


def test_tokenizer_gives_its_special_ids():
    tokenizer = WordPieceTokenizer.train(["a red circle on a blue ground", "how many squares"], vocab_size=60)
    step = build_pretraining("albef", "tiny", tokenizer=tokenizer)
    config = step.model.config
    assert (config.pad_id, config.cls_id, config.mask_id) == (tokenizer.pad_id, tokenizer.cls_id, tokenizer.mask_id)
    assert config.vocab_size == tokenizer.vocab_size
    assert build_pretraining("albef", "tiny", vocab_size=90).model.config.mask_id == 89
    with pytest.raises(ValueError, match="size must be one of tiny, base; received 'large'"):
        build_pretraining("albef", "large")


def test_every_loss_falls_on_a_batch():
    """On one batch, contrast, matching and masked words are all learnt; a longer queue would hold the very pairs it contrasts with."""
    step = make_step(queue_size=1, momentum=0.5)
    optimizer = torch.optim.AdamW(step.model.parameters(), lr=2e-3)
    inputs, negatives = make_inputs(step), (torch.tensor([1, 2, 3, 0]), torch.tensor([1, 2, 3, 0]))
    history = []
    for _ in range(90):
        losses = step(inputs, alpha=0.0, negatives=negatives)
        optimizer.zero_grad()
        step.total(losses).backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    for name, first in history[0].items():
        assert history[-1][name] < 0.3 * first, f"{name} went from {first:.3f} to {history[-1][name]:.3f}"
