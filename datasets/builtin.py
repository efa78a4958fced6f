"""Data sets that need no preparation: digits ships with scikit-learn, torchvision fetches the rest.

Files already under `data_root` are used as they are, from a read-only folder too. Downloading is
not guarded against other processes: under torchrun rank 0 builds first and the others wait.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from datasets.bad_images import replace_bad_images
from datasets.decoding import fit_arrays, has_image_suffix
from datasets.storage import ImageFileDataset, InMemoryDataset, Listing
from utils.config import Config
from utils.errors import DataError, one_line, show
from utils.files import socket_timeout

DIGIT_NAMES = tuple("0123456789")
DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer; a blocked network may never answer
PHOTO_SIZE = (64, 64)  # of data sets of larger photos, if the config asks for no size
CELEBA_PARTITION = {"train": "0", "valid": "1", "test": "2"}
CELEBA_NUMBERS = {"train": range(1, 162_771), "test": range(182_638, 202_600)}  # valid between
FLOWERS_URL = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
FLOWERS_FILES = ("jpg", "imagelabels.mat", "setid.mat")

log = logging.getLogger("diffusion")


def build_digits(config: Config, split: str) -> InMemoryDataset:
    """scikit-learn's 1797 handwritten digits, 8x8; every fifth image of a class is a test image."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = np.rint(source.images * 255 / 16).astype(np.uint8)
    labels = source.target.astype(np.int64)
    seen = np.eye(len(DIGIT_NAMES), dtype=np.int64)[labels].cumsum(axis=0)  # of each class so far
    is_test = seen[np.arange(len(labels)), labels] % 5 == 0
    chosen = is_test == (split == "test")
    pixels = fit_arrays(images[chosen], config.image_size, config.image_channels)
    return InMemoryDataset(pixels, torch.from_numpy(labels[chosen]), DIGIT_NAMES)


def build_torchvision(class_name: str, config: Config, split: str) -> InMemoryDataset:
    """MNIST, FashionMNIST, CIFAR10 or CIFAR100, by its class in torchvision.

    Raises a DataError if the files are missing or damaged, and cannot be downloaded.
    """
    import torchvision.datasets

    dataset_class = getattr(torchvision.datasets, class_name)
    if hasattr(dataset_class, "resources"):  # MNIST and FashionMNIST
        folder = Path(config.data_root) / class_name / "raw"
        files = [name.removesuffix(".gz") for name, _ in dataset_class.resources]
    else:
        folder = Path(config.data_root) / dataset_class.base_folder
        files = [name for name, _ in (*dataset_class.train_list, *dataset_class.test_list)]
        files.append(f"{dataset_class.meta['filename']} (all unpacked from {dataset_class.url})")
    train = split == "train"
    try:
        source = dataset_class(config.data_root, train=train, download=False)
    except Exception:  # missing files are a RuntimeError, damaged ones may be anything
        with _download(config.dataset, folder, files):
            source = dataset_class(config.data_root, train=train, download=True)
    images, labels = np.asarray(source.data), np.asarray(source.targets)
    class_names = [name.partition(" - ")[0] for name in source.classes]  # MNIST has "7 - seven"
    largest = labels.max(initial=0)
    if len(images) != len(labels) or largest >= len(class_names):
        raise DataError(
            f"{show(folder)}: {len(images)} images with {len(labels)} labels up to {largest} is "
            f"not {config.dataset}; delete the folder and start again"
        )
    pixels = fit_arrays(images, config.image_size, config.image_channels)
    return InMemoryDataset(pixels, torch.from_numpy(labels), class_names)


def list_celeba(config: Config, split: str) -> Listing:
    """The files of aligned CelebA, sorted and unlabelled.

    Needs `celeba/img_align_celeba/` only, in any capitals. The lines of `list_eval_partition.txt`
    beside it are such as `000001.jpg 0`: 0 train, 1 valid, 2 test; without it the images are split
    by number, as that list splits them, which is logged. Raises a DataError if the images are
    missing and cannot be downloaded, the list has a line of another form, an image another name, or
    the split no image.
    """
    root = Path(config.data_root)
    images_dir = _any_case(root, "celeba", "img_align_celeba")
    if not images_dir.is_dir():
        from torchvision.datasets import CelebA

        files = ["img_align_celeba/ (the unpacked img_align_celeba.zip)"]
        with _download("celeba", images_dir.parent, files):
            CelebA(config.data_root, split="all", target_type=[], download=True)
    images_dir = _any_case(root, "celeba", "img_align_celeba")
    partition = _any_case(images_dir.parent, "list_eval_partition.txt")
    lines = partition.read_text(encoding="utf-8").splitlines() if partition.is_file() else []
    names = [] if partition.is_file() else _celeba_by_number(images_dir, split)
    for number, line in enumerate(lines, start=1):
        name, _, part = line.partition(" ")
        if part.strip() not in CELEBA_PARTITION.values() or "/" in name or not name:
            raise DataError(
                f"{show(partition)}:{number}: {line!r}: must be a file name and 0, 1 or 2"
            )
        if part.strip() == CELEBA_PARTITION[split]:
            names.append(name)
    if not names:
        raise DataError(f"{show(partition)}: lists no image of the {split} split")
    return Listing(images_dir, sorted(names), [0] * len(names), ())


def _any_case(folder: Path, *parts: str) -> Path:
    """`folder` / part / part, where names that are there in other capitals count as well."""
    for part in parts:
        there = sorted(os.listdir(folder)) if folder.is_dir() else []
        same = [name for name in there if name.casefold() == part]
        folder /= part if part in there or not same else same[0]
    return folder


def _celeba_by_number(images_dir: Path, split: str) -> list[str]:
    """The names of a split's images without the list of the splits, sorted."""
    names, numbers = sorted(filter(has_image_suffix, os.listdir(images_dir))), CELEBA_NUMBERS[split]
    for name in names:
        if not re.fullmatch(r"[0-9]{6}[.]\w+", name):
            raise DataError(f"{show(images_dir / name)}: not called as CelebA's images, 000001.jpg")
    chosen = [name for name in names if int(name[:6]) in numbers]
    if not chosen:
        ends = f"{numbers[0]:06d} to {numbers[-1]:06d}"
        raise DataError(f"{show(images_dir)}: no image of the {split} split, {ends}")
    how = "no list_eval_partition.txt, so the splits are by number, as published"
    log.warning(f"celeba: {how}: {len(chosen):,} of {len(numbers):,} {split} images")
    return chosen


def list_flowers102(config: Config, split: str) -> Listing:
    """The files of Oxford Flowers 102 (Nilsback and Zisserman, 2008), sorted; of `classes` alone.

    As the official train split has but 1,020 of 8,189 images, "test" is the validation split, 1,020
    too, and "train" all others. A DataError tells of files that are missing, damaged or at odds.
    """
    from scipy.io import loadmat
    from torchvision.datasets import Flowers102

    root = Path(config.data_root)
    if not _find_flowers102(root):
        files = ("jpg/ (the unpacked 102flowers.tgz)", *FLOWERS_FILES[1:], f"from {FLOWERS_URL}")
        with _download("flowers102", root / "flowers-102", files):
            Flowers102(root, download=True)
    images_dir, labels_path, splits_path = _find_flowers102(root)
    there = {name.casefold(): name for name in sorted(os.listdir(images_dir))}
    try:
        labels = loadmat(path := labels_path)["labels"].ravel()
        if not {*labels} <= {*range(1, 103)}:
            raise ValueError("its labels are not 1 to 102")
        content = loadmat(path := splits_path)
        validation, *others = (content[key].ravel() for key in ("valid", "trnid", "tstid"))
        numbers = np.arange(1, len(labels) + 1)
        is_whole = np.array_equal(np.sort(np.concatenate([validation, *others])), numbers)
        if not is_whole or not 0 < len(validation) < len(labels):
            raise ValueError(f"its splits do not share out {len(labels)} images, each once")
        path, names = images_dir, [there.get(f"image_{number:05d}.jpg") for number in numbers]
        if lost := names.count(None):
            raise ValueError(f"{lost} missing, first image_{names.index(None) + 1:05d}.jpg")
    except Exception as error:  # of scipy and zlib, a dozen kinds for damaged files
        fault = f"damaged or incomplete ({type(error).__name__}: {one_line(error)})"
        raise DataError(f"{show(path)}: {fault}; get it anew from {FLOWERS_URL}") from error
    indices = np.flatnonzero(np.isin(numbers, validation) == (split == "test"))
    listing = Listing(images_dir, names, [int(n) - 1 for n in labels], tuple(Flowers102.classes))
    return listing.take(indices).of_classes(config.classes)


def build_photos(
    list_images: Callable[[Config, str], Listing], config: Config, split: str
) -> ImageFileDataset:
    """The listed images, the largest centred part of each; 64x64 pixels without `image_size`.
    Raises as `list_images` and `replace_bad_images` do."""
    listing = replace_bad_images(config, list_images(config, split))
    size = config.image_size or PHOTO_SIZE
    return ImageFileDataset(listing, config.image_channels or 3, *size)


def _find_flowers102(root: Path) -> list[Path]:
    """Where `FLOWERS_FILES` are, in any capitals; empty unless all are in `root/flowers-102`,
    another folder named after flowers, or `root`, with folders of such names in there."""
    for top in (root / "flowers-102", *sorted(root.glob("*[Ff][Ll][Oo][Ww][Ee][Rr]*")), root):
        places: dict[str, Path] = {}
        for folder, inner, files in os.walk(top):
            places |= {name.casefold(): Path(folder, name) for name in sorted(inner + files)}
            inner[:] = sorted(n for n in inner if "flower" in n.casefold() or n.lower() == "jpg")
        if places.keys() >= set(FLOWERS_FILES):
            return [places[name] for name in FLOWERS_FILES]
    return []


@contextlib.contextmanager
def _download(dataset: str, folder: Path, files: Sequence[str]) -> Iterator[None]:
    """Turn any failure inside into a DataError, one line that says where to put which files.

    Folders that the failed download made, and left empty, are removed.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with socket_timeout(DOWNLOAD_TIMEOUT):
            yield
    except Exception as error:  # network, disk, archive and missing-package errors alike
        for path in made:
            with contextlib.suppress(OSError):  # not made after all, or not empty
                path.rmdir()
        raise DataError(
            f"dataset={dataset!r}: files in {show(folder)} are missing or damaged, and downloading "
            f"them failed ({type(error).__name__}: {one_line(error)}); put there: "
            f"{', '.join(files)}"
        ) from error
