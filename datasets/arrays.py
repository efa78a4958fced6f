"""Image files that are arrays of numbers: .npy, .npz and .tif, of any number of channels.

What is wrong with a file raises a ValueError, which `datasets.decoding` explains, and what is wrong
with all of a kind, their shape or type, a DataError.
"""

from __future__ import annotations

import contextlib
import logging
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from utils.errors import DataError, require, show
from utils.files import ARRAY_EXTENSIONS, read_npy_header
from utils.images import VALUE_TYPES

PLAIN_COLOURS = ("MINISBLACK", "RGB")  # of a TIFF, whose numbers mean other colours else


def is_array(path: Path | str) -> bool:
    """Whether a file of this name is taken for an array."""
    return str(path).lower().endswith(ARRAY_EXTENSIONS)


class Header(NamedTuple):
    """An array file, its numbers not read yet."""

    shape: tuple[int, int, int]  # (C, H, W), as it will be
    dtype: str  # "uint8", or one of `VALUE_TYPES`
    read: Callable[[], np.ndarray]


@contextlib.contextmanager
def opened_array(path: Path, channels: int) -> Iterator[Header]:
    """The header of an image file of so many channels; 8-bit ones may be pictures of 1 or 3."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        if str(path).lower().endswith((".tif", ".tiff")):
            shape, dtype, read = _tiff(file, stack)
        else:
            name, size = "it", path.stat().st_size
            if str(path).lower().endswith(".npz"):
                archive = stack.enter_context(zipfile.ZipFile(file))
                if len(archive.infolist()) != 1:
                    raise ValueError(f"{len(archive.infolist())} arrays in it; save one")
                (info,) = archive.infolist()
                name, size, file = info.filename, info.file_size, archive.open(info)
            shape, dtype = read_npy_header(file, name, size)

            def read() -> np.ndarray:
                file.seek(0)
                return np.lib.format.read_array(file, allow_pickle=False)

        if dtype.name != "uint8" and dtype.name not in VALUE_TYPES:
            raise DataError(f"{show(path)}: holds {dtype}; use uint8, {', '.join(VALUE_TYPES)}")
        counts = {channels} | ({1, 3} if dtype.name == "uint8" and channels in (1, 3) else set())
        axes = [axis for axis in (0, 2) if len(shape) == 3 and shape[axis] in counts]
        if len(shape) == 2 and 1 in counts:
            axes, shape = [0], (1, *shape)
        if len(axes) != 1:
            raise DataError(f"{show(path)}: {_misfit(shape, channels)}")

        def read_checked() -> np.ndarray:
            array = np.moveaxis(read().reshape(shape), axes[0], 0)
            if not np.isfinite(array).all():
                raise ValueError(f"{int((~np.isfinite(array)).sum())} values are NaN or infinite")
            return array

        rest = [length for axis, length in enumerate(shape) if axis != axes[0]]
        yield Header((shape[axes[0]], *rest), dtype.name, read_checked)


def _tiff(file: object, stack: contextlib.ExitStack) -> tuple:
    """Shape, type and reader of the one image in a TIFF file."""
    require("tifffile")
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it says is said here
    tiff = stack.enter_context(tifffile.TiffFile(file))
    if len(tiff.series) != 1:
        raise ValueError(f"{len(tiff.series)} images in it; save one")
    (series,) = tiff.series
    if (colours := tiff.pages[0].photometric.name) not in PLAIN_COLOURS:
        raise ValueError(f"its colours are {colours}; save it as {' or '.join(PLAIN_COLOURS)}")
    return series.shape, series.dtype, series.asarray


def _misfit(shape: tuple[int, ...], channels: int) -> str:
    """What keeps an array of this shape from being an image of so many channels."""
    if len(shape) not in (2, 3):
        return f"its shape is {shape}; an image is (H, W), (channels, H, W) or (H, W, channels)"
    if len(shape) == 3 and shape[0] == shape[2] == channels:
        return f"its shape is {shape}: which {channels} are the channels? Crop or pad the others"
    own = 1 if len(shape) == 2 else min(shape[0], shape[2])
    return f"its shape is {shape}, but image_channels={channels}; set image_channels={own}"


def fit_array(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """The largest centred part of an array (C, H, W) of the right aspect ratio, resized by
    antialiased bilinear interpolation, which keeps to the range of the values, to float64."""
    if array.shape[1:] == (height, width):
        return array
    scale = min(array.shape[1] / height, array.shape[2] / width)
    sides = max(1, round(height * scale)), max(1, round(width * scale))
    y, x = ((length - side) // 2 for length, side in zip(array.shape[1:], sides, strict=True))
    part = torch.from_numpy(array[None, :, y : y + sides[0], x : x + sides[1]].astype(np.float64))
    return F.interpolate(part, (height, width), mode="bilinear", antialias=True)[0].numpy()
