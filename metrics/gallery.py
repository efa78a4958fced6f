"""Pictures for the report: generated images, a row per class, as the scorers see them pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from datasets.real import RealSets
from metrics.rows import KeptRows
from metrics.scoring import Entry
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
        chosen = _choose(num_images, labels)
        self.labels = None if labels is None else [labels[i] for i in chosen]
        self.images = KeptRows(chosen, shape, torch.uint8)

    def clear(self) -> None:
        self.images.clear()

    def see_real(self, real: RealSets | None, runtime: Runtime) -> None:
        pass

    def reduce_real(self, runtime: Runtime) -> None:
        pass

    def see_generated(self, images: Tensor, labels: list[int] | None, indices: range) -> None:
        self.images.put(images, indices)

    def reduce_generated(self, runtime: Runtime) -> None:
        self.images.all_reduce(runtime)

    def results(self) -> dict[str, Entry]:
        return {}

    def grid(self) -> Tensor:
        """uint8 (C, H', W'): a row per class where there are classes."""
        if self.labels is None:
            return make_grid(self.images.values, grid_rows(len(self.images.values)))
        order = sorted(range(len(self.labels)), key=self.labels.__getitem__)  # stable
        rows = grid_rows(len(order), [self.labels[i] for i in order])
        return make_grid(self.images.values[order], rows)


def _choose(num_images: int, labels: Sequence[int] | None) -> list[int]:
    """Indices of the pictures: the first of every class, or the first ones."""
    if labels is None:
        return list(range(min(num_images, MAX_IMAGES)))
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    classes = sorted(by_class)[:MAX_CLASSES]
    per_class = max(1, MAX_IMAGES // len(classes))
    return sorted(index for label in classes for index in by_class[label][:per_class])
