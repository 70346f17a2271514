import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp_fast.data import WordPieceTokenizer, clean_caption

CAPTIONS = ["a photo of a blue circle", "there is a red triangle and no green shape in the picture", "one teal rectangle"]


def test_tokenizer_train_numbers_special_tokens_first_and_last(tokenizer):
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (0, 1, 2, 3, 4)
    assert (tokenizer.dec_id, tokenizer.enc_id) == (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1)
    assert tokenizer.vocab_size == len(tokenizer) == len(tokenizer.vocab) <= 120
    assert tokenizer.special_ids == (0, 1, 2, 3, 4, tokenizer.dec_id, tokenizer.enc_id)


def test_tokenizer_round_trip(tokenizer):
    for caption, ids in zip(CAPTIONS, tokenizer.encode(CAPTIONS, 64), strict=True):
        assert ids[0] == tokenizer.cls_id
        assert ids[-1] == tokenizer.sep_id
        assert not set(ids[1:-1]) & set(tokenizer.special_ids)
        assert tokenizer.decode(ids) == caption


def test_tokenizer_train_is_deterministic_across_processes(tokenizer):
    code = f"from vlp_fast.data import WordPieceTokenizer as W; print(hash(W.train({CAPTIONS!r}, 120).vocab))"
    env = {**os.environ, "PYTHONHASHSEED": "0"}
    runs = [subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout != ""


def test_tokenizer_encode_truncates_and_keeps_sep(tokenizer):
    whole = tokenizer.encode([CAPTIONS[1]], 100)[0]
    for max_length in (2, 3, 5, len(whole) - 1, len(whole), len(whole) + 1):
        ids = tokenizer.encode([CAPTIONS[1]], max_length)[0]
        assert len(ids) == min(max_length, len(whole))
        assert ids[:-1] == whole[: len(ids) - 1]
        assert ids[-1] == tokenizer.sep_id


def test_tokenizer_encode_of_nothing(tokenizer):
    assert tokenizer.encode([], 30) == []
    assert tokenizer.encode([""], 30) == [[tokenizer.cls_id, tokenizer.sep_id]]


def test_tokenizer_text_cannot_inject_special_tokens(tokenizer):
    ids = tokenizer.encode(["a [MASK] photo [SEP] [DEC] [PAD]"], 100)[0]
    assert set(ids[1:-1]) & set(tokenizer.special_ids) <= {tokenizer.unk_id}


@settings(deadline=None, max_examples=50, derandomize=True)
@given(captions=st.lists(st.text(max_size=40), max_size=4), max_length=st.integers(2, 12))
def test_tokenizer_encode_any_text_within_length(tokenizer, captions, max_length):
    encoded = tokenizer.encode(captions, max_length)
    assert len(encoded) == len(captions)
    for ids in encoded:
        assert 2 <= len(ids) <= max_length
        assert (ids[0], ids[-1]) == (tokenizer.cls_id, tokenizer.sep_id)
        assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_tokenizer_from_vocab_file_has_the_ids_of_blip(vocab_file):
    tokenizer = WordPieceTokenizer.from_vocab_file(vocab_file)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (
        0,
        100,
        101,
        102,
        103,
    )
    assert (tokenizer.dec_id, tokenizer.enc_id, tokenizer.vocab_size) == (30522, 30523, 30524)
    assert tokenizer.encode(["A picture of cats, Cáts."], 30) == [
        [101, 1000, 1001, 1002, 1003, 1004, 100, 1003, 1004, 100, 102]
    ]
    assert tokenizer.decode([30522, 1000, 1001, 1002, 1003, 1004, 1005, 102, 0, 0]) == "a picture of catster"
    assert tokenizer.decode([100]) == "[UNK]"


def test_tokenizer_save_vocab_gives_the_same_ids_back(tokenizer, tmp_path):
    tokenizer.save_vocab(tmp_path / "vocab.txt")
    again = WordPieceTokenizer.from_vocab_file(tmp_path / "vocab.txt")
    assert again.vocab == tokenizer.vocab
    assert again.special_ids == tokenizer.special_ids
    assert again.encode(CAPTIONS, 20) == tokenizer.encode(CAPTIONS, 20)


def test_tokenizer_errors(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"there is no vocabulary file .*none.txt"):
        WordPieceTokenizer.from_vocab_file(tmp_path / "none.txt")
    (tmp_path / "v.txt").write_text("[PAD]\n[UNK]\na\n")
    with pytest.raises(ValueError, match=r"v.txt is not a WordPiece vocabulary: .*\[CLS\], \[SEP\], \[MASK\] is missing"):
        WordPieceTokenizer.from_vocab_file(tmp_path / "v.txt")
    (tmp_path / "v.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"v.txt is not a WordPiece vocabulary: "):
        WordPieceTokenizer.from_vocab_file(tmp_path / "v.txt")
    with pytest.raises(ValueError, match="must not repeat a piece; 'a' stands in it more than once"):
        WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "a"])
    with pytest.raises(ValueError, match="a tokenizer is trained on captions; received none with text"):
        WordPieceTokenizer.train(["", "  "], 100)
    with pytest.raises(
        ValueError, match="vocab_size must hold 7 special tokens and the captions' 3 characters; 10 is the least"
    ):
        WordPieceTokenizer.train(["ab"], 9)
    assert WordPieceTokenizer.train(["ab"], 10).vocab_size == 10
    with pytest.raises(ValueError, match=r"max_length must leave room for \[CLS\] and \[SEP\]; received 1"):
        tokenizer.encode(["a"], 1)
    with pytest.raises(ValueError, match="captions must be a list of texts; received a single text"):
        tokenizer.encode("a photo", 10)
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, .*\); received -1"):
        tokenizer.decode([3, -1])


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A Photo of a CAT.", "a photo of a cat"),
        ('"Hello"  (world)!!! #1: a*b; c~d', "hello world 1 a b c d"),
        ("well-known, isn't it?", "well-known, isn't it?"),
        ("  tabs\tand\nlines\n", "tabs and lines"),
        ("...", ""),
        ("", ""),
    ],
)
def test_clean_caption(caption, cleaned):
    assert clean_caption(caption) == cleaned


def test_clean_caption_keeps_the_first_words():
    assert clean_caption("w " * 50).split() == ["w"] * 30
    assert clean_caption("one two three", max_words=2) == "one two"
