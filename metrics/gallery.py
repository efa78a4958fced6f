"""Some of the images, such as those that the report shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from metrics.base import Collector, Context
from reporting.pages import Picture
from utils.distributed import Runtime
from utils.images import as_pictures, grid_rows, make_grid, to_array

MAX_IMAGES = 100
MAX_CLASSES = 20


class ChosenImages(Collector):
    """Keeps the images with the `chosen` global indices, which ascend, for the main process.

    After `reduce` they are in `values`, on the CPU: (len(chosen), C, H, W).
    """

    def __init__(self, chosen: Sequence[int] | np.ndarray) -> None:
        self.chosen = torch.as_tensor(chosen, dtype=torch.int64)
        self.reset()

    def reset(self) -> None:
        self.parts: list[Tensor] = []
        self.values = torch.zeros(0)

    def update(self, images: Tensor, indices: range) -> None:
        bounds = torch.tensor([indices.start, indices.stop])
        first, stop = torch.searchsorted(self.chosen, bounds).tolist()
        self.parts.append(images[self.chosen[first:stop] - indices.start].cpu())

    def reduce(self, runtime: Runtime) -> None:
        parts = [part for share in runtime.gather_objects(self.parts) for part in share]
        self.values = torch.cat(parts) if parts else torch.zeros(0)
        self.parts = []


class Gallery(ChosenImages):
    """Keeps the first generated images, of every class if there are classes, to be shown."""

    def __init__(self, context: Context) -> None:
        labels, self.shown = context.generated.labels, context.generated.shown
        super().__init__(first_images(context.generated.num_images, labels))
        self.labels = None if labels is None else [labels[i] for i in self.chosen.tolist()]

    def pictures(self) -> dict[str, Picture]:
        """A grid of the images, if any were drawn, with a row per class where there are classes."""
        images, labels = self.values, None
        if not len(images):
            return {}
        if self.labels is not None:
            order = sorted(range(len(images)), key=self.labels.__getitem__)  # stable
            images, labels = images[order], [self.labels[i] for i in order]
        grid = make_grid(as_pictures(images, self.shown), grid_rows(len(images), labels))
        return {"samples": Picture(to_array(grid), "Samples", "A row per class, if any.")}


def first_images(num_images: int, labels: Sequence[int] | None) -> list[int]:
    """The ascending indices of the first images of every class; without classes, the first ones."""
    if labels is None:
        return list(range(min(num_images, MAX_IMAGES)))
    labels = torch.tensor(labels)
    classes = labels.unique()[:MAX_CLASSES]
    per_class = max(1, MAX_IMAGES // len(classes))
    return sorted(i for k in classes for i in (labels == k).nonzero()[:per_class, 0].tolist())
