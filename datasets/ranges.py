"""Which values of the files of a data set become -1 and 1."""

from __future__ import annotations

import logging
from pathlib import Path

from datasets.bad_images import map_images
from datasets.decoding import ARRAYS, array_file, value_type
from datasets.remarks import FileRange, range_of
from datasets.storage import Listing
from utils.config import Config
from utils.errors import DataError, show
from utils.images import Values

log = logging.getLogger("diffusion")


def read_range(
    path: Path, channels: int, dtype: str | None, given: tuple[float, float] | None = None
) -> FileRange:
    """The range of an array file, of this type if one is given, and what lies outside a given one.
    Raises what `decode_image` does."""
    with array_file(path, channels, dtype) as header:
        return range_of(header.read(), given)


def with_range(config: Config, values: Values | None) -> Config:
    """The config whose `value_range` is that of these values, which are not measured again."""
    return config.model_copy(update={"value_range": values and values[1:]})


def values_of(config: Config, first: Path, train: Listing) -> Values | None:
    """The type of the file `first`, with `value_range` or the range that all `train` images have,
    which is measured and told; None for 8-bit images. Raises a DataError for a broken one, a range
    that is none, and a `value_range` for 8-bit images, which is 0 to 255."""
    channels = config.image_channels or 3
    dtype, given = value_type(first, channels), config.value_range
    if dtype == "uint8":
        if given is not None:
            fault = f"value_range={list(given)} is for other types ({ARRAYS}); leave it out"
            raise DataError(f"{show(first)}: has 8-bit values, 0 to 255; {fault}")
        return None
    if given is not None:
        return Values(dtype, *given)
    count, total = len(train.names), None

    def measure(i: int) -> FileRange:
        return read_range(train.path(i), channels, dtype)

    for part in map_images(measure, count, "measuring values"):
        if isinstance(part, DataError):
            raise part
        total = part.merged(total)
    low, high, *_ = total
    if low == high:
        raise DataError(f"{show(train.root)}: all values of its {count} train images are {low:g}")
    log.info("value_range=%r,%r: measured on %d train images of %s", low, high, count, dtype)
    return Values(dtype, low, high)
