"""Guidance against steps on one sheet."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from diffusion import Step
from editing.command import (
    AddOption,
    Command,
    Job,
    add_label_option,
    add_seed_option,
    draw,
    first_seed,
    output,
    spread,
)
from generation.run import check_labels
from generation.sampling import Run, Sampling, sample_steps
from generation.sweep import settings_of
from utils.captions import contact_sheet
from utils.distributed import Runtime
from utils.errors import ConfigError
from utils.images import MAX_GRID_IMAGES, make_grid, save_image


def add_options(add: AddOption) -> None:
    add_label_option(add)
    add_seed_option(add)


def prepare(args: argparse.Namespace, run: Run, runtime: Runtime) -> Job:
    scales, counts = args.cfg_scale or [None], args.num_inference_steps or [None]
    settings = settings_of(
        run.config,
        1,
        method=args.sampling_method,
        eta=args.ddim_eta,
        cfg_scales=scales,
        step_counts=counts,
    )
    if args.labels:
        check_labels(args.labels, run)
    every = run.classes if run.config.conditional else [None]
    labels, seeds = args.labels or list(every), args.seeds or [first_seed(args, run)]
    count = max(len(labels), len(seeds))
    labels, seeds = spread(labels, count, "--labels"), spread(seeds, count, "--seeds")
    if count * len(settings) > MAX_GRID_IMAGES:
        raise ConfigError(
            f"{len(settings)} cells of {count} images: a sheet shows at most {MAX_GRID_IMAGES} "
            "images; give fewer --labels or --seeds"
        )

    def steps_of(sampling: Sampling, rows: slice) -> Iterator[Step]:
        asked = labels[rows] if run.config.conditional else None
        return sample_steps(run, seeds[rows], asked, sampling, runtime.device)

    def write() -> list[Path]:
        cells = []
        for setting in settings:
            images = draw(args, run, runtime, count, partial(steps_of, setting.sampling))
            if images is not None:
                cells.append(images[0] if count == 1 else make_grid(images, [list(range(count))]))
        if not cells:
            return []
        columns = len(counts)
        rows = [list(range(len(cells)))[i : i + columns] for i in range(0, len(cells), columns)]
        steps = [f"{s.sampling.num_inference_steps} steps" for s in settings[:columns]]
        left = [f"cfg {s.sampling.cfg_scale:g}" for s in settings[::columns]]
        path = output(args, ".png")
        above = [steps] + [[]] * (len(rows) - 1)
        save_image(path, contact_sheet(torch.stack(cells), rows, above=above, left=left))
        return [path]

    last = settings[-1].sampling
    return Job(
        f"{len(settings)} settings of {count} images, up to {last.describe()}",
        write,
        f"python sample.py --checkpoint {args.checkpoint} --num_inference_steps "
        f"{last.num_inference_steps} --cfg_scale {last.cfg_scale:g}, with the best of them",
    )


COMMAND = Command("guidance against steps on one sheet", add_options, prepare, is_sweep=True)
