"""Frechet distances (FID and the like), KID and IS, all from features of pretrained networks.

The Frechet distance between two Gaussians is that of Heusel et al. 2017, arXiv:1706.08500, eq. 6.
The kernel distance (Binkowski et al. 2018, arXiv:1801.01401) and the Inception score (Salimans et
al. 2016, arXiv:1606.03498) are torch-fidelity's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from metrics.base import Entry, Metric, measured, number
from metrics.features import DINOV2, EFFNET, INCEPTION, Features

SINGULAR_BELOW = 2048  # or at just as many images the covariance of 2048 features is singular
COMPARABLE_FROM = 10_000
NUM_SUBSETS, SUBSET_SIZE = 100, 1000  # KID: how many subsets, and images in each
NUM_SPLITS = 10  # Inception score: parts of which each has a score of its own


def frechet_distance(
    mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor
) -> tuple[float, float]:
    """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)), in float64.

    Takes means (D,) and covariances (D, D); raises a ValueError if a value is not finite. Returns
    the distance clamped at 0, and as it came out: a set against itself gives -1e-13 to -1e-7. With
    any R for which R R^T = S1 the last trace is the sum of the root eigenvalues of R^T S2 R. It is
    symmetric, so they are real. R is a Cholesky factor, or, where a covariance is singular (fewer
    images than features), made of eigenvectors.
    """
    mu1, sigma1, mu2, sigma2 = (x.double().cpu() for x in (mu1, sigma1, mu2, sigma2))
    if not all(x.isfinite().all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("features are not finite")
    root, failed = torch.linalg.cholesky_ex(sigma1)
    if failed:
        eigenvalues, vectors = torch.linalg.eigh(sigma1)
        root = vectors * eigenvalues.clamp(min=0).sqrt()
    product = root.T @ (sigma2 @ root)
    cross = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()  # reads its lower triangle
    raw = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(0.0, raw.item()), raw.item()


def count_name(num_images: int) -> str:
    """`50000` -> `fid_50k`, `64` -> `fid_64`: values of different counts are not comparable."""
    thousands, rest = divmod(num_images, 1000)
    return f"fid_{thousands}k" if thousands and not rest else f"fid_{num_images}"


def feature_warnings(num_images: int, channels: int) -> Iterator[str]:
    """What to know about distances in a network's features, and its scores, of so many images."""
    if num_images <= SINGULAR_BELOW:
        yield f"{num_images} images are too few for FID, IS and the like: the values are unreliable"
    elif num_images < COMPARABLE_FROM:
        yield (
            f"Frechet distances of {num_images} images are biased upward and not comparable with "
            "published values, which use 50,000"
        )
    if channels == 1:
        yield (
            "the networks behind FID, IS and the like have seen colour photographs: on grey images "
            "read class_acc first"
        )


class Fid(Metric):
    """The Frechet distance between the features of generated and real images."""

    better = "lower"
    network = INCEPTION
    real_images = True
    collector = Features
    keeps = "fid"  # also the name, in files, of statistics that can take the real images' place
    warnings = staticmethod(feature_warnings)

    def compute(self) -> Entry:
        seen: Features = self.collected
        reference = seen.references.get(self.keeps)
        num_real = seen.num_real if reference is None else reference.num_images
        counts = f"{seen.num_images} generated and {num_real or 'unknown'} real images"
        if seen.num_images < 2 or (reference is None and seen.num_real < 2):
            return measured(None, f"{counts} have no covariance")
        real, doubt = seen.statistics(self.keeps), None
        generated = seen.generated.moments[self.keeps].mean_cov()
        value, raw = frechet_distance(*generated, real.mu, real.sigma)
        if min(seen.num_images, num_real or math.inf) <= SINGULAR_BELOW:
            doubt = f"{counts} are too few for a covariance of {len(real.mu)} features"
        meta = dict(reference.meta) or None if reference else None
        details = {"raw": raw, **seen.counts(self.keeps), "n_real": num_real, "reference": meta}
        if self.keeps == "fid":
            details["name"] = count_name(seen.num_images)
        return measured(value, doubt, **details)


def kernel_distance(generated: Tensor, real: Tensor, *, subset_size: int) -> tuple[float, float]:
    """Compare `NUM_SUBSETS` subsets of features (N, D) and (M, D) in float64.

    Returns the mean squared discrepancy, and its deviation over the subsets. Subsets as large as
    both sets are all equal. The mean is unbiased, so it can be slightly negative. Raises a
    ValueError if the features are not finite.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    sets = [features.double() for features in (generated, real)]
    if not all(features.isfinite().all() for features in sets):
        raise ValueError("features are not finite")
    sizes = {"kid_subsets": NUM_SUBSETS, "kid_subset_size": subset_size}
    result = kid_features_to_metric(*sets, **sizes, verbose=False)
    return tuple(result[f"kernel_inception_distance_{part}"] for part in ("mean", "std"))


class Kid(Metric):
    """The kernel distance between the features of generated and real images."""

    better = "lower"
    network = INCEPTION
    real_images = True
    collector = Features
    keeps = "features"

    def compute(self) -> Entry:
        seen: Features = self.collected
        size = min(SUBSET_SIZE, seen.num_images, seen.num_real)
        if size < 2:
            return measured(None, "KID needs 2 images of each kind", **seen.counts())
        features = (kind.rows["features"] for kind in (seen.generated, seen.real))
        mean, std = kernel_distance(*features, subset_size=size)
        doubt = f"subsets of {size} images instead of {SUBSET_SIZE}" if size < SUBSET_SIZE else None
        return measured(mean, doubt, std=std, subset_size=size, **seen.counts())

    @classmethod
    def note(cls, result: Entry) -> str:
        return f"+- {number(result['std'])} over subsets of {result['subset_size']}"


class InceptionScore(Metric):
    """How clear the ImageNet classes of the images are, and how varied."""

    better = "higher"
    network = INCEPTION
    collector = Features
    keeps = "logits"
    warnings = staticmethod(feature_warnings)

    def compute(self) -> Entry:
        from torch_fidelity.metric_isc import isc_features_to_metric

        seen: Features = self.collected
        count, num_splits = seen.num_images, min(NUM_SPLITS, seen.num_images)
        score = isc_features_to_metric(seen.generated.rows["logits"], splits=num_splits)
        mean, std = (score[f"inception_score_{part}"] for part in ("mean", "std"))
        doubt = f"biased low at {count} images" if count <= SINGULAR_BELOW else None
        details = {"num_splits": num_splits, "n": count, "extractor": seen.details}
        return measured(mean, doubt, std=std, **details)

    @classmethod
    def note(cls, result: Entry) -> str:
        return f"+- {number(result['std'])} over {result['num_splits']} splits"


Sfid = type("Sfid", (Fid,), {"keeps": "sfid"})
FdDinov2 = type("FdDinov2", (Fid,), {"network": DINOV2, "keeps": "fd_dinov2"})
FdEffnet = type("FdEffnet", (Fid,), {"network": EFFNET, "keeps": "fd_effnet"})
KidDinov2 = type("KidDinov2", (Kid,), {"network": DINOV2})
KidEffnet = type("KidEffnet", (Kid,), {"network": EFFNET})
