"""Samples from the noise that inverting found."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from diffusion import Step
from editing.command import (
    AddOption,
    Command,
    Job,
    captions_of,
    deterministic,
    draw,
    labels_of,
    output,
    part,
)
from editing.latents import read_latents
from editing.mathematics import label_denoiser, steps_from
from generation.sampling import Run, sampling_from
from utils.captions import contact_sheet
from utils.cli import parse_int_list
from utils.distributed import Runtime
from utils.errors import ConfigError
from utils.images import grid_rows, save_image


def add_options(add: AddOption) -> None:
    add("--latents", required=True, metavar="NPZ", help="the file")
    add("--labels", type=parse_int_list, help="other classes than those in the file")


def prepare(args: argparse.Namespace, run: Run, runtime: Runtime) -> Job:
    if args.seed is not None:
        raise ConfigError("--seed: the noise is that of --latents")
    latents = read_latents(args.latents, run.spec)
    method, steps, scale = args.sampling_method or "ddim", args.num_inference_steps, args.cfg_scale
    if steps is None and method == "ddim":
        steps = latents.num_inference_steps
    scale = latents.cfg_scale if scale is None else scale
    sampling = deterministic(sampling_from(run.config, method, steps, args.ddim_eta or 0.0, scale))
    count = len(latents.noise)
    labels = labels_of(args, run, latents.labels, count, f"{args.latents} has no labels")

    def steps_of(rows: slice) -> Iterator[Step]:
        denoise = label_denoiser(run, part(labels, rows), sampling, runtime.device)
        return steps_from(run, denoise, latents.noise[rows].to(runtime.device), sampling)

    def write() -> list[Path]:
        images = draw(args, run, runtime, count, steps_of)
        if images is None:
            return []
        path = output(args, ".png")
        rows = grid_rows(count)
        names = captions_of(labels, count, run)
        above = [[names[i] for i in row] for row in rows]
        save_image(path, contact_sheet(images, rows, above=above))
        return [path]

    return Job(
        f"{count} images from {args.latents}: {sampling.describe()}",
        write,
        "the same with other --labels, or a larger --cfg_scale, which leads away from the pictures",
    )


COMMAND = Command("samples from the noise that invert wrote", add_options, prepare)
