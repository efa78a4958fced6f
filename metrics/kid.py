"""Kernel Inception distance (Binkowski et al. 2018, arXiv:1801.01401), by torch-fidelity.

Unbiased also at few images, unlike FID; so it can be slightly negative.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from metrics.base import Entry, Metric, entry, number
from metrics.inception import INCEPTION, InceptionFeatures

NUM_SUBSETS, SUBSET_SIZE = 100, 1000


class KernelDistance(NamedTuple):
    """Mean and deviation over subsets. Subsets as large as both sets are all equal: std = 0."""

    mean: float
    std: float


def kernel_distance(generated: Tensor, real: Tensor, *, subset_size: int) -> KernelDistance:
    """Mean squared discrepancy of `NUM_SUBSETS` subsets of features (N, D) and (M, D), in float64.

    Raises:
        ValueError: features that are not finite.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    if not (generated.isfinite().all() and real.isfinite().all()):
        raise ValueError("features are not finite")
    result = kid_features_to_metric(
        generated.double(),
        real.double(),
        kid_subsets=NUM_SUBSETS,
        kid_subset_size=subset_size,
        verbose=False,
    )
    return KernelDistance(
        result["kernel_inception_distance_mean"], result["kernel_inception_distance_std"]
    )


class Kid(Metric):
    """The kernel distance between the Inception features of generated and real images."""

    better = "lower"
    network = INCEPTION
    real_images = True
    collector = InceptionFeatures
    keeps = "features"

    def compute(self) -> Entry:
        seen: InceptionFeatures = self.collected
        counts = {"n": seen.num_images, "n_real": seen.num_real, "extractor": seen.details}
        size = min(SUBSET_SIZE, seen.num_images, seen.num_real)
        if size < 2:
            return entry("unreliable", None, "KID needs 2 images of each kind", **counts)
        features = (kind.rows["features"] for kind in (seen.generated, seen.real))
        distance = kernel_distance(*features, subset_size=size)
        few = size < SUBSET_SIZE
        return entry(
            "unreliable" if few else "ok",
            distance.mean,
            f"subsets of {size} images instead of {SUBSET_SIZE}" if few else None,
            std=distance.std,
            subset_size=size,
            better=self.better,
            **counts,
        )

    @classmethod
    def note(cls, result: Entry) -> str:
        if result["value"] is None:
            return ""
        return f"+- {number(result['std'])} over subsets of {result['subset_size']}"
