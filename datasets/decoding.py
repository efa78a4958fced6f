"""From image files and arrays of any kind to uint8 (C, H, W)."""

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

from utils.errors import DataError, one_line, show
from utils.files import IMAGE_EXTENSIONS, looks_like
from utils.images import ImageSpec

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = 64_000_000  # per image; a small file can claim to be a huge one
MAX_FILE_BYTES = 2**29  # the WebP reader takes a whole file into memory to learn its size
SIZE_LIMIT = f"at most {MAX_PIXELS // 10**6} million pixels and {MAX_FILE_BYTES // 2**20} MiB"
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


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image as a viewer shows it, from the file's header alone.

    Raises what `decode_image` does, but sees no fault in the pixels.
    """
    with _opened(path) as image:
        # Pillow decodes a whole PNG to look for an EXIF block behind the pixels.
        in_header = image.format != "PNG" or "exif" in image.info
        turned = in_header and _orientation(image) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


def decode_image(path: Path, spec: ImageSpec) -> Tensor:
    """The image as uint8 (C, H, W) of the shape in `spec`; see `fit_image`.

    Of an animation, this is the first frame. Raises a BadImageError if the file is broken,
    truncated, too large or no PNG, JPEG, WebP or BMP image, a DataError if it cannot be read.
    """
    with _opened(path) as image:
        image.load()
        return torch.from_numpy(fit_image(image, spec.height, spec.width, spec.channels))


def bit_depth(path: Path) -> int:
    """Bits of a value in the file: 16 or, of most files, 8. Raises what `decode_image` does."""
    with _opened(path) as image:
        wide = image.format == "PNG" and image.tile and str(image.tile[0][3]).endswith("16B")
        return 16 if wide else 8


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image with its header read and its pixels not. What the body raises is explained too."""
    kind, size = BadImageError, ""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
            raise DataError(f"{show(path)}: not a regular file; remove it")
        size = f"{status.st_size} bytes"
        if status.st_size > MAX_FILE_BYTES:
            raise Image.DecompressionBombError(size)
        with path.open("rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height}")
            yield image
    except DataError:
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
