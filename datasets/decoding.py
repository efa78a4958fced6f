"""From image files and arrays of any kind to tensors (C, H, W)."""

from __future__ import annotations

import contextlib
import stat
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag
from torch import Tensor

from datasets.arrays import Header, fit_array, is_array, opened_array
from utils.errors import DataError, UserError, one_line, show
from utils.files import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS, looks_like
from utils.images import ImageSpec, Values

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = 64_000_000  # per image; a small file can claim to be a huge one
MAX_FILE_BYTES = 2**29  # the WebP reader takes a whole file into memory to learn its size
SIZE_LIMIT = f"at most {MAX_PIXELS // 10**6} million pixels and {MAX_FILE_BYTES // 2**20} MiB"
ARRAYS = " ".join(ARRAY_EXTENSIONS)
# Pillow's warnings about sizes and EXIF blocks: both are decided here, and an error is one line.
warnings.filterwarnings("ignore", module=r"PIL\.")


def _cut_text(packed: bytes) -> bytes:
    """Of a text or colour profile in a PNG what Pillow allows. Its own function raises an error if
    there is more, but this says nothing of the pixels."""
    return zlib.decompressobj().decompress(packed, PngImagePlugin.MAX_TEXT_CHUNK)


PngImagePlugin._safe_zlib_decompress = _cut_text


class BadImageError(DataError):
    """A file that can be read but not decoded: what `on_bad_image` is about.

    A missing file, a lack of permission or a disk that fails is a plain `DataError`: the next
    process may see something else there, so it must not decide which images are used.
    """


def has_image_suffix(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def read_size(path: Path, channels: int) -> tuple[int, int]:
    """(height, width) of an image as a viewer shows it, from the file's header alone.

    Raises what `decode_image` does, but sees no fault in the pixels.
    """
    if is_array(path):
        with array_file(path, channels) as header:
            return header.shape[1:]
    with _opened(path) as image:
        # Pillow decodes a whole PNG to look for an EXIF block behind the pixels.
        in_header = image.format != "PNG" or "exif" in image.info
        turned = in_header and _orientation(image) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


def value_type(path: Path, channels: int) -> str:
    """The type of the values in an image file, "uint8" of all pictures, from its header. Raises
    what `decode_image` does, and a DataError for another number of channels than it can have."""
    if is_array(path):
        with array_file(path, channels) as header:
            return header.dtype
    if channels not in (1, 3):
        fault = f"is a picture, which image_channels={channels} is not for"
        raise DataError(f"{show(path)}: {fault}; use 1 or 3, or array files ({ARRAYS})")
    return "uint8"


def decode_image(path: Path, spec: ImageSpec, values: Values | None = None) -> Tensor:
    """The image, (C, H, W) of the shape in `spec`: uint8, see `fit_image`, or with `values` the
    floats in [-1, 1] that its own become; these must be of that type.

    Of an animation, this is the first frame. Raises a BadImageError if the file is broken,
    truncated, too large or no image, a DataError if it cannot be read, or is of another kind.
    """
    if is_array(path):
        with array_file(path, spec.channels, values.dtype if values else "uint8") as header:
            return _decode_array(header.read(), spec, values)
    value_type(path, spec.channels)
    with _opened(path) as image:
        image.load()
        return torch.from_numpy(fit_image(image, spec.height, spec.width, spec.channels))


def bit_depth(path: Path) -> int:
    """Bits of a value in the file: 16 or, of most files, 8. Raises what `decode_image` does."""
    if is_array(path):
        return 8  # or more, of which all are used
    with _opened(path) as image:
        wide = image.format == "PNG" and image.tile and str(image.tile[0][3]).endswith("16B")
        return 16 if wide else 8


def _decode_array(array: np.ndarray, spec: ImageSpec, values: Values | None) -> Tensor:
    _, *size, _ = spec
    if values is not None:
        return values.to_float(fit_array(array, *size))
    if spec.channels in (1, 3):
        pixels = array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0))
        return torch.from_numpy(fit_image(Image.fromarray(pixels), *size, spec.channels))
    return torch.from_numpy(fit_array(array, *size).round().astype(np.uint8))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image with its header read and its pixels not. What the body raises is explained too."""
    with (
        _explained(path),
        path.open("rb") as file,
        Image.open(file, formats=IMAGE_FORMATS) as image,
    ):
        _check_pixels(image.height, image.width)
        yield image


@contextlib.contextmanager
def array_file(path: Path, channels: int, dtype: str | None = None) -> Iterator[Header]:
    """`opened_array`, of this type if one is given. What it and the body raise is explained."""
    with _explained(path), opened_array(path, channels) as header:
        _check_pixels(*header.shape[1:])
        if dtype not in (None, header.dtype):
            raise DataError(f"{show(path)}: holds {header.dtype}, the others {dtype}; convert it")
        yield header


def _check_pixels(height: int, width: int) -> None:
    if width * height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{width} x {height}")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the body raises as it reads this image file into a DataError."""
    kind, size = BadImageError, ""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
            raise DataError(f"{show(path)}: not a regular file; remove it")
        size = f"{status.st_size} bytes"
        if status.st_size > MAX_FILE_BYTES:
            raise Image.DecompressionBombError(size)
        yield
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, ...
        reason = one_line(error)
        if isinstance(error, Image.DecompressionBombError):
            fault = f"image too large ({reason}); {SIZE_LIMIT}; shrink or remove it"
        elif isinstance(error, UnidentifiedImageError):
            fault = f"not a readable PNG, JPEG, WebP or BMP image ({size})"
            fault += f", but {what}" if (what := looks_like(path)) else "; replace or remove it"
        elif isinstance(error, MemoryError):
            kind, fault = DataError, "not enough memory to decode it"
        elif isinstance(error, OSError) and error.errno is not None:  # Pillow's own have no errno
            kind, fault = DataError, f"cannot be read: {error.strerror or reason}"
        else:
            fault = f"broken image ({reason}); replace or remove it"
        raise kind(f"{show(path)}: {fault}") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; an unreadable EXIF block means upright, as viewers have it."""
    try:
        value = image.getexif().get(ExifTag.Orientation, 1)
    except Exception:
        return 1
    return value if value in range(1, 9) else 1


def fit_image(image: Image.Image, height: int, width: int, channels: int) -> np.ndarray:
    """A decoded image of any mode and size -> uint8 (channels, height, width).

    It is turned upright by its EXIF data. Transparency is laid over white, 16-bit levels keep
    their upper 8 bits, RGB becomes grey by ITU-R 601 luminance. The largest centred part of the
    right aspect ratio is resized by antialiased bicubic interpolation.
    """
    if _orientation(image) != 1:
        image.info.pop("exif", None)  # Pillow would write it anew, and fail if it is damaged
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        if "transparency" in image.info:
            levels[levels == image.info["transparency"]] = 65535
        image = Image.fromarray((levels >> 8).astype(np.uint8))
    elif image.mode.lower().endswith("a") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert("RGB").convert(mode)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def fit_arrays(images: np.ndarray, size: tuple[int, int] | None, channels: int | None) -> Tensor:
    """uint8 (N, H, W) grey or (N, H, W, 3) RGB -> uint8 (N, C, H', W'), as `fit_image` does it.

    `size` is (H', W') and `channels` C, 1 or 3; None keeps the images' own. Grey is repeated to
    make RGB.
    """
    grey = images.ndim == 3
    height, width = size or images.shape[1:3]
    channels = channels or (1 if grey else 3)
    if (height, width) == images.shape[1:3] and (grey or channels == 3):
        stacked = torch.from_numpy(np.ascontiguousarray(images))
        stacked = stacked[:, None] if grey else stacked.permute(0, 3, 1, 2)
        return stacked.repeat(1, channels // stacked.shape[1], 1, 1)
    fitted = [fit_image(Image.fromarray(image), height, width, channels) for image in images]
    return torch.from_numpy(np.stack(fitted))
