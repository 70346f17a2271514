"""Small images and a small vocabulary for the tests of the data room."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlp_fast.data import WordPieceTokenizer

CAPTIONS = ["a photo of a blue circle", "there is a red triangle and no green shape in the picture", "one teal rectangle"]


@pytest.fixture
def image_bytes() -> Callable[..., bytes]:
    """image_bytes(color="red", size=(8, 8), format="PNG") -> an encoded image; colour None is noise, so that it is long."""

    def encode(color: str | None = "red", size: tuple[int, int] = (8, 8), format: str = "PNG") -> bytes:
        if color is None:
            noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            image = Image.fromarray(noise)
        else:
            image = Image.new("RGB", size, color)
        file = io.BytesIO()
        image.save(file, format)
        return file.getvalue()

    return encode


@pytest.fixture
def bad_images(image_bytes) -> dict[str, bytes]:
    """Bytes that are no image, each in its own way."""
    noise = image_bytes(None, (32, 32))
    return {
        "truncated": noise[: len(noise) // 2],
        "empty": b"",
        "text": b"this is a text, whatever its name says",
        "gif": image_bytes("red", format="GIF"),
        "header": noise[:8],
        "flipped": noise[:100] + bytes(255 - byte for byte in noise[100:]),
    }


@pytest.fixture(scope="session")
def tokenizer() -> WordPieceTokenizer:
    return WordPieceTokenizer.train(CAPTIONS, 120)


@pytest.fixture
def vocab_file(tmp_path: Path) -> Path:
    """A vocabulary laid out as bert-base-uncased's: [PAD] 0, [UNK] 100, [CLS] 101, [SEP] 102, [MASK] 103, 30,522 lines."""
    pieces = [f"[unused{index}]" for index in range(30522)]
    pieces[0] = "[PAD]"
    pieces[100:104] = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces[1000:1006] = ["a", "picture", "of", "cat", "##s", "##ter"]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n")
    return path
