"""Some classes of a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from datasets.base import ImageDataset
from utils.errors import DataError


def require_classes(classes: Iterable[int], labels: Iterable[int], num_classes: int) -> None:
    """
    Raises:
        DataError: there is a class without any label.
    """
    present = set(labels)
    if absent := sorted(set(classes) - present):
        raise DataError(
            f"classes={list(classes)}: the data has no image of {absent}; it has images of "
            f"{len(present)} of {num_classes} classes"
        )


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
