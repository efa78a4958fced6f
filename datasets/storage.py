"""The two ways to hold a data set: images in memory, and files decoded when they are asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from datasets.base import ImageSpec
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

    def of_classes(self, classes: Collection[int]) -> Listing:
        kept = [i for i, label in enumerate(self.labels) if label in classes]
        names, labels = ([column[i] for i in kept] for column in (self.names, self.labels))
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
