"""Randomness as a pure function of (seed, stream, index).

No generator lives longer than the thing it draws for, so nothing depends on how many numbers were
drawn before: resuming is exact, and previews, logging or worker counts cannot change training.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

NOISE_BLOCK = 128  # rows of a batch: one of no more, as by default, keeps the noise of older runs


class Stream(IntEnum):
    """One number per purpose. Values are part of the reproducibility contract: append only."""

    PERMUTATION = 0  # index: epoch
    FLIP = 1  # index: step
    TIMESTEP = 2  # index: step
    NOISE = 3  # index: step; of rows from the 128th on, block of rows
    LABEL_DROPOUT = 4  # index: step
    MODEL_DROPOUT = 5  # index: step, micro-batch of the global batch
    SAMPLE = 6  # index: none; the seed is the sample's own
    MODEL_INIT = 7  # index: none
    EVALUATION = 8  # index: what is drawn
    CLASSIFIER = 9  # index: epoch
    VALIDATION = 10  # index: image of the test split
    CONDITION = 11  # index: step, row of the global batch
    CONDITION_DROPOUT = 12  # index: step


class EvaluationDraw(IntEnum):
    """What `Stream.EVALUATION` draws. Values are part of the reproducibility contract."""

    CLASSIFIER_SPLIT = 3
    REAL_IMAGES = 4
    CHECKED_FOR_COPIES = 5
    STAND_INS_FOR_TEST_IMAGES = 6
    NEIGHBOUR_ROWS = 7
    LABELS = 8
    HOLES = 9
    GAPS = 10


def derive_seed(seed: int, stream: Stream, *index: int) -> int:
    """Mix the keys into 64 bits. (`seed + step` would make run 0 step 6 equal run 1 step 5.) Not
    every generator takes them all: torch's on a CPU, an MT19937, is seeded by 32 bits."""
    return int(_mix(seed, stream, *index).generate_state(1, np.uint64)[0])


def torch_generator(
    seed: int, stream: Stream, *index: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh generator on `device`. CPU and CUDA draw different numbers from the same key."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, stream, *index))


def numpy_generator(seed: int, stream: Stream, *index: int) -> np.random.Generator:
    """A fresh Philox generator with a 128-bit key, so that no two of many keys collide."""
    return np.random.Generator(np.random.Philox(_mix(seed, stream, *index)))


def _mix(seed: int, stream: Stream, *index: int) -> np.random.SeedSequence:
    # SeedSequence strings 32-bit words together: with a long seed written out first, (5 + 2**32, 3)
    # would be (5, 1, 3). So what a seed has above 32 bits comes last.
    high = seed >> 32
    return np.random.SeedSequence((seed & 0xFFFFFFFF, stream, *index, *((high,) if high else ())))


def fixed_subset(num_items: int, limit: int | None, *index: int) -> np.ndarray:
    """At most `limit` of `num_items` (None: all) as sorted int64 indices, spread at random, as data
    sets are often sorted by class. A function of the arguments alone; `index` says which subset it
    is, see `EvaluationDraw`."""
    return np.sort(numpy_generator(0, Stream.EVALUATION, *index).permutation(num_items)[:limit])


def seed_everything(seed: int) -> None:
    """Seed the global torch generators (weight initialisation and dropout draw from them)."""
    torch.manual_seed(derive_seed(seed, Stream.MODEL_INIT))


def batch_noise(like: Tensor, rows: range, *, batch_size: int, seed: int, step: int) -> Tensor:
    """The noise of `rows` of a step's global batch: standard normals as `like`, (len(rows), ...).

    Each `NOISE_BLOCK` rows of the batch, the last maybe fewer, have a generator of their own, which
    draws where some of `rows` are among them. So the noise is that of any number of processes.
    """
    noise, device = like.new_empty(like.shape), like.device
    for first in range(rows.start - rows.start % NOISE_BLOCK, rows.stop, NOISE_BLOCK):
        index = (first // NOISE_BLOCK,) if first else ()  # of the first, the step alone is the key
        draws = torch_generator(seed, Stream.NOISE, step, *index, device=device)
        size = (min(NOISE_BLOCK, batch_size - first), *like.shape[1:])
        block = torch.randn(size, generator=draws, device=device)
        start, stop = max(first, rows.start), min(first + NOISE_BLOCK, rows.stop)
        noise[start - rows.start : stop - rows.start] = block[start - first : stop - first]
    return noise


def sample_noise(seeds: list[int], device: torch.device) -> Callable[[tuple[int, ...]], Tensor]:
    """Per-image noise: row i of every draw comes from `seeds[i]` alone.

    Drawn on the CPU, so an image does not depend on batch size, process count or device type. The
    function returned gives float32 standard normals of a shape (B, ...), B = len(seeds), on
    `device`; its n-th call gives each image its n-th draw.
    """
    generators = [numpy_generator(seed, Stream.SAMPLE) for seed in seeds]

    def draw(shape: tuple[int, ...]) -> Tensor:
        if shape[0] != len(generators):
            raise ValueError(f"{shape[0]} rows asked of {len(generators)} per-image generators")
        rows = [g.standard_normal(shape[1:], dtype=np.float32) for g in generators]
        noise = torch.from_numpy(np.stack(rows))
        if device.type == "cuda":  # pinned, so the host draws on while the device still computes
            return noise.pin_memory().to(device, non_blocking=True)
        return noise.to(device)

    return draw
