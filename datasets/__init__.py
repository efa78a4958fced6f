"""The table of data sets, and what the config says about them.

A new data set is one builder `(config, split) -> ImageDataset` and one line in `DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from datasets.base import ImageDataset, ImageSpec
from datasets.builtin import (
    build_celeba,
    build_cifar10,
    build_cifar100,
    build_digits,
    build_fashionmnist,
    build_mnist,
)
from datasets.folder import build_custom, has_test_folder
from datasets.subset import ClassSubset
from datasets.synthetic import build_synthetic
from utils.config import Config, Problem, did_you_mean
from utils.errors import DataError

__all__ = [
    "DATASETS",
    "SPLITS",
    "DatasetEntry",
    "ImageDataset",
    "ImageSpec",
    "build_dataset",
    "check_config",
    "default_flip",
    "has_test_split",
    "native_spec",
]

SPLITS = ("train", "test")


class DatasetEntry(NamedTuple):
    """How to build a data set, and what is known of it without reading any data."""

    build: Callable[[Config, str], ImageDataset]
    native: ImageSpec | None  # before image_size and image_channels; None: depends on the files
    flip: bool  # whether mirror images are as good as the originals


DATASETS: dict[str, DatasetEntry] = {
    "digits": DatasetEntry(build_digits, ImageSpec(1, 8, 8, 10), False),
    "mnist": DatasetEntry(build_mnist, ImageSpec(1, 28, 28, 10), False),
    "fashionmnist": DatasetEntry(build_fashionmnist, ImageSpec(1, 28, 28, 10), True),
    "cifar10": DatasetEntry(build_cifar10, ImageSpec(3, 32, 32, 10), True),
    "cifar100": DatasetEntry(build_cifar100, ImageSpec(3, 32, 32, 100), True),
    "celeba": DatasetEntry(build_celeba, ImageSpec(3, 64, 64, 0), True),
    "synthetic": DatasetEntry(build_synthetic, ImageSpec(3, 32, 32, 6), False),
    "custom": DatasetEntry(build_custom, None, True),
}
IN_FILES = ("celeba", "custom")  # the images are files, decoded when they are asked for
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

    Data sets of torchvision are downloaded if they are not under `data_root`.

    Raises:
        DataError: unknown name or split, or data that is missing, broken or labelled wrongly, or
            has no image of one of `classes`.
    """
    if config.dataset not in DATASETS:
        raise DataError(_unknown(config.dataset))
    if split not in SPLITS:
        raise DataError(f"split={split!r}: use {' or '.join(SPLITS)}")
    entry = DATASETS[config.dataset]
    dataset = entry.build(config, split)
    if entry.native is not None and dataset.spec != native_spec(config):
        raise DataError(
            f"dataset={config.dataset!r}: its builder made images of {dataset.spec}, but the table "
            f"and the config describe {native_spec(config)}"
        )
    return dataset if config.classes is None else ClassSubset(dataset, config.classes)


def has_test_split(config: Config) -> bool:
    """Whether `build_dataset(config, "test")` can work; only `custom` may be without.

    Raises:
        DataError: `custom` whose folders cannot be read or have no clear meaning.
    """
    return has_test_folder(config) if config.dataset == "custom" else True


def native_spec(config: Config) -> ImageSpec | None:
    """The spec with `image_size` and `image_channels` applied, as far as no file need be read.

    None for a `custom` set whose size or number of classes only its files tell, and for an unknown
    name.
    """
    entry = DATASETS.get(config.dataset)
    if entry is None:
        return None
    if entry.native is not None:
        height, width = config.image_size or (entry.native.height, entry.native.width)
        channels = config.image_channels or entry.native.channels
        return ImageSpec(channels, height, width, entry.native.num_classes)
    num_classes = config.num_classes if _custom_is_labelled(config) else 0
    if config.image_size is None or num_classes is None:
        return None
    return ImageSpec(config.image_channels or 3, *config.image_size, num_classes)


def default_flip(config: Config) -> bool:
    """Whether to mirror at random: `horizontal_flip`, else whether the data set bears it."""
    if config.horizontal_flip is not None:
        return config.horizontal_flip
    return DATASETS[config.dataset].flip


def check_config(config: Config) -> Iterator[Problem]:
    """Faults of the data keys that can be seen without reading data."""
    if config.dataset not in DATASETS:
        yield Problem(("dataset",), _unknown(config.dataset))
        return
    yield from _check_classes(config)
    if config.on_bad_image == "skip" and config.dataset not in IN_FILES:
        yield Problem(
            ("on_bad_image", "dataset"),
            f"on_bad_image='skip' is for data sets of image files ({', '.join(IN_FILES)}), not "
            f"{config.dataset!r}",
        )
    if config.dataset == "custom":
        yield from _check_custom(config)
        return
    if config.label_file is not None:
        yield Problem(
            ("label_file", "dataset"),
            f"label_file={config.label_file!r} is for dataset='custom', not {config.dataset!r}",
        )
    num_classes = DATASETS[config.dataset].native.num_classes
    if config.num_classes not in (None, num_classes):
        yield Problem(
            ("num_classes", "dataset"),
            f"num_classes={config.num_classes}, but {config.dataset} has {num_classes} classes; "
            "leave num_classes out",
        )
    if config.conditional and num_classes == 0:
        yield Problem(
            ("conditional", "dataset"),
            f"conditional=True needs labels, which dataset={config.dataset!r} has not; "
            "set conditional=False",
        )


def _check_classes(config: Config) -> Iterator[Problem]:
    spec = native_spec(config)
    if config.classes is None or spec is None:
        return
    if spec.num_classes == 0:
        yield Problem(
            ("classes", "dataset"),
            f"classes={list(config.classes)}, but these images have no labels; leave classes out",
        )
    elif max(config.classes) >= spec.num_classes:
        yield Problem(
            ("classes", "dataset"),
            f"classes={list(config.classes)}: the classes are 0..{spec.num_classes - 1}",
        )


def _check_custom(config: Config) -> Iterator[Problem]:
    if config.use_subdirs and config.label_file is not None:
        yield Problem(
            ("label_file", "use_subdirs"),
            f"label_file={config.label_file!r} goes with use_subdirs=False; with use_subdirs=True "
            "the folder names are the labels",
        )
    if _custom_is_labelled(config):
        if config.num_classes == 0:
            yield Problem(
                ("num_classes", "use_subdirs", "label_file"),
                "num_classes=0, but these images are labelled; leave num_classes out, or set "
                "use_subdirs=False without label_file",
            )
        return
    if config.conditional:
        yield Problem(
            ("conditional", "use_subdirs", "label_file"),
            "conditional=True needs labels; a flat folder (use_subdirs=False) gets them from "
            "label_file",
        )
    if config.num_classes:
        yield Problem(
            ("num_classes", "use_subdirs", "label_file"),
            f"num_classes={config.num_classes}, but a flat folder without label_file has no "
            "labels; set label_file or leave num_classes out",
        )


def _custom_is_labelled(config: Config) -> bool:
    return config.use_subdirs or config.label_file is not None


def _unknown(name: str) -> str:
    hint = did_you_mean(name.lower(), DATASETS, ALIASES)
    return f"dataset={name!r}: use {', '.join(DATASETS)}{hint}"
