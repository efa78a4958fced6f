"""The table of data sets, and what the config says about them.

A new data set is one builder `(config, split) -> ImageDataset` and one line in `DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from datasets import builtin, folder
from datasets.base import ImageDataset, ImageSpec
from datasets.storage import ClassSubset, Listing
from datasets.synthetic import build_synthetic
from utils.config import Config, Problem, did_you_mean
from utils.errors import DataError

SPLITS = ("train", "test")


class DatasetEntry(NamedTuple):
    """How to build a data set, and what is known of it without reading any of its files.

    Attributes:
        build: the images of a split, "train" or "test".
        native: their shape before `image_size` and `image_channels`; None if the files decide it.
        flip: whether mirror images are as good as the originals.
        in_files: the image files of a split, not opened yet; None if images are held in memory.
        num_classes: K as the config tells it, None if the files do. Needed where `native` is None.
        has_test_split: whether there are test images; None if there always are.
        check: faults of the config keys that are for this data set alone.
    """

    build: Callable[[Config, str], ImageDataset]
    native: ImageSpec | None
    flip: bool
    in_files: Callable[[Config, str], Listing] | None = None
    num_classes: Callable[[Config], int | None] | None = None
    has_test_split: Callable[[Config], bool] | None = None
    check: Callable[[Config], Iterator[Problem]] | None = None


def _torchvision(class_name: str, native: ImageSpec, *, flip: bool) -> DatasetEntry:
    return DatasetEntry(partial(builtin.build_torchvision, class_name), native, flip)


DATASETS: dict[str, DatasetEntry] = {
    "digits": DatasetEntry(builtin.build_digits, ImageSpec(1, 8, 8, 10), flip=False),
    "mnist": _torchvision("MNIST", ImageSpec(1, 28, 28, 10), flip=False),
    "fashionmnist": _torchvision("FashionMNIST", ImageSpec(1, 28, 28, 10), flip=True),
    "cifar10": _torchvision("CIFAR10", ImageSpec(3, 32, 32, 10), flip=True),
    "cifar100": _torchvision("CIFAR100", ImageSpec(3, 32, 32, 100), flip=True),
    "celeba": DatasetEntry(
        builtin.build_celeba, ImageSpec(3, 64, 64, 0), flip=True, in_files=builtin.list_celeba
    ),
    "synthetic": DatasetEntry(build_synthetic, ImageSpec(3, 32, 32, 6), flip=False),
    "custom": DatasetEntry(
        folder.build_custom,
        native=None,
        flip=True,
        in_files=folder.list_images,
        num_classes=folder.number_of_classes,
        has_test_split=folder.has_test_folder,
        check=folder.check_custom,
    ),
}
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
    dataset = DATASETS[config.dataset].build(config, split)
    spec = native_spec(config)
    if spec is not None and dataset.spec != spec:
        raise DataError(
            f"dataset={config.dataset!r}: its builder made images of {dataset.spec}, but the table "
            f"and the config describe {spec}"
        )
    return dataset if config.classes is None else ClassSubset(dataset, config.classes)


def has_test_split(config: Config) -> bool:
    """Whether `build_dataset(config, "test")` can work.

    Raises:
        DataError: the folders of a `custom` data set cannot be read or have no clear meaning.
    """
    has_split = DATASETS[config.dataset].has_test_split
    return has_split is None or has_split(config)


def native_spec(config: Config) -> ImageSpec | None:
    """The spec with `image_size` and `image_channels` applied, as far as no file need be read.

    None if the size or number of classes can only be told from the files, and for an unknown name.
    """
    entry = DATASETS.get(config.dataset)
    if entry is None:
        return None
    channels, height, width, num_classes = entry.native or (3, None, None, _num_classes(config))
    height, width = config.image_size or (height, width)
    if height is None or num_classes is None:
        return None
    return ImageSpec(config.image_channels or channels, height, width, num_classes)


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
    entry, num_classes = DATASETS[config.dataset], _num_classes(config)
    if config.on_bad_image == "skip" and entry.in_files is None:
        of_files = ", ".join(name for name, other in DATASETS.items() if other.in_files)
        yield Problem(
            ("on_bad_image", "dataset"),
            f"on_bad_image='skip' is for data sets of image files ({of_files}), not "
            f"{config.dataset!r}",
        )
    if entry.check is not None:
        yield from entry.check(config)
    elif config.label_file is not None:
        yield Problem(
            ("label_file", "dataset"),
            f"label_file={config.label_file!r} is for dataset='custom', not {config.dataset!r}",
        )
    has = "labels" if num_classes is None else f"{num_classes} classes"
    if num_classes == 0:
        has += " (class folders or a label_file of dataset='custom' give some)"
    if config.num_classes not in (None, num_classes):
        yield Problem(
            ("num_classes", "dataset"),
            f"num_classes={config.num_classes}, but {config.dataset} has {has}; leave it out",
        )
    if config.conditional and num_classes == 0:
        yield Problem(
            ("conditional", "dataset"),
            f"conditional=True needs labels, but {config.dataset} has {has}; set conditional=False",
        )
    if config.classes and num_classes is not None and max(config.classes) >= num_classes:
        yield Problem(
            ("classes", "dataset"),
            f"classes={list(config.classes)}: {config.dataset} has {has}, numbered from 0",
        )


def _num_classes(config: Config) -> int | None:
    entry = DATASETS[config.dataset]
    return entry.native.num_classes if entry.native else entry.num_classes(config)


def _unknown(name: str) -> str:
    hint = did_you_mean(name.lower(), DATASETS, ALIASES)
    return f"dataset={name!r}: use {', '.join(DATASETS)}{hint}"
