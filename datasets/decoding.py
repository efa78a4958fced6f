"""From image files and arrays of any kind to uint8 (C, H, W)."""

from __future__ import annotations

import stat
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from datasets.base import ImageSpec
from utils.errors import DataError

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = 64_000_000  # per image; a small file can claim to be a huge one
MAX_FILE_BYTES = 2**29  # the WebP reader takes a whole file into memory to learn its size
EXIF_ORIENTATION = 0x0112
EXIF_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MODES = {"1": "grey", "L": "grey", "I": "grey", "P": "palette"}  # of Pillow; others as they are
# Pillow's warnings about sizes and EXIF blocks: both are decided here, and an error is one line.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImageError(DataError):
    """A file that can be read but not decoded: what `on_bad_image` is about.

    A missing file, a lack of permission or a disk that fails is a plain `DataError`: the next
    process may see something else there, so it must not decide which images are used.
    """


def show(path: Path | str) -> str:
    """`path` for a one-line message: unprintable names (line breaks, broken bytes) are escaped."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def has_image_suffix(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image as a viewer shows it, from the file's header alone.

    Raises:
        DataError: see `open_image`.
    """
    with open_image(path) as image:
        return upright_size(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) after turning by EXIF, of an image that need not be decoded yet."""
    # Pillow decodes a whole PNG to look for an EXIF block behind the pixels.
    in_header = image.format != "PNG" or "exif" in image.info
    turned = in_header and _orientation(image) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


def decode_image(path: Path, spec: ImageSpec) -> Tensor:
    """uint8 (C, H, W) of the shape `spec` asks for; see `fit_image`. Animations give frame 0.

    Raises:
        BadImageError: the file is broken, truncated, of another format or too large.
        DataError: the file cannot be read.
    """
    with open_image(path) as image:
        return torch.from_numpy(load_fitted(image, path, *spec.shape))


def load_fitted(
    image: Image.Image, path: Path, channels: int, height: int, width: int
) -> np.ndarray:
    """`fit_image` of an image just opened from `path`.

    Raises:
        BadImageError, DataError: see `decode_image`.
    """
    try:
        image.load()
        return fit_image(image, height, width, channels)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, ...
        raise _as_data_error(path, error) from error


def open_image(path: Path) -> Image.Image:
    """The image with its header read and its pixels not; to be closed, or used in `with`.

    Raises:
        BadImageError: not a PNG, JPEG, WebP or BMP image, or too large.
        DataError: the file cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
            raise DataError(f"{show(path)}: not a regular file; remove it")
        if status.st_size > MAX_FILE_BYTES:
            raise BadImageError(_too_large(path, f"{status.st_size} bytes"))
        image = Image.open(path, formats=IMAGE_FORMATS)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError(_too_large(path, _one_line(error))) from error
    except UnidentifiedImageError as error:
        raise BadImageError(
            f"{show(path)}: not a readable PNG, JPEG, WebP or BMP image "
            f"({status.st_size} bytes); replace or remove it"
        ) from error
    except Exception as error:
        raise _as_data_error(path, error) from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise BadImageError(_too_large(path, f"{image.width} x {image.height}"))
    return image


def _as_data_error(path: Path, error: Exception) -> DataError:
    """What went wrong with the machine (Pillow's own OSErrors have no errno), or with the image."""
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(f"{show(path)}: cannot be read: {error.strerror or _one_line(error)}")
    if isinstance(error, MemoryError):
        return DataError(f"{show(path)}: not enough memory to decode it")
    return BadImageError(f"{show(path)}: broken image ({_one_line(error)}); replace or remove it")


def describe_mode(image: Image.Image) -> str:
    """Such as `RGB + alpha` or `grey, 16 bit`, of an image that is not decoded yet."""
    base = image.mode.partition(";")[0].removesuffix("A")
    mode = MODES.get(base, base)
    if image.mode.endswith("A") or "transparency" in image.info:
        mode += " + alpha"
    if base == "I" or any(str(tile[3]).endswith(";16B") for tile in image.tile):
        mode += ", 16 bit"
    return mode + (", several frames" if getattr(image, "is_animated", False) else "")


def _too_large(path: Path, found: str) -> str:
    return (
        f"{show(path)}: image too large ({found}); at most {MAX_PIXELS // 10**6} million pixels "
        f"and {MAX_FILE_BYTES // 2**20} MiB are allowed; shrink or remove it"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; an unreadable EXIF block means upright, as viewers have it."""
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:
        return 1


def fit_image(image: Image.Image, height: int, width: int, channels: int) -> np.ndarray:
    """A decoded image of any mode and size -> uint8 (channels, height, width).

    Upright by EXIF; transparency over white; 16-bit to its upper 8 bits; RGB to grey by ITU-R 601
    luminance; the largest centred part of the right aspect ratio, resized by antialiased bicubic.
    """
    orientation = _orientation(image)
    if orientation in EXIF_TRANSPOSE:
        image = image.transpose(EXIF_TRANSPOSE[orientation])
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
        box = centre_box(image.height, image.width, height / width)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    pixels = np.array(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def centre_box(height: int, width: int, aspect: float) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest centred box whose height / width is `aspect`."""
    box_width = min(width, height / aspect)
    box_height = min(height, width * aspect)
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height


def fit_arrays(images: np.ndarray, size: tuple[int, int] | None, channels: int | None) -> Tensor:
    """uint8 (N, H, W) grey or (N, H, W, 3) RGB -> uint8 (N, C, H', W'), as `fit_image` does it.

    Args:
        size: (H', W'); None keeps the images' own.
        channels: 1 or 3; None keeps the images' own. Grey is repeated to make RGB.
    """
    grey = images.ndim == 3
    height, width = size or images.shape[1:3]
    channels = channels or (1 if grey else 3)
    if (height, width) == images.shape[1:3] and (grey or channels == 3):
        stacked = images[:, None] if grey else images.transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(stacked)).repeat(
            1, channels // stacked.shape[1], 1, 1
        )
    fitted = [fit_image(Image.fromarray(image), height, width, channels) for image in images]
    return torch.from_numpy(np.stack(fitted))
