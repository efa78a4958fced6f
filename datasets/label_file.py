"""The label file of a flat folder: JSON such as {"img1.jpg": 0, "more/img2.jpg": 1}.

The dataset.json of EDM and StyleGAN is read too: {"labels": [["img1.jpg", 0], ...]}.

It may come from anybody, so no name in it leads out of the folder of the images, and no content of
it costs more than a line of text.
"""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

from datasets.decoding import has_image_suffix
from datasets.packed import ImagePath, Member
from utils.errors import DataError, one_line, show
from utils.files import IMAGE_EXTENSIONS

MAX_BYTES = 2**27  # a few million images; reading takes about ten times as much memory
MAX_SHOWN = 80  # characters of a name or label in a message
ABSENT = "no such file"
NEEDED = 'must be a mapping {"img1.jpg": 0, ...}'


def read_label_file(path: ImagePath, root: ImagePath, num_classes: int | None) -> dict[str, int]:
    """The label of each image, by its file name relative to `root`.

    Raises a DataError if the file cannot be read, an entry is not a file below root with a label
    in [0, K), or a label in [0, K) has no image.

    Args:
        root: folder of the images; nothing outside it may be named, not by a symlink either.
        num_classes: K where the config says so; default: the largest label + 1.
    """
    resolved_root = os.path.realpath(str(root))
    labels: dict[str, int] = {}
    for key, label in _read_pairs(path):
        name = PurePosixPath(key).as_posix()
        fault = "the file is listed twice" if name in labels else None
        if type(label) is not int or label < 0:
            fault = "the label must be a whole number from 0"
        elif num_classes is not None and label >= num_classes:
            fault = f"num_classes={num_classes} allows labels below it; correct one of them"
        if fault := fault or _name_fault(key, root, resolved_root):
            advice = how_to_complete(path, root) if fault.startswith(ABSENT) else ""
            raise DataError(f"{show(path)}: {_shown(key)}: {_shown(label)}: {fault}{advice}")
        labels[name] = label
    used = set(labels.values())
    expected = max(used) + 1 if num_classes is None else num_classes
    missing = min(set(range(len(used) + 1)) - used)
    if missing < expected:
        raise DataError(
            f"{show(path)}: no image has label {missing}, but labels must be 0 to "
            f"{_shown(expected - 1)} without gaps ({len(used)} different ones found); renumber "
            f"them or set num_classes{how_to_complete(path, root)}"
        )
    return labels


def how_to_complete(path: ImagePath, root: ImagePath) -> str:
    """The end of a message: lines of Python that make a complete label file of the one there."""
    lines = (
        "how to fix: these three lines of Python write labels_complete.json there, with every image"
        " and without gaps",
        "(images that had no label are the last class); then set label_file=labels_complete.json",
        f"import json, pathlib, re; root = pathlib.Path({str(root)!a}); "
        f"old = json.load(open({str(path)!a}, encoding='utf-8-sig'))",
        "names = [n for n in sorted(p.relative_to(root).as_posix() for p in root.rglob('*.*')) "
        f"if n.lower().endswith({IMAGE_EXTENSIONS}) and not re.search('(^|/)([.]|[@#].*/)', n)]",
        "given = dict(old.get('labels') or old); labels = [given.get(n, 10**9) for n in names]; "
        "ids = sorted(set(labels)); "
        "(root / 'labels_complete.json').write_text(json.dumps("
        "{n: ids.index(k) for n, k in zip(names, labels)}))",
    )
    return "" if isinstance(root, Member) else "".join(f"\n       {line}" for line in lines)


def _read_pairs(path: ImagePath) -> tuple[tuple[str, Any], ...]:
    """The file's keys and values as pairs, because a dict would hide a key given twice."""
    try:
        if not path.is_file():
            if isinstance(path, Member) and (pairs := path.labels()):
                return pairs
            raise ValueError("no such label_file; give it relative to data_root, or in full")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{size} bytes, at most {MAX_BYTES} are allowed")
        with path.open("rb") as file:  # Windows editors begin with a byte order mark
            pairs = json.loads(file.read().decode("utf-8-sig"), object_pairs_hook=tuple)
    except (OSError, ValueError, RecursionError) as error:
        reason = one_line(error, MAX_SHOWN)
        raise DataError(f"{show(path)}: not readable as JSON ({reason}); {NEEDED}") from error
    if pairs == (("labels", None),):
        raise DataError(f"{show(path)}: has no labels (null); leave label_file out to use none")
    if isinstance(pairs, tuple) and len(pairs) == 1 and isinstance(pairs[0][1], list):
        entries = pairs[0][1] if pairs[0][0] == "labels" else [()]
        if all(isinstance(e, list) and len(e) == 2 and isinstance(e[0], str) for e in entries):
            pairs = tuple(map(tuple, entries))
    if not isinstance(pairs, tuple) or not pairs:
        kind = "one with no labels" if pairs == () else f"a {type(pairs).__name__}"
        raise DataError(f"{show(path)}: {NEEDED}, not {kind}")
    return pairs


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "a list" if isinstance(value, list) else "an object"
    text = show(json.dumps(value[: MAX_SHOWN + 1] if isinstance(value, str) else value))
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _name_fault(key: str, root: ImagePath, resolved_root: str) -> str | None:
    """Why `key` does not name an image file below the root, if so."""
    name = PurePosixPath(key)
    if "\0" in key or "\\" in key or name.is_absolute() or ".." in name.parts:
        return "the file name must be relative to data_root, with '/' and without '..'"
    try:
        resolved = os.path.realpath(str(root / name))
        exists = os.path.isfile(resolved) if isinstance(root, Path) else (root / name).is_file()
    except (OSError, ValueError) as error:  # ValueError: broken surrogates in the name
        return f"not usable as a file name ({one_line(error, MAX_SHOWN)})"
    if os.path.commonpath((resolved, resolved_root)) != resolved_root:
        return f"a link that leads out of {show(root)}; copy the file instead"
    if not exists:
        return f"{ABSENT} in {show(root)}; correct the name or remove the line"
    if not has_image_suffix(key):
        return f"not an image by its name; use {' '.join(IMAGE_EXTENSIONS)}"
    return None
