"""Generated images on disk: while they wait to be scored, and as pictures for the user.

Files of a store hold contiguous global indices, whoever drew them: an interrupted evaluation goes
on with any number of processes and any batch size.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.files import atomic_path
from utils.images import save_image
from utils.labels import save_labels

FILE_NAME = re.compile(r"images_(\d{8})_(\d{8})\.npy")

log = logging.getLogger("diffusion")


class SampleStore:
    """uint8 images (C, H, W) by global index, in the files of one folder.

    Args:
        folder: made with the first image.
        shape: (C, H, W); files of another shape are left alone and not read.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.folder = folder
        self.shape = tuple(shape)

    def resumed(self, share: range, draw: Callable[[range], Iterable[Tensor]]) -> Iterator[Tensor]:
        """The images of `share` in order: stored ones are read, the others drawn and stored.

        A disk that refuses is told about once; the images still go on.

        Args:
            draw: global indices -> their images, batch by batch.
        """
        writable = True
        for indices, path in self.runs(share):
            parts = draw(indices) if path is None else [self._read(indices, path)]
            start = indices.start
            for images in parts:
                if path is None and writable:
                    try:
                        self._write(start, images)
                    except OSError as error:
                        writable = False
                        log.warning("images are not kept for a restart: %s", error)
                yield images
                start += len(images)

    def runs(self, share: range) -> list[tuple[range, Path | None]]:
        """`share` cut into contiguous runs, each with the file that holds it, or None."""
        files = self._files()
        runs, start = [], share.start
        while start < share.stop:
            here = [(held, path) for held, path in files if held.start <= start < held.stop]
            if here:
                held, path = max(here, key=lambda item: item[0].stop)
                stop = min(held.stop, share.stop)
            else:
                ahead = (held.start for held, _ in files if held.start > start)
                path, stop = None, min([*ahead, share.stop])
            runs.append((range(start, stop), path))
            start = stop
        return runs

    def _files(self) -> list[tuple[range, Path]]:
        paths = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        names = ((FILE_NAME.fullmatch(path.name), path) for path in paths)
        held = [(range(int(m[1]), int(m[2])), path) for m, path in names if m]
        return [(indices, path) for indices, path in held if self._fits(indices, path)]

    def _fits(self, indices: range, path: Path) -> bool:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError):
            return False
        return array.shape == (len(indices), *self.shape) and array.dtype == np.uint8

    def _read(self, indices: range, path: Path) -> Tensor:
        first = int(FILE_NAME.fullmatch(path.name)[1])
        array = np.load(path, allow_pickle=False)
        return torch.from_numpy(array[indices.start - first : indices.stop - first])

    def _write(self, start: int, images: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"images_{start:08d}_{start + len(images):08d}.npy"
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, images.numpy())

    def remove(self) -> None:
        """Remove the images, and the folder if nothing else is in it."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if FILE_NAME.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()


def saved(
    batches: Iterable[Tensor], folder: Path, start: int, labels: Sequence[int] | None = None
) -> Iterator[Tensor]:
    """Pass `batches` on, writing image `start` + i of them as `folder`/000000.png ...

    A disk that refuses is told about once; the images still go on.

    Args:
        labels: the classes of all images, by global index; written to labels.json with image 0.
    """
    if labels is not None and start == 0:
        with contextlib.suppress(OSError):  # the images will say so
            save_labels(folder, labels)
    index, writable = start, True
    for images in batches:
        for i, image in enumerate(images, index):
            try:
                if writable:
                    save_image(folder / f"{i:06d}.png", image)
            except OSError as error:
                writable = False
                log.warning("images from %06d.png on are not saved: %s", i, error)
        yield images
        index += len(images)
