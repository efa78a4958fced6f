"""Parts of pictures drawn anew, the rest kept as it is."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from datasets.pictures import read_mask
from diffusion import Step
from editing.command import (
    AddOption,
    Command,
    Job,
    add_label_option,
    add_seed_option,
    draw,
    part,
    sampling_of,
)
from editing.mathematics import box_mask, inpaint_steps
from editing.pictures import add_input_options, inputs_of, write_pictures
from generation.sampling import Run
from utils.cli import parse_int_list
from utils.distributed import Runtime
from utils.errors import ConfigError
from utils.images import to_float

HOLE_LEVEL = 128  # grey level of what is to be drawn, in the picture of the hole


def add_options(add: AddOption) -> None:
    add_input_options(add)
    add_label_option(add)
    add_seed_option(add)
    add("--mask", metavar="PATH", help="an image as large as the model's; white is drawn")
    add("--box", type=parse_int_list, metavar="X0,Y0,X1,Y1", help="or a rectangle, in pixels")
    add("--resample", type=int, default=1, help="take each step so often (RePaint); default: 1")


def prepare(args: argparse.Namespace, run: Run, runtime: Runtime) -> Job:
    sampling = sampling_of(args, run)
    if (args.mask is None) == (args.box is None):
        raise ConfigError("give --mask or --box, one of them")
    if args.resample < 1:
        raise ConfigError(f"--resample {args.resample}: must be at least 1")
    if args.resample > 1 and sampling.method == "dpmpp_2m":
        raise ConfigError("--resample: dpmpp_2m remembers its last step; use ddim or ddpm")
    height, width = run.spec.height, run.spec.width
    if args.mask is not None:
        unknown = read_mask(args.mask, height, width)
    else:
        unknown = box_mask(args.box, height, width)
    inputs = inputs_of(args, run, runtime)

    def steps_of(rows: slice) -> Iterator[Step]:
        x_0 = to_float(inputs.images[rows].to(runtime.device))
        seeds, labels = inputs.seeds[rows], part(inputs.labels, rows)
        return inpaint_steps(run, x_0, unknown, seeds, labels, args.resample, sampling)

    def write() -> list[Path]:
        images = draw(args, run, runtime, len(inputs.images), steps_of)
        if images is None:
            return []
        holes = inputs.images.masked_fill(unknown, HOLE_LEVEL)
        kinds = {"input": inputs.images, "known": holes, "output": images}
        return write_pictures(args, kinds, inputs)

    times = f", each step {args.resample} times" if args.resample > 1 else ""
    return Job(
        f"{len(inputs.images)} pictures, {int(unknown.sum())} of {height * width} pixels to be "
        f"drawn: {sampling.describe()}{times}",
        write,
        "the same with --resample 5, if what is drawn does not fit what is known"
        if args.resample == 1
        else "the same with other --seeds, for other ways to fill the hole",
    )


COMMAND = Command("parts of pictures drawn anew, the rest kept as it is", add_options, prepare)
