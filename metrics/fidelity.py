"""Kernel Inception distance (Binkowski et al. 2018, arXiv:1801.01401) and Inception score
(Salimans et al. 2016, arXiv:1606.03498), by torch-fidelity."""

from __future__ import annotations

from torch import Tensor

from metrics.base import Entry, Metric, measured, number
from metrics.fid import SINGULAR_BELOW, inception_warnings
from metrics.inception import INCEPTION, InceptionFeatures

NUM_SUBSETS, SUBSET_SIZE = 100, 1000
NUM_SPLITS = 10


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
    result = kid_features_to_metric(
        *sets, kid_subsets=NUM_SUBSETS, kid_subset_size=subset_size, verbose=False
    )
    return tuple(result[f"kernel_inception_distance_{part}"] for part in ("mean", "std"))


class Kid(Metric):
    """The kernel distance between the Inception features of generated and real images."""

    better = "lower"
    network = INCEPTION
    real_images = True
    collector = InceptionFeatures
    keeps = "features"

    def compute(self) -> Entry:
        seen: InceptionFeatures = self.collected
        size = min(SUBSET_SIZE, seen.num_images, seen.num_real)
        if size < 2:
            return measured(None, "KID needs 2 images of each kind", **seen.counts())
        features = (kind.rows["features"] for kind in (seen.generated, seen.real))
        mean, std = kernel_distance(*features, subset_size=size)
        few = size < SUBSET_SIZE
        doubt = f"subsets of {size} images instead of {SUBSET_SIZE}" if few else None
        return measured(mean, doubt, std=std, subset_size=size, **seen.counts())

    @classmethod
    def note(cls, result: Entry) -> str:
        return f"+- {number(result['std'])} over subsets of {result['subset_size']}"


class InceptionScore(Metric):
    """How clear the ImageNet classes of the images are, and how varied."""

    better = "higher"
    network = INCEPTION
    collector = InceptionFeatures
    keeps = "logits"
    warnings = staticmethod(inception_warnings)

    def compute(self) -> Entry:
        from torch_fidelity.metric_isc import isc_features_to_metric

        seen: InceptionFeatures = self.collected
        count, num_splits = seen.num_images, min(NUM_SPLITS, seen.num_images)
        score = isc_features_to_metric(seen.generated.rows["logits"], splits=num_splits)
        mean, std = (score[f"inception_score_{part}"] for part in ("mean", "std"))
        doubt = f"biased low at {count} images" if count <= SINGULAR_BELOW else None
        details = {"num_splits": num_splits, "n": count, "extractor": seen.details}
        return measured(mean, doubt, std=std, **details)

    @classmethod
    def note(cls, result: Entry) -> str:
        return f"+- {number(result['std'])} over {result['num_splits']} splits"
