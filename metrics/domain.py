"""Distances between generated and real images in the features of a classifier of that data.

Frechet distance and precision, recall, density, coverage: as with Inception, but with features that
fit the data, need no download and mean something on grey images. Values compare only under one
classifier.
"""

from __future__ import annotations

from torch import Tensor

from metrics.base import Entry, Metric, measured, number
from metrics.class_accuracy import ClassifierViews
from metrics.fid import frechet_distance
from metrics.moments import FeatureMoments
from metrics.prdc import Prdc, prdc_entry, searched


class FdDomain(Metric):
    """The Frechet distance in the classifier's features, beside that of unseen real images."""

    better = "lower"
    real_images = True
    classes = True
    collector = ClassifierViews
    keeps = "domain"

    def compute(self) -> Entry:
        seen: ClassifierViews = self.collected
        num_images, num_real, dim = seen.num_images, *seen.real.shape
        counts = f"{num_images} generated and {num_real} real images"
        if min(num_images, num_real) < 2:
            return seen.judged(measured(None, f"{counts} have no covariance"))
        target = _gaussian(seen.real)
        distance, baseline = frechet_distance(*seen.moments.mean_cov(), *target), None
        if len(seen.unseen) >= 2:
            baseline = frechet_distance(*_gaussian(seen.unseen), *target).value
        few = min(num_images, num_real) <= dim
        result = measured(
            distance.value,
            f"{counts} are too few for a covariance of {dim} features" if few else None,
            raw=distance.raw,
            real_value=baseline,  # unseen real images: what a perfect model would get
            n=num_images,
            n_real=num_real,
            n_unseen=len(seen.unseen),
            num_features=dim,
        )
        return seen.judged(result)

    @classmethod
    def note(cls, result: Entry) -> str:
        return f"unseen real images {number(result['real_value'])}"


class PrdcDomain(Prdc):
    """Precision, recall, density and coverage in the classifier's features."""

    network = None
    classes = True
    collector = ClassifierViews
    keeps = "domain"

    def compute(self) -> Entry:
        seen: ClassifierViews = self.collected
        real = seen.real[searched(len(seen.real))]
        return seen.judged(prdc_entry(real, seen.kept.values))


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    moments = FeatureMoments(features.shape[1])
    moments.update(features)
    return moments.mean_cov()
