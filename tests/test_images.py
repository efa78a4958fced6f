"""8-bit conversion, grids and GIFs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from utils.images import (
    GRID_BACKGROUND,
    GRID_PADDING,
    MAX_COLUMNS,
    MIN_CELL_SIZE,
    ImageSpec,
    block_labels,
    grid_rows,
    make_grid,
    save_gif,
    save_image,
    to_array,
    to_float,
    to_rgb,
    to_uint8,
)


def random_images(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def frames_of(path) -> list[tuple[np.ndarray, int]]:
    with Image.open(path) as image:
        found = []
        for number in range(image.n_frames):
            image.seek(number)
            found.append((np.array(image.convert("RGB")), image.info["duration"]))
        assert image.info["loop"] == 0
    return found


def test_there_and_back_is_exact_for_every_level():
    levels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(levels)
    assert floats.dtype == torch.float32
    assert (floats[0], floats[255]) == (-1, 1)
    assert torch.equal(to_uint8(floats), levels)
    assert torch.equal(to_uint8(floats.double()), levels)


def test_the_formula_and_the_clipping():
    x = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])
    expected = (x * 127.5 + 128).clip(0, 255).to(torch.uint8)
    assert torch.equal(to_uint8(x), expected)
    assert to_uint8(x).tolist() == [0, 0, 64, 128, 191, 255, 255]


def test_conversions_leave_their_input_alone():
    floats, bytes_ = torch.linspace(-2, 2, 9), random_images(9)
    kept = floats.clone(), bytes_.clone()
    to_uint8(floats)
    to_float(bytes_)
    assert torch.equal(floats, kept[0])
    assert torch.equal(bytes_, kept[1])


def test_half_precision_converts_like_single():
    x = torch.linspace(-1.2, 1.2, 301).to(torch.bfloat16)
    assert torch.equal(to_uint8(x), to_uint8(x.float()))


def test_spec():
    spec = ImageSpec(3, 8, 12, 10)
    assert spec.shape == (3, 8, 12)
    assert ImageSpec(*spec) == spec


def test_to_rgb_repeats_grey_only():
    grey, colour = random_images(2, 1, 3, 4), random_images(2, 3, 3, 4)
    assert to_rgb(grey).shape == (2, 3, 3, 4)
    assert all(torch.equal(to_rgb(grey)[:, c], grey[:, 0]) for c in range(3))
    assert to_rgb(colour) is colour


@pytest.mark.parametrize(
    ("num_images", "labels", "shape"),
    [
        (1, None, [1]),
        (2, None, [2]),
        (9, None, [3, 3, 3]),
        (10, None, [4, 4, 2]),
        (80, None, [9] * 8 + [8]),
        (300, None, [16] * 18 + [12]),
        (6, [0, 1, 2, 3, 4, 5], [3, 3]),
        (6, [0, 0, 0, 1, 1, 1], [3, 3]),
        (5, [0, 0, 0, 2, 2], [3, 2]),
        (20, [7] * 20, [10, 10]),
        (40, [0] * 20 + [1] * 20, [10, 10, 10, 10]),
        (4, [0, 1, 1, 0], [1, 2, 1]),
    ],
)
def test_rows_of_a_grid(num_images, labels, shape):
    rows = grid_rows(num_images, labels)
    assert [len(row) for row in rows] == shape
    assert [i for row in rows for i in row] == list(range(num_images))
    assert max(shape) <= MAX_COLUMNS
    if labels is not None and len(set(labels)) < num_images:
        assert all(len({labels[i] for i in row}) == 1 for row in rows)


def test_blocks_of_labels():
    assert block_labels(6, [0, 1, 2]) == [0, 0, 1, 1, 2, 2]
    assert block_labels(7, [4, 9]) == [4, 4, 4, 4, 9, 9, 9]
    assert block_labels(2, [3, 1, 2]) == [3, 1]
    assert block_labels(3, [5]) == [5, 5, 5]
    for count in range(10, 40):
        labels = block_labels(count, range(10))
        sizes = [labels.count(c) for c in range(10)]
        assert labels == sorted(labels)
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (12, 20), (50, 60), (70, 30)])
def test_layout_of_a_grid(channels, size):
    height, width = size
    images = random_images(5, channels, height, width)
    rows = [[0, 1, 2], [3, 4]]
    grid = make_grid(images, rows)
    scale = max(1, -(-MIN_CELL_SIZE // max(size)))
    assert scale == {(8, 8): 6, (12, 20): 3, (50, 60): 1, (70, 30): 1}[size]
    cell_h, cell_w = height * scale, width * scale
    pad = GRID_PADDING
    assert grid.shape == (channels, 2 * (cell_h + pad) + pad, 3 * (cell_w + pad) + pad)
    background = torch.full(grid.shape[1:], True)
    for r, row in enumerate(rows):
        for c, index in enumerate(row):
            y, x = pad + r * (cell_h + pad), pad + c * (cell_w + pad)
            cell = grid[:, y : y + cell_h, x : x + cell_w]
            assert torch.equal(cell[:, ::scale, ::scale], images[index])
            assert torch.equal(cell[:, scale - 1 :: scale, scale - 1 :: scale], images[index])
            background[y : y + cell_h, x : x + cell_w] = False
    assert (grid[:, background] == GRID_BACKGROUND).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_exact_pixels(tmp_path, channels):
    image = random_images(channels, 6, 9)
    save_image(tmp_path / "new" / "folder" / "x.png", image)
    pixels = read(tmp_path / "new" / "folder" / "x.png")
    assert pixels.shape == ((6, 9) if channels == 1 else (6, 9, 3))
    assert np.array_equal(pixels, to_array(image))


@pytest.mark.parametrize("channels", [1, 3])
def test_gif_holds_its_last_frame(tmp_path, channels):
    path = tmp_path / "new" / "x.gif"
    frames = [torch.full((channels, 6, 9), level, dtype=torch.uint8) for level in (0, 100, 255)]
    save_gif(path, frames, fps=20, final_seconds=2.0)
    found = frames_of(path)
    assert [duration for _, duration in found] == [50, 50, 2000]
    assert [pixels.shape for pixels, _ in found] == [(6, 9, 3)] * 3
    assert [int(pixels[0, 0, 0]) for pixels, _ in found] == [0, 100, 255]


def test_gif_of_one_frame(tmp_path):
    save_gif(tmp_path / "x.gif", [random_images(1, 4, 4)], fps=20, final_seconds=1.5)
    with Image.open(tmp_path / "x.gif") as image:
        assert (image.n_frames, image.info["duration"], image.size) == (1, 1500, (4, 4))


def test_gif_speed(tmp_path):
    frames = [torch.full((1, 4, 4), level, dtype=torch.uint8) for level in (0, 100, 200)]
    for fps, durations in ((10, [100, 100, 100]), (1000, [20, 20, 20])):
        save_gif(tmp_path / "x.gif", frames, fps=fps, final_seconds=0)
        assert [duration for _, duration in frames_of(tmp_path / "x.gif")] == durations
