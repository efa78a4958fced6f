"""Does the model draw the class it was asked for? Judged by a classifier trained on real images."""

from __future__ import annotations

import torch

from metrics.base import Entry, Metric, Row, entry, number
from metrics.class_views import ClassifierViews
from metrics.classifier import accuracy, count_pairs, per_class
from reporting.html import Picture
from utils.images import grid_rows, make_grid, to_array

UNSURE_BELOW = 0.5  # probability of the class that is seen


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson 1927); sensible at 0, 1 and small counts."""
    from scipy.stats import binomtest

    if count == 0:
        return 0.0, 1.0
    return tuple(binomtest(hits, count).proportion_ci(method="wilson"))


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
        labels = torch.tensor(seen.labels, dtype=torch.int64)
        confusion = count_pairs(labels, seen.views[:, 0].long(), len(seen.class_names))
        count = seen.num_images
        hits = int(confusion.diagonal().sum())
        by_name = dict(zip(seen.class_names, per_class(confusion), strict=True))
        known = {name: share for name, share in by_name.items() if share is not None}
        result = entry(
            "ok",
            hits / count,
            None,
            ci95=list(wilson_interval(hits, count)),
            real_ceiling=accuracy(seen.confusion),
            per_class=by_name,
            per_class_real=dict(zip(seen.class_names, per_class(seen.confusion), strict=True)),
            worst_class=min(known, key=known.get) if known else None,
            mean_requested_prob=seen.views[:, 2].mean().item(),
            unsure_share=(seen.views[:, 1] < UNSURE_BELOW).double().mean().item(),
            confusion=confusion.tolist(),
            n=count,
            n_real=int(seen.confusion.sum()),
            better=self.better,
        )
        return seen.judged(result)

    def pictures(self) -> dict[str, Picture]:
        seen: ClassifierViews = self.collected
        if not seen.mistakes:
            return {}
        images = torch.stack([mistake.image for mistake in seen.mistakes])
        grid = make_grid(images, grid_rows(len(images)))
        names = seen.class_names
        told = (f"{names[m.requested]} drawn as {names[m.seen]}" for m in seen.mistakes)
        return {"failures": Picture(to_array(grid), "Wrong classes", "; ".join(told))}

    @classmethod
    def note(cls, result: Entry) -> str:
        low, high = result["ci95"]
        return (
            f"95 % interval {number(low)} to {number(high)}, real images "
            f"{number(result['real_ceiling'])}, unsure {result['unsure_share']:.1%}"
        )

    @classmethod
    def table(cls, result: Entry) -> tuple[str, list[Row]] | None:
        shares, real = result.get("per_class"), result.get("per_class_real")
        if not shares:
            return None
        rows = [
            (name, number(share), f"real {number(real[name])}") for name, share in shares.items()
        ]
        return "requested class, accuracy", rows
