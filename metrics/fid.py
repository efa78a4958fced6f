"""Frechet distance between two Gaussians (Heusel et al. 2017, arXiv:1706.08500, eq. 6)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from metrics.base import Entry, Metric, Row, measured
from metrics.inception import INCEPTION, InceptionFeatures

# A covariance of D = 2048 features is singular at or below this many images.
SINGULAR_BELOW = 2048
COMPARABLE_FROM = 10_000


class Frechet(NamedTuple):
    """`value` is `raw` clamped at 0: a set against itself gives -1e-13 to -1e-7."""

    value: float
    raw: float


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> Frechet:
    """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)), in float64.

    Takes means (D,) and covariances (D, D); raises a ValueError if their shapes do not fit or a
    value is not finite. With any R for which R R^T = S1 the last trace is the sum of the root
    eigenvalues of R^T S2 R. It is symmetric, so they are real. R is a Cholesky factor, or, where a
    covariance is singular (fewer images than features), made of eigenvectors.
    """
    mu1, sigma1, mu2, sigma2 = (x.double().cpu() for x in (mu1, sigma1, mu2, sigma2))
    dim = len(mu1)
    if mu1.shape != mu2.shape or sigma1.shape != (dim, dim) or sigma2.shape != (dim, dim):
        shapes = [tuple(x.shape) for x in (mu1, sigma1, mu2, sigma2)]
        raise ValueError(f"need means (D,) and covariances (D, D) of one D, got {shapes}")
    if not all(x.isfinite().all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("features are not finite")
    root, failed = torch.linalg.cholesky_ex(sigma1)
    if failed:
        eigenvalues, vectors = torch.linalg.eigh(sigma1)
        root = vectors * eigenvalues.clamp(min=0).sqrt()
    product = root.T @ (sigma2 @ root)
    cross = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()  # reads its lower triangle
    raw = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return Frechet(max(0.0, raw.item()), raw.item())


def count_name(num_images: int) -> str:
    """`50000` -> `fid_50k`, `64` -> `fid_64`: values of different counts are not comparable."""
    thousands, rest = divmod(num_images, 1000)
    return f"fid_{thousands}k" if thousands and not rest else f"fid_{num_images}"


def inception_warnings(num_images: int, channels: int) -> Iterator[str]:
    """What to know about FID and the Inception score of so many images."""
    if num_images <= SINGULAR_BELOW:
        yield f"{num_images} images are too few for FID and IS: the values are unreliable"
    elif num_images < COMPARABLE_FROM:
        yield (
            f"FID of {num_images} images is biased upward and not comparable with published "
            "values, which use 50,000"
        )
    if channels == 1:
        yield (
            "FID and IS come from a network that has seen colour photographs: on grey images "
            "read class_acc first"
        )


class Fid(Metric):
    """The Frechet distance between the Inception features of generated and real images."""

    better = "lower"
    network = INCEPTION
    real_images = True
    statistics_suffice = True
    collector = InceptionFeatures
    keeps = "moments"
    warnings = staticmethod(inception_warnings)

    def compute(self) -> Entry:
        seen: InceptionFeatures = self.collected
        num_real = seen.num_real if seen.reference is None else seen.reference.num_images
        counts = f"{seen.num_images} generated and {num_real or 'unknown'} real images"
        if seen.num_images < 2 or (seen.reference is None and seen.num_real < 2):
            return measured(None, f"{counts} have no covariance")
        real, dim, doubt = seen.statistics(), seen.extractor.feature_dim, None
        distance = frechet_distance(*seen.generated.moments.mean_cov(), real.mu, real.sigma)
        if min(seen.num_images, num_real or math.inf) <= SINGULAR_BELOW:
            doubt = f"{counts} are too few for a covariance of {dim} features"
        return measured(
            distance.value,
            doubt,
            name=count_name(seen.num_images),
            raw=distance.raw,
            n=seen.num_images,
            n_real=num_real,
            extractor=seen.details,
            reference=dict(seen.reference.meta) or None if seen.reference else None,
        )

    @classmethod
    def rows(cls, name: str, result: Entry) -> list[Row]:
        return super().rows(result.get("name", name), result)
