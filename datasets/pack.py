"""Pack images, whatever data_root can be, into one .zip with EDM's dataset.json for data_root.

python -m datasets.pack my_images images.zip
python -m datasets.pack my_images images.zip use_subdirs=false label_file=labels.json
"""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from datasets import SPLITS, check_config
from datasets.folder import has_test_folder, list_images
from datasets.pictures import folder_settings
from datasets.remarks import passed_over
from utils.cli import Parser
from utils.config import apply_overrides, validate
from utils.config_files import RawConfig
from utils.errors import EXIT_OK, UserError, exit_code_of, one_line, say, show
from utils.files import atomic_path


def main(argv: Sequence[str] | None = None) -> int:
    """Write the .zip and say how to train on it. Returns the exit code."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", help="the images; key=value can follow as for training")
    parser.add_argument("output", type=Path, help="the .zip to write; nothing is replaced")
    args, overrides = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    raw = RawConfig({"experiment_name": "pack"} | folder_settings(args.folder), {})
    config = validate(raw, checks=(check_config,), problems=apply_overrides(raw, overrides))
    output, folder = args.output, Path(config.data_root).resolve()
    if output.suffix.lower() != ".zip" or output.exists() or folder in output.resolve().parents:
        raise UserError(f"{show(output)}: give a .zip outside {show(folder)} that is not there yet")
    listings = [list_images(config, split) for split in SPLITS[: 1 + has_test_folder(config)]]
    root, class_names = listings[0].root, listings[0].class_names
    labels = {name: label for part in listings for name, label in zip(*part[1:3], strict=True)}
    pairs = [(name, labels[name]) for name in sorted(labels, key=os.fsencode)]
    tables = {"dataset": {"labels": pairs if class_names else None}, "class_names": class_names}
    try:
        output.parent.resolve(strict=True)  # one that is not there is a slip, not to be made
        with atomic_path(output) as path, zipfile.ZipFile(path, "w") as archive:
            for name, _ in pairs:
                if not (root / name).is_file():  # opening a named pipe would wait for ever
                    raise UserError(f"{show(root / name)}: not a file that can be read; remove it")
                with (root / name).open("rb") as file:
                    archive.writestr(zipfile.ZipInfo(name), file.read())
            for name, table in tables.items():
                archive.writestr(zipfile.ZipInfo(f"{name}.json"), json.dumps(table))
    except (OSError, ValueError) as error:  # a ValueError: a name that is no UTF-8, a checksum
        raise UserError(f"{show(output)}: cannot be written ({one_line(error)})") from error
    keys = " use_subdirs=false" * (not config.use_subdirs)
    keys += " label_file=dataset.json" * bool(config.label_file)
    wrote = f"{len(pairs)} images, {len(class_names)} classes: data_root={show(output)}{keys}"
    say("\n".join([*passed_over(listings[0]), wrote]))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
