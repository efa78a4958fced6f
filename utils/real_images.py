"""Real images by index: how the data sets hand them to the metrics, neither knowing the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from utils.distributed import Runtime
from utils.images import ImageSpec
from utils.rng import Stream, numpy_generator


@dataclass(frozen=True)
class RealImages:
    """Real images by index, wherever they come from.

    Attributes:
        labels: (N,) int64; all 0 when unlabelled.
        indices: those to compare with, sorted; normally all N.
        fetch: indices -> uint8 (b, C, H, W) and labels (b,), batch by batch, in the given order.
    """

    labels: Tensor
    indices: Sequence[int]
    fetch: Callable[[Sequence[int]], Iterator[tuple[Tensor, Tensor]]]
    spec: ImageSpec
    fingerprint: str
    split: str = "train"
    class_names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return self.spec.num_classes

    def share(self, runtime: Runtime) -> Sequence[int]:
        part = runtime.share(len(self.indices))
        return self.indices[part.start : part.stop]

    def load(self, indices: Sequence[int]) -> Tensor:
        """uint8 (len(indices), C, H, W), all in memory."""
        return torch.cat([images for images, _ in self.fetch(indices)])


class RealSets(NamedTuple):
    """The real images by their part in an evaluation; `reference` may be one of the others.

    Attributes:
        reference: to compare with.
        train: what the model was trained on: copies are looked for here, classifiers are trained.
        test: what neither has seen, if there is any.
    """

    reference: RealImages
    train: RealImages
    test: RealImages | None = None


def choose_indices(num_images: int, limit: int | None) -> Sequence[int]:
    """All indices, or `limit` drawn with a fixed seed: data sets are often sorted by class."""
    if limit is None or limit >= num_images:
        return range(num_images)
    order = numpy_generator(0, Stream.EVALUATION, 4).permutation(num_images)
    return sorted(order[:limit].tolist())
