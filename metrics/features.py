"""Features of many images: on disk while they are made, by rows when a metric needs them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

PATTERN = "features_*.f32"
DTYPE = np.dtype("<f4")


class Features:
    """(N, D) features: arrays (n, D) one after another, which may be mapped files."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows(self, indices: Sequence[int] | np.ndarray | slice) -> np.ndarray:
        """(n, D) of these indices, in their order; a copy."""
        if isinstance(indices, slice):
            indices = np.arange(len(self))[indices]
        index = np.asarray(indices, dtype=np.int64)
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"rows {index.min()} to {index.max()} of {len(self)} features")
        rows = np.empty((len(index), self.parts[0].shape[1]), dtype=self.parts[0].dtype)
        for start, part in zip(self.starts, self.parts, strict=False):
            here = (index >= start) & (index < start + len(part))
            rows[here] = part[index[here] - start]
        return rows


def as_features(features: Features | np.ndarray | Tensor) -> Features:
    """Arrays and tensors (N, D) as `Features`, without a copy if on the CPU."""
    if isinstance(features, Features):
        return features
    array = features.detach().cpu().numpy() if isinstance(features, Tensor) else features
    if array.ndim != 2:
        raise ValueError(f"need features (N, D), got {array.shape}")
    return Features([array])


class FeatureStore:
    """Features of images by global index: a file per process, all processes in one folder.

    Order of a run: `clear` on the main process, barrier, `append` on each process, `close`,
    barrier, `read` on the main process. A file holds rows of `dim` little-endian float32 and is
    named by the global index of its first row.
    """

    def __init__(self, folder: Path, dim: int) -> None:
        self.folder = folder
        self.dim = dim
        self.file: BinaryIO | None = None
        self.next_index = 0

    def clear(self) -> None:
        """Remove the files of an earlier run, which may have had more processes."""
        self.close()
        for path in self.folder.glob(PATTERN):
            path.unlink()

    def append(self, features: Tensor, indices: range) -> None:
        """Write features (b, dim) of the next images of this share, with these global indices.

        The first call opens the file and replaces one of that name.
        """
        if features.shape != (len(indices), self.dim) or indices.step != 1:
            raise ValueError(f"{tuple(features.shape)} features of {indices}, D = {self.dim}")
        if not len(indices):
            return
        if self.file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = (self.folder / PATTERN.replace("*", f"{indices.start:08d}")).open("wb")
        elif indices.start != self.next_index:
            raise ValueError(f"features of {indices} come where {self.next_index} is the next")
        rows = features.detach().float().cpu().contiguous().numpy()
        self.file.write(rows.astype(DTYPE, copy=False).data)
        self.next_index = indices.stop

    def close(self) -> None:
        """Finish this process's file. A later `append` starts another one."""
        if self.file is not None:
            self.file.close()
            self.file = None

    def read(self, num_images: int | None = None) -> Features:
        """All processes' features. Give `num_images` so that a missing end is noticed as well.

        Raises:
            ValueError: files are missing, incomplete, overlap, or end elsewhere.
        """
        parts, found = [], 0
        for path in sorted(self.folder.glob(PATTERN), key=first_index):
            start = first_index(path)
            if start != found:
                problem = "missing" if start > found else "there twice (not cleared?)"
                first, end = sorted((start, found))
                raise ValueError(f"{self.folder}: features {first} to {end - 1} are {problem}")
            count, rest = divmod(path.stat().st_size, self.dim * DTYPE.itemsize)
            if rest or not count:
                raise ValueError(f"{path}: cut short, or not of {self.dim} features per image")
            parts.append(np.memmap(path, DTYPE, mode="r", shape=(count, self.dim)))
            found += count
        if not found or (num_images is not None and found != num_images):
            expected = "any" if num_images is None else num_images
            raise ValueError(f"{self.folder}: features of {found}, not {expected} images")
        return Features(parts)


def first_index(path: Path) -> int:
    return int(path.stem.removeprefix("features_"))


def remove_features(folder: Path) -> None:
    """All files of stores in sub-folders of `folder`, and whatever folder is then empty."""
    for path in folder.glob(f"*/{PATTERN}"):
        path.unlink()
    for empty in (*folder.glob("*/"), folder):
        with contextlib.suppress(OSError):
            empty.rmdir()
