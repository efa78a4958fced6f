"""What is odd about a data set although it can be trained on: a line each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

from datasets.bad_images import map_images
from datasets.decoding import bit_depth
from datasets.storage import ImageDataset, Listing
from utils.errors import show
from utils.files import ARRAY_EXTENSIONS, PICTURE_EXTENSIONS

MAX_KINDS = 20  # of files, in one line
ARRAY = 32  # bits: a float in memory, whatever the files hold
NUM_TRIED = 64  # images, of all, that are decoded to see whether they are dark


def passed_over(listing: Listing | None) -> list[str]:
    """A line on what lies there and is not used, most first, as `12 passed over: 8 .tif, ...`."""
    counts = listing.passed_over if listing else {}
    kinds = sorted(counts, key=lambda kind: (-counts[kind], kind))
    told = [f"{counts[kind]} {kind}" for kind in kinds[:MAX_KINDS]]
    names = show(", ".join(told + ["..."] * (len(kinds) > MAX_KINDS)))
    kinds = f"{' '.join(PICTURE_EXTENSIONS)}, or without these {' '.join(ARRAY_EXTENSIONS)}"
    read = f"passed over: {names} (images are read from {kinds})"
    return [f"{sum(counts.values())} files or folders {read}"] if counts else []


def extent(image: Tensor, given: Sequence[float] | None) -> tuple[float, float, int]:
    """The least and the largest value of an image, and how many lie outside a given range."""
    low, high = given or (image.min(), image.max())
    return image.min().item(), image.max().item(), int(((image < low) | (image > high)).sum())


def remarks(listing: Listing, extents: Mapping[int, list[tuple]]) -> list[str]:
    """All lines on a listing; `extents` are those of images, by bit depth or `ARRAY`."""
    folded = Counter(name.casefold() for name in listing.class_names)
    twins = [name for name in listing.class_names if folded[name.casefold()] > 1]
    lines = passed_over(listing)
    if twins:
        lines.append(f"classes that differ in case alone: {show(', '.join(twins[:4]))}")
    for depth, parts in sorted(extents.items()):
        lows, highs, outside = zip(*parts, strict=True)
        if count := sum(map(bool, outside)):
            which = f"{sum(outside)} values in {count} of {len(parts)} images leave value_range"
            lines.append(f"{which}: the least is {min(lows):g}, the largest {max(highs):g}")
        if depth != ARRAY and (unused := 8 - max(highs).bit_length()):
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
    values, extents = dataset.values, {}

    def measure(i: int) -> tuple[int, tuple]:
        kind = ARRAY if values else bit_depth(listing.path(tried[i]))
        return kind, extent(dataset[tried[i]][0], values and (-1 - 1e-6, 1 + 1e-6))

    for result in map_images(measure, len(tried), "trying images"):
        if isinstance(result, tuple):  # a broken image stops training in its own time
            extents.setdefault(result[0], []).append(result[1])
    return remarks(listing, extents)
