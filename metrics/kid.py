"""Kernel Inception distance (Binkowski et al. 2018, arXiv:1801.01401).

Unbiased also at few images, unlike FID; so it can be slightly negative. Takes the same subsets as
torch-fidelity's `kid_features_to_metric`, but in float64: its float32 sums are off by up to 1e-7.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from metrics.features import Features, as_features

NUM_SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020  # torch-fidelity's


class Kid(NamedTuple):
    """Over subsets: mean and deviation. Subsets as large as both sets are all equal: std = 0."""

    mean: float
    std: float
    subset_size: int


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(m, D), (n, D) -> (m, n): (x . y / D + 1)^3."""
    root = x @ y.T / x.shape[1] + 1
    return root * root * root  # `** 3` is slow


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared mean discrepancy of (m, D) and (n, D) (Gretton et al. 2012, eq. 3)."""
    m, n = len(x), len(y)
    xx, yy = kernel(x, x), kernel(y, y)
    within = (xx.sum() - xx.trace()) / (m * (m - 1)) + (yy.sum() - yy.trace()) / (n * (n - 1))
    return float(within - 2 * kernel(x, y).mean())


def kernel_inception_distance(
    features1: Features | np.ndarray | Tensor,
    features2: Features | np.ndarray | Tensor,
    *,
    num_subsets: int = NUM_SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = SEED,
) -> Kid:
    """Mean squared MMD of subsets of (N1, D) and (N2, D); smaller sets have smaller subsets.

    Raises:
        ValueError: fewer than 2 images, another D, or features that are not finite.
    """
    sets = as_features(features1), as_features(features2)
    size = min(subset_size, *map(len, sets))
    if size < 2 or num_subsets < 1:
        raise ValueError(f"KID needs subsets of 2 images, got {num_subsets} of {size}")
    dim1, dim2 = (f.rows(slice(0, 1)).shape[1] for f in sets)
    if dim1 != dim2:
        raise ValueError(f"KID needs features of one D, got {dim1} and {dim2}")
    rng = np.random.RandomState(seed)
    values = np.empty(num_subsets)
    for i in range(num_subsets):
        x, y = (f.rows(rng.choice(len(f), size, replace=False)).astype(np.float64) for f in sets)
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ValueError("features are not finite")
        values[i] = squared_mmd(x, y)
    return Kid(float(values.mean()), float(values.std()), size)
