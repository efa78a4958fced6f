"""Your own images: a folder per class, or a flat folder with or without a JSON file of labels.

    data_root/cat/1.png, data_root/dog/2.jpg           use_subdirs=True
    data_root/train/cat/..., data_root/test/cat/...    use_subdirs=True, with a test split (or val/)
    data_root/1.png, label_file {"1.png": 0}           use_subdirs=False, label_file="labels.json"
    data_root/1.png                                    use_subdirs=False, unlabelled

Hidden files and folders, and files that are no images by their extension, are passed over. Every
other doubt is an error: nothing is guessed, relabelled or left out. (Images that cannot be decoded
are replaced if `on_bad_image="skip"` asks for it.)
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from datasets.bad_images import decoding_error, read_sizes, replace_bad_images
from datasets.decoding import IMAGE_EXTENSIONS, has_image_suffix, read_size, show
from datasets.label_file import read_label_file
from datasets.storage import ImageFileDataset, Listing
from datasets.subset import require_classes
from utils.config import Config
from utils.errors import DataError

TEST_FOLDERS = ("test", "val")  # in order of preference
SPLIT_FOLDERS = ("train", *TEST_FOLDERS)
BUILTIN_HINTS = ("cifar100", "cifar10", "fashionmnist", "mnist", "celeba", "digits")


def build_custom(config: Config, split: str) -> ImageFileDataset:
    """Images under `data_root`; the header of each one is read, its pixels are not.

    With `on_bad_image="skip"` each image is decoded once, see `replace_bad_images`.

    Raises:
        DataError: with one line naming the file or folder, what was found and how to fix it.
    """
    listing = list_images(config, split)
    channels = config.image_channels or 3
    if config.on_bad_image == "skip":
        listing = replace_bad_images(listing, config.image_size, channels)
    sizes = read_sizes(listing)
    height, width = config.image_size or common_size(config, split, listing, sizes)
    return ImageFileDataset(listing, height=height, width=width, channels=channels)


def has_test_folder(config: Config) -> bool:
    """Whether `data_root` is cut into train/ and test/ (or val/)."""
    root = Path(config.data_root)
    return root.is_dir() and "test" in find_splits(config, root)


def list_images(config: Config, split: str) -> Listing:
    """Sorted images of `split` with their labels: of `classes` alone, if given, so that no file of
    another class is ever opened.

    Raises:
        DataError: see `build_custom`.
    """
    listing = _list_split(config, split)
    if config.classes is None or not listing.class_names:
        return listing
    require_classes(config.classes, listing.labels, len(listing.class_names))
    return listing.of_classes(config.classes)


def _list_split(config: Config, split: str) -> Listing:
    root = Path(config.data_root)
    _require_folder(config, root)
    splits = find_splits(config, root)
    if split not in splits:
        raise DataError(
            f"{show(root)}: dataset='custom' has no {split} split; make the folders "
            "train/ and test/ in there to have one"
        )
    if config.label_file is not None:
        return _list_labelled(config, root)
    if not config.use_subdirs:
        _check_num_classes(config, root, 0, "no labels without label_file")
        return _below(root, _list_unlabelled(splits[split]))
    listing = _list_classes(splits[split])
    if split != "train":
        train_classes = tuple(name for name in _visible(splits["train"])[0])
        listing = _with_classes_of(listing, splits["train"], train_classes)
    shown = ", ".join(listing.class_names[:5]) + (", ..." if listing.class_names[5:] else "")
    count = len(listing.class_names)
    _check_num_classes(config, root, count, f"{count} class folders ({show(shown)})")
    return _below(root, listing)


def _below(root: Path, listing: Listing) -> Listing:
    """The listing with names relative to `root`, so that train/1.png is not test/1.png."""
    names = [(listing.root / name).relative_to(root).as_posix() for name in listing.names]
    return listing._replace(root=root, names=names)


def find_splits(config: Config, root: Path) -> dict[str, Path]:
    """Folder of each split: train/ and test/ (or val/) inside `root`, else `root` for "train".

    They count as splits if train/ holds what `use_subdirs` asks for: class folders, or images.

    Raises:
        DataError: the folders look like splits of images without classes.
    """
    folders, files = _visible(root)
    if config.label_file is not None or "train" not in folders or _images(files):
        return {"train": root}
    inner_folders, inner_files = _visible(root / "train")
    test = next((name for name in TEST_FOLDERS if name in folders), None)
    only_splits = set(folders) <= set(SPLIT_FOLDERS)
    if config.use_subdirs and only_splits and test and not inner_folders and _images(inner_files):
        raise DataError(
            f"{show(root)}: train/ and {test}/ hold images but no class folders; set "
            "use_subdirs=False for images without classes, or rename them if they are classes"
        )
    fits = bool(inner_folders) if config.use_subdirs else bool(_images(inner_files))
    if not fits or not (test or only_splits):
        return {"train": root}
    splits = {"train": root / "train"}
    if test:
        splits["test"] = root / test
    return splits


def _require_folder(config: Config, root: Path) -> None:
    if root.is_dir():
        return
    wanted = f"{config.experiment_name} {root.name}".lower().replace("-", "").replace("_", "")
    builtin = next((name for name in BUILTIN_HINTS if name in wanted), None)
    hint = f"; {builtin} is built in: dataset={builtin!r} needs no folder" if builtin else ""
    found = "is a file, not a folder" if root.exists() else "no such folder"
    raise DataError(
        f"data_root={show(root)!r}: {found} (looked in {show(Path.cwd())}); set data_root to the "
        f"folder of your images{hint}"
    )


def _visible(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the (folders, files) in `folder` that are not hidden, sorted by bytes."""
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{show(folder)}: cannot be read: {error.strerror}") from error
    folders = [entry.name for entry in entries if entry.is_dir()]
    files = [entry.name for entry in entries if not entry.is_dir()]
    return sorted(folders, key=os.fsencode), sorted(files, key=os.fsencode)


def _images(names: Iterable[str]) -> list[str]:
    return [name for name in names if has_image_suffix(name)]


def _walk(folder: Path) -> list[str]:
    """All visible files below `folder`, relative with `/`, sorted by bytes.

    Raises:
        DataError: a folder cannot be read, or is a link (which could lead round in circles).
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{show(error.filename)}: cannot be read: {error.strerror}") from error

    found = []
    for path, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked = next((name for name in folders if os.path.islink(os.path.join(path, name))), None)
        if linked:
            raise DataError(
                f"{show(os.path.join(path, linked))}: a link to a folder, not followed this deep; "
                "put the folder itself there, or remove the link"
            )
        inside = Path(path).relative_to(folder)
        found += [(inside / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(found, key=os.fsencode)


def _seen(files: Iterable[str]) -> str:
    """`looked for .png ...; saw 3 .txt, 1 .gif`."""
    suffixes = Counter(PurePosixPath(name).suffix.lower() or "without extension" for name in files)
    saw = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5))
    return f"looked for {' '.join(IMAGE_EXTENSIONS)}; saw {show(saw) if saw else 'no files'}"


def _list_classes(root: Path) -> Listing:
    class_names, files = _visible(root)
    loose = _images(files)
    if loose and not any(_images(_walk(root / name)) for name in class_names):
        raise DataError(
            f"{show(root)}: use_subdirs=True needs a folder per class, but {len(loose)} image(s) "
            f"lie directly in it (first: {show(loose[0])}); set use_subdirs=False for a flat folder"
        )
    if loose:
        raise DataError(
            f"{show(root / loose[0])}: {len(loose)} image(s) lie beside the class folders; move "
            "them into one of these, or away"
        )
    if not class_names:
        raise DataError(f"{show(root)}: no class folders and no images; {_seen(files)}")
    names, labels = [], []
    for label, class_name in enumerate(class_names):
        inside = _walk(root / class_name)
        images = _images(inside)
        if not images:
            raise DataError(
                f"{show(root / class_name)}: class folder without images; {_seen(inside)}; add "
                "images or remove the folder"
            )
        names += [f"{class_name}/{name}" for name in images]
        labels += [label] * len(images)
    return Listing(root, names, labels, tuple(class_names))


def _with_classes_of(listing: Listing, train: Path, class_names: tuple[str, ...]) -> Listing:
    """The listing with labels as in the train split, which may have more classes."""
    for name in listing.class_names:
        if name not in class_names:
            raise DataError(
                f"{show(listing.root / name)}: no such class folder in {show(train)}; add it there "
                "or remove this one"
            )
    index = [class_names.index(name) for name in listing.class_names]
    return listing._replace(labels=[index[i] for i in listing.labels], class_names=class_names)


def _check_num_classes(config: Config, root: Path, count: int, found: str) -> None:
    if config.num_classes not in (None, count):
        raise DataError(
            f"{show(root)}: num_classes={config.num_classes}, but there are {found}; "
            f"set num_classes={count} or leave it out"
        )


def _list_unlabelled(root: Path) -> Listing:
    folders, files = _visible(root)
    names = _images(files)
    inside = next((f"{name}/" for name in folders if _images(_walk(root / name))), None)
    if inside and not names:
        raise DataError(
            f"{show(root)}: use_subdirs=False needs the images directly in this folder, but they "
            f"lie in subfolders ({show(inside)}); set use_subdirs=True for a folder per class"
        )
    if inside:
        raise DataError(
            f"{show(root / inside)}: there are images in a subfolder, which use_subdirs=False does "
            f"not read, beside {len(names)} in {show(root)}; move them up, or away"
        )
    if not names:
        raise DataError(f"{show(root)}: no images; {_seen(files)}")
    return Listing(root, names, [0] * len(names), ())


def _list_labelled(config: Config, root: Path) -> Listing:
    if config.use_subdirs:
        raise DataError(
            f"label_file={config.label_file!r} goes with use_subdirs=False; with use_subdirs=True "
            "the folder names are the labels"
        )
    path = root / config.label_file
    if not path.is_file() and Path(config.label_file).is_file():
        path = Path(config.label_file)
    labels = read_label_file(path, root, config.num_classes)
    files = _walk(root)
    unlisted = [name for name in _images(files) if name not in labels]
    if unlisted:
        raise DataError(
            f"{show(root / unlisted[0])}: not in {show(path)} ({len(unlisted)} image(s) without a "
            "label); add a label or remove the file"
        )
    names = sorted(labels, key=os.fsencode)
    num_classes = max(labels.values()) + 1
    class_names = tuple(str(label) for label in range(num_classes))
    return Listing(root, names, [labels[name] for name in names], class_names)


def common_size(
    config: Config, split: str, listing: Listing, sizes: list[tuple[int, int]]
) -> tuple[int, int]:
    """Where `image_size` is not given: the size of the first train image, which all must have.

    Args:
        listing: without bad images if these are skipped.

    Raises:
        DataError: naming the first image of another size.
    """
    first_path = listing.path(0) if split == "train" else _first_train_image(config)
    size = read_size(first_path)
    for name, other in zip(listing.names, sizes, strict=True):
        if other != size:
            raise DataError(
                f"{show(listing.root / name)}: is {other[0]} x {other[1]} (height x width), but "
                f"{show(first_path)} is {size[0]} x {size[1]}; set image_size to bring all images "
                "to one size"
            )
    return size


def _first_train_image(config: Config) -> Path:
    """The first that is used: where bad images are skipped, the first good one."""
    train = list_images(config, "train")
    paths = (train.path(index) for index in range(len(train.names)))
    if config.on_bad_image == "error":
        return next(paths)
    channels = config.image_channels or 3
    good = (path for path in paths if decoding_error(path, None, channels) is None)
    return next(good, train.path(0))
