"""Frechet distance between two Gaussians (Heusel et al. 2017, arXiv:1706.08500, eq. 6)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A covariance of D = 2048 features is singular at or below this many images.
SINGULAR_BELOW = 2048
COMPARABLE_FROM = 10_000


class Frechet(NamedTuple):
    """`value` is `raw` clamped at 0: a set against itself gives -1e-13 to -1e-7."""

    value: float
    raw: float


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> Frechet:
    """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)), in float64.

    With any R for which R R^T = S1 the last trace is the sum of the root eigenvalues of R^T S2 R.
    It is symmetric, so they are real. R is a Cholesky factor, or, where a covariance is singular
    (fewer images than features), made of eigenvectors.

    Args:
        mu1, mu2: (D,) means.
        sigma1, sigma2: (D, D) covariances.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
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
