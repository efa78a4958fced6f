"""What each optimizer step trains on: images, labels, timesteps and noise, keyed by the step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count, repeat
from typing import NamedTuple

import torch
from torch import Tensor

from datasets import ImageDataset, default_flip
from datasets.conditions import planes_of
from datasets.loader import batches
from diffusion import DENSITIES, Process
from utils.config import Config
from utils.distributed import Runtime
from utils.images import to_uint8
from utils.labels import NULL_LABEL
from utils.rng import Stream, batch_noise, numpy_generator, torch_generator

QUARTILES = tuple(f"train/loss_q{k}" for k in (1, 2, 3, 4))  # as their mean losses are logged


class Example(NamedTuple):
    """The arguments of `Process.loss`, and the condition: this process's rows of a global batch."""

    x_0: Tensor
    y: Tensor | None
    t: Tensor
    noise: Tensor
    planes: Tensor | None = None  # see `conditioned`


def quartile_of(t: Tensor, num_timesteps: int) -> Tensor:
    """Which of `QUARTILES` each t, (b,) int64, is in: its quarter of [0, num_timesteps). The first
    one has the least noise."""
    return t * len(QUARTILES) // num_timesteps


def training_examples(
    config: Config, process: Process, dataset: ImageDataset, runtime: Runtime, start_step: int = 0
) -> Iterator[Example]:
    """Yield this rank's training examples, one a step, from `start_step` on, without end.

    Timesteps and dropped labels, a number a row, are drawn for the whole global batch and cut to
    this rank's rows, noise in blocks of rows, see `batch_noise`. So training does not depend on the
    number of processes.
    """
    batch_size, device, share = config.batch_size, runtime.device, runtime.share(config.batch_size)
    rows = slice(share.start, share.stop)
    settings = dict(batch_size=batch_size, seed=config.seed, start_step=start_step, rows=rows)
    settings |= dict(horizontal_flip=default_flip(config), num_workers=config.num_workers)
    settings["device"] = device
    images, partners = batches(dataset, **settings), getattr(dataset, "partners", None)
    pictures = repeat((None, None)) if partners is None else batches(partners, **settings)
    is_float = config.condition is not None and dataset[0][0].is_floating_point()
    generator = partial(torch_generator, config.seed, device=device)
    draw_timesteps = partial(DENSITIES[config.timestep_sampling], process, config)
    steps = zip(count(start_step), images, pictures, strict=False)
    for step, (x_0, labels), (picture, _) in steps:
        t = draw_timesteps(batch_size, generator(Stream.TIMESTEP, step))
        noise = batch_noise(x_0, share, batch_size=batch_size, seed=config.seed, step=step)
        y = labels if config.conditional else None
        if config.label_dropout > 0:
            draws = generator(Stream.LABEL_DROPOUT, step)
            chance = torch.rand(batch_size, generator=draws, device=device)
            y = labels.masked_fill(chance[rows] < config.label_dropout, NULL_LABEL)
        planes = None
        if config.condition is not None:
            pixels = x_0 if is_float else to_uint8(x_0)
            keys = [(config.seed, Stream.CONDITION, step, row) for row in share]
            planes = planes_of(config, pixels, picture, keys)
            draws = numpy_generator(config.seed, Stream.CONDITION_DROPOUT, step)
            chance = torch.from_numpy(draws.random((batch_size, 1, 1, 1))[rows]).to(device)
            planes = planes.masked_fill(chance < config.condition_dropout_prob, 0)
        yield Example(x_0, y, t[rows], noise, planes)
