"""Your own images: a folder per class, or a flat folder with or without a JSON file of labels.

    data_root/cat/1.png, data_root/dog/2.jpg           use_subdirs=True
    data_root/train/cat/..., data_root/Test set/...    use_subdirs=True, with a test split (or val/)
    data_root/1.png, label_file {"1.png": 0}           use_subdirs=False, label_file="labels.json"
    data_root/1.png                                    use_subdirs=False, unlabelled

Hidden files and folders, folders that only machines fill, and files that are no images by their
extension are passed over, and counted in `Listing.passed_over`. Every other doubt is an error:
nothing is guessed, relabelled or left out. (Images that cannot be decoded are replaced if
`on_bad_image="skip"` asks for it.)
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from datasets.bad_images import read_sizes, replace_bad_images, values_of
from datasets.decoding import has_image_suffix, is_array, read_size
from datasets.label_file import how_to_complete, read_label_file
from datasets.packed import ImagePath, Member, open_root, split_of
from datasets.storage import ImageFileDataset, Listing
from utils.config import Config
from utils.errors import DataError, show
from utils.files import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS, PICTURE_EXTENSIONS
from utils.images import ImageSpec

TEST_KINDS = ("test", "val")  # in order of preference
# Thumbnails, waste baskets and the like of file servers, archives and systems
JUNK_FOLDERS = re.compile(
    r"@(eadir|tmp|recycle|recently-snapshot|sharebin)|#(recycle|snapshot|sharebin)|__macosx|"
    r"\$recycle\.bin|recycle[rd]|system volume information|lost\+found|__pycache__|"
    r"network trash folder|temporary items",
    re.IGNORECASE,
).fullmatch
# Files that lie beside images without being any, by extension or name, which no line need tell
COMPANIONS = re.compile(
    r"\.(txt|jsonl?|cls|[ct]sv|md|rst|xml|ya?ml|toml|ini|cfg|db|log|html?|pdf|py|sh|url|names|lst)|"
    r".*\(text\)"
).fullmatch
PLAIN_TEXTS = re.compile(r"readme|licen[sc]e|copying|notice|icon\r", re.IGNORECASE).fullmatch
BUILTIN_HINTS = ("cifar100", "cifar10", "fashionmnist", "mnist", "celeba", "flowers102", "digits")
# What is wrong with a label_file beside use_subdirs=True
BESIDE_SUBDIRS = (
    "goes with use_subdirs=False; with use_subdirs=True the folder names are the labels"
)


class Children(NamedTuple):
    """The names in a folder that are not hidden; folders and images are sorted by their bytes."""

    folders: list[str]
    images: list[str]  # files with the extension of an image
    others: Counter[str]  # how many other files, by their extension, and `junk/` folders
    suffixes: tuple[str, ...]  # those of images


def build_custom(config: Config, split: str) -> ImageFileDataset:
    """The images under `data_root`. No file is opened with `image_size`, else their headers are.

    With `on_bad_image="skip"` each image is decoded once, see `replace_bad_images`. Raises a
    DataError, one line that names the file or folder, what is wrong with it and how to fix it.
    """
    listing = replace_bad_images(config, list_images(config, split))
    train = listing
    if split != "train" and (config.image_size is None or is_array(listing.names[0])):
        train = replace_bad_images(config, list_images(config, "train"))
    channels = config.image_channels or 3
    size = config.image_size or _common_size(channels, train.path(0), listing)
    spec = ImageSpec(channels, *size, 0)
    values = values_of(train.root, tuple(train.names), spec, config.value_range)
    return ImageFileDataset(listing, channels, *size, values=values)


def has_test_folder(config: Config) -> bool:
    """Whether `data_root` is cut into train/ and test/ (or val/); raises as `build_custom` does."""
    return open_root(config.data_root).is_dir() and "test" in _split_folders(config)


def _splits_in(names: Iterable[str]) -> set[str]:
    """The splits that the words of any of the names are, as in `seg_train` and `testA`."""
    words = (re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![a-z])", name) for name in names)
    return {split for name in words for word in name if (split := split_of(word))}


def number_of_classes(config: Config) -> int | None:
    """0 for unlabelled images, else `num_classes`; None if the files alone tell."""
    labelled = config.use_subdirs or config.label_file is not None
    return config.num_classes or None if labelled else 0


def list_images(config: Config, split: str) -> Listing:
    """The images of `split` with their labels, sorted by the bytes of their names.

    With `classes` only their images are listed, so no file of another class is ever opened.
    Raises as `build_custom` does.
    """
    root = open_root(config.data_root)
    if not root.is_dir():
        names = f"{config.experiment_name} {root.name}".lower().replace("-", "").replace("_", "")
        builtin = next((name for name in BUILTIN_HINTS if name in names), None)
        hint = f"; {builtin} is built in: dataset={builtin!r} needs no folder" if builtin else ""
        fault = "is a file, not a folder" if root.exists() else "no such folder"
        raise DataError(
            f"data_root={show(root)!r}: {fault} (looked in {show(Path.cwd())}); set data_root to "
            f"the folder of your images, or a .zip, .tar or .parquet of them{hint}"
        )
    shards = root.archive.shards if isinstance(root, Member) else ()
    mixed = (path.stem for path, _ in shards if path.suffix.lower() != ".parquet")
    if len(kinds := sorted(_splits_in(mixed))) > 1:
        raise DataError(f"{show(root)}: shards of {' and '.join(kinds)}; keep a folder of each")
    folders = _split_folders(config)
    if split not in folders:
        raise DataError(
            f"{show(root)}: dataset='custom' has no {split} split, which val_interval needs; make "
            "the folders train/ and test/ in there, without a label_file, to have one"
        )
    if config.label_file is not None:
        listing = _list_labelled(config, root)
    else:
        listing = _list_folder(config, folders, split)
    told = {kind: count for kind, count in listing.passed_over.items() if not COMPANIONS(kind)}
    return listing._replace(passed_over=told).of_classes(config.classes)


def suffixes_of(root: ImagePath, channels: int | None = None) -> tuple[str, ...]:
    """Those of the images under `root`: of pictures if there is one, which have 1 or 3 channels,
    else of arrays."""
    walk = Member.walk if isinstance(root, Member) else os.walk
    for _, folders, files in walk(root, onerror=None) if channels in (None, 1, 3) else ():
        folders[:] = filter(_is_seen, folders)
        if any(has_image_suffix(n, PICTURE_EXTENSIONS) for n in files if not n.startswith(".")):
            return PICTURE_EXTENSIONS
    return IMAGE_EXTENSIONS if channels in (None, 1, 3) else ARRAY_EXTENSIONS


def _is_seen(folder: str) -> bool:
    return not folder.startswith(".") and not JUNK_FOLDERS(folder)


def children_of(folder: ImagePath, suffixes: tuple[str, ...], *, deep: bool = False) -> Children:
    """What lies in a folder; if `deep`, the files at any depth as `a/b.png`, and no folders.

    Raises a DataError if a folder cannot be read, or one passed through is a link, which might
    lead in circles.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{show(error.filename)}: cannot be read: {error.strerror}") from error

    children = Children([], [], Counter(), suffixes)
    walk = Member.walk if isinstance(folder, Member) else os.walk
    for path, folders, files in walk(folder, onerror=refuse):
        children.others.update(f"{name}/" for name in folders if JUNK_FOLDERS(name))
        folders[:] = filter(_is_seen, folders)
        if not deep:
            children.folders.extend(sorted(folders, key=os.fsencode))
            folders.clear()
        for inner in (os.path.join(path, name) for name in folders):
            if os.path.islink(inner):
                raise DataError(
                    f"{show(inner)}: a link to a folder, not followed this deep; put the folder "
                    "itself there, or remove the link"
                )
        inside = os.path.join(path, "")[len(os.path.join(str(folder), "")) :]
        for name in files:
            if has_image_suffix(name, suffixes) and not name.startswith("."):
                children.images.append(inside + name)
            elif not name.startswith("."):
                text = " (text)" if PLAIN_TEXTS(name) else ""
                children.others[Path(name).suffix.lower() or f"without extension{text}"] += 1
    children.images.sort(key=os.fsencode)
    return children


def _split_folders(config: Config) -> dict[str, ImagePath]:
    """Folder of each split: train/ and test/ (or val/) in `data_root`, else itself for "train".

    They count as splits if they hold what `use_subdirs` asks for, class folders or images, and
    nothing but splits lies beside train/ where there is no test split. Raises a DataError if two
    folders are one split.
    """
    root = open_root(config.data_root)
    list_folder = partial(children_of, suffixes=suffixes_of(root, config.image_channels))
    whole = list_folder(root)
    if config.label_file is not None or whole.images:
        return {"train": root}
    named = defaultdict(list)
    for name in filter(split_of, whole.folders):
        inside = list_folder(root / name)
        if inside.folders if config.use_subdirs else inside.images:
            named[split_of(name)].append(name)
    test = next((kind for kind in TEST_KINDS if kind in named), None)
    if "train" not in named or not (test or all(map(split_of, whole.folders))):
        return {"train": root}
    splits = {"train": named["train"]} | ({"test": named[test]} if test else {})
    for split, names in splits.items():
        if names[1:]:
            both = show("/ and ".join(names))
            raise DataError(f"{show(root)}: {both}/ are one split, {split}; keep one of them there")
    return {split: root / names[0] for split, names in splits.items()}


def _list_folder(config: Config, folders: dict[str, ImagePath], split: str) -> Listing:
    """The images in the class folders of a split's folder, or directly in it.

    Args:
        folders: that of each split; the class folders of train have the labels 0, 1, ...
    """
    root, folder, train = open_root(config.data_root), folders[split], folders["train"]
    list_folder = partial(children_of, suffixes=suffixes_of(root, config.image_channels))
    children = list_folder(folder)
    inside = {name: list_folder(folder / name, deep=True) for name in children.folders}
    filled = [f"{name}/" for name in inside if inside[name].images]
    class_names = list_folder(train).folders if config.use_subdirs else []
    wanted, unwanted, needs = children.folders, children.images, "a folder per class"
    if not config.use_subdirs:
        wanted, unwanted, needs = children.images, filled, "the images directly in this folder"
    if unwanted or not wanted:
        raise DataError(
            f"{show(folder)}: use_subdirs={config.use_subdirs} needs {needs}, but it holds "
            f"{_seen(children, filled)}; put all images there, or set "
            f"use_subdirs={not config.use_subdirs}"
        )
    if config.use_subdirs:
        _refuse_splits(folder, {name: files.images for name, files in inside.items()})
    if config.num_classes not in (None, len(class_names)):
        shown = show(", ".join(class_names[:5]) + (", ..." if class_names[5:] else ""))
        kind = f"class folders ({shown})" if class_names else "labels without label_file"
        raise DataError(
            f"{show(root)}: num_classes={config.num_classes}, but there are {len(class_names)} "
            f"{kind}; set num_classes={len(class_names)} or leave it out"
        )
    passed_over, prefix = sum((files.others for files in inside.values()), children.others), ""
    if folder != root:  # train/1.png is not test/1.png
        prefix, beside = f"{os.path.basename(str(folder))}/", list_folder(root)
        unused = [name for name in beside.folders if root / name not in folders.values()]
        passed_over += beside.others + Counter(f"{name}/" for name in unused)
    if not config.use_subdirs:
        names = [prefix + name for name in children.images]
        return Listing(root, names, [0] * len(names), (), passed_over)
    names, labels = [], []
    for class_name, files in inside.items():
        fault = None
        if class_name not in class_names:
            fault = f"no such class folder in {show(train)}; add it there or remove this one"
        elif not files.images:
            fault = f"a class folder with {_seen(files)}; add some, or remove it"
        if fault:
            raise DataError(f"{show(folder / class_name)}: {fault}")
        names += [f"{prefix}{class_name}/{name}" for name in files.images]
        labels += [class_names.index(class_name)] * len(files.images)
    called = root.archive.class_names if isinstance(root, Member) else {}
    return Listing(root, names, labels, tuple(called.get(n, n) for n in class_names), passed_over)


def _refuse_splits(folder: ImagePath, images: dict[str, list[str]]) -> None:
    """Raise a DataError if class folders, with these images, may be splits or hold splits.

    A class may be called like a split if it holds images directly, unless all are.
    """
    nested = [name for name in images if all("/" in image for image in images[name])]
    doubtful = list(images) if all(_splits_in([name]) for name in images) else nested
    named = [name for name in doubtful if _splits_in([name])]
    splits = named if any(map(split_of, nested)) or len(_splits_in(named)) > 1 else []
    for name in images:
        folders = {part for path in images[name] for part in path.split("/")[:-1]}
        if len(_splits_in(folders)) > 1:
            splits = [f"{name}/{part}" for part in sorted(folders) if _splits_in([part])]
    if splits:
        raise DataError(
            f"{show(folder)}: {show('/ and '.join(splits[:3]))}/: named like splits, not classes; "
            "splits are train/ and test/ alone in data_root, with class folders in them (or, with "
            "use_subdirs=False, images); classes of such names hold images directly: rename others"
        )


def _seen(children: Children, filled: Sequence[str] = ()) -> str:
    """Where the images of a folder are, `filled` subfolders too, or what is there instead."""
    kinds = {"image(s) directly in it": children.images, "subfolder(s) with images": filled}
    places = [
        f"{len(names)} {kind} (first: {show(names[0])})" for kind, names in kinds.items() if names
    ]
    if places:
        return " and ".join(places)
    saw = ", ".join(f"{count} {suffix}" for suffix, count in children.others.most_common(5))
    return f"no images (looked for {' '.join(children.suffixes)}; saw {show(saw or 'no files')})"


def _list_labelled(config: Config, root: ImagePath) -> Listing:
    """The images of a label file, whose classes are called by their numbers."""
    if config.use_subdirs:
        raise DataError(f"label_file={config.label_file!r} {BESIDE_SUBDIRS}")
    path = root / config.label_file
    if not path.is_file() and Path(config.label_file).is_file():
        path = Path(config.label_file)
    labels = read_label_file(path, root, config.num_classes)
    children = children_of(root, suffixes_of(root, config.image_channels), deep=True)
    if odd := [name for name in labels if not has_image_suffix(name, children.suffixes)]:
        kinds = f"{' '.join(children.suffixes)} is read here, and not both kinds"
        raise DataError(f"{show(path)}: {show(odd[0])}: {kinds}; label one of them")
    unlisted = [name for name in children.images if name not in labels]
    if unlisted:
        raise DataError(
            f"{show(root / unlisted[0])}: not in {show(path)} ({len(unlisted)} image(s) without a "
            f"label); add a label or remove the file{how_to_complete(path, root)}"
        )
    names = sorted(labels, key=os.fsencode)
    class_names = tuple(map(str, range(max(labels.values()) + 1)))
    in_order = [labels[name] for name in names]
    return Listing(root, names, in_order, class_names, children.others)


def _common_size(channels: int, first: ImagePath, listing: Listing) -> tuple[int, int]:
    """(height, width) of `first`, the first train image that is used.

    Raises a DataError that names the first image of another size.
    """
    size, sizes = read_size(first, channels), read_sizes(listing, channels)
    for name, other in zip(listing.names, sizes, strict=True):
        if other != size:
            raise DataError(
                f"{show(listing.root / name)}: is {other[0]} x {other[1]} (height x width), but "
                f"{show(first)} is {size[0]} x {size[1]}; set image_size to bring all "
                "images to one size"
            )
    return size
