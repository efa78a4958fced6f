"""Existing pictures, whatever made them: a folder, or an .npz with `arr_0` (N, H, W, C)."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.base import ImageDataset, ImageSpec
from datasets.decoding import decode_image, fit_arrays, read_size, show
from datasets.folder import build_custom
from datasets.storage import InMemoryDataset
from utils.config import Config
from utils.errors import DataError
from utils.labels import LABELS_FILE

FIX = "give a folder of images or an .npz with arr_0, uint8 (N, H, W, C)"


class Pictures(NamedTuple):
    """Attributes:
    data: the images; of `data.labels` nothing is meant.
    labels: the class of each picture, in the numbering of the data set they imitate, or None.
    unlabelled: why there are no labels.
    """

    data: ImageDataset
    labels: list[int] | None
    unlabelled: str | None = None


def folder_settings(path: str | Path) -> dict[str, Any]:
    """Config keys that make the images in the folder `path` a data set.

    Raises:
        DataError: there is no such folder.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{path}: no such folder; {FIX}")
    has_folders = any(entry.is_dir() for entry in root.iterdir() if entry.name[0] != ".")
    labelled = not has_folders and (root / LABELS_FILE).is_file()
    return {
        "dataset": "custom",
        "data_root": str(root),
        "use_subdirs": has_folders,
        "label_file": LABELS_FILE if labelled else None,
        "num_classes": None,
    }


def read_pictures(
    path: str | Path,
    class_names: tuple[str, ...],
    *,
    image_size: tuple[int, int] | None = None,
    image_channels: int | None = None,
) -> Pictures:
    """The pictures at `path` and their classes.

    In a folder of folders, these are named as the classes, or by their numbers. A flat folder may
    have a `labels.json`, an .npz `arr_1` (N,), with class numbers.

    Args:
        class_names: of the data set that the pictures imitate; empty: it has none.
        image_size: (height, width) to bring files to; None: they have one size.
        image_channels: 1 or 3, for files; None: 3.

    Raises:
        DataError: no pictures, broken ones, or labels that are no classes.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return _read_npz(path, class_names)
    settings = folder_settings(path)
    numbered = settings.pop("label_file") is not None
    config = Config(**settings, image_size=image_size, image_channels=image_channels)
    data = build_custom(config, "train")
    if config.use_subdirs:
        numbers = [_class_of(name, path / name, class_names) for name in data.class_names]
        labels = [numbers[label] for label in data.labels.tolist()]
    elif numbered:
        labels = _numbers(path / LABELS_FILE, data.names, len(class_names))
    else:
        return Pictures(data, None, f"{path} has no folder per class and no {LABELS_FILE}")
    return _labelled(data, labels, class_names)


def fitted_pictures(
    path: str | Path, spec: ImageSpec, class_names: tuple[str, ...] = ()
) -> Pictures:
    """`read_pictures`, or a single image file, in the shape that a model of `spec` draws.

    Cropped and resized as the images of a data set are, see `decoding.fit_image`.

    Raises:
        DataError: see `read_pictures`.
    """
    path = Path(path)
    if path.is_dir():
        size = (spec.height, spec.width)
        return read_pictures(path, class_names, image_size=size, image_channels=spec.channels)
    if path.suffix != ".npz":
        if not path.is_file():
            raise DataError(f"{show(path)}: no such file or folder; {FIX}, or an image file")
        return Pictures(_in_memory(decode_image(path, spec)[None]), None, f"{path} is one file")
    found = read_pictures(path, class_names)
    images = torch.stack([found.data[i][0] for i in range(len(found.data))])
    arrays = images[:, 0] if images.shape[1] == 1 else images.permute(0, 2, 3, 1)
    fitted = fit_arrays(arrays.numpy(), (spec.height, spec.width), spec.channels)
    return found._replace(data=_in_memory(fitted))


def read_mask(path: str | Path, height: int, width: int) -> Tensor:
    """An image file as a mask, bool (1, H, W): True where it is white, or at least half so.

    Raises:
        DataError: it cannot be read, or has another size than the pictures it is for.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{show(path)}: no such file; give a black and white image")
    found = read_size(path)
    if found != (height, width):
        raise DataError(
            f"{show(path)}: the mask is {found[1]}x{found[0]} pixels, but the model draws "
            f"{width}x{height}; give it that size"
        )
    return decode_image(path, ImageSpec(1, height, width, 0)) >= 128


def _in_memory(images: Tensor) -> InMemoryDataset:
    return InMemoryDataset(images, torch.zeros(len(images)), ())


def _labelled(data: ImageDataset, labels: list[int], class_names: tuple[str, ...]) -> Pictures:
    if not class_names:
        return Pictures(data, None, "the real images have no classes")
    return Pictures(data, labels)


def _class_of(name: str, path: Path, class_names: tuple[str, ...]) -> int:
    if not class_names:
        return 0
    if name in class_names:
        return class_names.index(name)
    if name.isdecimal() and int(name) < len(class_names):
        return int(name)
    raise DataError(
        f"{path}: no such class; name the folder as one of {', '.join(class_names[:20])}, or by "
        f"its number, 0 to {len(class_names) - 1}"
    )


def _numbers(path: Path, names: list[str], num_classes: int) -> list[int]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        labels = [found[name] for name in names]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f'{path}: must be {{"000000.png": 3, ...}} with every picture ({error!r})'
        ) from error
    return _checked(labels, path, num_classes)


def _checked(labels: list[object], path: Path, num_classes: int) -> list[int]:
    wrong = [x for x in labels if type(x) is not int or not 0 <= x < max(1, num_classes)]
    if wrong and num_classes:
        raise DataError(f"{path}: label {wrong[0]!r}: classes are 0 to {num_classes - 1}")
    return labels


def _read_npz(path: Path, class_names: tuple[str, ...]) -> Pictures:
    try:
        with np.load(path, allow_pickle=False) as stored:
            images = stored["arr_0"]
            labels = stored["arr_1"] if "arr_1" in stored.files else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({error}); {FIX}") from error
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[3] not in (1, 3)
        or not images.size
    ):
        raise DataError(f"{path}: arr_0 is {images.dtype} {images.shape}; {FIX}, C = 1 or 3")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    data = _in_memory(pixels)
    if labels is None:
        return Pictures(data, None, f"{path} has no labels (arr_1)")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: arr_1 is {labels.dtype} {labels.shape}, not {len(images)} integers"
        )
    return _labelled(data, _checked(labels.tolist(), path, len(class_names)), class_names)
