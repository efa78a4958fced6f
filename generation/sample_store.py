"""Generated images on disk: while they wait to be scored, and as pictures for the user."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.checkpoint import has_its_checksum, save_checked
from utils.images import Values, image_suffix, save_image, to_file
from utils.labels import forget_labels

# A file is named by the index of its first image, and by that of its last image + 1.
FILES = f"images_{'[0-9]' * 8}_{'[0-9]' * 8}.npy"

log = logging.getLogger("diffusion")


def resumed(
    folder: Path,
    shape: tuple[int, ...],
    share: range,
    draw: Callable[[range], Iterable[Tensor]],
    *,
    show_progress: bool = False,
) -> Iterator[Tensor]:
    """The images of `share` in order: those in `folder` are read, the others drawn and kept there.

    So an interrupted evaluation goes on, with any number of processes and any batch size. Files
    that are torn, or hold images of another shape or type, are left alone and not read.

    Args:
        shape: (C, H, W) of one image.
        share: global indices of the images.
        draw: makes the images of a range of indices, (b, C, H, W), batch by batch.
    """
    stored = {}  # index of an image -> the file that holds it, and the first index in there
    for path in sorted(folder.glob(FILES)):
        first, stop = map(int, path.stem.split("_")[1:])
        if stop <= share.start or share.stop <= first:
            continue  # another process reads it
        with contextlib.suppress(OSError, EOFError, ValueError):
            array = np.load(path, mmap_mode="r")
            if array.shape != (stop - first, *shape) or array.dtype not in (np.uint8, np.float32):
                continue
            if has_its_checksum(path):
                stored |= dict.fromkeys(range(first, stop), (path, first))
            else:
                log.info("%s is damaged, or has no checksum: its images are drawn again", path)
    if there := sum(index in stored for index in share):
        log.info("%d of %d images are there already: %s", there, len(share), folder)

    def read_or_drawn() -> Iterator[Tensor]:
        for file, run in groupby(share, stored.get):
            indices = list(run)
            if file is None:
                yield from draw(range(indices[0], indices[-1] + 1))
            else:
                path, first = file
                yield torch.from_numpy(np.load(path)[[index - first for index in indices]])

    def keep(start: int, images: Tensor) -> None:
        if start not in stored:
            path = folder / f"images_{start:08d}_{start + len(images):08d}.npy"
            save_checked(path, lambda file: (np.save(file, images.numpy()), file.write(bytes(2))))

    with tqdm(total=len(share), unit="image", disable=not show_progress) as bar:
        for images in _written(read_or_drawn(), share.start, keep, "kept for a restart"):
            yield images
            bar.update(len(images))


def remove(folder: Path) -> None:
    """Remove the images that `resumed` kept, and the folder if nothing else is in it."""
    for path in folder.glob(FILES):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def saved(
    batches: Iterable[Tensor], folder: Path, start: int, written: list[int], values: Values | None
) -> Iterator[Tensor]:
    """Pass `batches` on, writing image `start` + i of them as `folder`/000000.png ... without
    labels; `written` gets for each that is there how many of its values are clipped."""

    def save(first: int, images: Tensor) -> None:
        if first == start:
            forget_labels(folder)
        suffix = image_suffix(images.shape[1], values is None)
        for i, image in enumerate(images, first):
            held, clipped = to_file(image, values)
            save_image(folder / f"{i:06d}{suffix}", held)
            written.append(clipped)

    return _written(batches, start, save, "all saved")


def tell_clipped(count: int, values: Values | None) -> None:
    """Tell in a line how many values `to_file` has clipped, if any."""
    if count:
        log.warning("%d values lie beyond what %s holds, and were clipped", count, values.dtype)


def _written(
    batches: Iterable[Tensor], start: int, write: Callable[[int, Tensor], None], how: str
) -> Iterator[Tensor]:
    """Pass `batches` on, each after `write(index of its first image, images)`.

    A disk that refuses costs the files alone: it is told once, and the images still go on.
    """
    writable = True
    for images in batches:
        try:
            if writable:
                write(start, images)
        except OSError as error:
            writable = False
            log.warning("images from %06d on are not %s: %s", start, how, error)
        yield images
        start += len(images)
