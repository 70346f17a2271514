import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp_fast.data import blockwise_mask, mask_tokens

CLS, SEP, MASK, VOCAB = 1, 2, 3, 50
SPECIAL = (0, CLS, SEP, MASK)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def captions(*lengths: int) -> torch.Tensor:
    """[CLS], `length` words, [SEP], again and again, packed."""
    return torch.tensor([token for n in lengths for token in (CLS, *range(10, 10 + n), SEP)], dtype=torch.int64)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    batch=st.integers(0, 4),
    height=st.integers(1, 17),
    width=st.integers(1, 17),
    ratio=st.floats(0, 1, allow_subnormal=False),
    seed=st.integers(0, 99),
)
def test_blockwise_mask_counts_are_exact(batch, height, width, ratio, seed):
    mask = blockwise_mask(batch, height, width, ratio, seeded(seed))
    assert mask.shape == (batch, height * width)
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [round(ratio * height * width)] * batch
    assert torch.equal(mask, blockwise_mask(batch, height, width, ratio, seeded(seed)))


def test_blockwise_mask_is_blocks_and_not_single_patches():
    mask = blockwise_mask(200, 14, 14, 0.4, seeded(0)).view(200, 14, 14)
    assert len({tuple(image.flatten().tolist()) for image in mask}) == 200
    horizontal = (mask[:, :, 1:] & mask[:, :, :-1]).sum() / (14 * 13 * 200)
    # two neighbours are both masked with probability 0.16 where patches are drawn one by one
    assert horizontal > 0.27
    # the middle is in more blocks than the rim, but every patch is masked in some image
    assert mask.float().mean(0).min() > 0.03


def test_blockwise_mask_errors():
    with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\]; received 1.5"):
        blockwise_mask(1, 4, 4, 1.5)
    with pytest.raises(ValueError, match="needs a grid of patches; received batch=1, grid 0 x 4"):
        blockwise_mask(1, 0, 4, 0.4)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 20), max_size=8),
    ratio=st.floats(0, 1, allow_subnormal=False),
    seed=st.integers(0, 99),
    vocab_size=st.sampled_from([None, VOCAB]),
)
def test_mask_tokens_counts_are_exact_in_every_caption(lengths, ratio, seed, vocab_size):
    tokens, total = captions(*lengths), [n + 2 for n in lengths]
    before = tokens.clone()
    result = mask_tokens(tokens, total, ratio, MASK, SPECIAL, seeded(seed), vocab_size=vocab_size)
    assert torch.equal(tokens, before)
    assert result.masked_rows.dtype == result.input_ids.dtype == torch.int64
    hidden = torch.zeros(len(tokens), dtype=torch.bool)
    hidden[result.masked_rows] = True
    expected = [0 if ratio == 0 or n == 0 else max(1, round(ratio * n)) for n in lengths]
    assert [int(part.sum()) for part in hidden.split(total)] == expected
    assert result.masked_rows.tolist() == sorted(set(result.masked_rows.tolist()))
    assert torch.equal(result.input_ids[~hidden], tokens[~hidden])
    assert not torch.isin(tokens[hidden], torch.tensor(SPECIAL)).any()
    if vocab_size is None:
        assert (result.input_ids[hidden] == MASK).all()
    else:
        assert not torch.isin(result.input_ids[hidden], torch.tensor([0, CLS, SEP])).any()
        assert (result.input_ids < VOCAB).all()
    again = mask_tokens(tokens, total, ratio, MASK, SPECIAL, seeded(seed), vocab_size=vocab_size)
    assert torch.equal(again.input_ids, result.input_ids)


def test_mask_tokens_masks_every_token_equally_often():
    tokens = captions(10)
    counts = torch.zeros(12)
    generator = seeded(0)
    for _ in range(1000):
        counts[mask_tokens(tokens, [12], 0.5, MASK, SPECIAL, generator).masked_rows] += 1
    assert counts[[0, -1]].tolist() == [0, 0]
    assert (counts[1:-1] - 500).abs().max() < 80


def test_mask_tokens_80_10_10():
    tokens = torch.full((20_000,), 40)
    input_ids, rows = mask_tokens(tokens, [20_000], 1.0, MASK, SPECIAL, seeded(0), vocab_size=VOCAB)
    assert len(rows) == 20_000
    assert abs((input_ids == MASK).float().mean() - 0.8) < 0.01
    # one random id in 46 is the one that stood there
    assert abs((input_ids == 40).float().mean() - 0.1 - 0.1 / 46) < 0.01
    assert set(range(4, VOCAB)) <= set(input_ids.tolist())


def test_mask_tokens_empty_captions_and_nothing_to_mask():
    result = mask_tokens(torch.tensor([CLS, SEP, CLS, 9, SEP]), [2, 0, 3], 0.15, MASK, SPECIAL)
    assert result.masked_rows.tolist() == [3]
    assert result.input_ids.tolist() == [CLS, SEP, CLS, MASK, SEP]
    assert mask_tokens(torch.zeros(0, dtype=torch.int64), [], 0.15, MASK, SPECIAL).masked_rows.shape == (0,)


def test_mask_tokens_errors():
    with pytest.raises(ValueError, match=r"lengths must sum to the rows of token_ids; they sum to 4, token_ids is \[5\]"):
        mask_tokens(captions(3), [4], 0.5, MASK, SPECIAL)
    with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\]; received -0.1"):
        mask_tokens(captions(3), [5], -0.1, MASK, SPECIAL)
    with pytest.raises(ValueError, match="vocab_size must leave ids that are not special to draw from; received 4"):
        mask_tokens(captions(3), [5], 0.5, MASK, SPECIAL, vocab_size=4)
