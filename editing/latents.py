"""Noise kept in a file, to sample from later: what `edit.py invert` found for some pictures."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.errors import DataError
from utils.images import ImageSpec


class Latents(NamedTuple):
    """Attributes:
    noise: float32 (N, C, H, W), `x_T` in the file.
    labels: the class of each, None without classes.
    num_inference_steps, cfg_scale: those they were found with.
    """

    noise: Tensor
    labels: list[int] | None
    num_inference_steps: int
    cfg_scale: float


def save_latents(path: Path, latents: Latents) -> None:
    """
    Raises:
        OSError: the disk refuses.
    """
    labels = {} if latents.labels is None else {"labels": np.array(latents.labels)}
    np.savez_compressed(
        path,
        x_T=latents.noise.numpy(),
        num_inference_steps=latents.num_inference_steps,
        cfg_scale=latents.cfg_scale,
        **labels,
    )


def read_latents(path: str | Path, spec: ImageSpec) -> Latents:
    """
    Raises:
        DataError: not such a file, or not for images of this shape.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            x_T = stored["x_T"]
            steps, scale = int(stored["num_inference_steps"]), float(stored["cfg_scale"])
            labels = stored["labels"] if "labels" in stored.files else None
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not what edit.py invert writes ({error})") from error
    if x_T.dtype != np.float32 or x_T.shape[1:] != spec.shape or not len(x_T):
        raise DataError(
            f"{path}: x_T is {x_T.dtype} {x_T.shape}, but the model draws from float32 (N, "
            f"{', '.join(map(str, spec.shape))})"
        )
    if not np.isfinite(x_T).all():
        raise DataError(f"{path}: x_T is not finite")
    if labels is not None and (labels.shape != x_T.shape[:1] or labels.dtype.kind not in "iu"):
        raise DataError(f"{path}: labels: {labels.dtype} {labels.shape}, not {len(x_T)} integers")
    given = None if labels is None else labels.tolist()
    return Latents(torch.from_numpy(x_T), given, steps, scale)
