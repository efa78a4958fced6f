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
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import DATASETS, SPLITS, build_dataset, check_config, has_test_split
from datasets.bad_images import map_images
from datasets.decoding import bit_depth, decode_image, is_array, read_size
from datasets.remarks import ARRAY, extent, remarks
from datasets.storage import ImageDataset, Listing
from utils.cli import new_parser, parse_args
from utils.config import Config, format_config, load_config
from utils.distributed import choose_device
from utils.errors import EXIT_FAILURE, EXIT_OK, DataError, exit_code_of, say, show
from utils.images import ImageSpec
from utils.logs import setup_logging

NUM_SHOWN = 10  # sizes, copies, largest and smallest classes in the text; JSON has all


def make_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = new_parser(__doc__ or "")
    parser.add_argument("--config", required=True, help="a .py, .yml or .yaml config file")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the report there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report and the verdict. Returns the exit code."""
    args = parse_args(make_parser(), sys.argv[1:] if argv is None else argv)
    config = load_config(args.config, args.overrides, checks=(check_config,))
    if args.print_config:
        say(format_config(config))
        return EXIT_OK
    setup_logging(is_main=True)
    choose_device(args.device)  # not used, but a wrong name is an error here as everywhere
    splits: dict[str, Any] = {}
    report = {"dataset": config.dataset, "data_root": show(config.data_root), "splits": splits}
    code, report["verdict"] = EXIT_OK, "not finished"
    try:
        say(_line("data set", f"{report['dataset']}, data_root={report['data_root']}"))
        train: dict[bytes, str] = {}
        for split in SPLITS if has_test_split(config) else ("train",):
            splits[split] = examine_split(config, split, train)
            say("\n".join(split_lines(split, splits[split])))
        num_bad = sum(len(facts["bad"]) for facts in splits.values())
        if num_bad and config.on_bad_image == "error":
            code = EXIT_FAILURE
            report["verdict"] = f"{num_bad} bad image(s): replace or remove, or on_bad_image=skip"
        else:
            for split in splits:
                dataset = build_dataset(config, split)
                if values := dataset.values:
                    splits[split]["values"] = values
                    say(_line(f"{split} values", "{}: {:g} is -1, {:g} is 1".format(*values)))
                again = [dataset] if is_array(getattr(dataset, "names", " ")[0]) else []
                for part in (*again, getattr(dataset, "partners", ())):
                    decoded = map_images(part.__getitem__, len(part), "comparing types")
                    for fault in (result for result in decoded if isinstance(result, DataError)):
                        raise fault
            report["verdict"] = "ready to train"
        say(_line("verdict", report["verdict"]))
    except DataError as error:
        report["verdict"] = str(error)
        raise
    finally:
        if args.json and not args.dry_run:
            text = json.dumps(report, indent=2) + "\n"
            args.json.write_text(text, encoding="utf-8")
    return code


def examine_split(config: Config, split: str, train: dict[bytes, str]) -> dict[str, Any]:
    """Sizes, classes, broken images and copies of a split, as plain JSON types.

    Every image is decoded as training does it. `train` has the name of each train image by the
    digest of its pixels; the train split itself puts them there.
    """
    entry = DATASETS[config.dataset]
    if entry.in_files is None:
        source = build_dataset(config, split)
        names = [f"image {i}" for i in range(len(source))]
        listing = Listing(Path(config.data_root), names, source.labels.tolist(), source.class_names)
    else:
        source = listing = entry.in_files(config, split)
    names, labels = [show(name) for name in listing.names], listing.labels
    sizes, extents, first, bad = Counter(), {}, {}, {}
    duplicates, in_train, num_conflicts = [], [], 0
    results = map_images(partial(examine, config, source), len(names), "decoding all images")
    for index, result in enumerate(results):
        if isinstance(result, DataError):
            bad[names[index]] = str(result)
            continue
        size, digest, kind, part = result
        sizes[size] += 1
        extents.setdefault(kind, []).append(part)
        earlier = first.setdefault(digest, index)
        if earlier != index:
            duplicates.append([names[earlier], names[index]])
            num_conflicts += labels[earlier] != labels[index]
        if split == "train":
            train.setdefault(digest, names[index])
        elif digest in train:
            in_train.append([train[digest], names[index]])
    counts, class_names = Counter(labels), listing.class_names
    chosen = range(len(class_names)) if config.classes is None else sorted(set(config.classes))
    classes = {class_names[label]: counts[label] for label in chosen if class_names}
    fewest = min(classes.values(), default=0)
    by_area = sorted(sizes, key=math.prod)
    return {
        "num_images": len(names),
        "sizes": sizes.most_common(),
        "smallest": by_area[0] if sizes else None,
        "largest": by_area[-1] if sizes else None,
        "classes": classes,
        "imbalance": max(classes.values()) / fewest if fewest else None,
        "bad": bad,
        "duplicates": duplicates,
        "conflicting_labels": num_conflicts,
        "in_train": in_train,
        "passed_over": dict(listing.passed_over),
        "remarks": remarks(listing, extents),
    }


def examine(
    config: Config, source: Listing | ImageDataset, index: int
) -> tuple[tuple[int, ...], bytes, int, tuple]:
    """(height, width) of an image before it is fitted, a digest of its pixels as training gets
    them, the bits of a value in the file, or `ARRAY`, and the extent of the values."""
    if isinstance(source, Listing):
        path, native = source.path(index), DATASETS[config.dataset].native
        channels = config.image_channels or 3
        size = read_size(path, channels)
        wanted = config.image_size or (native.shape[1:] if native else size)
        image = decode_image(path, ImageSpec(channels, *wanted, 0))
        kind = ARRAY if image.is_floating_point() else bit_depth(path)
    else:
        size, kind, image = source.spec.shape[1:], 8, source[index][0]
    pixels = repr(tuple(image.shape)).encode() + image.numpy().tobytes()
    digest = hashlib.blake2b(pixels, digest_size=16).digest()
    return size, digest, kind, extent(image, config.value_range)


def split_lines(split: str, facts: dict[str, Any]) -> list[str]:
    """The report of a split as text, in which long lists are cut."""
    classes, ratio, conflicts = (facts[k] for k in ("classes", "imbalance", "conflicting_labels"))
    kind = f"in {len(classes)} classes" if classes else "without labels"
    sizes = [f"{size[0]} x {size[1]}: {count}" for size, count in facts["sizes"][:NUM_SHOWN]]
    if len(facts["sizes"]) > 1:
        sizes.append("from {} x {} to {} x {}".format(*facts["smallest"], *facts["largest"]))
    lines = [_line(split, f"{facts['num_images']} images {kind}")]
    lines.append(_line("  height x width", ", ".join(sizes)))
    if classes:
        balance = f"largest / smallest = {ratio:.2f}" if ratio else "some are empty"
        ranked = sorted(classes.items(), key=lambda item: -item[1])
        rows = [f"{count:>8}  {show(name)}" for name, count in ranked]
        if len(rows) > 2 * NUM_SHOWN:
            rows[NUM_SHOWN:-NUM_SHOWN] = ["     ..."]
        lines += [_line("  classes", balance), *(_line("", row) for row in rows)]
    lines.append(_line("  bad images", len(facts["bad"])))
    lines += [_line("", fault) for fault in facts["bad"].values()]
    copies = {"duplicates": "  duplicates", "in_train": "  in train too"}
    for key, title in copies.items() if split != "train" else [("duplicates", "  duplicates")]:
        more = f", {conflicts} with another label" if conflicts and key == "duplicates" else ""
        lines.append(_line(title, f"{len(facts[key])}{more}"))
        lines += [_line("", f"{one} = {two}") for one, two in facts[key][:NUM_SHOWN]]
        lines += [_line("", "...")] if len(facts[key]) > NUM_SHOWN else []
    return lines + [_line("  note", line) for line in facts["remarks"]]


def _line(title: str, text: object) -> str:
    return f"{title:18}{text}".rstrip()


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
