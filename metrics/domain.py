"""Distances between generated and real images in the features of a classifier of that data.

Frechet distance and precision, recall, density, coverage: as with Inception, but with features that
fit the data, need no download and mean something on grey images. Values compare only under one
classifier.
"""

from __future__ import annotations

from torch import Tensor

from metrics.base import Entry, Metric, entry, number
from metrics.class_accuracy import ClassifierViews
from metrics.fid import frechet_distance
from metrics.moments import FeatureMoments
from metrics.prdc import Prdc, prdc, searched, too_few


class FdDomain(Metric):
    """The Frechet distance in the classifier's features, beside that of unseen real images."""

    better = "lower"
    real_images = True
    classes = True
    collector = ClassifierViews
    keeps = "domain"

    def compute(self) -> Entry:
        return self.collected.judged(self._distance(self.collected))

    def _distance(self, seen: ClassifierViews) -> Entry:
        num_images, num_real = seen.num_images, len(seen.real)
        counts = f"{num_images} generated and {num_real} real images"
        if min(num_images, num_real) < 2:
            return entry("unreliable", None, f"{counts} have no covariance")
        target = _moments(seen.real).mean_cov()
        distance = frechet_distance(*seen.moments.mean_cov(), *target)
        baseline = None
        if len(seen.unseen) >= 2:
            baseline = frechet_distance(*_moments(seen.unseen).mean_cov(), *target).value
        dim = seen.real.shape[1]
        few = min(num_images, num_real) <= dim
        return entry(
            "unreliable" if few else "ok",
            distance.value,
            f"{counts} are too few for a covariance of {dim} features" if few else None,
            raw=distance.raw,
            real_value=baseline,  # unseen real images: what a perfect model would get
            n=num_images,
            n_real=num_real,
            n_unseen=len(seen.unseen),
            num_features=dim,
            better=self.better,
        )

    @classmethod
    def note(cls, result: Entry) -> str:
        if result["value"] is None:
            return ""
        return f"unseen real images {number(result['real_value'])}"


class PrdcDomain(Prdc):
    """Precision, recall, density and coverage in the classifier's features."""

    network = None
    classes = True
    collector = ClassifierViews
    keeps = "domain"

    def compute(self) -> Entry:
        seen: ClassifierViews = self.collected
        if reason := too_few(len(seen.real), len(seen.kept.values)):
            return seen.judged(entry("unreliable", None, reason))
        shares = prdc(seen.real[searched(len(seen.real))], seen.kept.values)
        result = entry("ok", shares.precision, **shares._asdict(), better=self.better)
        return seen.judged(result)


def _moments(features: Tensor) -> FeatureMoments:
    moments = FeatureMoments(features.shape[1])
    moments.update(features)
    return moments
