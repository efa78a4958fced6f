"""The ways to hold a data set: in memory, as files decoded when asked for, or a part of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from datasets.base import ImageDataset, ImageSpec
from datasets.decoding import decode_image, show
from utils.errors import DataError


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


class Listing(NamedTuple):
    """The images of one split, before any is opened."""

    root: Path
    names: list[str]  # paths relative to root with `/`, in the order of the data set
    labels: list[int]  # one per name, in [0, len(class_names)); all 0 when unlabelled
    class_names: tuple[str, ...]  # empty when unlabelled

    def path(self, index: int) -> Path:
        return self.root / self.names[index]

    def take(self, indices: Sequence[int]) -> Listing:
        """The listing of the images at `indices`, in that order."""
        names, labels = ([column[i] for i in indices] for column in (self.names, self.labels))
        return self._replace(names=names, labels=labels)


class ImageFileDataset:
    """Image files decoded each time they are asked for. Satisfies `ImageDataset`.

    The fingerprint covers names, file sizes, labels and the shape, not the files' contents.
    """

    def __init__(self, listing: Listing, *, height: int, width: int, channels: int) -> None:
        """
        Raises:
            DataError: a file does not exist.
        """
        self.root, self.names, self._labels, self.class_names = listing
        self.labels = torch.tensor(self._labels, dtype=torch.int64)
        self.spec = ImageSpec(channels, height, width, len(self.class_names))
        self.fingerprint = self._hash_listing()

    def _hash_listing(self) -> str:
        digest = hashlib.sha256(repr((len(self.names), self.spec)).encode())
        for name, label in zip(self.names, self._labels, strict=True):
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
        return decode_image(self.root / self.names[index], self.spec), self._labels[index]


class ClassSubset:
    """The images of some classes, in their order; labels and number of classes stay as they are.

    Satisfies `ImageDataset`.

    Raises:
        DataError: from the constructor, for a class of which there is no image.
    """

    def __init__(self, dataset: ImageDataset, classes: Sequence[int]) -> None:
        num_classes = dataset.spec.num_classes
        require_classes(classes, dataset.labels.tolist() if num_classes else (), num_classes)
        self.spec, self.class_names = dataset.spec, dataset.class_names
        wanted = torch.tensor(sorted(set(classes)))
        self._dataset, self._indices = dataset, torch.isin(dataset.labels, wanted).nonzero()[:, 0]
        self.labels = dataset.labels[self._indices]
        if hasattr(dataset, "names"):
            self.names = [dataset.names[i] for i in self._indices.tolist()]
        text = f"{dataset.fingerprint} {wanted.tolist()}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._dataset[int(self._indices[index])]


def require_classes(classes: Iterable[int], labels: Iterable[int], num_classes: int) -> None:
    """Make sure that each of `classes` has an image.

    Raises:
        DataError: one of them is not among `labels`.
    """
    present = set(labels)
    if absent := sorted(set(classes) - present):
        raise DataError(
            f"classes={list(classes)}: the data has no image of {absent}; it has images of "
            f"{len(present)} of {num_classes} classes"
        )
