"""Pictures for the report: generated images, a row per class, as the scorers see them pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metrics.scoring import Entry, RealImages
from utils.distributed import Runtime
from utils.images import grid_rows, make_grid

MAX_IMAGES = 100
MAX_CLASSES = 20


class Gallery:
    """Keeps a few generated images (see `metrics.scoring.Scorer`); computes nothing.

    Args:
        labels: of the generated images by global index, or None.
        shape: (C, H, W) of one image.
    """

    names = ()

    def __init__(
        self, *, num_images: int, labels: Sequence[int] | None, shape: tuple[int, int, int]
    ) -> None:
        self.shape = shape
        self.chosen = _choose(num_images, labels)
        self.labels = None if labels is None else [labels[i] for i in self.chosen]
        self.places = {index: place for place, index in enumerate(self.chosen)}
        self.clear()

    def clear(self) -> None:
        self.images = torch.zeros((len(self.chosen), *self.shape), dtype=torch.uint8)

    def see_real(self, real: RealImages | None, runtime: Runtime) -> None:
        pass

    def reduce_real(self, runtime: Runtime) -> None:
        pass

    def see_generated(self, images: Tensor, labels: list[int] | None, indices: range) -> None:
        for i, index in enumerate(indices):
            if index in self.places:
                self.images[self.places[index]] = images[i]

    def reduce_generated(self, runtime: Runtime) -> None:
        runtime.all_reduce(self.images)  # each row is zero on all processes but one

    def results(self) -> dict[str, Entry]:
        return {}

    def grid(self) -> Tensor:
        """uint8 (C, H', W'): a row per class where there are classes."""
        return make_grid(self.images, grid_rows(len(self.images), self.labels))


def _choose(num_images: int, labels: Sequence[int] | None) -> list[int]:
    """Indices of the pictures: the first of every class, or the first ones."""
    if labels is None:
        return list(range(min(num_images, MAX_IMAGES)))
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    classes = sorted(by_class)[:MAX_CLASSES]
    per_class = max(1, MAX_IMAGES // len(classes))
    return [index for label in classes for index in by_class[label][:per_class]]
