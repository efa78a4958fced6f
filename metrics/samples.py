"""Generated images on disk while an evaluation runs, so that an interrupted one goes on.

Files hold contiguous global indices, whoever drew them: a run continues on any number of processes
and with any batch size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metrics.scoring import Batches
from utils.images import save_image

FILE_NAME = re.compile(r"images_(\d{8})_(\d{8})\.npy")

Draw = Callable[[range], Iterator[Tensor]]  # global indices -> their images, batch by batch


def sample_key(settings: Mapping[str, Any]) -> str:
    """12 hex digits that change with anything the images depend on."""
    content = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


class SampleStore:
    """uint8 images (C, H, W) by global index in one folder.

    Args:
        folder: its name should hold the `sample_key`; made with the first image.
        shape: (C, H, W); files of another shape are left alone and not read.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.folder = folder
        self.shape = tuple(shape)

    def runs(self, share: range) -> list[tuple[range, Path | None]]:
        """`share` cut into contiguous runs, each with the file that holds it, or None."""
        found = self._files()
        runs, start = [], share.start
        while start < share.stop:
            here = [(held, path) for held, path in found if held.start <= start < held.stop]
            if here:
                held, path = max(here, key=lambda item: item[0].stop)
                stop = min(held.stop, share.stop)
            else:
                path = None
                stop = min([held.start for held, _ in found if held.start > start] + [share.stop])
            stop = min(stop, share.stop)
            runs.append((range(start, stop), path))
            start = stop
        return runs

    def _files(self) -> list[tuple[range, Path]]:
        if not self.folder.is_dir():
            return []
        names = ((FILE_NAME.fullmatch(path.name), path) for path in sorted(self.folder.iterdir()))
        found = [(range(int(m[1]), int(m[2])), path) for m, path in names if m]
        return [(held, path) for held, path in found if self._fits(held, path)]

    def _fits(self, held: range, path: Path) -> bool:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError):
            return False
        return array.shape == (len(held), *self.shape) and array.dtype == np.uint8

    def read(self, indices: range, path: Path) -> Tensor:
        first = int(FILE_NAME.fullmatch(path.name)[1])
        array = np.load(path, allow_pickle=False)
        return torch.from_numpy(array[indices.start - first : indices.stop - first])

    def write(self, start: int, images: Tensor) -> None:
        """Store images (b, C, H, W) of the indices from `start` on; all of them or none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"images_{start:08d}_{start + len(images):08d}.npy"
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                np.save(file, images.numpy())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self) -> None:
        """The images, and the folder if nothing else is in it."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if FILE_NAME.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()


def resumed(
    store: SampleStore,
    share: range,
    labels: Sequence[int] | None,
    draw: Draw,
    warn: Callable[[str], None],
) -> Iterator[tuple[Tensor, list[int] | None, None]]:
    """The images of `share` with their labels, in order: stored ones read, the others drawn and
    stored. A disk that refuses is told about once; the images still go on."""
    writable = True
    for indices, path in store.runs(share):
        parts = [store.read(indices, path)] if path is not None else draw(indices)
        start = indices.start
        for images in parts:
            stop = start + len(images)
            if path is None and writable:
                try:
                    store.write(start, images)
                except OSError as error:
                    writable = False
                    warn(f"images are not kept for a restart: {error}")
            yield images, None if labels is None else list(labels[start:stop]), None
            start = stop


def save_batches(
    batches: Batches, folder: Path, start: int, warn: Callable[[str], None]
) -> Iterator[tuple[Tensor, list[int] | None, Any]]:
    """Pass `batches` on, writing image `start + i` of them as `folder`/000000.png ...

    A disk that refuses is told about once; the images still go on.
    """
    writable = True
    for images, labels, seeds in batches:
        for i, image in enumerate(images, start):
            try:
                if writable:
                    save_image(folder / f"{i:06d}.png", image)
            except OSError as error:
                writable = False
                warn(f"images from {i:06d}.png on are not saved: {error}")
        start += len(images)
        yield images, labels, seeds
