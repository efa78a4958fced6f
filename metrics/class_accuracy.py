"""What a classifier trained on the real images makes of generated ones.

Does the model draw the class it was asked for? The classifier's own accuracy on unseen real images
is the ceiling of what generated ones can be expected to reach. Frechet distance and precision to
coverage are as with Inception, but in features that fit the data, need no download and mean
something on grey images. Values compare only under one classifier (`key` in the report).
"""

from __future__ import annotations

import torch
from torch import Tensor

from metrics.base import Entry, Metric, Row, measured, number
from metrics.classifier import ClassifierViews, accuracy, count_pairs
from metrics.fid import frechet_distance
from metrics.prdc import Prdc, prdc_entry
from metrics.reference import FeatureMoments
from reporting.pages import Picture
from utils.images import as_pictures, grid_rows, make_grid, to_array

UNSURE_BELOW = 0.5  # probability of the class that is seen


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson 1927); sensible at 0, 1 and small counts."""
    from scipy.stats import binomtest

    return tuple(binomtest(hits, count).proportion_ci(method="wilson"))


def per_class(confusion: Tensor) -> list[float | None]:
    """The accuracy of each class; None where it has no image."""
    hits, totals = confusion.diagonal().tolist(), confusion.sum(1).tolist()
    return [h / n if n else None for h, n in zip(hits, totals, strict=True)]


class ClassAccuracy(Metric):
    """The share of images in which the classifier sees the class that was asked for."""

    better = "higher"
    real_images = True
    classes = True
    labels = True
    collector = ClassifierViews
    keeps = "accuracy"

    def compute(self) -> Entry:
        seen: ClassifierViews = self.collected
        names, labels = seen.class_names, torch.tensor(seen.labels, dtype=torch.int64)
        confusion = count_pairs(labels, seen.views[:, 0].long(), len(names))
        hits, count = int(confusion.diagonal().sum()), seen.num_images
        shares = dict(zip(names, per_class(confusion), strict=True))
        real = dict(zip(names, per_class(seen.confusion), strict=True))
        known = {name: share for name, share in shares.items() if share is not None}
        result = measured(
            hits / count,
            ci95=list(wilson_interval(hits, count)),
            real_ceiling=accuracy(seen.confusion),
            per_class=shares,
            per_class_real=real,
            worst_class=min(known, key=known.get) if known else None,
            mean_requested_prob=seen.views[:, 2].mean().item(),
            unsure_share=(seen.views[:, 1] < UNSURE_BELOW).double().mean().item(),
            confusion=confusion.tolist(),
            n=count,
            n_real=int(seen.confusion.sum()),
        )
        return seen.judged(result)

    def pictures(self) -> dict[str, Picture]:
        mistakes, names = self.collected.mistakes, self.collected.class_names
        if not mistakes:
            return {}
        shown = self.collected.context.generated.shown
        images = as_pictures(torch.stack([image for image, *_ in mistakes]), shown)
        grid = make_grid(images, grid_rows(len(images)))
        told = (f"{names[asked]} drawn as {names[seen]}" for _, asked, seen in mistakes)
        return {"failures": Picture(to_array(grid), "Wrong classes", "; ".join(told))}

    @classmethod
    def note(cls, result: Entry) -> str:
        low, high = map(number, result["ci95"])
        real, unsure = number(result["real_ceiling"]), result["unsure_share"]
        blind = "(of noise, too, it can be sure: see fd_domain)"
        return f"95 % interval {low} to {high}, real images {real}, unsure {unsure:.1%} {blind}"

    @classmethod
    def table(cls, result: Entry) -> tuple[str, list[Row]] | None:
        shares, real = result.get("per_class"), result.get("per_class_real")
        rows = [(name, number(shares[name]), f"real {number(real[name])}") for name in shares or ()]
        return ("requested class, accuracy", rows) if rows else None


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
        target, baseline = _gaussian(seen.real), None
        value, raw = frechet_distance(*_gaussian(seen.features), *target)
        if len(seen.unseen) >= 2:  # real images, too: what a perfect model would get
            baseline, _ = frechet_distance(*_gaussian(seen.unseen), *target)
        few = min(num_images, num_real) <= dim
        doubt = f"{counts} are too few for a covariance of {dim} features" if few else None
        details = {"n": num_images, "n_real": num_real, "n_unseen": len(seen.unseen)}
        details |= {"num_features": dim, "raw": raw, "real_value": baseline}
        return seen.judged(measured(value, doubt, **details))

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
        return seen.judged(prdc_entry(seen.real, seen.features))


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    moments = FeatureMoments(features.shape[1])
    moments.update(features)
    return moments.mean_cov()
