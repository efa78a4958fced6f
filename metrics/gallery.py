"""Pictures for the report: generated images, a row per class, kept while the metrics see them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from metrics.base import Collector, Context
from metrics.rows import KeptRows
from reporting.html import Picture
from utils.distributed import Runtime
from utils.images import grid_rows, make_grid, to_array

MAX_IMAGES = 100
MAX_CLASSES = 20


class Gallery(Collector):
    """Keeps a few generated images; no metric is computed from it."""

    def __init__(self, context: Context) -> None:
        labels = context.generated.labels
        chosen = first_images(context.generated.num_images, labels)
        self.labels = None if labels is None else [labels[i] for i in chosen]
        self.images = KeptRows(chosen)

    def reset(self) -> None:
        self.images.reset()

    def update(self, images: Tensor, indices: range) -> None:
        self.images.update(images, indices)

    def reduce(self, runtime: Runtime) -> None:
        self.images.reduce(runtime)

    def pictures(self) -> dict[str, Picture]:
        """A grid of the images, if any were drawn, with a row per class where there are classes."""
        images, labels = self.images.values, None
        if not len(images):
            return {}
        if self.labels is not None:
            order = sorted(range(len(images)), key=self.labels.__getitem__)  # stable
            images, labels = images[order], [self.labels[i] for i in order]
        grid = make_grid(images, grid_rows(len(images), labels))
        return {"samples": Picture(to_array(grid), "Samples", "A row per class, if any.")}


def first_images(num_images: int, labels: Sequence[int] | None) -> list[int]:
    """The ascending indices of the first images of every class; without classes, the first ones."""
    if labels is None:
        return list(range(min(num_images, MAX_IMAGES)))
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    classes = sorted(by_class)[:MAX_CLASSES]
    per_class = max(1, MAX_IMAGES // len(classes))
    return sorted(index for label in classes for index in by_class[label][:per_class])
