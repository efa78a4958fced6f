"""The shape of an image, the conversions between [-1, 1] and files, and grids and GIFs."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.errors import ConfigError
from utils.files import atomic_path

VALUE_TYPES = ("uint16", "int16", "float16", "float32", "float64")
GRID_PADDING = 2  # pixels between the cells of a grid
GRID_BACKGROUND = 32  # grey level between and behind the cells
MIN_CELL_SIZE = 48  # pixels; smaller images are enlarged by a whole factor so one can see them
MAX_COLUMNS = 16
MAX_GRID_IMAGES = 400  # in one grid, sheet or GIF
MAX_FRAME_SECONDS, MAX_FPS = 655, 1000  # a GIF has 16 bits for hundredths of a second
MIN_GIF_FRAME_MS = 20.0  # viewers slow down whatever is faster


class ImageSpec(NamedTuple):
    """The shape of one image, and how many classes the images have; 0 if they have no labels."""

    channels: int
    height: int
    width: int
    num_classes: int

    def __str__(self) -> str:
        classes = f"{self.num_classes} classes" if self.num_classes else "no classes"
        return f"{self.height}x{self.width} pixels, {self.channels} channel(s), {classes}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.channels, self.height, self.width


class Values(NamedTuple):
    """What floats in [-1, 1] stand for, of images that are not of 8 bits."""

    dtype: str  # of the files, one of `VALUE_TYPES`
    low: float  # the value that is -1
    high: float  # the value that is 1


BYTES = Values("uint8", 0, 255)  # what 8-bit images have in their place


def is_range(low: float, high: float) -> bool:
    """Whether values can go from `low` to `high`, in doubles."""
    return 0 < high - low < 1e300


def to_file(images: Tensor, values: Values | None) -> tuple[Tensor, int]:
    """Images as files hold them, and how many of `values` are clipped to the limits of the type."""
    if values is None:
        return images, 0
    dtype = getattr(torch, values.dtype)
    limits = (torch.finfo if dtype.is_floating_point else torch.iinfo)(dtype)
    x = (images.double() + 1) / 2 * (values.high - values.low) + values.low
    held = (x if dtype.is_floating_point else x.round()).clamp(limits.min, limits.max)
    return held.to(dtype), int(((held - x).abs() > 0.5).sum())


def image_suffix(channels: int, is_8_bit: bool) -> str:
    """The suffix of files for images: those that a PNG cannot hold are arrays."""
    return ".png" if is_8_bit and channels in (1, 3) else ".npy"


def as_pictures(images: Tensor, channels: Sequence[int] | None = None) -> Tensor:
    """What can be seen of images (B, C, H, W): uint8, of `channels`, or the first three or one."""
    images = to_uint8(images) if images.is_floating_point() else images
    return images[:, list(channels or range(3 if images.shape[1] >= 3 else 1))]


def to_float(images: Tensor) -> Tensor:
    """Images of uint8 values 0..255, of any shape, as float32 values in [-1, 1]. Those that are
    floats are in this range already."""
    values = images.to(torch.float32)
    return values if images.is_floating_point() else values.div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Images of values in [-1, 1] as uint8: x * 127.5 + 128, clipped, truncated (as EDM and DiT).

    It inverts `to_float`: `to_uint8(to_float(u)) == u` for every u.
    """
    return images.float().mul(127.5).add_(128.0).clamp_(0, 255).to(torch.uint8)


def to_rgb(images: Tensor) -> Tensor:
    """Images (B, 1 or 3, H, W) as (B, 3, H, W); the one channel of grey ones is repeated."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def to_array(image: Tensor) -> np.ndarray:
    """A uint8 image (C, H, W) as PIL and imageio take it: (H, W) if grey, else (H, W, 3)."""
    array = image.cpu().numpy()
    return array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0)


def grid_rows(num_images: int, labels: Sequence[int] | None = None) -> list[list[int]]:
    """The rows of a grid, each a list of image indices.

    With labels, consecutive equal labels share rows and a new label starts a new row; where every
    label has a single image, or there are no labels, the grid is near-square.
    """
    key = None if labels is None else labels.__getitem__
    groups = [list(group) for _, group in groupby(range(num_images), key)]
    if all(len(group) == 1 for group in groups):
        groups = [list(range(num_images))]
        columns = max(1, min(MAX_COLUMNS, math.ceil(math.sqrt(num_images))))
    else:
        longest = max(map(len, groups))
        columns = math.ceil(longest / math.ceil(longest / MAX_COLUMNS))
    return [group[i : i + columns] for group in groups for i in range(0, len(group), columns)]


def block_labels(num_samples: int, labels: Sequence[int]) -> list[int]:
    """`num_samples` labels for a grid: those given, in blocks that are as equal as they can be."""
    if num_samples < len(labels):
        return list(labels[:num_samples])
    return [labels[i * len(labels) // num_samples] for i in range(num_samples)]


def make_grid(
    images: Tensor, rows: list[list[int]], *, min_cell_size: int = MIN_CELL_SIZE
) -> Tensor:
    """One picture, uint8 (C, H', W'), of images uint8 (B, C, H, W) at the indices in `rows`, see
    `grid_rows`. Images whose longer side has less than `min_cell_size` pixels are enlarged by a
    whole factor."""
    scale = max(1, math.ceil(min_cell_size / max(images.shape[2:])))
    columns = max(map(len, rows))
    places = torch.tensor([[*row, *[-1] * (columns - len(row))] for row in rows])  # -1: empty
    cells = images.cpu()[places]
    cells[places < 0] = GRID_BACKGROUND
    cells = cells.repeat_interleave(scale, 3).repeat_interleave(scale, 4)  # (R, C, ch, h, w)
    cells = F.pad(cells, (0, GRID_PADDING, 0, GRID_PADDING), value=GRID_BACKGROUND)
    grid = cells.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    return F.pad(grid, (GRID_PADDING, 0, GRID_PADDING, 0), value=GRID_BACKGROUND)


def save_image(path: Path, image: Tensor) -> None:
    """Write a uint8 (C, H, W) image as PNG (or what the suffix says; as .npy any type), making the
    folder. An error leaves an older one as it was, and so does a link to one elsewhere."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None and path.suffix != ".npy":
        raise ValueError(f"unknown file extension: {path.suffix}")
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        if path.suffix == ".npy":
            np.save(file, image.numpy())
        else:
            Image.fromarray(to_array(image)).save(file, kind)


def check_film(fps: float, final_seconds: float, prefix: str = "--") -> None:
    """Raise a ConfigError unless a film can have that many frames a second, and such an end."""
    limits = (1 / MAX_FRAME_SECONDS, MAX_FPS), (0, MAX_FRAME_SECONDS)
    given = ("fps", fps), ("final_seconds", final_seconds)
    for (name, value), (low, high) in zip(given, limits, strict=True):
        if not low <= value <= high:
            raise ConfigError(f"{prefix}{name} {value:g}: must lie in {low:.2g}..{high}")


def save_gif(path: Path, frames: Sequence[Tensor], *, fps: float, final_seconds: float) -> None:
    """Write uint8 (C, H, W) frames as an endlessly looping GIF that holds the last frame."""
    import imageio.v3 as iio

    frame_ms = max(MIN_GIF_FRAME_MS, 1000.0 / fps)
    final_ms = max(frame_ms, final_seconds * 1000.0)
    arrays = [to_array(frame) for frame in frames]
    # Pillow takes no list for a single frame
    duration = [frame_ms] * (len(frames) - 1) + [final_ms] if len(frames) > 1 else final_ms
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        iio.imwrite(file, arrays, extension=".gif", duration=duration, loop=0)


def save_mp4(path: Path, frames: Sequence[Tensor], *, fps: float, final_seconds: float) -> None:
    """Write uint8 (C, H, W) frames as an H.264 film that shows the last frame longer. Works only
    where imageio-ffmpeg is installed, see `can_write_mp4`."""
    import imageio.v3 as iio

    path.parent.mkdir(parents=True, exist_ok=True)
    held = [frames[-1]] * max(0, round(final_seconds * fps) - 1)
    film = to_rgb(torch.stack([*frames, *held]))
    odd_rows, odd_columns = film.shape[2] % 2, film.shape[3] % 2  # H.264 halves the colours' size
    film = F.pad(film, (0, odd_columns, 0, odd_rows), value=GRID_BACKGROUND)
    arrays = film.permute(0, 2, 3, 1).cpu().numpy()
    iio.imwrite(path, arrays, plugin="FFMPEG", fps=fps, codec="libx264", macro_block_size=1)


def can_write_mp4() -> bool:
    """Whether imageio-ffmpeg, which `save_mp4` needs, is installed."""
    return importlib.util.find_spec("imageio_ffmpeg") is not None
