"""Statistics of real images in a file: mean and covariance of Inception features.

The arrays `mu` and `sigma` of an .npz are what pytorch-fid, EDM and ADM write and read; ours add
the number of images and how the statistics were made, as JSON in `meta`.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.errors import ConfigError
from utils.files import atomic_path


class Reference(NamedTuple):
    """The statistics that FID takes of one set of images."""

    mu: Tensor  # their mean (D,), float64
    sigma: Tensor  # their covariance (D, D), float64
    num_images: int | None = None  # None where the file does not say
    meta: Mapping[str, Any] = MappingProxyType({})  # what identifies them; empty in others' files


def read_reference(path: str | Path, dim: int) -> Reference:
    """Read an .npz with statistics of `dim` features.

    Raises a ConfigError if it is missing, damaged, would run code, or is of another network.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        mu, sigma = (torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma"))
        meta = json.loads(str(arrays.get("meta", "{}")))
        num_images = int(arrays["num_images"]) if "num_images" in arrays else None
    except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"--reference {path}: cannot be read ({error}); it takes an .npz with the plain arrays "
            "mu and sigma, as --write_reference makes it"
        ) from error
    if mu.shape != (dim,) or sigma.shape != (dim, dim):
        shapes = f"mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)}"
        raise ConfigError(f"--reference {path}: {shapes} are not of {dim} features")
    return Reference(mu, sigma, num_images, meta)


def write_reference(path: Path, reference: Reference) -> None:
    """Write the statistics to an .npz, the whole file or none; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "mu": reference.mu.cpu().numpy(),
        "sigma": reference.sigma.cpu().numpy(),
        "meta": np.array(json.dumps(dict(reference.meta))),
    }
    if reference.num_images is not None:
        arrays["num_images"] = np.array(reference.num_images)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
