"""Image files, folders of them, and configs of data sets, for the tests of datasets/."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from utils.config import Config
from utils.errors import DataError


def config(**values: Any) -> Config:
    return Config(**{"experiment_name": "test", **values})


def write_image(
    path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0
) -> Path:
    """A random image; `size` is (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size if mode == "L" else (*size, len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels, mode).save(path)
    return path


def write_flowers102(folder: Path, images: str = "jpg", **tables: Any) -> dict[str, list[int]]:
    """Twelve photos of several sizes in torchvision's layout; `tables` replace those of the files.
    Returns all tables: `labels` from 1, and the numbers from 1 of the images in each split."""
    from scipy.io import savemat

    tables = {
        "labels": [1, 1, 2, 2, 3, 3, 7, 7, 50, 50, 102, 102],
        "trnid": [11, 2, 3],
        "valid": [5, 8, 12, 1],
        "tstid": [10, 4, 9, 6, 7],
    } | tables
    for number in range(1, 13):
        write_image(folder / images / f"image_{number:05d}.jpg", (50, 60 + number), seed=number)
    savemat(folder / "imagelabels.mat", {"labels": np.uint8(tables["labels"])})
    splits = {key: np.uint16(tables[key]) for key in ("trnid", "valid", "tstid") if tables[key]}
    savemat(folder / "setid.mat", splits)
    return tables


def custom(root: Path, **values: Any) -> Config:
    return config(**{"dataset": "custom", "data_root": str(root), **values})


def flat(root: Path, labels: Any = None, *, num_images: int = 3, **values: Any) -> Config:
    for i in range(num_images):
        write_image(root / f"{i}.png", seed=i)
    if labels is None:
        return custom(root, use_subdirs=False, **values)
    text = labels if isinstance(labels, str) else json.dumps(labels)
    (root / "labels.json").write_text(text)
    return custom(root, use_subdirs=False, label_file="labels.json", **values)


def assert_data_error(build, *parts: str | Path) -> str:
    """`build()` raises a DataError, one line but for advice below, that holds all `parts`."""
    with pytest.raises(DataError) as caught:
        build()
    message = str(caught.value).partition("\n       how to fix: ")[0]
    assert message.isprintable()
    assert len(message.splitlines()) == 1
    for part in parts:
        assert str(part) in message
    return message


def png_claiming(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    end = b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    return b"\x89PNG\r\n\x1a\n" + chunk + end
