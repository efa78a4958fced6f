"""What the commands share: what they are given, how they draw, and what they say at the end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion import SAMPLERS, Step
from generation.run import Run, check_labels
from generation.sampling import Sampling, batch_rows, gather_images, run_steps, sampling_from
from utils.captions import class_captions
from utils.distributed import Runtime
from utils.errors import ConfigError, shell_line
from utils.images import to_float


class Pictures(NamedTuple):
    """Pictures to start from, each with a seed and perhaps a class."""

    images: Tensor  # (N, C, H, W); in a batch float32 (b, C, H, W) in [-1, 1]
    labels: list[int] | None
    seeds: list[int]

    def batch(self, rows: slice, device: torch.device) -> Pictures:
        """The pictures of these rows, on the device, as floats in [-1, 1]."""
        images = to_float(self.images[rows].to(device))
        return Pictures(images, self.labels and self.labels[rows], self.seeds[rows])


class Job(NamedTuple):
    """What a command is given: its options, the model, and which process of how many this is."""

    args: argparse.Namespace
    run: Run
    runtime: Runtime

    @property
    def first_seed(self) -> int:
        """The seed of the first image: that of --seed, else the config's."""
        return self.run.config.seed if self.args.seed is None else self.args.seed

    def path(self, suffix: str) -> Path:
        """The path of an output file or folder, from --output_dir and --output_name."""
        return Path(self.args.output_dir, self.args.output_name + suffix)

    def command(self, script: str, *words: object) -> str:
        """The command, for a line to copy, that calls a script for the same checkpoint."""
        given = "--checkpoint", Path(self.args.checkpoint)
        if self.args.config is not None:  # parts of other packages may lie beside it
            given += "--config", Path(self.args.config)
        return shell_line("python", *script.split(), *given, *words)

    def sampling(self, *defaults: str | float | None) -> Sampling:
        """The settings that the options ask for; where they say nothing, the `defaults`, which are
        a method, a number of steps, an eta and a scale; without these, the config's."""
        args = self.args
        given = args.sampling_method, args.num_inference_steps, args.ddim_eta, args.cfg_scale
        chosen = [b if a is None else a for a, b in zip_longest(given, defaults)]
        sampler = SAMPLERS.get(chosen[0] or self.run.config.sampling_method)
        if args.ddim_eta is None and sampler and "eta" not in sampler.options:
            chosen[2] = None
        return sampling_from(self.run.config, *chosen)

    def labels(self, own: list[int] | None, count: int, missing: str | None) -> list[int] | None:
        """The class of each of `count` images: that of --labels, else `own`, which pictures came
        with; None if they came with none, and `missing` says why. Raises a ConfigError if there is
        none, the model does not have it, or their number is wrong."""
        if self.args.labels is not None:
            check_labels(self.args.labels, self.run)
            return spread(self.args.labels, count, "--labels")
        if not self.run.config.conditional:
            return None
        if own is None:
            raise ConfigError(f"--labels: give a class for all images, or one for each; {missing}")
        check_labels(own, self.run)
        return spread(own, count, "labels of the pictures")

    def captions(self, labels: list[int] | None, count: int) -> list[str]:
        """The names of `count` images' classes, empty for a model without classes."""
        return [""] * count if labels is None else class_captions(labels, self.run.class_names)

    def draw(self, num_images: int, steps_of: Callable[[slice], Iterator[Step]]) -> Tensor | None:
        """Sample images: (N, C, H, W) on the main process, None on the others.

        From a slice of 0..num_images, `steps_of` makes the steps that draw these.
        """
        run, runtime = self.run, self.runtime
        rows = batch_rows(num_images, self.args.batch_size, runtime)
        bar = tqdm(rows, unit="batch", disable=not runtime.is_main)
        parts = (run_steps(run, steps_of(r), r.stop - r.start, runtime.device) for r in bar)
        return gather_images(parts, run, runtime)


def spread(values: Sequence[Any], count: int, name: str) -> list[Any]:
    """`count` values from as many, or from one for all; a ConfigError if it is neither."""
    if len(values) not in (1, count):
        raise ConfigError(f"{name}: {len(values)} given; give 1 for all, or {count}")
    return list(values) * (count // len(values))


def spread_both(seeds: list[Any], labels: list[Any], where: str = "") -> tuple[list, list]:
    """Make as many seeds as labels, see `spread`; `where` follows the options in messages."""
    count = max(len(seeds), len(labels))
    return spread(seeds, count, f"--seeds{where}"), spread(labels, count, f"--labels{where}")


def wrote(paths: Sequence[Path], following: str) -> str:
    """A command's last line: the files it wrote, and what one could do next."""
    return f"wrote {', '.join(map(str, paths))}; next: {following}"
