"""Which images of a listing can be used, and what takes the place of the others (`on_bad_image`).

Under `error` only the header of each file is read before training; a file whose pixels turn out to
be broken stops it later. Under `skip` every image is decoded once before training: so what is
replaced is known, counted and part of the data set's fingerprint before the first step, and the
same in all processes and after a restart. Nothing is kept of the decoded pixels.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from datasets.base import ImageSpec
from datasets.decoding import BadImageError, decode_image, read_size, show
from datasets.storage import Listing
from utils.errors import DataError

THREADS = 8  # opening files waits for the disk or the network, not for Python
FILES_PER_TASK = 64
MAX_NAMED = 10  # files named in one message

T = TypeVar("T")

log = logging.getLogger("diffusion")


def max_bad(num_images: int) -> int:
    """How many images `on_bad_image="skip"` replaces: 1 % of the data set, and at least one."""
    return max(1, num_images // 100)


def map_files(function: Callable[[int], T], num_files: int) -> Iterator[T]:
    """`function(i)` of every index, in order, computed by threads."""

    def some(start: int) -> list[T]:
        return [function(i) for i in range(start, min(start + FILES_PER_TASK, num_files))]

    pool = ThreadPoolExecutor(THREADS)
    try:
        for results in pool.map(some, range(0, num_files, FILES_PER_TASK)):
            yield from results
    finally:
        pool.shutdown(cancel_futures=True)


def progress_bar(num_files: int, description: str) -> tqdm:
    """A bar over files on the terminal of the main process."""
    shown = log.isEnabledFor(logging.INFO) and sys.stderr.isatty()
    return tqdm(total=num_files, desc=description, unit="image", leave=False, disable=not shown)


def read_sizes(listing: Listing) -> list[tuple[int, int]]:
    """(height, width) of every image, from the headers.

    Raises:
        DataError: some are no images, broken or too large; all are named (at most ten).
    """

    def size_or_error(index: int) -> tuple[int, int] | DataError:
        try:
            return read_size(listing.path(index))
        except DataError as error:
            return error

    results = list(map_files(size_or_error, len(listing.names)))
    errors = {i: result for i, result in enumerate(results) if isinstance(result, DataError)}
    if errors:
        raise DataError(summary_of(listing, errors))
    return results


def summary_of(listing: Listing, errors: dict[int, DataError]) -> str:
    """The first error in full, and the names of the other files, up to `MAX_NAMED` in all."""
    first, *others = errors.items()
    if not others:
        return str(first[1])
    return f"{first[1]} (bad too, {len(errors)} in all: {names_of(listing, dict(others), 1)})"


def names_of(listing: Listing, indices: dict[int, DataError], num_named: int = 0) -> str:
    shown = [show(listing.names[i]) for i in list(indices)[: MAX_NAMED - num_named]]
    return ", ".join(shown) + (", ..." if len(indices) > len(shown) else "")


def decoding_error(
    path: Path, image_size: tuple[int, int] | None, channels: int
) -> BadImageError | None:
    """Why the image cannot be decoded as training would decode it; None if it can.

    Args:
        image_size: (height, width); None: its own.

    Raises:
        DataError: the file cannot be read at all.
    """
    try:
        decode_image(path, ImageSpec(channels, *(image_size or read_size(path)), 0))
    except BadImageError as error:
        return error
    return None


def find_bad_images(
    listing: Listing, image_size: tuple[int, int] | None, channels: int
) -> dict[int, BadImageError]:
    """Index -> `decoding_error` of every image that has one.

    Raises:
        DataError: a file cannot be read at all.
    """
    bad = {}
    with progress_bar(len(listing.names), "looking for broken images") as bar:
        errors = map_files(
            lambda i: decoding_error(listing.path(i), image_size, channels), len(listing.names)
        )
        for index, error in enumerate(errors):
            if error is not None:
                bad[index] = error
            bar.update()
    return bad


def replace_bad_images(
    listing: Listing, image_size: tuple[int, int] | None, channels: int
) -> Listing:
    """The listing where the next good image, with its own label, stands for each bad one.

    So the number of images and the places of the good ones do not change, and with them neither
    the order of training. One warning names what was replaced.

    Raises:
        DataError: more than `max_bad` are bad, or all images of a class.
    """
    log.info("on_bad_image=skip: decoding %d images once", len(listing.names))
    bad = find_bad_images(listing, image_size, channels)
    if not bad:
        return listing
    check_bad_images(listing, bad)
    source = next_good([i in bad for i in range(len(listing.names))])
    log.warning(
        "on_bad_image=skip: %d of %d images in %s cannot be decoded, the next good one takes the "
        "place of each: %s",
        len(bad),
        len(listing.names),
        show(listing.root),
        names_of(listing, bad),
    )
    return listing._replace(
        names=[listing.names[i] for i in source], labels=[listing.labels[i] for i in source]
    )


def check_bad_images(listing: Listing, bad: dict[int, BadImageError]) -> None:
    """
    Raises:
        DataError: see `replace_bad_images`.
    """
    count, limit = len(listing.names), max_bad(len(listing.names))
    if len(bad) > limit or len(bad) == count:
        raise DataError(
            f"{show(listing.root)}: {len(bad)} of {count} images cannot be decoded, "
            f"on_bad_image='skip' replaces {min(limit, count - 1)} at most (1 %): "
            f"{summary_of(listing, bad)}"
        )
    good_labels = {label for i, label in enumerate(listing.labels) if i not in bad}
    for index, error in bad.items():
        if listing.labels[index] not in good_labels:
            name = listing.class_names[listing.labels[index]]
            raise DataError(f"class {show(name)} has no image that can be decoded: {error}")


def next_good(is_bad: Sequence[bool]) -> list[int]:
    """For each index itself if it is good, else the next good one, the first following the last."""
    good = np.flatnonzero(~np.asarray(is_bad))
    place = np.searchsorted(good, np.arange(len(is_bad)))
    return good[place % len(good)].tolist()
