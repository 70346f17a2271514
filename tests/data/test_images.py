import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from vlp_fast.data import ImageError, ImageTransform, RootedPath, decode_image


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_decode_image_reads_paths_bytes_and_images(tmp_path, image_bytes, format):
    data = image_bytes("blue", (6, 4), format)
    path = tmp_path / "x.bin"
    path.write_bytes(data)
    opened = Image.open(io.BytesIO(data))
    for handle in (data, path, str(path), RootedPath(str(path), str(tmp_path)), opened):
        image = decode_image(handle)
        assert (image.mode, image.size) == ("RGB", (6, 4))
        assert np.abs(np.asarray(image, int) - [0, 0, 255]).max() <= 6


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "gif", "header", "flipped"])
def test_decode_image_names_a_broken_image(bad_images, kind):
    with pytest.raises(ImageError, match="broken image: ") as error:
        decode_image(bad_images[kind])
    assert error.value.reason == "broken image"


def test_decode_image_checks_the_size_before_the_pixels(image_bytes):
    data = image_bytes(None, (40, 30))
    assert decode_image(data, max_pixels=1200).size == (40, 30)
    # only the header is there: reading pixels would say "broken"
    with pytest.raises(ImageError, match="over-size image: 40 x 30 is more than max_pixels=1199") as error:
        decode_image(data[:60], max_pixels=1199)
    assert error.value.reason == "over-size image"
    with pytest.raises(ImageError, match="over-size"):
        decode_image(Image.new("RGB", (40, 30)), max_pixels=1199)


def test_decode_image_takes_pillows_bomb_error_for_over_size(image_bytes, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError) as error:
        decode_image(image_bytes("red", (40, 30)))
    assert error.value.reason == "over-size image"


def test_decode_image_missing_file(tmp_path):
    for path in (tmp_path / "none.png", tmp_path, "x" * 5000, "half\ud800pair.png", "nul\0.png"):
        with pytest.raises(ImageError) as error:
            decode_image(path)
        assert error.value.reason == "missing file"


def test_decode_image_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="missing file"):
        decode_image(tmp_path / "pipe.png")


def test_decode_image_stays_below_its_root_even_through_links(tmp_path, image_bytes):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(image_bytes())
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "inner.png").write_bytes(image_bytes())
    (root / "fine.png").symlink_to(root / "inner.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    assert decode_image(RootedPath(str(root / "fine.png"), str(root))).size == (8, 8)
    for name in ("link.png", "../secret.png"):
        with pytest.raises(ImageError) as error:
            decode_image(RootedPath(str(root / name), str(root)))
        assert error.value.reason == "path outside the data root"
    with pytest.raises(ImageError, match="missing file"):
        decode_image(RootedPath(str(root / "loop.png"), str(root)))


def test_decode_image_scales_16_bit_grey(tmp_path):
    Image.fromarray(np.full((4, 4), 128 << 8, np.uint16)).save(tmp_path / "x.png")
    assert np.asarray(decode_image(tmp_path / "x.png")).tolist() == np.full((4, 4, 3), 128).tolist()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_image_transform_takes_every_mode(mode):
    out = ImageTransform(4)(Image.new(mode, (5, 3)))
    assert out.shape == (3, 4, 4)
    assert out.dtype == torch.float32


def test_image_transform_normalises_with_the_published_numbers():
    white, black = Image.new("RGB", (5, 7), "white"), Image.new("RGB", (5, 7), "black")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    clip = ImageTransform(3)
    torch.testing.assert_close(clip(white), ((1 - mean) / std)[:, None, None].expand(3, 3, 3))
    torch.testing.assert_close(clip(black), (-mean / std)[:, None, None].expand(3, 3, 3))
    inception = ImageTransform(3, "inception")
    torch.testing.assert_close(inception(white), torch.ones(3, 3, 3))
    torch.testing.assert_close(inception(black), -torch.ones(3, 3, 3))


def test_image_transform_is_pillows_bicubic_resize_by_channel(image_bytes):
    image = decode_image(image_bytes(None, (20, 12)))
    expected = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC), np.float32).transpose(2, 0, 1) / 127.5 - 1
    out = ImageTransform(8, "inception")(image)
    assert out.is_contiguous()
    torch.testing.assert_close(out, torch.from_numpy(expected))


def test_image_transform_train_depends_on_the_generator_only(image_bytes):
    data, transform = image_bytes(None, (20, 12)), ImageTransform(8, train=True, crop_scale=(0.2, 1.0))
    first, again, other = (transform(data, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_image_transform_train_crops_lie_inside_and_keep_their_scale():
    transform, image = ImageTransform(4, train=True, crop_scale=(0.3, 0.6)), Image.new("RGB", (60, 60))
    generator, flips = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        (left, top, right, bottom), flip = transform._random_crop(image, generator)
        assert 0 <= left < right <= 60
        assert 0 <= top < bottom <= 60
        assert 0.27 <= (right - left) * (bottom - top) / 3600 <= 0.63
        flips += flip
    assert 110 < flips < 190


def test_image_transform_train_flips_left_to_right():
    image = Image.fromarray(np.tile(np.arange(4, dtype=np.uint8)[None, :, None] * 60, (4, 1, 3)))
    transform, plain = ImageTransform(4, "inception", train=True, crop_scale=(1.0, 1.0)), ImageTransform(4, "inception")(image)
    seen = set()
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        (left, _, right, _), flip = transform._random_crop(image, generator)
        if right - left == 4:
            out = transform(image, torch.Generator().manual_seed(seed))
            torch.testing.assert_close(out, plain.flip(2) if flip else plain)
            seen.add(flip)
    assert seen == {False, True}


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_image_transform_train_extreme_shapes(size):
    transform = ImageTransform(4, train=True)
    for seed in range(20):
        assert transform(Image.new("RGB", size), torch.Generator().manual_seed(seed)).shape == (3, 4, 4)


def test_image_transform_errors():
    with pytest.raises(ValueError, match="image_size must be positive; received 0"):
        ImageTransform(0)
    with pytest.raises(ValueError, match="normalization must be one of clip, inception; received 'imagenet'"):
        ImageTransform(8, "imagenet")
    with pytest.raises(ValueError, match=r"crop_scale must be .* received \(0.9, 0.5\)"):
        ImageTransform(8, train=True, crop_scale=(0.9, 0.5))
