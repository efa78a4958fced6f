"""Pictures, noised and drawn again."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

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
from editing.mathematics import img2img_steps, last_timesteps, timesteps_of
from editing.pictures import add_input_options, inputs_of, write_pictures
from generation.sampling import Run
from utils.distributed import Runtime
from utils.images import to_float


def add_options(add: AddOption) -> None:
    add_input_options(add)
    add_label_option(add)
    add_seed_option(add)
    add("--strength", type=float, default=0.6, help="share of the steps: 1 forgets the picture")


def prepare(args: argparse.Namespace, run: Run, runtime: Runtime) -> Job:
    sampling = sampling_of(args, run)
    count = len(last_timesteps(timesteps_of(run, sampling), args.strength))
    inputs = inputs_of(args, run, runtime)

    def steps_of(rows: slice) -> Iterator[Step]:
        x_0 = to_float(inputs.images[rows].to(runtime.device))
        seeds, labels = inputs.seeds[rows], part(inputs.labels, rows)
        return img2img_steps(run, x_0, seeds, labels, args.strength, sampling)

    def write() -> list[Path]:
        images = draw(args, run, runtime, len(inputs.images), steps_of)
        if images is None:
            return []
        return write_pictures(args, {"input": inputs.images, "output": images}, inputs)

    return Job(
        f"{len(inputs.images)} pictures, strength {args.strength:g}: the last {count} steps of "
        f"{sampling.describe()}",
        write,
        f"the same with a smaller --strength than {args.strength:g}, to stay closer to the input",
    )


COMMAND = Command("pictures, noised and drawn again", add_options, prepare)
