"""The images of a config's data set by index, as evaluation takes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from datasets import build_dataset, has_test_split
from datasets.conditions import planes_at
from datasets.loader import image_batches
from datasets.storage import ImageDataset
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import DataError
from utils.rng import EvaluationDraw, fixed_subset

log = logging.getLogger("diffusion")


@dataclass(frozen=True)
class RealImages:
    """Real images of a data set by index."""

    dataset: ImageDataset
    indices: Sequence[int]  # those to compare with, sorted; normally all N
    split: str
    batch_size: int  # of what `fetch` yields
    num_workers: int
    planes: Callable[..., Tensor] | None = None  # of the conditions, see `planes_at`

    def fetch(self, indices: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (b, C, H, W) and labels (b,) at `indices`, batch by batch, in the given order."""
        return image_batches(self.dataset, indices, self.batch_size, num_workers=self.num_workers)

    def share(self, runtime: Runtime) -> Sequence[int]:
        """This process's part of `indices`."""
        part = runtime.share(len(self.indices))
        return self.indices[part.start : part.stop]

    def at(self, places: Iterable[int]) -> list[int]:
        """The indices at these places of `indices`; behind the last comes the first again, as more
        images may be drawn from real ones than there are."""
        return [self.indices[place % len(self.indices)] for place in places]

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (len(indices), C, H, W) and labels, all in memory."""
        return tuple(map(torch.cat, zip(*self.fetch(indices), strict=True)))


class RealSets(NamedTuple):
    """The real images by their part in an evaluation; `reference` may be one of the others."""

    reference: RealImages  # to compare with
    train: RealImages  # seen in training: copies are looked for here, classifiers are trained
    test: RealImages | None = None  # not seen by either, if there are any


def chosen_images(num_images: int, limit: int | None) -> Sequence[int]:
    """The indices of all images, or of `limit` of them, always the same ones, ascending."""
    if limit is None:
        return range(num_images)
    return fixed_subset(num_images, limit, EvaluationDraw.REAL_IMAGES).tolist()


def real_sets(
    config: Config,
    runtime: Runtime,
    batch_size: int,
    *,
    split: str = "train",
    limit: int | None = None,
) -> RealSets:
    """The train and test images. To be called on every process.

    Raises a DataError if there are no train images, or none of `split`.

    Args:
        split: of the images to compare with.
        limit: how many of them, drawn with a fixed seed; None: all.
    """

    def images_of(name: str) -> RealImages:
        with runtime.main_first():  # it may download
            dataset = build_dataset(config, name)
        indices = chosen_images(len(dataset), limit if name == split else None)
        planes = config.condition and partial(planes_at, config, dataset)
        return RealImages(dataset, indices, name, batch_size, config.num_workers, planes)

    train, test = images_of("train"), None
    try:
        if split == "test" or has_test_split(config):
            test = images_of("test")
    except DataError as error:
        if split == "test":
            raise
        log.warning("the test split cannot be used: %s", error)
    return RealSets(test if split == "test" else train, train, test)
