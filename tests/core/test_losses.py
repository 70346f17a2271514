"""Losses against the formulas of their papers, written out, in float64 where the loss computes in it."""

import math

import pytest
import torch
import torch.nn.functional as F

from vlp_fast import losses

BATCH, DIM, QUEUE = 5, 8, 7
ONE = torch.tensor(1.0)


@pytest.fixture
def features():
    return [F.normalize(torch.randn(BATCH, DIM), dim=1) for _ in range(2)]


def soft_cross_entropy(logits, targets):
    total = 0.0
    for row in range(len(logits)):
        normaliser = math.log(sum(math.exp(x) for x in logits[row].tolist()))
        total -= sum(t * (x - normaliser) for t, x in zip(targets[row].tolist(), logits[row].tolist(), strict=True))
    return total / len(logits)


def softmax(row):
    exponentials = [math.exp(x) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def test_contrastive_loss_is_the_mean_of_both_directions(features):
    image, text = features
    scale = torch.tensor(14.0)
    logits = 14.0 * image @ text.T
    identity = torch.eye(BATCH)
    expected = (soft_cross_entropy(logits, identity) + soft_cross_entropy(logits.T, identity)) / 2
    assert losses.contrastive_loss(image, text, scale).item() == pytest.approx(expected, rel=1e-5)
    assert losses.contrastive_loss(text, image, scale).item() == pytest.approx(expected, rel=1e-5)


def test_contrastive_loss_does_not_depend_on_the_order_of_pairs(features):
    image, text = features
    order = torch.randperm(BATCH)
    scale = torch.tensor(5.0)
    torch.testing.assert_close(
        losses.contrastive_loss(image[order], text[order], scale), losses.contrastive_loss(image, text, scale)
    )


def test_contrastive_loss_of_equal_logits_is_log_of_the_batch(features):
    loss = losses.contrastive_loss(*features, torch.tensor(0.0))
    assert loss.item() == pytest.approx(math.log(BATCH), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_distilled_contrastive_loss_is_soft_cross_entropy(alpha):
    logits, teacher = (2 * torch.randn(BATCH, BATCH + QUEUE, dtype=torch.float64) for _ in range(2))
    targets = torch.tensor([softmax(row) for row in teacher.tolist()], dtype=torch.float64) * alpha
    targets += (1 - alpha) * torch.eye(BATCH, BATCH + QUEUE, dtype=torch.float64)
    torch.testing.assert_close(targets.sum(1), torch.ones(BATCH, dtype=torch.float64))
    keys = torch.eye(BATCH + QUEUE, dtype=torch.float64)  # so that features are logits
    loss = losses.distilled_contrastive_loss(logits, teacher, keys, torch.tensor(1.0, dtype=torch.float64), alpha)
    assert loss.item() == pytest.approx(soft_cross_entropy(logits, targets), rel=1e-12)


def drawn_from(similarity, **options):
    """Hard negatives for given similarities."""
    return losses.hard_negatives(similarity, torch.eye(len(similarity)), 1.0, **options)


def test_hard_negatives_never_pick_the_rows_own_column():
    similarity = 3 * torch.randn(6, 6) + 50 * torch.eye(6)  # its own column outweighs all others
    for _ in range(60):
        drawn = drawn_from(similarity)
        assert drawn.shape == (6,)
        assert drawn.dtype == torch.int64
        assert not (drawn == torch.arange(6)).any()


@pytest.mark.parametrize("floor", [0.0, 1e-4, 0.5])
def test_hard_negatives_are_drawn_with_the_weights_of_the_paper(floor):
    similarity = torch.tensor([[9.0, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    draws = 1500
    counts = torch.zeros(3, 3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for _ in range(draws):
        counts[torch.arange(3), drawn_from(similarity, floor=floor, generator=generator)] += 1
    weights = torch.softmax(similarity.double(), 1) + floor
    weights.fill_diagonal_(0)
    expected = weights / weights.sum(1, keepdim=True)
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() <= 4.5 * deviation + 1e-12).all()


def test_hard_negatives_keep_a_chance_where_the_softmax_has_none():
    similarity = torch.full((3, 3), -1e4)
    similarity[0, 0] = 1e4  # the others of row 0 underflow to weight 0: the floor alone is left
    drawn = {int(drawn_from(similarity)[0]) for _ in range(50)}
    assert drawn == {1, 2}


def test_hard_negatives_are_repeatable():
    similarity = torch.randn(8, 8)
    a, b = (drawn_from(similarity, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)


def test_hard_negatives_need_two_pairs():
    with pytest.raises(ValueError, match="hard negatives need at least 2 pairs in the batch; received 1."):
        drawn_from(torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: losses.sigmoid_contrastive_loss(x, x[:1], ONE, ONE), r"must have one shape; received \[2, 3\] and \[1, 3\]"),
        (lambda x: losses.hard_negatives(x, x[:1], ONE), "queries and keys must have one shape"),
    ],
)
def test_losses_refuse_pairs_of_different_sizes(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(2, 3))


def test_matching_loss_is_cross_entropy_with_the_positives_first():
    logits = torch.randn(5, 2, dtype=torch.float64)
    labels = torch.tensor([1, 1, 0, 0, 0])
    expected = soft_cross_entropy(logits, F.one_hot(labels, 2))
    assert losses.matching_loss(logits, 2).item() == pytest.approx(expected, rel=1e-6)
    assert losses.matching_loss(torch.zeros(7, 2), 3).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_compute_in_float32(dtype):
    logits = torch.randn(6, 9).to(dtype)
    assert losses.matching_loss(logits[:, :2], 3).dtype == torch.float32
    assert losses.contrastive_loss(logits, logits, torch.tensor(1.0)).dtype == torch.float32
