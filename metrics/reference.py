"""Mean and covariance of features: streamed and summed over processes, and in a file.

The arrays `mu` and `sigma` of an .npz are what pytorch-fid, EDM and ADM write and read, `mu_s` and
`sigma_s` what ADM adds for sFID; ours add the number of images and how the statistics were made, as
JSON in `meta`.
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

from utils.distributed import Runtime
from utils.errors import ConfigError, show
from utils.files import read_npz, write_npz

# Metrics whose statistics a file may hold: how many features, and how the arrays' names end
GIVEN = {"fid": (2048, ""), "sfid": (2023, "_s"), "fd_dinov2": (1024, "_dinov2")}
ROUNDING = 1e-5  # share of the largest variance by which a covariance may be off
BLOCK = 256  # rows of the sum of outer products that one matrix product adds to


def float64_device(device: torch.device | str) -> torch.device:
    """The device if it can compute in float64, else the CPU: MPS (Apple GPUs) has no float64."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


class FeatureMoments:
    """Count, sum and sum of outer products of features, in float64.

    In float32 the covariance is lost where the mean is large beside the spread. Of `outer`, which
    is symmetric, only the blocks on and below the diagonal are filled: nearly half the work.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        device = float64_device(device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add features (b, D); b may be 0."""
        x = features.to(self.sum.device).double()
        self.count += len(x)
        self.sum += x.sum(0)
        for start in range(0, x.shape[1], BLOCK):
            stop = start + BLOCK
            self.outer[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])

    def all_reduce(self, runtime: Runtime) -> None:
        for total in (self.count, self.sum, self.outer):
            runtime.all_reduce(total)

    def mean_cov(self) -> tuple[Tensor, Tensor]:
        """(D,) mean and (D, D) unbiased covariance; a ValueError for fewer than two images."""
        count = self.count.item()
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 images, there are {count:.0f}")
        mean, outer = self.sum / count, self.outer.tril()
        outer += outer.tril(-1).T
        return mean, outer.addr_(mean, mean, alpha=-count).div_(count - 1)


class Reference(NamedTuple):
    """The statistics that FID takes of one set of images."""

    mu: Tensor  # their mean (D,), float64
    sigma: Tensor  # their covariance (D, D), float64
    num_images: int | None = None  # None where the file does not say
    meta: Mapping[str, Any] = MappingProxyType({})  # what identifies them; empty in others' files


def given_references(path: str | Path) -> dict[str, Reference]:
    """Those of `GIVEN` in an .npz, of which `fid` has to be there; see `read_reference`."""
    references = {"fid": read_reference(path, *GIVEN["fid"])}
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    others = {name: how for name, how in GIVEN.items() if f"mu{how[1]}.npy" in names}
    return {name: read_reference(path, *how) for name, how in others.items()} | references


def read_reference(path: str | Path, dim: int, end: str = "") -> Reference:
    """Read an .npz with statistics of `dim` features, in arrays whose names have this end.

    Raises a ConfigError if it is missing, damaged, would run code, or is of another network.
    """
    try:
        names = [f"mu{end}", f"sigma{end}"]
        arrays = read_npz(path, names, ["meta", "num_images"])
        if any(arrays[name].dtype.kind not in "fiu" for name in names):
            raise ValueError("mu and sigma are no real numbers")
        mu, sigma = (torch.from_numpy(arrays[name].astype(np.float64)) for name in names)
        meta = json.loads(str(arrays.get("meta", "{}")))
        num_images = int(arrays["num_images"]) if "num_images" in arrays else None
        if not isinstance(meta, dict) or (num_images is not None and num_images < 2):
            raise ValueError("meta is no JSON object, or num_images is below 2")
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        needs = "an .npz with plain arrays mu and sigma is needed, as --write_reference makes it"
        raise ConfigError(f"--reference {show(path)}: cannot be read ({error}); {needs}") from error
    if mu.shape not in ((dim,), (1, dim)) or sigma.shape != (dim, dim):
        shapes = f"{names[0]} {tuple(mu.shape)} and {names[1]} {tuple(sigma.shape)}"
        raise ConfigError(f"--reference {show(path)}: {shapes} are not of {dim} features")
    if problem := covariance_problem(mu, sigma):
        raise ConfigError(f"--reference {show(path)}: {problem}; write the statistics anew")
    return Reference(mu.view(dim), sigma, num_images, meta)


def covariance_problem(mu: Tensor, sigma: Tensor) -> str | None:
    """Why these, float64, are no mean and covariance (D, D); None if they are, up to rounding."""
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        return "mu or sigma is not finite"
    slack = ROUNDING * sigma.diagonal().abs().max()  # of files in float32
    if not torch.allclose(sigma, sigma.T, rtol=0, atol=slack):
        return "sigma is no covariance, it is not symmetric"
    lowest = torch.linalg.eigvalsh(sigma)[0]
    return None if lowest >= -slack else f"sigma is no covariance, it has the eigenvalue {lowest:g}"


def write_reference(path: Path, reference: Reference) -> None:
    """Write the statistics to an .npz, the whole file or none; makes its folder."""
    arrays = {name: getattr(reference, name).cpu().numpy() for name in ("mu", "sigma")}
    arrays["meta"] = np.array(json.dumps(dict(reference.meta)))
    if reference.num_images is not None:
        arrays["num_images"] = np.array(reference.num_images)
    write_npz(path, **arrays)
