"""Fine-tuning steps of BEiT-3, pretraining in the paper's form, and their losses and masks against plain definitions."""

import pytest
import torch
import torch.nn.functional as F

from vlp_fast.data import Batch
from vlp_fast.models import Beit3, Beit3Config
from vlp_fast.testing import assert_as_accurate_as
from vlp_fast.training import Beit3Pretraining
from vlp_fast.training.beit3_tasks import Beit3Captioning, Beit3Contrast, answer_loss, caption_loss, mask_captions

CONFIG = {
    "image_size": 16, "patch_size": 8, "dim": 32, "depth": 2, "num_heads": 4, "hidden_dim": 64, "vocab_size": 60,
    "visual_vocab_size": 8, "max_positions": 16,
}  # fmt: skip
LENGTHS = (5, 3, 7, 2)
MASK = 59


@pytest.fixture
def batch():
    return Batch(torch.randn(4, 3, 16, 16), torch.randint(3, 58, (sum(LENGTHS),)), LENGTHS, ("",) * 4)


def plain_caption_loss(hidden, weight, bias, targets, smoothing, drop_worst):
    logits = F.linear(hidden, weight, bias)
    words = logits.shape[1]
    wanted = torch.full_like(logits, smoothing / (words - 1)).scatter(1, targets[:, None], 1 - smoothing)
    rows = F.kl_div(logits.log_softmax(1), wanted, reduction="none").sum(1)
    return rows.sort().values[: max(int(len(rows) * (1 - drop_worst)), 1)].mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("drop_worst", [0.0, 0.2])
@pytest.mark.parametrize("rows", [1, 11])
def test_caption_loss_is_the_divergence_of_the_easiest_rows(rows, drop_worst, smoothing):
    targets = torch.randint(7, (rows,))
    exact = [torch.randn(rows, 6).double(), torch.randn(7, 6).double(), torch.randn(7).double()]

    def run(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in exact]
        loss = function(*inputs)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    def ours(h, w, b):
        return caption_loss(h, w, b, targets, label_smoothing=smoothing, drop_worst=drop_worst)

    def plain(h, w, b):
        return plain_caption_loss(h, w, b, targets, smoothing, drop_worst)

    torch.testing.assert_close(run(ours, torch.float64), run(plain, torch.float64))
    parts = [run(ours, torch.float32), run(plain, torch.float32), run(plain, torch.float64)]
    for mine, baseline, wanted in zip(*parts, strict=True):
        assert_as_accurate_as(mine, baseline, wanted)


def test_caption_loss_without_rows_is_zero():
    weight = torch.randn(7, 6, requires_grad=True)
    loss = caption_loss(torch.zeros(0, 6), weight, torch.zeros(7), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert weight.grad.abs().max() == 0


def test_task_losses_and_masks_say_what_is_wrong():
    one = torch.zeros(1, 6), torch.zeros(7, 6), torch.zeros(7), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 0.857143\]; received 0.9"):
        caption_loss(*one, label_smoothing=0.9)
    with pytest.raises(ValueError, match=r"drop_worst must lie in \[0, 1\); received 1"):
        caption_loss(*one, drop_worst=1)
    with pytest.raises(ValueError, match=r"received \[2, 3\] and \[2, 4\]"):
        answer_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\]; received 2"):
        mask_captions(torch.zeros(3, dtype=torch.long), [3], 2, 1, 9)
    with pytest.raises(ValueError, match="lengths must sum to the 3 rows of token_ids; they sum to 4"):
        mask_captions(torch.zeros(3, dtype=torch.long), [4], 0.5, 1, 9)


def test_mask_captions_hides_any_word_but_the_first():
    lengths = [10, 1, 4, 2] * 200
    ids = torch.randint(3, 58, (sum(lengths),))
    hidden, rows = mask_captions(ids, lengths, 0.7, MASK, 60, torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    per_caption = torch.bincount(torch.bucketize(rows, offsets, right=True) - 1, minlength=len(lengths)).tolist()
    assert per_caption == [7, 0, 3, 1] * 200
    assert not torch.isin(rows, offsets).any()
    assert torch.isin(offsets[1:] - 1, rows).float().mean() > 0.5  # the last token is hidden as often as others
    changed = torch.zeros(len(ids), dtype=torch.bool).index_fill(0, rows, True)
    assert torch.equal(hidden[~changed], ids[~changed])
    assert abs((hidden[rows] == MASK).float().mean() - 0.8) < 0.03
    assert abs((hidden[rows] == ids[rows]).float().mean() - 0.1) < 0.03
    again, _ = mask_captions(ids, lengths, 0.7, MASK, 60, torch.Generator().manual_seed(0))
    assert torch.equal(hidden, again)


def train(objective, make_inputs, steps=120):
    optimizer = torch.optim.AdamW(objective.parameters(), 2e-3)
    totals = []
    for step in range(steps):
        total = objective.total(objective(make_inputs(step)))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    return sum(totals[:5]) / 5, sum(totals[-5:]) / 5


@pytest.mark.parametrize("form", [{}, {"share_attention": True, "vl_experts_from_layer": 1}])
@pytest.mark.parametrize("task", ["contrast", "captioning", "pretraining"])
def test_beit3_learns_in_both_forms(batch, task, form):
    config, generator = Beit3Config(**CONFIG, **form), torch.Generator().manual_seed(0)
    if task == "contrast":
        objective = Beit3Contrast(config)
        first, last = train(objective, lambda step: batch, 40)
        assert first > 1.0
        assert last < 0.2
    elif task == "captioning":
        objective = Beit3Captioning(config, mask_id=MASK, drop_after=60)
        first, last = train(objective, lambda step: objective.prepare(batch, generator, step))
        assert last < 0.5 * first
    else:

        class Codes:
            num_codes = 8

            def encode(self, images):
                return (images.unflatten(3, (2, 8)).unflatten(2, (2, 8)).mean((1, 3, 5)).flatten(1) * 40).long() % 8

        objective = Beit3Pretraining(config, Codes(), mask_id=MASK, special_ids=[0, 1, 2])
        first, last = train(objective, lambda step: objective.prepare(batch, generator))
        assert last < 0.6 * first
        if form:
            gradients = [objective.model.encoder.layers[i].ffn.fc1.weight.grad for i in (0, 1)]
            assert [len(g) for g in gradients] == [2, 3]
            assert all((g.flatten(1).abs().amax(1) > 0).all() for g in gradients)


def test_beit3_captioning_drops_the_worst_words_late_only(batch):
    objective = Beit3Captioning(Beit3Config(**CONFIG), mask_id=MASK, drop_after=10)
    early, late = (objective(objective.prepare(batch, torch.Generator().manual_seed(0), step))["caption"] for step in (10, 11))
    assert late < early
    moved = objective.prepare(batch, torch.Generator().manual_seed(0)).to("meta")
    assert moved.token_ids.device.type == "meta"


def test_beit3_fine_tuning_takes_over_the_pretrained_trunk():
    objective, pretrained = Beit3Contrast(Beit3Config(**CONFIG)), Beit3(Beit3Config(**CONFIG))
    objective.model.load_trunk(pretrained)
    mine = objective.model.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in pretrained.state_dict().items())
    assert set(mine) - set(pretrained.state_dict()) == {"vision_head.weight", "language_head.weight", "logit_scale"}
