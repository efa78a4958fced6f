"""Which images of a listing can be used, and what takes the place of the others (`on_bad_image`).

Under `error` only the header of each file is read before training; a file whose pixels turn out to
be broken stops it later. Under `skip` every image is decoded once before training: so what is
replaced is known, counted and part of the data set's fingerprint before the first step, and the
same in all processes and after a restart. Nothing is kept of the decoded pixels.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from datasets.decoding import BadImageError, decode_image, is_array, opened, read_size, type_of
from datasets.packed import ImagePath
from datasets.storage import Listing
from utils.config import Config
from utils.errors import DataError, show
from utils.images import ImageSpec, Values, is_range

THREADS = 8  # opening files waits for the disk or the network, not for Python
NUM_QUEUED = 4096  # images that may wait for a thread, or as results; the data set may be large
MAX_NAMED = 10  # files named in one message

T = TypeVar("T")

log = logging.getLogger("diffusion")


def max_bad(num_images: int) -> int:
    """How many images `on_bad_image="skip"` replaces: 1 % of the data set, and at least one."""
    return max(1, num_images // 100)


def map_images(
    function: Callable[[int], T], num_images: int, description: str
) -> Iterator[T | DataError]:
    """Yield `function(index)`, or the `DataError` it raised, of every image in order.

    Threads compute it. The main process shows a progress bar of that description on a terminal.
    """

    def attempt(index: int) -> T | DataError:
        try:
            return function(index)
        except DataError as error:
            return error

    hidden = not (log.isEnabledFor(logging.INFO) and sys.stderr.isatty())
    starts = range(0, num_images, NUM_QUEUED)
    parts = (range(start, min(start + NUM_QUEUED, num_images)) for start in starts)
    with ThreadPoolExecutor(THREADS) as pool:
        results = chain.from_iterable(pool.map(attempt, part) for part in parts)
        yield from tqdm(results, description, num_images, leave=False, disable=hidden)


@functools.lru_cache(maxsize=4)
def values_of(
    root: ImagePath, names: tuple[str, ...], spec: ImageSpec, given: tuple[float, float] | None
) -> Values | None:
    """What -1 and 1 stand for: the `given` values, or the least and the largest of these images,
    which are read for it once; None for 8-bit images. Raises a DataError for a range of none."""
    first, dtype = root / names[0], "uint8"
    if is_array(first):
        with opened(first, spec.channels, True) as header:
            dtype = type_of(header, first)
    if dtype == "uint8":
        if given is not None:
            raise DataError(f"{show(first)}: value_range={list(given)}, but 8 bits are 0 to 255")
        return None
    if given is None:
        decode = partial(decode_image, spec=spec, values=Values(dtype, -1, 1))
        given = np.inf, -np.inf
        for image in map_images(lambda i: decode(root / names[i]), len(names), "measuring values"):
            if isinstance(image, DataError):
                raise image
            given = min(given[0], image.min().item()), max(given[1], image.max().item())
        log.info("value_range=%r,%r: measured on %d images, %s", *given, len(names), dtype)
    if not is_range(*given):
        raise DataError("{}: no value_range goes from {:g} to {:g}".format(show(root), *given))
    return Values(dtype, *given)


def read_sizes(listing: Listing, channels: int, dtype: str | None = None) -> list[tuple[int, int]]:
    """(height, width) of every image, from the files' headers, which must be of that type.

    Raises a DataError that names at most ten files, if some are no images, broken or too large.
    """
    count = len(listing.names)
    results = [*map_images(lambda i: read_size(listing.path(i), channels, dtype), count, "sizes")]
    errors = {i: result for i, result in enumerate(results) if isinstance(result, DataError)}
    if errors:
        raise DataError(_summary(listing, errors))
    return results


def try_decoding(config: Config, listing: Listing, index: int) -> None:
    """Decode image `index` as the config asks for it, see `decode_image` for what it raises."""
    path, channels = listing.path(index), config.image_channels or 3
    size = config.image_size or read_size(path, channels)
    decode_image(path, ImageSpec(channels, *size, 0))


def replace_bad_images(config: Config, listing: Listing) -> Listing:
    """The listing where, under `skip`, the next good image and its label stand for each bad one.

    So the number of images and the places of the good ones do not change, and with them neither
    the order of training. One warning names what was replaced. Raises a DataError if more than
    `max_bad` are bad, or all images of a class, or if a file cannot be read.
    """
    if config.on_bad_image == "error":
        return listing
    count = len(listing.names)
    log.info("on_bad_image=skip: decoding %d images once", count)
    error_of = map_images(partial(try_decoding, config, listing), count, "looking for bad images")
    bad = {index: error for index, error in enumerate(error_of) if error is not None}
    for error in bad.values():
        if not isinstance(error, BadImageError):
            raise error
    if not bad:
        return listing
    fault = f"{show(listing.root)}: {len(bad)} of {count} images cannot be decoded"
    limit = min(max_bad(count), count - 1)
    if len(bad) > limit:
        raise DataError(
            f"{fault}, on_bad_image='skip' replaces {limit} at most (1 %): {_summary(listing, bad)}"
        )
    good_labels = {label for index, label in enumerate(listing.labels) if index not in bad}
    for index, error in bad.items():
        if listing.labels[index] not in good_labels:
            name = listing.class_names[listing.labels[index]]
            raise DataError(f"class {show(name)} has no image that can be decoded: {error}")
    taken = "the next good one takes the place of each"
    log.warning("on_bad_image=skip: %s, %s: %s", fault, taken, _names(listing, bad))
    return listing.take(next_good([index in bad for index in range(count)]))


def next_good(is_bad: Sequence[bool]) -> list[int]:
    """Map each index to itself if it is good, else to the next good one, in a circle."""
    good = np.flatnonzero(~np.asarray(is_bad))
    place = np.searchsorted(good, np.arange(len(is_bad)))
    return good[place % len(good)].tolist()


def _summary(listing: Listing, errors: dict[int, DataError]) -> str:
    """The first error in full and, if there are several, the names of the files."""
    more = f" ({len(errors)} are bad: {_names(listing, errors)})" if len(errors) > 1 else ""
    return f"{next(iter(errors.values()))}{more}"


def _names(listing: Listing, indices: Iterable[int]) -> str:
    names = [show(listing.names[index]) for index in indices]
    return ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
