"""From an image file to the float tensor a model reads: safe decoding, crop, resize, normalisation.

Only JPEG, PNG and WebP are opened, and an image's size is checked before its pixels are decoded. EXIF orientation is not
applied, as in the pipelines the published checkpoints were trained with.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlp_fast.data.pairs import ImageSource, RootedPath

__all__ = ["ImageError", "ImageTransform", "decode_image"]

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000  # 7,000 x 7,000; below Pillow's own warning at 89 million
NORMALIZATIONS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
ASPECT = (3 / 4, 4 / 3)  # of random crops


class ImageError(ValueError):
    """An image that cannot be used. `reason` is the short one a `SkipReport` counts; the message says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def decode_image(image: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image as RGB pixels.

    Args:
        image: a Pillow image, a path, a `RootedPath`, or the bytes of a JPEG, PNG or WebP file (its first frame is taken).
        max_pixels: width times height allowed; read from the header, before anything is decoded. Pillow's own limit against
            decompression bombs stays in force above it.

    Raises:
        ImageError: with reason "missing file", "path outside the data root", "over-size image" or "broken image".
    """
    if isinstance(image, Image.Image):
        _check_size(image, max_pixels)
        return _rgb(image)
    file = io.BytesIO(image) if isinstance(image, bytes) else _regular_file(image)
    try:
        with Image.open(file, formats=FORMATS) as opened:
            _check_size(opened, max_pixels)
            return _rgb(opened)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("over-size image", f"{error}.") from error
    # A decoder fed with arbitrary bytes raises OSError, SyntaxError, ValueError, struct.error, zlib.error and more.
    except Exception as error:
        raise ImageError("broken image", f"{type(error).__name__}: {error}.") from error


class ImageTransform:
    """Decode, crop, resize (bicubic) and normalise: any image -> float32 ``[3, image_size, image_size]``.

    Without `train` the whole image is resized to the square, aspect ratio not kept (what BLIP, CoCa and BEiT-3 evaluate with).
    With `train` a random part of it is, flipped left to right half of the time: area uniform in `crop_scale`, aspect ratio
    log-uniform in [3/4, 4/3], sides cut to the image's.

    Args:
        image_size: side of the square, in pixels.
        normalization: "clip" (BLIP, ALBEF, CoCa: CLIP's mean and deviation) or "inception" (BEiT-3: 0.5 and 0.5).
        train: random crop and flip.
        crop_scale: smallest and largest part of the image's area a random crop takes (BLIP pre-trains with (0.2, 1.0)).
        max_pixels: as in `decode_image`.

    Raises:
        ValueError: a size that is not positive, an unknown normalisation, or a crop scale outside (0, 1].
    """

    def __init__(
        self,
        image_size: int,
        normalization: str = "clip",
        train: bool = False,
        *,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size must be positive; received {image_size}.")
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}; received {normalization!r}.")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be (smallest, largest) within (0, 1]; received {crop_scale}.")
        self.image_size, self.normalization, self.train = image_size, normalization, train
        self.crop_scale, self.max_pixels = crop_scale, max_pixels
        mean, std = (np.array(values, np.float32) for values in NORMALIZATIONS[normalization])
        self._scale, self._shift = 1 / (255 * std), mean / std

    def __call__(self, image: ImageSource, generator: torch.Generator | None = None) -> Tensor:
        """One image as float32 ``[3, image_size, image_size]``; `generator` (on the CPU) draws the random crop and flip.

        Raises:
            ImageError: the image cannot be used; see `decode_image`.
        """
        pixels = decode_image(image, self.max_pixels)
        box, flip = self._random_crop(pixels, generator) if self.train else ((0.0, 0.0, pixels.width, pixels.height), False)
        pixels = pixels.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC, box=box)
        array = np.asarray(pixels, np.float32)[:, :: -1 if flip else 1]
        # numpy, not torch: several threads decode at once, and each torch operation would start threads of its own
        return torch.from_numpy(np.ascontiguousarray((array * self._scale - self._shift).transpose(2, 0, 1)))

    def _random_crop(
        self, pixels: Image.Image, generator: torch.Generator | None
    ) -> tuple[tuple[float, float, float, float], bool]:
        area, aspect, left, top, flip = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        low, high = self.crop_scale
        area = pixels.width * pixels.height * (low + area * (high - low))
        aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** aspect
        width = min(max(round(math.sqrt(area * aspect)), 1), pixels.width)
        height = min(max(round(math.sqrt(area / aspect)), 1), pixels.height)
        x, y = int(left * (pixels.width - width + 1)), int(top * (pixels.height - height + 1))
        return (x, y, x + width, y + height), flip < 0.5

    def __repr__(self) -> str:
        return f"ImageTransform({self.image_size}, {self.normalization!r}, train={self.train})"


def _check_size(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise ImageError("over-size image", f"{image.width} x {image.height} is more than max_pixels={max_pixels}.")


def _regular_file(image: RootedPath | Path | str) -> Path:
    """The path of an existing regular file (a pipe would block), inside its root if it has one."""
    path = Path(image.path if isinstance(image, RootedPath) else image)
    try:
        resolved = path.resolve()
        found = resolved.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a loop of links, half a surrogate pair
        raise ImageError("missing file", f"{path}: {error}.") from error
    if isinstance(image, RootedPath) and not resolved.is_relative_to(Path(image.root).resolve()):
        raise ImageError("path outside the data root", f"{path} is not below {image.root}.")
    if not found:
        raise ImageError("missing file", f"{path} is not a file.")
    return resolved


def _rgb(image: Image.Image) -> Image.Image:
    """RGB pixels; 16-bit grey is scaled to 8 bits, where Pillow's own conversion would clip it to white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")
