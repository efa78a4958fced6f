"""From image files and arrays of any kind to tensors (C, H, W)."""

from __future__ import annotations

import contextlib
import functools
import stat
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag
from torch import Tensor

from utils.errors import DataError, UserError, one_line, require, show
from utils.files import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS, looks_like, read_member, read_npy
from utils.images import VALUE_TYPES, ImageSpec, Values

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


def has_image_suffix(name: object, suffixes: tuple[str, ...] = IMAGE_EXTENSIONS) -> bool:
    """Whether a file of this name or path is taken for an image, or one with these suffixes."""
    return str(name).lower().endswith(suffixes)


is_array = functools.partial(has_image_suffix, suffixes=ARRAY_EXTENSIONS)


def type_of(image: np.ndarray | Image.Image, path: Path, wanted: str | None = None) -> str:
    """What the values of an `opened` image are; a DataError if that is not the `wanted` type."""
    dtype = getattr(image, "dtype", np.dtype("uint8")).name
    if wanted not in (None, dtype):
        raise DataError(f"{show(path)}: holds {dtype}, not {wanted}; convert it")
    return dtype


def read_size(path: Path, channels: int = 3, dtype: str | None = None) -> tuple[int, int]:
    """(height, width) of an image as a viewer shows it, from the file's header alone.

    Raises what `decode_image` does, but sees no fault in the pixels.
    """
    with opened(path, channels, True) as image:
        type_of(image, path, dtype)
        if isinstance(image, np.ndarray):
            return image.shape[1:]
        # Pillow decodes a whole PNG to look for an EXIF block behind the pixels.
        in_header = image.format != "PNG" or "exif" in image.info
        turned = in_header and _orientation(image) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


def decode_image(path: Path, spec: ImageSpec, values: Values | None = None) -> Tensor:
    """The image, (C, H, W) of the shape in `spec`: uint8, see `fit_image`, or of arrays of other
    `values` float32 in [-1, 1], resized by bilinear interpolation; in [low, high] without `values`.

    Of an animation, this is the first frame. Raises a BadImageError if the file is broken, too
    large or no image, a DataError if it cannot be read, or is not of the type of `values`.
    """
    with opened(path, spec.channels) as image:
        dtype = type_of(image, path, values and values.dtype)
        if not isinstance(image, np.ndarray):
            image.load()
            return torch.from_numpy(fit_image(image, spec.height, spec.width, spec.channels))
    from torchvision.transforms.v2 import functional as transforms

    scale = min(image.shape[1] / spec.height, image.shape[2] / spec.width)
    part = [max(1, round(side * scale)) for side in (spec.height, spec.width)]
    x = transforms.center_crop(torch.from_numpy(image.astype(np.float64)), part)
    x = transforms.resize(x, [spec.height, spec.width], antialias=True)
    _, low, high = values or (dtype, -1, 1)
    return x.round().byte() if dtype == "uint8" else ((x - low) / (high - low) * 2 - 1).float()


def bit_depth(path: Path) -> int:
    """Bits of a value in the file: 16 or, of most files, 8. Raises what `decode_image` does."""
    if is_array(path):
        return 8
    with opened(path) as image:
        wide = image.format == "PNG" and image.tile and str(image.tile[0][3]).endswith("16B")
        return 16 if wide else 8


@contextlib.contextmanager
def opened(path: Path, channels: int = 3, header_only: bool = False) -> Iterator[Any]:
    """The image with its header read and its pixels not; of an array file the array (C, H, W), or
    one without its numbers, or the 8-bit picture that it is. What the body raises is explained."""
    kind, size = BadImageError, ""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
            raise DataError(f"{show(path)}: not a regular file; remove it")
        size = f"{status.st_size} bytes"
        if status.st_size > MAX_FILE_BYTES:
            raise Image.DecompressionBombError(size)
        if is_array(path):
            with path.open("rb") as file:
                yield _array_in(file, path, channels, header_only)
            return
        with path.open("rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height}")
            yield image
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


def _array_in(file: IO, path: Path, channels: int, header_only: bool) -> np.ndarray | Image.Image:
    """The one array in a file as (C, H, W), or a picture of the 8-bit ones that are grey or RGB."""
    suffix = str(path).lower().rpartition(".")[2]
    if suffix == "npy":
        array = read_npy(file, "it", path.stat().st_size, header_only)
    elif suffix == "npz":
        with zipfile.ZipFile(file) as archive:
            if len(names := archive.namelist()) != 1:
                raise ValueError(f"{len(names)} arrays in it, not one")
            array = read_member(archive, names[0], path.stat().st_size)
    else:
        require("tifffile")
        import tifffile

        with tifffile.TiffFile(file) as tiff:
            images, colours = tiff.series, tiff.pages[0].photometric.name
            if len(images) != 1 or colours not in ("MINISBLACK", "RGB"):
                raise ValueError(f"{len(images)} image(s) of {colours}, not 1 of MINISBLACK or RGB")
            array = images[0].asarray()
    if array.dtype.name not in (types := ("uint8", *VALUE_TYPES)):
        raise DataError(f"{show(path)}: holds {array.dtype}; use {', '.join(types)}")
    x = array[None] if array.ndim == 2 else array
    counts = (1, 3) if array.dtype == np.uint8 and channels in (1, 3) else (channels,)
    axes = [a for a in {2: (0,), 3: (0, 2)}.get(array.ndim, ()) if x.shape[a] in counts]
    if len(axes) != 1:
        fault = f"its shape {array.shape} has image_channels={channels} not just once"
        fix = f"is it {min(x.shape, default=0)}? Give (H, W), (C, H, W) or (H, W, C)"
        raise DataError(f"{show(path)}: {fault}; {fix}")
    x = np.moveaxis(x, axes[0], 0)
    if x[0].size > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{x.shape[2]} x {x.shape[1]}")
    if not x.size or not np.isfinite(x).all():
        raise ValueError(f"it holds {'NaN or infinite' if x.size else 'no'} values")
    if counts == (channels,):
        return x
    return Image.fromarray(x[0] if len(x) == 1 else x.transpose(1, 2, 0).copy())


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
