"""Does the model draw the class it was asked for? Judged by a classifier trained on real images.

Its own accuracy on real images it has not seen is the ceiling of what generated images can be
expected to reach. Values compare only under one classifier (`key` in the report).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from datasets.real import RealImages, RealSets
from metrics.base import Collector, Context, Entry, Metric, Row, measured, number
from metrics.classifier import (
    Classifier,
    accuracy,
    classifier_spec,
    classify,
    count_pairs,
    new_classifier,
    per_class,
    split_images,
    trained_classifier,
)
from metrics.gallery import ChosenRows
from metrics.moments import FeatureMoments
from metrics.prdc import searched
from reporting.pages import Picture
from utils.distributed import Runtime
from utils.images import grid_rows, make_grid, to_array

MIN_CEILING = 0.9
UNSURE_BELOW = 0.5  # probability of the class that is seen
MAX_MISTAKES = 40  # pictures of wrong classes kept for the report


class Mistake(NamedTuple):
    """A generated image in which the classifier sees another class than the requested one."""

    image: Tensor  # uint8 (C, H, W)
    requested: int
    seen: int


class ClassifierViews(Collector):
    """Classes that are seen, for "accuracy", and features, for "domain", as far as they are kept.

    The main process trains the classifier, or takes it from the cache, and hands it to the others.

    Attributes:
        views: after `reduce`, on the main process, float64 (N, 3) of all images: the class seen,
            its probability, and the probability of the requested class.
        mistakes: some images with a wrong class.
        moments, kept: sums, and some rows, of the features (N, F) of the generated images.
        real, unseen: on the main process, features of the real images to compare with, and of
            other real images.
        confusion: (K, K) int64, class x class seen, of unseen real images.
        details: what identifies the classifier, for the report.
    """

    def __init__(self, context: Context) -> None:
        self.context, self.keeps = context, context.keeps
        self.device = context.runtime.device
        self.num_images, self.labels = context.generated.num_images, context.generated.labels
        self.network: Classifier | None = None
        self.class_names: Sequence[str] = ()
        self.confusion = torch.zeros(0, 0, dtype=torch.int64)
        self.details: dict[str, Any] = {}
        self.kept = ChosenRows(searched(self.num_images))

    def update_real(self, real: RealSets | None, runtime: Runtime) -> None:
        if real is None:
            raise ValueError("the classifier needs real images to train on")
        train = real.train
        self.class_names = train.class_names or [str(k) for k in range(train.num_classes)]
        shape, flip = self.context.generated.spec.shape, self.context.real.flip
        spec = classifier_spec(shape, train.num_classes, len(train.labels), flip=flip)
        self.network = new_classifier(spec, self.device)
        if not runtime.is_main:
            return
        self.network, self.confusion, self.details = trained_classifier(
            real, spec, self.device, self.context.cache_dir
        )
        if real.test is None and "accuracy" in self.keeps:
            self.details["note"] = "no test split: the ceiling is from a held-out tenth of train"
        if "domain" in self.keeps:
            seen, unseen = split_images(real, seed=spec.seed)
            wanted = set(train.indices)
            seen = replace(seen, indices=[index for index in seen.indices if index in wanted])
            if real.reference is not train:
                seen, unseen = real.reference, seen
            self.real, self.unseen = self._features(seen), self._features(unseen)

    def _features(self, images: RealImages) -> Tensor:
        rows = [torch.zeros(0, self.network.head.in_features)]
        for batch, _ in images.fetch(images.indices):
            rows.append(classify(self.network, batch, self.device)[1])
        return torch.cat(rows)

    def reduce_real(self, runtime: Runtime) -> None:
        for tensor in self.network.state_dict().values():
            runtime.broadcast(tensor)

    def reset(self) -> None:
        self.views = torch.zeros(0, 3, dtype=torch.float64)
        self.mistakes: list[Mistake] = []
        self.moments = FeatureMoments(self.network.head.in_features)
        self.kept.reset()

    def update(self, images: Tensor, indices: range) -> None:
        probs, features = classify(self.network, images, self.device)
        if "domain" in self.keeps:
            self.moments.update(features)
            self.kept.update(features, indices)
        if "accuracy" in self.keeps:
            requested = torch.tensor(self.labels[indices.start : indices.stop])
            sure, seen = probs.max(1)
            asked_for = probs.gather(1, requested[:, None])[:, 0]
            self.views = torch.cat([self.views, torch.stack([seen, sure, asked_for], 1).double()])
            for i in (seen != requested).nonzero()[:, 0].tolist():
                if len(self.mistakes) < MAX_MISTAKES:
                    self.mistakes.append(Mistake(images[i], int(requested[i]), int(seen[i])))

    def reduce(self, runtime: Runtime) -> None:
        if "domain" in self.keeps:
            self.moments.all_reduce(runtime)
            self.kept.reduce(runtime)
        if "accuracy" in self.keeps:
            self.views = runtime.gather(self.views, self.num_images)
            shares = runtime.gather_objects(self.mistakes)
            self.mistakes = list(itertools.chain.from_iterable(shares))[:MAX_MISTAKES]

    def judged(self, result: Entry) -> Entry:
        """`result`, with the classifier it comes from; "unreliable" if that one is weak."""
        right = accuracy(self.confusion)
        if result["status"] == "ok" and not right >= MIN_CEILING:  # it may be NaN
            doubt = f"the classifier itself is right on only {right:.1%} of real images"
            result |= {"status": "unreliable", "reason": doubt}
        return result | {"classifier": self.details}


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
        names, labels = seen.class_names, torch.tensor(seen.labels, dtype=torch.int64)
        confusion = count_pairs(labels, seen.views[:, 0].long(), len(names))
        hits, count = int(confusion.diagonal().sum()), seen.num_images
        shares, real = (
            dict(zip(names, per_class(cells), strict=True)) for cells in (confusion, seen.confusion)
        )
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
        images = torch.stack([mistake.image for mistake in mistakes])
        grid = make_grid(images, grid_rows(len(images)))
        told = (f"{names[m.requested]} drawn as {names[m.seen]}" for m in mistakes)
        return {"failures": Picture(to_array(grid), "Wrong classes", "; ".join(told))}

    @classmethod
    def note(cls, result: Entry) -> str:
        low, high = map(number, result["ci95"])
        real, unsure = number(result["real_ceiling"]), result["unsure_share"]
        return f"95 % interval {low} to {high}, real images {real}, unsure {unsure:.1%}"

    @classmethod
    def table(cls, result: Entry) -> tuple[str, list[Row]] | None:
        shares, real = result.get("per_class"), result.get("per_class_real")
        rows = [(name, number(shares[name]), f"real {number(real[name])}") for name in shares or ()]
        return ("requested class, accuracy", rows) if rows else None
