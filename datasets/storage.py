"""What every data set is, and how one is held: in memory, as files, as a part of another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Subset

from datasets.decoding import decode_image
from datasets.packed import ImagePath
from utils.errors import DataError, show
from utils.images import BYTES, ImageSpec, Values


class ImageDataset(Protocol):
    """A deterministic, finite sequence of labelled images."""

    spec: ImageSpec
    labels: Tensor  # (N,) int64 in [0, K); all 0 when unlabelled
    class_names: tuple[str, ...]  # K names; empty when unlabelled
    fingerprint: str  # changes when the images, labels or their order change
    values: Values | None  # of the files of images that are floats; None: they are uint8

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """image (C, H, W), uint8 or float32 in [-1, 1], label in [0, K)."""
        ...


class InMemoryDataset:
    """All images as one tensor (N, C, H, W) on any device. Satisfies `ImageDataset`.

    Labels are (N,) in [0, len(class_names)), and all 0 if there are no class names. The
    fingerprint is a hash of the images and labels unless one is given.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, class_names: Sequence[str], *, fingerprint: str = ""
    ) -> None:
        self.images, self.values = images, None
        self.labels = labels.to("cpu", torch.int64)
        self.class_names = tuple(class_names)
        self.spec = ImageSpec(*images.shape[1:], len(self.class_names))
        self.fingerprint = fingerprint
        if not fingerprint:
            digest = hashlib.sha256(repr(tuple(images.shape)).encode())
            digest.update(images.cpu().contiguous().numpy())
            digest.update(self.labels.numpy())
            self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


class Listing(NamedTuple):
    """The images of one split, before any is opened."""

    root: ImagePath
    names: list[str]  # paths relative to root with `/`, in the order of the data set
    labels: list[int]  # one per name, in [0, len(class_names)); all 0 when unlabelled
    class_names: tuple[str, ...]  # empty when unlabelled
    # How many files of an extension, and folders (`name/`), lie there and are not used
    passed_over: Mapping[str, int] = MappingProxyType({})

    def path(self, index: int) -> ImagePath:
        return self.root / self.names[index]

    def take(self, indices: Sequence[int]) -> Listing:
        """The listing of the images at `indices`, in that order."""
        names, labels = ([column[i] for i in indices] for column in (self.names, self.labels))
        return self._replace(names=names, labels=labels)

    def of_classes(self, classes: Sequence[int] | None) -> Listing:
        """The images of `classes`, all if None; a DataError if one of them has no image."""
        if classes is None or not self.class_names:
            return self
        require_classes(classes, self.labels, len(self.class_names))
        return self.take([i for i, label in enumerate(self.labels) if label in classes])


class ImageFileDataset:
    """Image files decoded each time they are asked for. Satisfies `ImageDataset`.

    The fingerprint covers names, file sizes, labels, the shape and the range of values, not the
    files' contents. The constructor raises a DataError if a file does not exist.
    """

    decode: Callable[..., Tensor] | None = None  # how pictures of other kinds are read

    def __init__(self, listing: Listing, *shape: int, values: Values | None = None) -> None:
        self.values = values
        self.listing, self.names, self.class_names = listing, listing.names, listing.class_names
        self.labels = torch.tensor(listing.labels, dtype=torch.int64)
        self.spec = ImageSpec(*shape, len(self.class_names))
        facts = len(self.names), self.spec, *filter(None, [values])
        digest = hashlib.sha256(repr(facts).encode())
        for name, label in zip(self.names, listing.labels, strict=True):
            path = listing.root / name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"{show(path)}: cannot be read: {error.strerror}") from error
            digest.update(os.fsencode(name) + b"\0" + f"{size} {label}\n".encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, values = self.listing.path(index), self.values or BYTES
        image = (self.decode or decode_image)(path, self.spec, values)
        return image, self.listing.labels[index]


class ClassSubset(Subset):
    """The images of some classes, in their order; labels and number of classes stay as they are.

    Satisfies `ImageDataset`. The constructor raises a DataError if a class has no image.
    """

    def __init__(self, dataset: ImageDataset, classes: Sequence[int]) -> None:
        self.spec, self.class_names, self.values = dataset.spec, dataset.class_names, dataset.values
        num_classes = self.spec.num_classes
        require_classes(classes, dataset.labels.tolist() if num_classes else (), num_classes)
        wanted = torch.tensor(sorted(set(classes)))
        indices = torch.isin(dataset.labels, wanted).nonzero()[:, 0]
        super().__init__(dataset, indices.tolist())
        self.labels = dataset.labels[indices]
        if hasattr(dataset, "listing"):  # of files, for messages
            self.listing = dataset.listing.take(self.indices)
            self.names = self.listing.names
        text = f"{dataset.fingerprint} {wanted.tolist()}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()


def require_classes(classes: Iterable[int], labels: Iterable[int], num_classes: int) -> None:
    """Raise a DataError if one of `classes` is not among the `labels` of the images."""
    present = set(labels)
    if absent := sorted(set(classes) - present):
        raise DataError(
            f"classes={list(classes)}: the data has no image of {absent}; it has images of "
            f"{len(present)} of {num_classes} classes"
        )
