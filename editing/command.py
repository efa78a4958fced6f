"""What the commands share: what they are given, how they draw, and what they say at the end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import Tensor
from tqdm import tqdm

from diffusion import Step
from generation.run import Run, check_labels
from generation.sampling import Sampling, batch_rows, gather_images, run_steps, sampling_from
from utils.captions import class_captions
from utils.distributed import Runtime
from utils.errors import ConfigError
from utils.images import to_uint8

S, T = TypeVar("S"), TypeVar("T")


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

    def sampling(self) -> Sampling:
        """The sampler and its settings that the options ask for."""
        args = self.args
        steps, scale = args.num_inference_steps, args.cfg_scale
        return sampling_from(self.run.config, args.sampling_method, steps, args.ddim_eta, scale)

    def labels(self, own: list[int] | None, count: int, missing: str | None) -> list[int] | None:
        """The class of each of `count` images: that of --labels, else `own`, which pictures came
        with; None if they came with none, and `missing` says why.

        Raises:
            ConfigError: there is none, the model does not have it, or their number is wrong.
        """
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
        """Sample images: uint8 (N, C, H, W) on the main process, None on the others.

        From a slice of 0..num_images, `steps_of` makes the steps that draw these.
        """
        run, device = self.run, self.runtime.device
        rows = batch_rows(num_images, self.args.batch_size, self.runtime)
        bar = tqdm(rows, unit="batch", disable=not self.runtime.is_main)
        parts = (to_uint8(run_steps(run, steps_of(batch), device)).cpu() for batch in bar)
        return gather_images(parts, num_images, run.spec.shape, self.runtime)


def spread(values: Sequence[T], count: int, name: str) -> list[T]:
    """`count` values from as many, or from one for all; a ConfigError if it is neither."""
    if len(values) not in (1, count):
        raise ConfigError(f"{name}: {len(values)} given; give 1 for all, or {count}")
    return list(values) * (count // len(values))


def spread_both(seeds: list[S], labels: list[T], where: str = "") -> tuple[list[S], list[T]]:
    """As many seeds as labels, see `spread`; `where` ends the options' names in messages."""
    count = max(len(seeds), len(labels))
    return spread(seeds, count, f"--seeds{where}"), spread(labels, count, f"--labels{where}")


def wrote(paths: Sequence[Path], following: str) -> str:
    """A command's last line: the files it wrote, and what one could do next."""
    return f"wrote {', '.join(map(str, paths))}; next: {following}"
