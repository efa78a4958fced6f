"""What a command is, and what the commands share: settings, labels, seeds, drawing."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion import Step
from generation.run import check_labels
from generation.sampling import Run, Sampling, last_steps, sampling_from
from utils.captions import class_captions
from utils.cli import parse_int_list
from utils.distributed import Runtime
from utils.errors import ConfigError
from utils.images import to_uint8

T = TypeVar("T")
AddOption = Callable[..., argparse.Action]


class Job(NamedTuple):
    """A command whose arguments have been checked.

    Attributes:
        summary: what it does, in a line.
        write: sample, on every process, and write, on the main one, which returns the files.
        following: a command that could come next.
    """

    summary: str
    write: Callable[[], list[Path]]
    following: str


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        help: what it is for, in a few words.
        add_options: adds what it takes beside the options of all.
        prepare: checks what was given, and writes nothing. Raises ConfigError or DataError.
        is_sweep: takes lists of steps and scales.
    """

    help: str
    add_options: Callable[[AddOption], None]
    prepare: Callable[[argparse.Namespace, Run, Runtime], Job]
    is_sweep: bool = False


def add_label_option(add: AddOption) -> None:
    add("--labels", type=parse_int_list, help="a class for all images, or one for each")


def add_seed_option(add: AddOption) -> None:
    add("--seeds", type=parse_int_list, help="a seed for all images, or one for each")


def sampling_of(args: argparse.Namespace, run: Run) -> Sampling:
    return sampling_from(
        run.config, args.sampling_method, args.num_inference_steps, args.ddim_eta, args.cfg_scale
    )


def deterministic(sampling: Sampling) -> Sampling:
    """
    Raises:
        ConfigError: the image does not follow from x_T alone.
    """
    if not sampling.is_deterministic:
        raise ConfigError(
            f"{sampling.describe()}: draws noise on the way; use --sampling_method ddim "
            "--ddim_eta 0, or dpmpp_2m"
        )
    return sampling


def first_seed(args: argparse.Namespace, run: Run) -> int:
    return run.config.seed if args.seed is None else args.seed


def spread(values: list[T], count: int, name: str) -> list[T]:
    """
    Raises:
        ConfigError: neither one value for all nor `count` of them.
    """
    if len(values) not in (1, count):
        raise ConfigError(f"{name}: {len(values)} given; give 1 for all, or {count}")
    return values * count if len(values) == 1 else values


def labels_of(
    args: argparse.Namespace, run: Run, own: list[int] | None, count: int, missing: str | None
) -> list[int] | None:
    """The class of each of `count` images: that of --labels, else its own.

    Raises:
        ConfigError: there is none, the model does not have it, or their number is wrong.
    """
    if args.labels is not None:
        check_labels(args.labels, run)
        return spread(args.labels, count, "--labels")
    if not run.config.conditional:
        return None
    if own is None:
        raise ConfigError(f"--labels: give a class for all images, or one for each; {missing}")
    check_labels(own, run)
    return spread(own, count, "labels of the pictures")


def part(labels: list[int] | None, rows: slice) -> list[int] | None:
    return None if labels is None else labels[rows]


def captions_of(labels: list[int] | None, count: int, run: Run) -> list[str]:
    return [""] * count if labels is None else class_captions(labels, run.class_names)


def draw(
    args: argparse.Namespace,
    run: Run,
    runtime: Runtime,
    num_images: int,
    steps_of: Callable[[slice], Iterator[Step]],
    on_step: Callable[[int, Step], None] | None = None,
) -> Tensor | None:
    """The images, uint8 (N, C, H, W), on the main process; None on others."""
    batches = last_steps(
        run, num_images, steps_of, batch_size=args.batch_size, runtime=runtime, on_step=on_step
    )
    total = -(-len(runtime.share(num_images)) // args.batch_size)
    bar = tqdm(batches, total=total, unit="batch", disable=not runtime.is_main)
    empty = torch.zeros((0, *run.spec.shape), dtype=torch.uint8)
    return runtime.gather(torch.cat([empty, *(to_uint8(x).cpu() for _, x in bar)]), num_images)


def output(args: argparse.Namespace, suffix: str) -> Path:
    return Path(args.output_dir, args.output_name + suffix)
