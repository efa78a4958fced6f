"""The one label that is not a class, and which classes to ask for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import ConfigError
from utils.files import numbered, write_text
from utils.images import image_suffix, save_image
from utils.rng import EvaluationDraw, Stream, numpy_generator

NULL_LABEL = -1  # "no class"; users and data sets only ever see 0..K-1
LABELS_FILE = "labels.json"  # in a flat folder of pictures: {"000000.png": 3, ...}
LABEL_MODES = ("balanced", "train", "uniform")


def requested_labels(
    mode: str,
    count: int,
    num_classes: int,
    *,
    classes: Sequence[int] | None = None,
    train_labels: Tensor | None = None,
) -> list[int]:
    """The classes, in [0, num_classes), of images 0, 1, ... `count` - 1, whatever `count` is.
    Another mode or class is a ConfigError, and so is "train" without train images.

    Args:
        mode: "balanced" (one class after the other), "uniform" (drawn), "train" (drawn as often as
            in the train images) or the number of a class.
        classes: the classes to choose from; default: all.
        train_labels: int64 (N,), the classes of the train images. Only "train" needs them.
    """
    classes = range(num_classes) if classes is None else classes
    if mode == "balanced":
        return [classes[i % len(classes)] for i in range(count)]
    if mode.isdecimal() and len(mode) < 20:  # Python reads no number of 5,000 digits
        if int(mode) < num_classes:
            return [int(mode)] * count
        raise ConfigError(f"--label_mode {mode}: classes are 0..{num_classes - 1}")
    if mode not in LABEL_MODES:
        raise ConfigError(f"--label_mode {mode!r}: use {', '.join(LABEL_MODES)} or a class number")
    counts = torch.zeros(num_classes)
    counts[list(classes)] = 1
    if mode == "train":
        if train_labels is None:
            raise ConfigError("--label_mode train: there are no train images to count classes in")
        counts = train_labels.bincount(minlength=num_classes)
    # Doubles, one an image: the classes of the first images do not depend on `count`.
    drawn = numpy_generator(0, Stream.EVALUATION, EvaluationDraw.LABELS).random(count)
    edges = counts.double().cumsum(0) / counts.sum()
    return torch.searchsorted(edges[:-1], torch.from_numpy(drawn), right=True).tolist()


def save_labels(folder: Path, labels: Sequence[int] | None, names: Sequence[str]) -> None:
    """Write the classes of pictures to `folder`: it can be trained on, or evaluated. After
    the pictures: until then, and with None, `forget_labels` sees to it that they have none."""
    if labels is not None:
        named = dict(zip(names, labels, strict=True))
        write_text(folder / LABELS_FILE, json.dumps(named))


def forget_labels(folder: Path) -> None:
    """Remove the classes of older pictures, before the first new one takes the name of one."""
    (folder / LABELS_FILE).unlink(missing_ok=True)


def save_images(
    folder: Path, images: Tensor, labels: Sequence[int] | None, stems: Sequence[str] = ()
) -> None:
    """Write images (B, C, H, W) to `folder`, as `stems` or 000000 ..., and then their classes."""
    forget_labels(folder)
    suffix = image_suffix(images.shape[1], images.dtype == torch.uint8)
    names = [stem + suffix for stem in stems or numbered(len(images))]
    for i, image in enumerate(images):
        save_image(folder / names[i], image)
    save_labels(folder, labels, names)
