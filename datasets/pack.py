"""Pack a folder of images into one .zip, on which training starts at once: data_root=images.zip

python -m datasets.pack my_images my_images.zip
python -m datasets.pack my_images my_images.zip use_subdirs=false label_file=labels.json

The files are stored as they are, in the order of training, with their labels as the dataset.json of
EDM and StyleGAN. Whatever else data_root can be, such as tar shards, is packed too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from datasets import check_config
from datasets.folder import has_test_folder, list_images
from datasets.pictures import folder_settings
from datasets.remarks import passed_over
from utils.cli import Parser, normalized
from utils.config import apply_overrides, validate
from utils.config_files import RawConfig
from utils.errors import EXIT_OK, UserError, exit_code_of, one_line, say, show
from utils.files import atomic_path

LABELS = "dataset.json"  # as EDM and StyleGAN call it


def main(argv: Sequence[str] | None = None) -> int:
    """Write the .zip and say how to train on it. Returns the exit code."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=kind, allow_abbrev=False)
    parser.add_argument("folder", help="the images; key=value can follow as for training")
    parser.add_argument("output", type=Path, help="the .zip to write; nothing is replaced")
    args, overrides = parser.parse_known_args(normalized(sys.argv[1:] if argv is None else argv))
    raw = RawConfig({"experiment_name": "pack"} | folder_settings(args.folder), {})
    config = validate(raw, checks=(check_config,), problems=apply_overrides(raw, overrides))
    output, folder = args.output, Path(config.data_root).resolve()
    is_inside = output.resolve().is_relative_to(folder)
    if output.suffix.lower() != ".zip" or output.exists() or is_inside:
        raise UserError(f"{show(output)}: give a .zip outside {show(folder)} that is not there yet")
    listings = [list_images(config, "train")]
    if has_test_folder(config):
        listings.append(list_images(config, "test"))
    root, class_names, beside = listings[0].root, listings[0].class_names, config.label_file
    if beside and not (root / beside).is_file():  # but elsewhere, or in the files of an archive
        beside = LABELS
    labels = {name: label for part in listings for name, label in zip(*part[1:3], strict=True)}
    names = sorted(labels, key=os.fsencode)
    table = {"labels": [(name, labels[name]) for name in names], "class_names": class_names}
    try:
        with atomic_path(output) as path, zipfile.ZipFile(path, "w") as archive:
            for name in tqdm(
                sorted({*names, beside or LABELS} - {LABELS}), leave=False, disable=None
            ):
                with (root / name).open("rb") as file:
                    archive.writestr(zipfile.ZipInfo(name), file.read())
            text = json.dumps(table if class_names else {"labels": None})
            archive.writestr(zipfile.ZipInfo(LABELS), text)
    except (OSError, ValueError) as error:  # a ValueError: a name that is no UTF-8, a checksum
        raise UserError(f"{show(output)}: cannot be written ({one_line(error)})") from error
    settings = "" if config.use_subdirs else " use_subdirs=false"
    settings += f" label_file={beside}" if beside else ""
    for line in passed_over(listings[0]):
        say(line)
    say(f"{len(names)} images, {len(class_names)} classes: data_root={show(output)}{settings}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
