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
from datasets.remarks import passed_over
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import DataError
from utils.images import ImageSpec, Values
from utils.rng import EvaluationDraw, fixed_subset

log = logging.getLogger("diffusion")


@dataclass(frozen=True)
class RealImages:
    """Real images by index, wherever they come from."""

    labels: Tensor  # (N,) int64; all 0 when unlabelled
    indices: Sequence[int]  # those to compare with, sorted; normally all N
    # Indices -> images (b, C, H, W) and labels (b,), batch by batch, in the given order.
    fetch: Callable[[Sequence[int]], Iterator[tuple[Tensor, Tensor]]]
    spec: ImageSpec
    fingerprint: str
    split: str = "train"
    class_names: tuple[str, ...] = ()
    passed_over: Sequence[str] = ()  # a line about what lies there too, or none
    values: Values | None = None  # of images that are floats; None: they are uint8
    planes: Callable[..., Tensor] | None = None  # of the conditions, see `planes_at`

    @property
    def num_classes(self) -> int:
        return self.spec.num_classes

    def share(self, runtime: Runtime) -> Sequence[int]:
        """This process's part of `indices`."""
        part = runtime.share(len(self.indices))
        return self.indices[part.start : part.stop]

    def paired(self, places: Iterable[int]) -> list[int]:
        """The index of the image for each generated one; behind the last comes the first again."""
        return [self.indices[place % len(self.indices)] for place in places]

    def load(self, indices: Sequence[int]) -> Tensor:
        """Images (len(indices), C, H, W), all in memory."""
        return torch.cat([images for images, _ in self.fetch(indices)])


class RealSets(NamedTuple):
    """The real images by their part in an evaluation; `reference` may be one of the others."""

    reference: RealImages  # to compare with
    train: RealImages  # seen in training: copies are looked for here, classifiers are trained
    test: RealImages | None = None  # not seen by either, if there are any


def chosen_images(num_images: int, limit: int | None) -> Sequence[int]:
    """The indices of all images, or of `limit` of them, always the same ones, ascending."""
    if limit is None or limit >= num_images:
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
        return RealImages(
            labels=dataset.labels.cpu(),
            indices=chosen_images(len(dataset), limit if name == split else None),
            fetch=partial(
                image_batches, dataset, batch_size=batch_size, num_workers=config.num_workers
            ),
            spec=dataset.spec,
            fingerprint=dataset.fingerprint,
            split=name,
            class_names=tuple(dataset.class_names),
            passed_over=passed_over(getattr(dataset, "listing", None)),
            values=dataset.values,
            planes=config.condition and partial(planes_at, config, dataset),
        )

    train, test = images_of("train"), None
    try:
        if split == "test" or has_test_split(config):
            test = images_of("test")
    except DataError as error:
        if split == "test":
            raise
        log.warning("the test split cannot be used: %s", error)
    return RealSets(test if split == "test" else train, train, test)
