"""Existing pictures, whatever made them: a folder, or an .npz with `arr_0` (N, H, W, C)."""

from __future__ import annotations

import json
import logging
from os.path import splitext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.conditions import IN_UNITS, file_channels, picture_files
from datasets.decoding import decode_image, fit_arrays, read_size
from datasets.folder import build_custom, children_of, has_test_folder, suffixes_of
from datasets.loader import make_resident
from datasets.packed import ImagePath, open_root
from datasets.remarks import passed_over
from datasets.storage import ImageDataset, ImageFileDataset, InMemoryDataset, Listing
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import DataError, show
from utils.files import looks_like, read_npz
from utils.images import BYTES, ImageSpec, Values
from utils.labels import LABELS_FILE

FIX = "give a folder of images, a .zip of it, or an .npz with arr_0, uint8 (N, H, W, C)"
MAX_NAMED = 20  # classes named in one message

log = logging.getLogger("diffusion")


class Pictures(NamedTuple):
    """Pictures that exist already."""

    data: ImageDataset  # the images; its own labels mean nothing
    labels: list[int] | None  # the class of each, as the data set they imitate numbers them
    unlabelled: str | None = None  # why there are no labels


def folder_settings(path: str | Path) -> dict[str, Any]:
    """Config keys that make the images in the folder `path` a data set.

    Raises a DataError if there is no such folder, or it cannot be read.
    """
    root = open_root(path)
    if not root.is_dir():
        fault = "is a file, not a folder" if root.exists() else "no such folder"
        what = looks_like(root) if root.is_file() else None
        raise DataError(f"{show(path)}: {what or fault}; {FIX}")
    children = children_of(root, suffixes_of(root))
    use_subdirs = bool(children.folders) and not children.images
    labelled = not use_subdirs and (root / LABELS_FILE).is_file()
    return {
        "dataset": "custom",
        "data_root": str(root),
        "use_subdirs": use_subdirs,
        "label_file": LABELS_FILE if labelled else None,
        "num_classes": None,
    }


def read_pictures(
    path: str | Path,
    class_names: tuple[str, ...],
    *,
    image_size: tuple[int, int] | None = None,
    image_channels: int | None = None,
    values: Values | None = None,
) -> Pictures:
    """The pictures at `path` and their classes.

    In a folder of folders, these are named as the classes, or by their numbers. A flat folder may
    have a `labels.json`, an .npz `arr_1` (N,), with class numbers. What else lies in a folder is
    told in a warning. Raises a DataError if there are no pictures, broken ones, several splits, or
    labels that are no classes.

    Args:
        class_names: those of the data set that the pictures imitate; empty if it has none.
        image_size: (height, width) to bring them to; None: they have one size.
        image_channels: None: 3 for files, those of the array in an .npz.
        values: those of the data set that the pictures imitate, whose range they have, too.
    """
    path = Path(path)
    if path.suffix.lower() == ".npz":
        arrays, labels = _read_npz(path)
        images = _in_memory(fit_arrays(arrays, image_size, image_channels))
    else:
        settings = folder_settings(path) | {"label_file": None}
        settings["value_range"] = values and values[1:]
        config = Config(**settings, image_size=image_size, image_channels=image_channels)
        if has_test_folder(config):
            raise DataError(f"{show(path)}: holds splits; name the folder of one of them")
        images = build_custom(config, "train")
        for line in passed_over(images.listing):
            log.warning("%s: %s", show(path), line)
        labels = _labels_in_folder(open_root(path), images, class_names)
    if labels is None:
        reason = f"{path} has no labels: no folder per class, no {LABELS_FILE}, no arr_1"
        return Pictures(images, None, reason)
    if not class_names:
        return Pictures(images, None, "the real images have no classes")
    for label in labels:
        if type(label) is not int or not 0 <= label < len(class_names):
            raise DataError(
                f"{show(path)}: label {label!r}: classes are 0 to {len(class_names) - 1} (folders: "
                f"{', '.join(class_names[:MAX_NAMED])}), there is no such class"
            )
    return Pictures(images, labels)


def fitted_pictures(
    path: str | Path, spec: ImageSpec, class_names: tuple[str, ...], values: Values | None
) -> Pictures:
    """`read_pictures`, or a single image file, in the shape that a model of `spec` draws.

    Cropped and resized as the images of a data set are, see `decoding.fit_image`.
    """
    path, size = Path(path), (spec.height, spec.width)
    if open_root(path).is_dir() or path.suffix.lower() == ".npz":
        shape = dict(image_size=size, image_channels=spec.channels)
        return read_pictures(path, class_names, **shape, values=values)
    if not path.is_file():
        raise DataError(f"{show(path)}: no such file or folder; {FIX}, or an image file")
    image = _in_memory(decode_image(path, spec, values or BYTES)[None])
    image.values = values
    return Pictures(image, None, f"{path} is one file")


def read_inputs(
    path: str | None, config: Config, spec: ImageSpec, copies: int, values: Values | None = None
) -> ImageDataset | None:
    """The picture at `path`, or those in a folder, for `planes_at`; with their `names`, and the
    `outputs`, names of `copies` images for each. `values` are those of the images. None for a
    model without a condition.

    Raises a DataError if there is none, or one does not fit, or the model takes none.
    """
    if (path is None) != (config.condition is None):
        rule = f"this model has condition={config.condition!r}; give pictures unless that is None"
        raise DataError(f"--condition {show(path)}: {rule}")
    if path is None:
        return None
    values = values if config.condition in IN_UNITS else None
    root, listing = Path(path), Listing(Path(path).parent, [Path(path).name], [0], ())
    if open_root(root).is_dir():
        shape = dict(image_size=spec.shape[1:], image_channels=file_channels(config, spec))
        listing = read_pictures(root, (), **shape, values=values).data.listing
    files = picture_files(config, listing, spec, values=values)
    held = make_resident(files, Runtime(torch.device("cpu")), resident=True)
    held.partners, held.names = held, [splitext(n)[0].replace("/", "_") for n in listing.names]
    ends = [f"_{i}" for i in range(copies)] if copies > 1 else [""]
    held.outputs = [name + end for name in held.names for end in ends]
    if len({*held.names}) < len(held.names):
        raise DataError(f"--condition {show(path)}: two pictures have one name; rename one")
    return held


def read_mask(path: str | Path, height: int, width: int) -> Tensor:
    """An image file as a mask, bool (1, H, W): True where it is white, or at least half so.

    Raises a DataError if it cannot be read, or has another size than the pictures it is for.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{show(path)}: no such file; give a black and white image")
    size = read_size(path)
    if size != (height, width):
        raise DataError(
            f"{show(path)}: the mask is {size[1]}x{size[0]} pixels, but the model draws "
            f"{width}x{height}; give it that size"
        )
    return decode_image(path, ImageSpec(1, height, width, 0)) >= 128


def _labels_in_folder(
    path: ImagePath, images: ImageFileDataset, class_names: tuple[str, ...]
) -> list[Any] | None:
    """The class of each image by the name or number of its folder, or by `labels.json`.

    Not checked: a folder that is no class stands for itself.
    """
    if images.class_names:
        numbers = {name: int(name) for name in images.class_names if name.isdecimal()}
        numbers |= {name: number for number, name in enumerate(class_names)}
        classes = [numbers.get(name, name) for name in images.class_names]
        return [classes[label] for label in images.labels.tolist()]
    if not (path / LABELS_FILE).is_file():
        return None
    try:
        with (path / LABELS_FILE).open("rb") as file:
            labels = json.load(file)
        return [labels[name] for name in images.names]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f'{show(path / LABELS_FILE)}: must be {{"000000.png": 3, ...}} with every picture '
            f"({error!r})"
        ) from error


def _read_npz(path: Path) -> tuple[np.ndarray, list[int] | None]:
    """uint8 (N, H, W) or (N, H, W, 3), and the labels."""
    try:
        arrays = read_npz(path, ["arr_0"], ["arr_1"])
    except ValueError as error:
        raise DataError(f"{show(path)}: cannot be read ({error}); {FIX}") from error
    images, labels = arrays["arr_0"], arrays.get("arr_1")
    allowed = images.ndim == 4 and images.shape[3] in (1, 3) and images.size
    if images.dtype != np.uint8 or not allowed:
        raise DataError(f"{show(path)}: arr_0 is {images.dtype} {images.shape}; {FIX}, C = 1 or 3")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise DataError(
            f"{show(path)}: arr_1 is {labels.dtype} {labels.shape}, not {len(images)} integers"
        )
    grey = images.shape[3] == 1
    return images[..., 0] if grey else images, None if labels is None else labels.tolist()


def _in_memory(images: Tensor) -> InMemoryDataset:
    return InMemoryDataset(images, torch.zeros(len(images)), ())
