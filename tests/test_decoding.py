"""From image files to pixels: every mode, no stretching, and faults that name the file."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from datasets import (
    build_dataset,
)
from datasets.decoding import MAX_PIXELS, decode_image, fit_arrays, read_size
from tests.hostile_files import chunk, png
from tests.image_files import assert_data_error, config, png_claiming, write_image
from utils.errors import DataError
from utils.images import ImageSpec


def test_centre_crop_never_stretches(tmp_path):
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[:, :20], pixels[:, 20:80], pixels[:, 80:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    image = decode_image(path, ImageSpec(3, 30, 30, 0))
    assert image.shape == (3, 30, 30)
    inner = image[:, :, 2:-2]  # at its edges bicubic sees two pixels of what was cut off
    assert (inner == torch.tensor([0, 255, 0])[:, None, None]).all()
    tall = decode_image(path, ImageSpec(3, 60, 20, 0))
    assert (tall == torch.tensor([0, 255, 0])[:, None, None]).all()
    full = decode_image(path, ImageSpec(3, 60, 100, 0))
    assert np.array_equal(full.permute(1, 2, 0).numpy(), pixels)


def test_downscaling_is_antialiased():
    checkers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[None]
    small = fit_arrays(checkers, (16, 16), None)
    assert small.float().sub(127.5).abs().max() < 8


def test_every_mode_is_read(tmp_path):
    spec = ImageSpec(3, 4, 4, 0)

    def first_pixel(image: Image.Image, suffix: str = ".png", **options) -> list[int]:
        path = tmp_path / f"image{suffix}"
        image.save(path, **options)
        assert read_size(path) == (4, 4)
        grey = decode_image(path, spec._replace(channels=1))
        rgb = decode_image(path, spec)
        assert grey.shape == (1, 4, 4)
        assert rgb.shape == (3, 4, 4)
        return rgb[:, 0, 0].tolist()

    size = (4, 4)
    assert first_pixel(Image.new("L", size, 77)) == [77] * 3
    assert first_pixel(Image.new("1", size, 1)) == [255] * 3
    assert first_pixel(Image.new("RGB", size, (1, 2, 3)), ".bmp") == [1, 2, 3]
    assert first_pixel(Image.new("RGB", size, (1, 2, 3)), ".webp", lossless=True) == [1, 2, 3]
    assert first_pixel(Image.new("RGBA", size, (10, 20, 30, 0))) == [255] * 3
    assert first_pixel(Image.new("RGBA", size, (10, 20, 30, 255))) == [10, 20, 30]
    assert first_pixel(Image.new("LA", size, (0, 128))) == [127] * 3
    palette = Image.new("RGB", size, (9, 8, 7)).quantize(4)
    assert first_pixel(palette) == [9, 8, 7]
    assert first_pixel(palette, transparency=palette.getpixel((0, 0))) == [255] * 3
    sixteen = Image.fromarray(np.full(size, 0x1234, np.uint16))
    assert first_pixel(sixteen) == [0x12] * 3
    cmyk = first_pixel(Image.new("CMYK", size, (0, 255, 255, 0)), ".jpg")
    assert cmyk[0] > 240
    assert max(cmyk[1:]) < 15
    frames = [Image.new("RGB", size, (i, i, i)) for i in (50, 200)]
    animation = {"save_all": True, "append_images": frames[1:]}
    assert first_pixel(frames[0], ".png", **animation) == [50] * 3
    assert first_pixel(frames[0], ".webp", lossless=True, **animation) == [50] * 3


def test_a_transparent_level_of_16_bits(tmp_path):
    """Only that very level, not its neighbours of the same upper 8 bits."""
    rows = b"".join(b"\0" + struct.pack(">2H", 0x1234, 0x1235) for _ in range(2))
    path = tmp_path / "a.png"
    path.write_bytes(png(rows, chunk(b"tRNS", struct.pack(">H", 0x1234)), depth=16))
    assert decode_image(path, ImageSpec(1, 2, 2, 0))[0].tolist() == [[255, 0x12]] * 2


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, suffix, orientation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    image.save(path, exif=exif)
    with Image.open(path) as saved:
        expected = np.asarray(ImageOps.exif_transpose(saved).convert("RGB"))
    assert read_size(path) == expected.shape[:2]
    decoded = decode_image(path, ImageSpec(3, *expected.shape[:2], 0))
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), expected)


def test_a_damaged_exif_block_still_turns(tmp_path):
    """Its orientation can be read, but the block as a whole cannot be written again."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    block = exif.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x00\x00\x02")  # a width of text
    assert block != exif.tobytes()
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path, exif=block)
    with Image.open(path) as saved, pytest.raises(struct.error):
        ImageOps.exif_transpose(saved)
    assert read_size(path) == (9, 6)
    decoded = decode_image(path, ImageSpec(3, 9, 6, 0))
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), np.rot90(pixels, -1))


@pytest.mark.parametrize("side", [8001, 12_000, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_by_their_header(tmp_path, side):
    assert side**2 > MAX_PIXELS
    write_image(tmp_path / "a" / "good.png")
    path = tmp_path / "a" / "bomb.png"
    path.write_bytes(png_claiming(side, side))
    settings = config(dataset="custom", data_root=str(tmp_path))
    assert_data_error(lambda: build_dataset(settings), path, "too large", "64 million")


def damage(kind: str, path: Path) -> None:
    data = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_bytes(b"this is no image")
    elif kind == "gif inside":
        Image.new("RGB", (8, 8)).save(path, format="GIF")
    elif kind == "header cut":
        path.write_bytes(data[:20])
    elif kind == "link to nowhere":
        path.unlink()
        path.symlink_to("nowhere.png")


@pytest.mark.parametrize("kind", ["empty", "text", "gif inside", "header cut", "link to nowhere"])
def test_broken_files_are_found_when_building(tmp_path, kind):
    for i in range(3):
        path = write_image(tmp_path / "a" / f"{i}.png")
        if i:
            damage(kind, path)
    settings = config(dataset="custom", data_root=str(tmp_path))
    assert_data_error(lambda: build_dataset(settings), tmp_path / "a" / "1.png", "a/2.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
def test_truncated_files_are_named(tmp_path, suffix):
    path = write_image(tmp_path / "a" / f"x{suffix}", (64, 64))
    data = path.read_bytes()

    def load():
        dataset = build_dataset(config(dataset="custom", data_root=str(tmp_path), image_size=8))
        return dataset[0]

    load()
    for share in (0.3, 0.6, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        assert_data_error(load, path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_random_damage_never_raises_anything_else(tmp_path):
    path = write_image(tmp_path / "a" / "x.png", (16, 16))
    spec = ImageSpec(3, 8, 8, 0)
    for suffix in (".png", ".jpg", ".webp", ".bmp"):
        good = write_image(tmp_path / f"x{suffix}", (16, 16)).read_bytes()
        rng = np.random.default_rng(0)
        for _ in range(60):
            data = bytearray(good)
            for position in rng.integers(0, min(len(data), 80), 3):
                data[position] = rng.integers(256)
            path.write_bytes(data)
            for read in (read_size, lambda path: decode_image(path, spec)):
                with contextlib.suppress(DataError):
                    read(path)
