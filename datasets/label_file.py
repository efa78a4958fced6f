"""The label file of a flat folder: JSON such as {"img1.jpg": 0, "more/img2.jpg": 1}.

It may come from anybody, so no name in it leads out of the folder of the images, and no content of
it costs more than a line of text.
"""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

from datasets.decoding import IMAGE_EXTENSIONS, has_image_suffix, show
from utils.errors import DataError

MAX_BYTES = 2**27  # a few million images; reading takes about ten times as much memory
MAX_SHOWN = 80  # characters of a name or label in a message


def read_label_file(path: Path, root: Path, num_classes: int | None) -> dict[str, int]:
    """Relative file name -> label.

    Args:
        root: folder of the images; nothing outside it may be named, not by a symlink either.
        num_classes: K where the config says so; default: the largest label + 1.

    Raises:
        DataError: the file cannot be read, or an entry is not `file below root: label in [0, K)`,
            or a label in [0, K) has no image.
    """
    pairs = _read_pairs(path)
    if not pairs:
        raise DataError(f'{show(path)}: no labels in it; write {{"img1.jpg": 0, ...}}')
    resolved_root = os.path.realpath(root)
    labels: dict[str, int] = {}
    for key, label in pairs:
        try:
            _check_label(label, num_classes)
            name = _checked_name(key, root, resolved_root)
            if name in labels:
                raise DataError("the file is listed twice")
        except DataError as error:
            raise DataError(f"{show(path)}: {_shown(key)}: {_shown(label)}: {error}") from error
        labels[name] = label
    _check_gaps(path, set(labels.values()), num_classes)
    return labels


def _read_pairs(path: Path) -> list[tuple[str, Any]]:
    if not path.is_file():
        raise DataError(
            f"{show(path)}: no such label_file; give it relative to data_root, or as a full path"
        )
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{size} bytes, at most {MAX_BYTES} are allowed")
        text = path.read_text(encoding="utf-8-sig")  # Windows editors begin with a byte order mark
        # As pairs, because a dict would hide a key given twice. No label is an object or array.
        pairs = json.loads(text, object_pairs_hook=_Pairs)
    except (OSError, ValueError, RecursionError) as error:
        reason = _cut(" ".join(str(error).split()))
        raise DataError(f"{show(path)}: not readable as JSON ({reason})") from error
    if not isinstance(pairs, _Pairs):
        raise DataError(
            f'{show(path)}: must be a mapping {{"img1.jpg": 0, ...}}, not a {type(pairs).__name__}'
        )
    return pairs


class _Pairs(list):
    """A JSON object as its (key, value) pairs, told apart from a JSON array."""


def _shown(value: Any) -> str:
    if isinstance(value, str):
        value = value[: MAX_SHOWN + 1]
    elif isinstance(value, list):
        value = "an object" if isinstance(value, _Pairs) else "a list"
        return value
    return _cut(show(json.dumps(value)))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _check_label(label: Any, num_classes: int | None) -> None:
    if type(label) is not int or label < 0:
        raise DataError("the label must be a whole number from 0")
    if num_classes is not None and label >= num_classes:
        raise DataError(
            f"num_classes={num_classes} allows labels below {num_classes}; correct the label or "
            "num_classes"
        )


def _checked_name(key: str, root: Path, resolved_root: str) -> str:
    """`key` as a normal relative path of an existing image file below the root."""
    name = PurePosixPath(key)
    if "\0" in key or "\\" in key or name.is_absolute() or ".." in name.parts:
        raise DataError("the file name must be relative to data_root, with '/' and without '..'")
    try:
        resolved = os.path.realpath(root / name)
        there = os.path.isfile(resolved)
    except (OSError, ValueError) as error:  # ValueError: broken surrogates in the name
        raise DataError(f"not usable as a file name ({_cut(str(error))})") from error
    if os.path.commonpath((resolved, resolved_root)) != resolved_root:
        raise DataError(f"a link that leads out of {show(root)}; copy the file instead")
    if not there:
        raise DataError(f"no such file in {show(root)}; correct the name or remove the line")
    if not has_image_suffix(key):
        raise DataError(f"not an image by its name; use {' '.join(IMAGE_EXTENSIONS)}")
    return name.as_posix()


def _check_gaps(path: Path, used: set[int], num_classes: int | None) -> None:
    expected = num_classes if num_classes is not None else max(used) + 1
    # Not range(expected): one absurd label must not cost memory.
    missing = next((label for label in range(len(used) + 1) if label not in used), expected)
    if missing < expected:
        raise DataError(
            f"{show(path)}: no image has label {missing}, but labels must be 0 to "
            f"{_shown(expected - 1)} without gaps ({len(used)} different ones found); renumber "
            "them or set num_classes"
        )
