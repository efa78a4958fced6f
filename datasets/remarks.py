"""What is odd about a data set although it can be trained on: a line each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from datasets.bad_images import map_images
from datasets.decoding import bit_depth
from datasets.storage import ImageDataset, Listing
from utils.errors import show
from utils.files import IMAGE_EXTENSIONS

MAX_KINDS = 20  # of files, in one line
ROUNDING = 1e-6
NUM_TRIED = 64  # images, of all, that are decoded to see whether they are dark


def passed_over(listing: Listing | None) -> list[str]:
    """A line on what lies there and is not used, most first, as `12 passed over: 8 .tif, ...`."""
    counts = listing.passed_over if listing else {}
    kinds = sorted(counts, key=lambda kind: (-counts[kind], kind))
    told = [f"{counts[kind]} {kind}" for kind in kinds[:MAX_KINDS]] + ["..."] * bool(
        kinds[MAX_KINDS:]
    )
    names = show(", ".join(told))
    read = f"passed over: {names} (images are read from {' '.join(IMAGE_EXTENSIONS)})"
    return [f"{sum(counts.values())} files or folders {read}"] if counts else []


class FileRange(NamedTuple):
    """The least and the largest value in files; how many are outside a range, in how many files."""

    low: float
    high: float
    num_outside: int
    num_files: int

    def merged(self, other: FileRange | None) -> FileRange:
        if other is None:
            return self
        pairs = list(zip(self, other, strict=True))
        return FileRange(min(pairs[0]), max(pairs[1]), sum(pairs[2]), sum(pairs[3]))


def range_of(array: np.ndarray, given: Sequence[float] | None = None) -> FileRange:
    """That of an array, and what lies outside of a given range."""
    low, high = given or (-np.inf, np.inf)
    outside = int(((array < low) | (array > high)).sum())
    return FileRange(float(array.min()), float(array.max()), outside, int(outside > 0))


def remarks(listing: Listing, ranges: Mapping[int | str, FileRange]) -> list[str]:
    """All lines on a listing; `ranges` are those of the files by bit depth, or of others than 8-bit
    images by type."""
    folded = Counter(name.casefold() for name in listing.class_names)
    twins = [name for name in listing.class_names if folded[name.casefold()] > 1]
    lines = passed_over(listing)
    if twins:
        lines.append(f"classes that differ in case alone: {show(', '.join(twins[:4]))}")
    for depth, part in sorted(ranges.items(), key=str):
        unused = 0 if isinstance(depth, str) else 8 - int(part.high).bit_length()
        if part.num_outside:
            count = f"{part.num_outside} values of {part.num_files} images"
            lines.append(f"{count} looked at lie outside value_range, so outside of -1 to 1")
        if unused:
            lines.append(
                f"{depth}-bit images: the upper {unused} of {depth} bits are never used, so they "
                "come out dark; scale their values to the full range"
            )
    return lines


def remarks_on(dataset: ImageDataset) -> list[str]:
    """`remarks` on images in files, some of which are decoded; nothing on others."""
    listing = getattr(dataset, "listing", None)
    if listing is None:
        return []
    tried = range(0, len(listing.names), -(-len(listing.names) // NUM_TRIED))
    ranges: dict[int | str, FileRange] = {}

    def measure(i: int) -> tuple[int | str, FileRange]:
        image, values = dataset[tried[i]][0].numpy(), dataset.values
        if values is not None:
            return values.dtype, range_of(image, (-1 - ROUNDING, 1 + ROUNDING))
        return bit_depth(listing.path(tried[i])), range_of(image)

    for result in map_images(measure, len(tried), "trying images"):
        if isinstance(result, tuple):  # a broken image stops training in its own time
            ranges[result[0]] = result[1].merged(ranges.get(result[0]))
    return remarks(listing, ranges)
