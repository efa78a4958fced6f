"""What each optimizer step trains on: images, labels, timesteps and noise, keyed by the step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from datasets import ImageDataset, default_flip
from datasets.loader import batches
from diffusion import DENSITIES, Process
from utils.config import Config
from utils.distributed import Runtime
from utils.labels import NULL_LABEL
from utils.rng import Stream, batch_noise, torch_generator

QUARTILES = tuple(f"train/loss_q{k}" for k in (1, 2, 3, 4))  # as their mean losses are logged


class Example(NamedTuple):
    """The arguments of `Process.loss`, this process's rows of one global batch."""

    x_0: Tensor
    y: Tensor | None
    t: Tensor
    noise: Tensor


def quartile_of(t: Tensor, num_timesteps: int) -> Tensor:
    """Which of `QUARTILES` each t, (b,) int64, is in: its quarter of [0, num_timesteps). The first
    one has the least noise."""
    return t * len(QUARTILES) // num_timesteps


def training_examples(
    config: Config,
    process: Process,
    dataset: ImageDataset,
    runtime: Runtime,
    start_step: int = 0,
) -> Iterator[Example]:
    """Yield this rank's training examples, one a step, from `start_step` on, without end.

    Timesteps and dropped labels, a number a row, are drawn for the whole global batch and cut to
    this rank's rows, noise in blocks of rows, see `batch_noise`. So training does not depend on the
    number of processes.
    """
    batch_size, device, share = config.batch_size, runtime.device, runtime.share(config.batch_size)
    rows = slice(share.start, share.stop)
    images = batches(
        dataset,
        batch_size=batch_size,
        seed=config.seed,
        device=device,
        rows=rows,
        horizontal_flip=default_flip(config),
        num_workers=config.num_workers,
        start_step=start_step,
    )
    generator = partial(torch_generator, config.seed, device=device)
    draw_timesteps = partial(DENSITIES[config.timestep_sampling], process, config)
    for step, (x_0, labels) in enumerate(images, start_step):
        t = draw_timesteps(batch_size, generator(Stream.TIMESTEP, step))
        noise = batch_noise(x_0, share, batch_size=batch_size, seed=config.seed, step=step)
        y = labels if config.conditional else None
        if config.label_dropout > 0:
            draws = generator(Stream.LABEL_DROPOUT, step)
            chance = torch.rand(batch_size, generator=draws, device=device)
            y = labels.masked_fill(chance[rows] < config.label_dropout, NULL_LABEL)
        yield Example(x_0, y, t[rows], noise)
