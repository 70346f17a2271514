"""WordPiece tokens of captions, with the two extra tokens BLIP adds: [DEC] starts a decoded caption, [ENC] a fused one.

The splitting into pieces is the `tokenizers` library's. Special tokens are put in place here, never found in the text: a
caption that contains "[MASK]" is four ordinary pieces of punctuation and letters, not a special token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

__all__ = ["WordPieceTokenizer", "clean_caption"]

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
APPENDED = ("[DEC]", "[ENC]")
DROPPED = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))


def clean_caption(caption: str, max_words: int = 30) -> str:
    """A caption as BLIP trains on it: lower case, ``.!"()*#:;~`` as spaces, single spaces, at most `max_words` words."""
    return " ".join(caption.lower().translate(DROPPED).split()[:max_words])


class WordPieceTokenizer:
    """Lower-cased BERT WordPiece over a given vocabulary; [DEC] and [ENC] take the two ids after it.

    With bert-base-uncased's 30,522 pieces [DEC] is 30522 and [ENC] 30523, the ids of BLIP's checkpoints.

    Args:
        vocab: the pieces; a piece's place is its id.

    Attributes:
        vocab_size: all ids, [DEC] and [ENC] included.
        pad_id, unk_id, cls_id, sep_id, mask_id, dec_id, enc_id: ids of the special tokens.
        special_ids: all of these, ascending.

    Raises:
        ValueError: a piece stands twice, or [PAD], [UNK], [CLS], [SEP] or [MASK] is missing.
    """

    def __init__(self, vocab: Sequence[str]) -> None:
        ids = {piece: index for index, piece in enumerate(vocab)}
        if len(ids) != len(vocab):
            twice = next(piece for index, piece in enumerate(vocab) if ids[piece] != index)
            raise ValueError(f"a WordPiece vocabulary must not repeat a piece; {twice!r} stands in it more than once.")
        missing = [token for token in SPECIAL if token not in ids]
        if missing:
            raise ValueError(f"a WordPiece vocabulary needs {', '.join(SPECIAL)}; {', '.join(missing)} is missing.")
        pieces = list(vocab)
        for token in APPENDED:
            if token not in ids:
                ids[token] = len(pieces)
                pieces.append(token)
        self.vocab = tuple(pieces)
        self.vocab_size = len(pieces)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (ids[token] for token in SPECIAL)
        self.dec_id, self.enc_id = (ids[token] for token in APPENDED)
        self.special_ids = tuple(sorted(ids[token] for token in (*SPECIAL, *APPENDED)))
        self._pieces = _bert(Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]")))

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> WordPieceTokenizer:
        """A vocabulary learned from captions: [PAD] is 0, then [UNK], [CLS], [SEP], [MASK], characters and pieces.

        Args:
            captions: any number of texts; they are held in memory.
            vocab_size: the most ids there may be, all special tokens included; fewer where the captions hold fewer pieces.

        Deterministic: the same captions give the same ids.

        Raises:
            ValueError: no text in the captions, or `vocab_size` below what special tokens and characters take.
        """
        tokenizer = _bert(Tokenizer(models.WordPiece(unk_token="[UNK]")))
        captions = list(captions)
        # The library numbers characters in an order that changes from run to run, and with it the pieces; given as special
        # tokens they keep the order given.
        alphabet = _alphabet(tokenizer, captions)
        if not alphabet:
            raise ValueError("a tokenizer is trained on captions; received none with text.")
        needed = len(SPECIAL) + len(APPENDED) + len(alphabet)
        if vocab_size < needed:
            raise ValueError(
                f"vocab_size must hold {len(SPECIAL) + len(APPENDED)} special tokens and the captions' {len(alphabet)} "
                f"characters; {needed} is the least, received {vocab_size}."
            )
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size - len(APPENDED), special_tokens=[*SPECIAL, *alphabet], show_progress=False
        )
        tokenizer.train_from_iterator(captions, trainer)
        ids = tokenizer.get_vocab()
        return cls(sorted(ids, key=ids.__getitem__))

    @classmethod
    def from_vocab_file(cls, path: str | Path) -> WordPieceTokenizer:
        """The tokenizer of a BERT vocabulary file: one piece a line, a line's place is its id.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a WordPiece vocabulary.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no vocabulary file {path}.")
        try:
            return cls(path.read_text("utf-8").removesuffix("\n").split("\n"))
        except ValueError as error:
            raise ValueError(f"{path} is not a WordPiece vocabulary: {error}") from error

    def save_vocab(self, path: str | Path) -> None:
        """Write the vocabulary, [DEC] and [ENC] included, for `from_vocab_file`, which gives the same ids back."""
        Path(path).write_text("\n".join(self.vocab) + "\n", "utf-8")

    def encode(self, captions: Sequence[str], max_length: int) -> list[list[int]]:
        """Ids of each caption as [CLS] pieces [SEP], at most `max_length` of them, without padding; [SEP] is always kept.

        Raises:
            ValueError: `max_length` below 2, or a single string instead of a list of them.
        """
        if max_length < 2:
            raise ValueError(f"max_length must leave room for [CLS] and [SEP]; received {max_length}.")
        if isinstance(captions, str):
            raise ValueError("captions must be a list of texts; received a single text.")
        encoded = self._pieces.encode_batch(list(captions), add_special_tokens=False)
        return [[self.cls_id, *caption.ids[: max_length - 2], self.sep_id] for caption in encoded]

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out, [UNK] is kept.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        ids = [int(token) for token in token_ids]
        outside = [token for token in ids if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(f"token ids must lie in [0, {self.vocab_size}); received {outside[0]}.")
        dropped = set(self.special_ids) - {self.unk_id}
        return self._pieces.decode([token for token in ids if token not in dropped], skip_special_tokens=False)

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"WordPieceTokenizer(vocab_size={self.vocab_size})"


def _bert(tokenizer: Tokenizer) -> Tokenizer:
    """BERT's uncased normalisation and splitting, and the joining of ## pieces."""
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _alphabet(tokenizer: Tokenizer, captions: Iterable[str]) -> list[str]:
    """All characters of the captions' words, and with ## those that continue a word; sorted."""
    words: set[str] = set()
    for caption in captions:
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(caption)))
    characters = {character for word in words for character in word}
    return sorted(characters) + sorted({f"##{character}" for word in words for character in word[1:]})
