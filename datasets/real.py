"""The images of a config's data set, as the metrics take them."""

from __future__ import annotations

import logging

from datasets import build_dataset, has_test_split
from datasets.loader import image_batches
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import DataError
from utils.real_images import RealImages, RealSets, choose_indices

log = logging.getLogger("diffusion")


def real_sets(
    config: Config,
    runtime: Runtime,
    batch_size: int,
    *,
    split: str = "train",
    limit: int | None = None,
) -> RealSets:
    """The train and test images. To be called on every process.

    Args:
        split: of the images to compare with.
        limit: how many of them, drawn with a fixed seed; None: all.

    Raises:
        DataError: there are no train images, or none of `split`.
    """
    limits = {"train": None, "test": None, split: limit}

    def images_of(split: str) -> RealImages:
        with runtime.main_first():  # it may download
            data = build_dataset(config, split)
        return RealImages(
            labels=data.labels.cpu(),
            indices=choose_indices(len(data), limits[split]),
            fetch=lambda indices: image_batches(
                data, indices, batch_size, num_workers=config.num_workers
            ),
            spec=data.spec,
            fingerprint=data.fingerprint,
            split=split,
            class_names=tuple(data.class_names),
        )

    train = images_of("train")
    if split == "test":
        test = images_of("test")
        return RealSets(test, train, test)
    try:
        test = images_of("test") if has_test_split(config) else None
    except DataError as error:
        log.warning("the test split cannot be used: %s", error)
        test = None
    return RealSets(train, train, test)
