"""Pictures to start from, and those that came of them on one sheet."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import datasets
from datasets.pictures import fitted_pictures
from datasets.real import chosen_images
from editing.command import AddOption, captions_of, first_seed, labels_of, output, spread
from generation.sampling import Run
from utils.captions import contact_sheet
from utils.distributed import Runtime
from utils.errors import ConfigError, DataError
from utils.files import check_picture_folder
from utils.images import MAX_COLUMNS, MAX_GRID_IMAGES, save_image
from utils.labels import save_labels


class Inputs(NamedTuple):
    """Pictures to work on, uint8 (N, C, H, W), each with a seed, a caption, and perhaps a class."""

    images: Tensor
    labels: list[int] | None
    seeds: list[int]
    captions: list[str]


def add_input_options(add: AddOption) -> None:
    add("--input", metavar="PATH", help="pictures: an image file, a folder, or an .npz")
    add("--real_split", choices=datasets.SPLITS, help="or images of the model's data set")
    add("--num_samples", "--n", type=int, help="how many of them; default: all")
    add("--save_images", action="store_true", help="each result as NAME_images/000000.png ...")


def inputs_of(args: argparse.Namespace, run: Run, runtime: Runtime) -> Inputs:
    """The pictures, with a class and a seed each. A single picture serves several of these.

    Raises:
        ConfigError, DataError: no pictures, too many, or numbers that do not go together.
        UserError: the folder of --save_images holds pictures that would stay.
    """
    if (args.input is None) == (args.real_split is None):
        raise ConfigError("give --input or --real_split, one of them")
    name, data, own, missing = _read_inputs(args, run, runtime)
    asked_for = len(data) if args.num_samples is None else args.num_samples
    if not 1 <= asked_for <= min(len(data), MAX_GRID_IMAGES):
        raise ConfigError(
            f"{name} holds {len(data)} pictures; --num_samples says how many of them to take, at "
            f"most {MAX_GRID_IMAGES}"
        )
    chosen = chosen_images(len(data), args.num_samples)
    images = torch.stack([data[i][0] for i in chosen])
    seeds = getattr(args, "seeds", None)  # inverting takes none
    count = max(len(images), len(args.labels or ()), len(seeds or ()))
    if len(images) not in (1, count):
        raise ConfigError(f"{len(images)} pictures, but {count} --labels or --seeds")
    if args.save_images:
        check_picture_folder(output(args, "_images"), count)
    own = own and [own[i] for i in chosen]
    first = first_seed(args, run)
    labels = labels_of(args, run, own, count, missing)
    return Inputs(
        images.expand(count, -1, -1, -1),
        labels,
        spread(seeds, count, "--seeds") if seeds else list(range(first, first + count)),
        captions_of(labels, count, run),
    )


def _read_inputs(
    args: argparse.Namespace, run: Run, runtime: Runtime
) -> tuple[str, datasets.ImageDataset, list[int] | None, str | None]:
    """Name, pictures, labels of their own, and if there are none, why."""
    if args.real_split is not None:
        name = f"{run.config.dataset} ({args.real_split})"
        with runtime.main_first():
            data = datasets.build_dataset(run.config, args.real_split)
        if data.spec.shape != run.spec.shape:
            raise DataError(f"{name}: images of {data.spec}, but the model draws {run.spec}")
        return name, data, data.labels.tolist(), None
    asked = run.config.conditional and args.labels is None
    numbers = tuple(map(str, range(run.spec.num_classes)))
    names = (run.class_names or numbers) if asked else ()
    return args.input, *fitted_pictures(args.input, run.spec, names)


def write_pictures(
    args: argparse.Namespace, kinds: Mapping[str, Tensor], inputs: Inputs
) -> list[Path]:
    """A sheet of all kinds, one above the other, and the results, which come last, one by one."""
    count = len(inputs.images)
    rows, above, left = [], [], []
    for start in range(0, count, MAX_COLUMNS):
        columns = range(start, min(start + MAX_COLUMNS, count))
        for k, kind in enumerate(kinds):
            rows.append([k * count + i for i in columns])
            above.append([inputs.captions[i] for i in columns] if k == 0 else [])
            left.append(kind)
    path = output(args, ".png")
    save_image(path, contact_sheet(torch.cat(list(kinds.values())), rows, above=above, left=left))
    if not args.save_images:
        return [path]
    folder = output(args, "_images")
    for i, image in enumerate(list(kinds.values())[-1]):
        save_image(folder / f"{i:06d}.png", image)
    if inputs.labels is not None:
        save_labels(folder, inputs.labels)
    return [path, folder]
