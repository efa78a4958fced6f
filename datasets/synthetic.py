"""Drawn coloured shapes with labels: nothing to download, any size, ready in a moment."""

from __future__ import annotations

import math

import numpy as np
import torch

from datasets.decoding import fit_arrays
from datasets.storage import InMemoryDataset
from utils.config import Config
from utils.rng import Stream, numpy_generator

# Class -> distance in pixels of places (x, y) to the edge of a shape of circumradius about r;
# negative inside.
SHAPES = {
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) - 0.8 * r,
    "triangle": lambda x, y, r: np.maximum(math.sqrt(0.75) * abs(x) - 0.5 * y, y) - 0.5 * r,
    "cross": lambda x, y, r: np.minimum(
        np.maximum(abs(x) - 0.3 * r, abs(y) - r), np.maximum(abs(x) - r, abs(y) - 0.3 * r)
    ),
    "ring": lambda x, y, r: abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r,
    "diamond": lambda x, y, r: (abs(x) + abs(y) - r) * math.sqrt(0.5),
}
CLASS_NAMES = tuple(SHAPES)
NUM_IMAGES = {"train": 1200, "test": 300}
DEFAULT_SIZE = (32, 32)
DRAWING_SEED = 20240229  # the data set is the same for every run's seed


def build_synthetic(config: Config, split: str) -> InMemoryDataset:
    """Image i shows shape i mod 6; colours, place and size depend on (split, i) alone."""
    num_images = NUM_IMAGES[split]
    height, width = config.image_size or DEFAULT_SIZE
    part = list(NUM_IMAGES).index(split)
    draws = np.stack(
        [numpy_generator(DRAWING_SEED, Stream.SAMPLE, part, i).random(9) for i in range(num_images)]
    )
    labels = np.arange(num_images) % len(CLASS_NAMES)
    images = np.empty((num_images, height, width, 3), np.uint8)
    for label in range(len(CLASS_NAMES)):
        chosen = labels == label
        images[chosen] = draw_shapes(label, draws[chosen], height, width)
    fitted = fit_arrays(images, None, config.image_channels)
    return InMemoryDataset(fitted, torch.from_numpy(labels), CLASS_NAMES)


def draw_shapes(label: int, draws: np.ndarray, height: int, width: int) -> np.ndarray:
    """Draw one image of the shape `label` per row of `draws`.

    Args:
        draws: (n, 9) in [0, 1): radius, y, x, three of the colour, three of the background.

    Returns:
        uint8 (n, height, width, 3).
    """
    draws = draws.astype(np.float32)
    radius = (0.18 + 0.18 * draws[:, 0]) * min(height, width)
    centre_y = radius + draws[:, 1] * (height - 2 * radius)
    centre_x = radius + draws[:, 2] * (width - 2 * radius)
    colour = 96 + 159 * draws[:, 3:6]  # bright on dark, so that shapes stay visible in grey
    background = 32 * draws[:, 6:9]
    y = np.arange(height, dtype=np.float32)[None, :, None] + 0.5 - centre_y[:, None, None]
    x = np.arange(width, dtype=np.float32)[None, None, :] + 0.5 - centre_x[:, None, None]
    distance = SHAPES[CLASS_NAMES[label]](x, y, radius[:, None, None])
    coverage = np.clip(0.5 - distance, 0, 1)[..., None]
    pixels = background[:, None, None] + coverage * (colour - background)[:, None, None]
    return np.rint(pixels).astype(np.uint8)
