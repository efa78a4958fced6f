"""From pixels of any kind to uint8 (C, H, W), and the two ways to hold them: memory and files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
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


class InMemoryDataset:
    """All images as one uint8 tensor, on the CPU or any other device. Satisfies `ImageDataset`."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        class_names: Sequence[str],
        *,
        fingerprint: str | None = None,
    ) -> None:
        """
        Args:
            images: uint8 (N, C, H, W).
            labels: (N,) in [0, len(class_names)); all 0 when unlabelled.
            class_names: empty when unlabelled.
            fingerprint: default: a hash of the images and labels.
        """
        self.images = images
        self.labels = labels.to("cpu", torch.int64)
        self.class_names = tuple(class_names)
        self.spec = ImageSpec(*images.shape[1:], len(self.class_names))
        self.fingerprint = fingerprint or _hash_images(images, self.labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def _hash_images(images: Tensor, labels: Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    digest.update(images.cpu().contiguous().numpy())
    digest.update(labels.numpy())
    return digest.hexdigest()


class ImageFileDataset:
    """Image files decoded each time they are asked for. Satisfies `ImageDataset`.

    The fingerprint covers names, file sizes, labels and the shape, not the files' contents.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        labels: Sequence[int],
        class_names: Sequence[str],
        *,
        height: int,
        width: int,
        channels: int,
    ) -> None:
        """
        Args:
            names: paths relative to `root`, in the order of the data set.
            labels: one per name, in [0, len(class_names)).

        Raises:
            DataError: a file does not exist.
        """
        self.root = root
        self.names = list(names)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.class_names = tuple(class_names)
        self.spec = ImageSpec(channels, height, width, len(self.class_names))
        self.fingerprint = self._hash_listing()

    def _hash_listing(self) -> str:
        digest = hashlib.sha256(repr((len(self.names), self.spec)).encode())
        for name, label in zip(self.names, self.labels.tolist(), strict=True):
            path = self.root / name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"{show(path)}: cannot be read: {error.strerror}") from error
            digest.update(os.fsencode(name) + b"\0" + f"{size} {label}\n".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = decode_image(self.root / self.names[index], self.spec)
        return image, int(self.labels[index])


def show(path: Path | str) -> str:
    """`path` for a one-line message: unprintable names (line breaks, broken bytes) are escaped."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image as a viewer shows it, from the file's header alone.

    Raises:
        DataError: not a PNG, JPEG, WebP or BMP image, or more than `MAX_PIXELS`.
    """
    with _open_image(path) as image:
        width, height = image.size
        # Pillow decodes a whole PNG to look for an EXIF block behind the pixels.
        in_header = image.format != "PNG" or "exif" in image.info
        turned = in_header and _orientation(image) >= 5
    return (width, height) if turned else (height, width)


def decode_image(path: Path, spec: ImageSpec) -> Tensor:
    """uint8 (C, H, W) of the shape `spec` asks for; see `fit_image`. Animations give frame 0.

    Raises:
        DataError: the file is missing, broken, truncated, of another format or too large.
    """
    with _open_image(path) as image:
        try:
            image.load()
            return torch.from_numpy(fit_image(image, spec.height, spec.width, spec.channels))
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, ...
            raise DataError(
                f"{show(path)}: broken image ({_one_line(error)}); replace or remove it"
            ) from error


def _open_image(path: Path) -> Image.Image:
    try:
        image = Image.open(path, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise DataError(_too_large(path, _one_line(error))) from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{show(path)}: not a readable PNG, JPEG, WebP or BMP image "
            f"({path.stat().st_size} bytes); replace or remove it"
        ) from error
    except OSError as error:
        reason = error.strerror or _one_line(error)
        raise DataError(f"{show(path)}: cannot be read: {reason}") from error
    except Exception as error:
        raise DataError(
            f"{show(path)}: broken image ({_one_line(error)}); replace or remove it"
        ) from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise DataError(_too_large(path, f"{image.width} x {image.height}"))
    return image


def _too_large(path: Path, found: str) -> str:
    return (
        f"{show(path)}: image too large ({found}); at most {MAX_PIXELS // 10**6} million pixels "
        "are allowed; shrink or remove it"
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
