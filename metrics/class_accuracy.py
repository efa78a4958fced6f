"""What a classifier trained on the real images makes of generated ones.

Does the model draw the class it was asked for? The classifier's own accuracy on real images it has
not seen is the ceiling of what generated images can be expected to reach. Frechet distance and
precision, recall, density, coverage are as with Inception, but in features that fit the data, need
no download and mean something on grey images. Values compare only under one classifier (`key` in
the report).
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from datasets.real import RealImages, RealSets
from metrics.base import Collector, Context, Entry, Metric, Row, measured, number
from metrics.classifier import (
    accuracy,
    classifier_spec,
    classify,
    count_pairs,
    new_classifier,
    per_class,
    split_images,
    trained_classifier,
)
from metrics.fid import frechet_distance
from metrics.prdc import Prdc, prdc_entry
from metrics.reference import FeatureMoments
from reporting.pages import Picture
from utils.distributed import Runtime
from utils.images import grid_rows, make_grid, to_array

MIN_CEILING = 0.9
UNSURE_BELOW = 0.5  # probability of the class that is seen
MAX_MISTAKES = 40  # pictures of wrong classes kept for the report


class ClassifierViews(Collector):
    """The classes that are seen in images, and their features.

    The main process trains the classifier, or takes it from the cache, and hands it to the others.
    All that follows is of the main process, after `reduce_real` and `reduce`.

    Attributes:
        details: what identifies the classifier, for the report.
        confusion: (K, K) int64, class x class seen, of real images that are new to the classifier.
        real, unseen: if "domain" is kept, features (N, F) of the real images to compare with, and
            of other real images.
        views: float64 (N, 3) of the generated images: the class seen, its probability, and the
            probability of the requested class.
        features: (N, F), of the generated images.
        mistakes: some of them with a wrong class: the image, the class requested, the class seen.
    """

    def __init__(self, context: Context) -> None:
        self.context, self.device = context, context.runtime.device
        self.num_images, self.labels = context.generated.num_images, context.generated.labels

    def update_real(self, real: RealSets | None, runtime: Runtime) -> None:
        if real is None:
            raise ValueError("the classifier needs real images to train on")
        train, keeps = real.train, self.context.keeps
        self.class_names = train.class_names or [str(k) for k in range(train.num_classes)]
        shape, flip = self.context.generated.spec.shape, self.context.real.flip
        spec = classifier_spec(shape, train.num_classes, len(train.labels), flip=flip)
        self.network = new_classifier(spec, self.device)
        if not runtime.is_main:
            return
        self.network, self.confusion, self.details = trained_classifier(
            real, spec, self.device, self.context.cache_dir
        )
        if real.test is None and "accuracy" in keeps:
            self.details["note"] = "no test split: the ceiling is from a held-out tenth of train"
        if "domain" in keeps:
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
        self.parts = [torch.zeros(0, 3 + self.network.head.in_features, dtype=torch.float64)]
        self.mistakes: list[tuple[Tensor, int, int]] = []

    def update(self, images: Tensor, indices: range) -> None:
        probs, features = classify(self.network, images, self.device)
        sure, seen = probs.max(1)
        asked = seen
        if self.labels is not None:
            asked = torch.tensor(self.labels[indices.start : indices.stop])
        views = torch.stack([seen, sure, probs.gather(1, asked[:, None])[:, 0]], 1)
        self.parts.append(torch.cat([views, features], 1).double())
        for i in (seen != asked).nonzero()[:, 0].tolist():
            if len(self.mistakes) < MAX_MISTAKES:
                self.mistakes.append((images[i], int(asked[i]), int(seen[i])))

    def reduce(self, runtime: Runtime) -> None:
        rows = runtime.gather(torch.cat(self.parts), self.num_images)
        if rows is not None:
            self.views, self.features = rows[:, :3], rows[:, 3:]
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
        images = torch.stack([image for image, *_ in mistakes])
        grid = make_grid(images, grid_rows(len(images)))
        told = (f"{names[asked]} drawn as {names[seen]}" for _, asked, seen in mistakes)
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
        distance, baseline = frechet_distance(*_gaussian(seen.features), *target), None
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
        return seen.judged(prdc_entry(seen.real, seen.features))


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    moments = FeatureMoments(features.shape[1])
    moments.update(features)
    return moments.mean_cov()
