"""Look a data set over before a long run: every image is decoded as training will decode it.

python -m datasets.check --config configs/custom_folder.py data_root=DIR image_size=64

Exit code: 0 ready to train; 1 images that cannot be decoded, with on_bad_image=error; 2 anything
else that would stop training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datasets import IN_FILES, build_dataset, check_config, default_flip, has_test_split
from datasets.bad_images import map_files, progress_bar
from datasets.decoding import (
    centre_box,
    describe_mode,
    load_fitted,
    open_image,
    show,
    upright_size,
)
from datasets.folder import list_images
from datasets.loader import stays_resident
from datasets.storage import ImageFileDataset, Listing
from utils.cli import new_parser, parse_args
from utils.config import Config, format_config, load_config
from utils.distributed import choose_device
from utils.errors import EXIT_FAILURE, EXIT_OK, DataError, UserError, exit_code_of
from utils.logs import setup_logging

NUM_SHOWN = 10  # sizes, duplicates, largest and smallest classes in the text; JSON has all


class Looked(NamedTuple):
    """What is kept of one image."""

    size: tuple[int, int]  # (height, width) of the file
    mode: str
    digest: bytes  # of the pixels as the loader gives them
    sums: np.ndarray  # (3, C) int64: number of pixels, sum, sum of squares


class Split(NamedTuple):
    """One split before its images are decoded."""

    listing: Listing
    classes: dict[int, str]  # names of the labels that are trained on
    channels: int
    size: tuple[int, int] | None  # None: the files' own
    look: Callable[[int], Looked | DataError]  # by index


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__ or "")
    parser.add_argument("--config", required=True, help="a .py, .yml or .yaml config file")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the report there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(make_parser(), sys.argv[1:] if argv is None else argv)
    config = load_config(args.config, args.overrides, checks=(check_config,))
    if args.print_config:
        print(format_config(config))
        return EXIT_OK
    setup_logging(is_main=True)
    device = choose_device(args.device)
    report: dict[str, Any] = {"dataset": config.dataset, "data_root": show(config.data_root)}
    code, fault = EXIT_OK, None
    try:
        splits = ("train", "test") if has_test_split(config) else ("train",)
        report |= look_over(config, splits)
        print("\n".join(report_lines(report, str(device))), flush=True)
        num_bad = sum(len(found["bad"]) for found in report["splits"].values())
        if num_bad and config.on_bad_image == "error":
            code = EXIT_FAILURE
            report["verdict"] = f"{num_bad} bad image(s): replace or remove, or on_bad_image=skip"
        else:
            for split in splits:
                build_dataset(config, split)
            report["verdict"] = "ready to train"
        print(_line("verdict", report["verdict"]))
    except DataError as error:
        report["verdict"], fault = str(error), error
    if args.json and not args.dry_run:
        try:
            args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{args.json}: cannot be written ({error.strerror})") from error
    if fault is not None:
        raise fault
    return code


def look_over(config: Config, splits: Sequence[str]) -> dict[str, Any]:
    """All that is reported, as plain JSON types.

    Raises:
        DataError: what a config or folder is refused for before any image is decoded.
    """
    opened = {split: open_split(config, split) for split in splits}
    train: dict[bytes, str] = {}
    found = {split: look_over_split(split, opened[split], train) for split in splits}
    loader = describe_loader(config, opened["train"], found["train"]["sizes"])
    return {"splits": found, "loader": loader}


def open_split(config: Config, split: str) -> Split:
    size, channels = config.image_size, config.image_channels or 3
    if config.dataset == "custom":
        listing = list_images(config, split)
    else:
        dataset = build_dataset(config.model_copy(update={"on_bad_image": "error"}), split)
        channels, size = dataset.spec.channels, dataset.spec.shape[1:]
        labels, class_names = dataset.labels.tolist(), dataset.class_names
        if not isinstance(dataset, ImageFileDataset):
            names = [f"image {i}" for i in range(len(dataset))]
            mode = "grey" if channels == 1 else "RGB"
            listing = Listing(Path(config.data_root), names, labels, class_names)

            def look_at_one(index: int) -> Looked:
                return look_at(dataset[index][0].numpy(), size, mode)

            return Split(listing, chosen_classes(config, class_names), channels, size, look_at_one)
        listing = Listing(dataset.root, dataset.names, labels, class_names)

    def look(index: int) -> Looked | DataError:
        path = listing.path(index)
        try:
            with open_image(path) as image:
                own_size, mode = upright_size(image), describe_mode(image)
                pixels = load_fitted(image, path, channels, *(size or own_size))
        except DataError as error:
            return error
        return look_at(pixels, own_size, mode)

    return Split(listing, chosen_classes(config, listing.class_names), channels, size, look)


def chosen_classes(config: Config, class_names: Sequence[str]) -> dict[int, str]:
    """Those of `classes`, else all: label -> name."""
    chosen = range(len(class_names)) if config.classes is None else config.classes
    return {label: name for label, name in enumerate(class_names) if label in chosen}


def look_at(pixels: np.ndarray, size: tuple[int, int], mode: str) -> Looked:
    """Take down what is needed of uint8 (C, H, W)."""
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels))
    values = pixels.reshape(len(pixels), -1).astype(np.int64)
    counts = np.full(len(pixels), values.shape[1])
    sums = np.stack([counts, values.sum(1), (values * values).sum(1)])
    return Looked(size, mode, digest.digest(), sums)


def look_over_split(split: str, images: Split, train: dict[bytes, str]) -> dict[str, Any]:
    """
    Args:
        train: digest -> name of the train images; filled by that split, compared with others.
    """
    names, labels = [show(name) for name in images.listing.names], images.listing.labels
    sizes, modes, first = Counter(), Counter(), {}
    bad, duplicates, in_train, conflicts = {}, [], [], 0
    sums = np.zeros((3, images.channels), np.int64)
    with progress_bar(len(names), f"looking at {split}") as bar:
        for i, found in enumerate(map_files(images.look, len(names))):
            bar.update()
            if isinstance(found, DataError):
                bad[names[i]] = str(found)
                continue
            sizes[found.size] += 1
            modes[found.mode] += 1
            sums += found.sums
            earlier = first.setdefault(found.digest, i)
            if earlier != i:
                duplicates.append([names[earlier], names[i]])
                conflicts += labels[earlier] != labels[i]
            if split == "train":
                train.setdefault(found.digest, names[i])
            elif found.digest in train:
                in_train.append([train[found.digest], names[i]])
    counts = Counter(labels)
    classes = {name: counts[label] for label, name in images.classes.items()}
    fewest = min(classes.values(), default=0)
    mean, square = sums[1:] / np.maximum(sums[0], 1) / [[255], [255**2]]
    by_area = sorted(sizes, key=math.prod)
    return {
        "num_images": len(names),
        "sizes": sizes.most_common(),
        "smallest": by_area[0] if sizes else None,
        "largest": by_area[-1] if sizes else None,
        "modes": dict(modes.most_common()),
        "classes": classes,
        "imbalance": max(classes.values()) / fewest if fewest else None,
        "bad": bad,
        "duplicates": duplicates,
        "conflicting_labels": conflicts,
        "in_train": in_train,
        "mean": mean.tolist(),
        "std": np.sqrt(np.maximum(square - mean**2, 0)).tolist(),
    }


def describe_loader(
    config: Config, images: Split, sizes: list[tuple[tuple[int, int], int]]
) -> dict[str, Any] | None:
    """What becomes of the train images; None where there is no one size to bring them to."""
    if images.size is None and len(sizes) != 1:
        return None
    height, width = images.size or sizes[0][0]
    fate = dict.fromkeys(("cropped", "enlarged", "reduced"), 0)
    for (own_height, own_width), count in sizes if config.dataset in IN_FILES else ():
        left, top, _, bottom = centre_box(own_height, own_width, height / width)
        scale = height / (bottom - top)
        fate["cropped"] += count * (max(left, top) > 1e-6)
        fate["enlarged"] += count * (scale > 1 + 1e-6)
        fate["reduced"] += count * (scale < 1 - 1e-6)
    num_bytes = len(images.listing.names) * images.channels * height * width
    return {
        "shape": [images.channels, height, width],
        "horizontal_flip": default_flip(config),
        **fate,
        "num_bytes": num_bytes,
        "resident": stays_resident(num_bytes, config.resident),
    }


def report_lines(report: dict[str, Any], device: str) -> list[str]:
    lines = [_line("data set", f"{report['dataset']}, data_root={report['data_root']}")]
    for split, found in report["splits"].items():
        lines += _split_lines(split, found)
    loader, train = report["loader"], report["splits"]["train"]
    if loader is not None:
        channels, *size = loader["shape"]
        parts = ["grey" if channels == 1 else "RGB", _size(size)]
        parts.append("mirrored at random" if loader["horizontal_flip"] else "never mirrored")
        parts += [f"{loader[k]} {k}" for k in ("cropped", "enlarged", "reduced") if loader[k]]
        lines.append(_line("loader", ", ".join(parts)))
        held = f"held on {device}" if loader["resident"] else "decoded anew in each epoch"
        lines.append(_line("memory", f"{loader['num_bytes'] / 2**20:.1f} MiB as uint8, {held}"))
    if train["sizes"]:
        mean, std = (" ".join(f"{x:.4f}" for x in train[key]) for key in ("mean", "std"))
        lines.append(_line("pixels", f"mean {mean}, std {std} (train, of 0 to 1)"))
    return lines


def _split_lines(split: str, found: dict[str, Any]) -> list[str]:
    classes, conflicts = found["classes"], found["conflicting_labels"]
    what = f"in {len(classes)} classes" if classes else "without labels"
    sizes = [f"{_size(size)}: {count}" for size, count in found["sizes"][:NUM_SHOWN]]
    if len(found["sizes"]) > 1:
        sizes.append(f"from {_size(found['smallest'])} to {_size(found['largest'])}")
    lines = [
        _line(split, f"{found['num_images']} images {what}"),
        _line("  height x width", ", ".join(sizes)),
        _line("  modes", ", ".join(f"{mode}: {n}" for mode, n in found["modes"].items())),
    ]
    if classes:
        ratio = found["imbalance"]
        balance = "some are empty" if ratio is None else f"largest / smallest = {ratio:.2f}"
        ranked = [f"{n:>8}  {show(k)}" for k, n in sorted(classes.items(), key=lambda c: -c[1])]
        if len(ranked) > 2 * NUM_SHOWN:
            ranked[NUM_SHOWN:-NUM_SHOWN] = ["     ..."]
        lines += _list("  classes", balance, ranked)
    lines += _list("  bad images", len(found["bad"]), list(found["bad"].values()))
    differ = f", {conflicts} with another label" if conflicts else ""
    titles = {"duplicates": ("  duplicates", differ), "in_train": ("  in train too", "")}
    for key in titles if split != "train" else ("duplicates",):
        title, more = titles[key]
        pairs = [f"{one} = {two}" for one, two in found[key][:NUM_SHOWN]]
        dots = ["..."] if len(found[key]) > NUM_SHOWN else []
        lines += _list(title, f"{len(found[key])}{more}", pairs + dots)
    return lines


def _list(title: str, text: object, rows: list[str]) -> list[str]:
    return [_line(title, text), *(_line("", row) for row in rows)]


def _line(title: str, text: object) -> str:
    return f"{title:18}{text}".rstrip()


def _size(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
