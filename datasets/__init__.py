"""The table of data sets, and what the config says about them.

A new data set is one builder `(config, split) -> ImageDataset` and one line in `DATASETS`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from datasets import builtin, folder
from datasets.conditions import add_partners
from datasets.storage import ClassSubset, ImageDataset, Listing
from datasets.synthetic import build_synthetic
from utils.config import Config, Parts, Problem, kind_of, unknown_name
from utils.errors import DataError
from utils.images import ImageSpec, image_suffix

SPLITS = ("train", "test")

log = logging.getLogger("diffusion")


class DatasetEntry(NamedTuple):
    """How to build a data set, and what is known of it without reading any of its files."""

    build: Callable[[Config, str], ImageDataset]  # the images of a split, "train" or "test"
    native: ImageSpec | None  # before `image_size` and `image_channels`; None: the files decide it
    flip: bool  # whether mirror images are as good as the originals
    # The image files of a split, not opened yet; None if images are held in memory.
    in_files: Callable[[Config, str], Listing] | None = None
    # K as the config tells it, None if the files do. Needed where `native` is None.
    num_classes: Callable[[Config], int | None] | None = None
    # Whether there are test images; None if there always are.
    has_test_split: Callable[[Config], bool] | None = None


def _torchvision(class_name: str, native: ImageSpec, *, flip: bool) -> DatasetEntry:
    return DatasetEntry(partial(builtin.build_torchvision, class_name), native, flip)


def _photos(list_images: Callable[[Config, str], Listing], num_classes: int) -> DatasetEntry:
    build = partial(builtin.build_photos, list_images)
    return DatasetEntry(build, ImageSpec(3, *builtin.PHOTO_SIZE, num_classes), True, list_images)


_DATASETS = {
    "digits": DatasetEntry(builtin.build_digits, ImageSpec(1, 8, 8, 10), flip=False),
    "mnist": _torchvision("MNIST", ImageSpec(1, 28, 28, 10), flip=False),
    "fashionmnist": _torchvision("FashionMNIST", ImageSpec(1, 28, 28, 10), flip=False),
    "cifar10": _torchvision("CIFAR10", ImageSpec(3, 32, 32, 10), flip=True),
    "cifar100": _torchvision("CIFAR100", ImageSpec(3, 32, 32, 100), flip=True),
    "celeba": _photos(builtin.list_celeba, 0),
    "flowers102": _photos(builtin.list_flowers102, 102),
    "synthetic": DatasetEntry(build_synthetic, ImageSpec(3, 32, 32, 6), flip=False),
    "custom": DatasetEntry(
        folder.build_custom,
        native=None,
        flip=True,
        in_files=folder.list_images,
        num_classes=folder.number_of_classes,
        has_test_split=folder.has_test_folder,
    ),
}
DATASETS = Parts(_DATASETS, kind_of(DatasetEntry, "a data set"))
ALIASES = {
    "fashion_mnist": "fashionmnist",
    "fashion": "fashionmnist",
    "cifar": "cifar10",
    "shapes": "synthetic",
    "folder": "custom",
    "imagefolder": "custom",
    "imagenet": "custom",
}


def build_dataset(config: Config, split: str = "train") -> ImageDataset:
    """The images of `split` ("train" or "test") in the size and channels the config asks for.

    Data sets of torchvision are downloaded if they are not under `data_root`. Raises a DataError
    for an unknown name or split, and if images are missing, broken or labelled wrongly, or there
    is none of one of `classes`.
    """
    for problem in unknown_name("dataset", config.dataset, DATASETS, ALIASES):
        raise DataError(problem.message)
    if split not in SPLITS:
        raise DataError(f"split={split!r}: use {' or '.join(SPLITS)}")
    if config.on_bad_image == "skip" and DATASETS[config.dataset].in_files is None:
        of_files = ", ".join(name for name, entry in DATASETS.items() if entry.in_files)
        log.warning("on_bad_image has no effect without a data set of image files: %s", of_files)
    dataset = DATASETS[config.dataset].build(config, split)
    spec = native_spec(config)
    if spec is not None and dataset.spec != spec:
        raise DataError(
            f"dataset={config.dataset!r}: its builder made images of {dataset.spec}, but the table "
            f"and the config describe {spec}"
        )
    dataset = dataset if config.classes is None else ClassSubset(dataset, config.classes)
    is_picture = image_suffix(dataset.spec.channels, dataset.values is None) == ".png"
    if config.condition == "mask" and not is_picture:
        fault = "a picture with a hole is a PNG of 8 bits, the images are arrays"
        raise DataError(f"condition='mask': {fault}; edit.py inpaint fills holes of such images")
    if config.condition == "folder":
        add_partners(config, dataset, split)
    return dataset


def has_test_split(config: Config) -> bool:
    """Whether there is a test split; raises a DataError if the folders have no clear meaning."""
    has_split = DATASETS[config.dataset].has_test_split
    return has_split is None or has_split(config)


def native_spec(config: Config) -> ImageSpec | None:
    """The shape and classes that the config asks for, before any file is read.

    None if the size or number of classes can only be told from the files, and for an unknown name.
    """
    if DATASETS.get(config.dataset) is None:
        return None
    spec = _told_by(config)
    return None if None in spec else spec


def default_flip(config: Config) -> bool:
    """Whether to mirror at random: `horizontal_flip`, else whether the data set bears it."""
    if config.horizontal_flip is not None:
        return config.horizontal_flip
    return DATASETS[config.dataset].flip


def check_config(config: Config) -> Iterator[Problem]:
    """Yield the faults of the data keys that can be seen without reading data."""
    if unknown := list(unknown_name("dataset", config.dataset, DATASETS, ALIASES)):
        yield from unknown
        return
    name, entry = config.dataset, DATASETS[config.dataset]
    channels, height, width, num_classes = _told_by(config)
    has = f"{name} has " + ("labels" if num_classes is None else f"{num_classes} classes")
    if num_classes == 0 and entry.native is None:
        has += " with use_subdirs=False and no label_file"
    faults: dict[str, str] = {}  # key -> what is wrong with its value
    if entry.native is not None and config.image_channels not in (None, 1, 3):
        faults["image_channels"] = ": use 1 or 3; other numbers are for array files, dataset=custom"
    shown = config.preview_channels
    if shown is not None and (len(shown) not in (1, 3) or max(shown) >= channels):
        faults["preview_channels"] = f": name one or three of 0..{channels - 1}"
    if config.label_file is not None and config.use_subdirs and entry.native is None:
        faults["label_file"] = f" {folder.BESIDE_SUBDIRS}"
    if config.num_classes not in (None, num_classes):
        faults["num_classes"] = f", but {has}; leave it out"
    if config.conditional and num_classes == 0:
        faults["conditional"] = (
            f" needs labels, but {has}; set conditional=False, see docs/migration.md"
        )
    if config.classes and num_classes is not None and max(config.classes) >= num_classes:
        faults["classes"] = f": {has}, numbered from 0"
    kind, colors, factor = config.condition, config.condition_colors or (), config.condition_factor
    if kind == "folder" and (entry.native is not None or config.condition_root is None):
        faults["condition"] = " needs dataset='custom' and condition_root, the folder of pictures"
    if kind == "grey" and channels == 1:
        faults["condition"] = ": the images are grey already; use RGB ones, or another condition"
    if kind == "downsample" and any((side or 1) % factor for side in (height, width)):
        faults["condition_factor"] = ": must divide image_size, height and width"
    if config.condition_channels not in (None, 1, 3) or (config.condition_channels and colors):
        faults["condition_channels"] = ": use 1 (grey) or 3 (RGB), or condition_colors"
    if {*map(len, colors)} not in ({1}, {3}, set()) or len({*colors}) < len(colors):
        faults["condition_colors"] = ": give different ones, all (red, green, blue) or all (grey,)"
    given = config.model_dump(mode="json", include=set(faults))  # with lists, as they are written
    for key, fault in faults.items():
        yield Problem((key, "dataset"), f"{key}={given[key]!r}{fault}")


def _told_by(config: Config) -> ImageSpec:
    """As `native_spec`, but for what the files decide there is None in its place."""
    entry = DATASETS[config.dataset]
    spec = entry.native or ImageSpec(3, None, None, entry.num_classes(config))
    height, width = config.image_size or spec.shape[1:]
    return ImageSpec(config.image_channels or spec.channels, height, width, spec.num_classes)
