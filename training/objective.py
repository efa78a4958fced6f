"""What each optimizer step trains on: images, labels, timesteps and noise, keyed by the step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from training.progress import Buckets
from utils.labels import NULL_LABEL
from utils.rng import Stream, torch_generator


class Example(NamedTuple):
    """The arguments of `GaussianDiffusion.loss`, this process's rows of one global batch."""

    x_0: Tensor
    y: Tensor | None
    t: Tensor
    noise: Tensor


def timestep_quartiles(num_timesteps: int) -> Buckets:
    """Examples by the quarter of [0, num_timesteps) that t lies in; q1 has the least noise."""
    names = tuple(f"train/loss_q{k}" for k in (1, 2, 3, 4))
    return Buckets(names, lambda example: example.t * len(names) // num_timesteps)


def training_examples(
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    num_timesteps: int,
    batch_size: int,
    rows: slice,
    seed: int,
    conditional: bool,
    label_dropout: float,
    start_step: int = 0,
) -> Iterator[Example]:
    """Add t, noise and dropped labels to (images, labels) batches that begin at `start_step`.

    Everything is drawn for the whole global batch and cut to `rows`, so that training does not
    depend on the number of processes.
    """
    for step, (x_0, labels) in zip(count(start_step), batches, strict=False):
        device = x_0.device

        def draws(stream: Stream, step: int = step, device: torch.device = device):
            return torch_generator(seed, stream, step, device=device)

        t = torch.randint(
            num_timesteps, (batch_size,), generator=draws(Stream.TIMESTEP), device=device
        )
        noise = torch.randn(
            (batch_size, *x_0.shape[1:]), generator=draws(Stream.NOISE), device=device
        )
        y = labels if conditional else None
        if conditional and label_dropout > 0:
            chance = torch.rand(batch_size, generator=draws(Stream.LABEL_DROPOUT), device=device)
            y = labels.masked_fill(chance[rows] < label_dropout, NULL_LABEL)
        yield Example(x_0, y, t[rows], noise[rows])
