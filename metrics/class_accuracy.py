"""Does the model draw the class it was asked for? Judged by a classifier trained on real images.

Its own accuracy on real images it has not seen is the ceiling of what generated images can be
expected to reach. Values compare only under one classifier (`key` in the report).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from datasets.real import RealSets
from metrics.classifier import (
    MAX_TEST_IMAGES,
    Classifier,
    Holdout,
    classifier_spec,
    count_pairs,
    look,
    new_classifier,
    trained_classifier,
)
from metrics.domain import DomainDistances
from metrics.scoring import Entry, entry
from utils.distributed import Runtime

MIN_CEILING = 0.9
MAX_FAILURES = 40  # pictures of wrong classes kept for the report


class ClassTotals:
    """What accuracy is computed from; sums only, so processes and batches can be added up."""

    def __init__(self, num_classes: int) -> None:
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # asked x seen
        self.requested_prob = torch.zeros((), dtype=torch.float64)
        self.unsure = torch.zeros((), dtype=torch.int64)  # no class above 0.5

    def update(self, probs: Tensor, labels: Tensor) -> None:
        """Add probabilities (b, K) of images that were requested (or are) of `labels` (b,)."""
        confidence, seen = probs.max(1)
        self.confusion += count_pairs(labels, seen, len(self.confusion))
        self.requested_prob += probs.double().gather(1, labels[:, None]).sum()
        self.unsure += (confidence < 0.5).sum()

    def all_reduce(self, runtime: Runtime) -> None:
        for total in (self.confusion, self.requested_prob, self.unsure):
            runtime.all_reduce(total)

    @property
    def count(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Top-1 over all images; NaN without any."""
        return self.confusion.diagonal().sum().item() / self.count if self.count else math.nan

    def per_class(self) -> list[float | None]:
        """Accuracy of each class; None where it has no image."""
        hits, totals = self.confusion.diagonal().tolist(), self.confusion.sum(1).tolist()
        return [h / n if n else None for h, n in zip(hits, totals, strict=True)]


def wilson_interval(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927); sensible at 0, 1 and small counts."""
    if count == 0:
        return 0.0, 1.0
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    spread /= 1 + z * z / count
    return max(0.0, centre - spread), min(1.0, centre + spread)


class Failure(NamedTuple):
    """A generated image in which the classifier sees another class than the requested one."""

    image: Tensor  # uint8 (C, H, W)
    requested: int
    seen: int


class ClassScorer:
    """Accuracy of the requested class, and distances in the classifier's features (see
    `metrics.scoring.Scorer`).

    Args:
        names: of "class_acc", "fd_domain" and "prdc_domain".
        num_images: generated images over all processes.
        shape: (C, H, W) of one image.
        cache_dir: trained classifiers are kept here; None: not kept.
        flip: mirrored images are as good as the originals.
        log: told what takes long.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        names: tuple[str, ...] = ("class_acc",),
        num_images: int = 0,
        shape: tuple[int, int, int],
        num_classes: int,
        cache_dir: Path | None = None,
        flip: bool = False,
        seed: int = 0,
        log: Callable[[str], None] = lambda _: None,
        num_steps: int | None = None,
    ) -> None:
        self.names = names
        self.device = device
        self.shape = shape
        self.num_images, self.num_classes = num_images, num_classes
        self.cache_dir = cache_dir
        self.flip = flip
        self.seed = seed
        self.log = log
        self.num_steps = num_steps
        self.network: Classifier | None = None
        self.ceiling = ClassTotals(num_classes)
        self.class_names: Sequence[str] = ()
        self.details: dict[str, Any] = {}
        self.held_out = False  # the ceiling is from train images
        self.domain: DomainDistances | None = None  # from `see_real` on, if it was asked for
        self.clear()

    def clear(self) -> None:
        self.generated = ClassTotals(self.num_classes)
        self.failures: list[Failure] = []
        if self.domain is not None:
            self.domain.clear()

    def see_real(self, real: RealSets | None, runtime: Runtime) -> None:
        if real is None:
            raise ValueError("the classifier needs real images to train on")
        train = real.train
        self.class_names = train.class_names or [str(k) for k in range(train.num_classes)]
        spec = classifier_spec(
            self.shape, train.num_classes, len(train.labels), flip=self.flip, seed=self.seed
        )
        if self.num_steps is not None:
            spec = dataclasses.replace(spec, num_steps=self.num_steps)
        self.network = new_classifier(spec, self.device)
        if {"fd_domain", "prdc_domain"} & set(self.names):
            self.domain = DomainDistances(self.num_images, self.network.head.in_features)
        if not runtime.is_main:
            return
        self.network, self.ceiling.confusion, parts, self.details = trained_classifier(
            real, spec, self.device, cache_dir=self.cache_dir, log=self.log
        )
        self.held_out = real.test is None
        if self.domain is not None:
            self._look_at_real(real, parts)

    def _look_at_real(self, real: RealSets, parts: Holdout) -> None:
        """Features of the images to compare with, and as a baseline those of other real ones."""
        wanted = set(real.train.indices)
        seen = real.train, [index for index in parts.train if index in wanted]
        unseen = real.train, parts.test
        if real.test is not None:
            unseen = real.test, list(real.test.indices)[:MAX_TEST_IMAGES]
        if real.reference is not real.train:
            seen, unseen = (real.reference, real.reference.indices), seen
        for (images, rows), add in ((seen, self.domain.add_real), (unseen, self.domain.add_unseen)):
            for batch, _ in images.fetch(rows):
                add(look(self.network, batch, self.device).features)

    def reduce_real(self, runtime: Runtime) -> None:
        if runtime.world_size == 1:
            return
        for tensor in self.network.state_dict().values():
            # The main process trained; a sum with zeros hands its tensors to the others.
            runtime.all_reduce(tensor if runtime.is_main else tensor.zero_())

    def see_generated(self, images: Tensor, labels: list[int] | None, indices: range) -> None:
        view = look(self.network, images, self.device)
        if "class_acc" in self.names:
            if labels is None:
                raise ValueError("accuracy needs to know which class was requested")
            requested = torch.tensor(labels, dtype=torch.int64)
            self.generated.update(view.probs, requested)
            seen = view.probs.argmax(1)
            for i in torch.nonzero(seen != requested).flatten().tolist():
                if len(self.failures) < MAX_FAILURES:
                    self.failures.append(Failure(images[i], labels[i], int(seen[i])))
        if self.domain is not None:
            self.domain.add_generated(view.features, indices)

    def reduce_generated(self, runtime: Runtime) -> None:
        self.generated.all_reduce(runtime)
        self._share_failures(runtime)
        if self.domain is not None:
            self.domain.all_reduce(runtime)

    def _share_failures(self, runtime: Runtime) -> None:
        """Every process's failures on all of them: a block of rows each, zero elsewhere."""
        first = runtime.rank * MAX_FAILURES
        size = runtime.world_size * MAX_FAILURES
        images = torch.zeros((size, *self.shape), dtype=torch.uint8)
        classes = torch.full((size, 2), 0, dtype=torch.int64)  # 1 + requested, 1 + seen
        for i, failure in enumerate(self.failures, first):
            images[i] = failure.image
            classes[i] = torch.tensor([failure.requested + 1, failure.seen + 1])
        runtime.all_reduce(images)
        runtime.all_reduce(classes)
        rows = torch.nonzero(classes[:, 0]).flatten().tolist()[:MAX_FAILURES]
        pairs = (classes - 1).tolist()
        self.failures = [Failure(images[i], *pairs[i]) for i in rows]

    def results(self) -> dict[str, Entry]:
        found = {"class_acc": self._accuracy()} if "class_acc" in self.names else {}
        if self.domain is not None:
            weak = not self.ceiling.accuracy >= MIN_CEILING
            for name, result in self.domain.results().items():
                if name in self.names:
                    found[name] = result | {"classifier": self.details}
                    if weak and result["status"] == "ok":
                        found[name] |= {"status": "unreliable", "reason": self._weakness()}
        return found

    def _weakness(self) -> str:
        return f"the classifier itself is right on only {self.ceiling.accuracy:.1%} of real images"

    def _accuracy(self) -> Entry:
        totals, ceiling = self.generated, self.ceiling
        low, high = wilson_interval(int(totals.confusion.diagonal().sum()), totals.count)
        weak = not ceiling.accuracy >= MIN_CEILING
        if self.held_out:
            self.details["note"] = "no test split: the ceiling is from a held-out tenth of train"
        per_class = dict(zip(self.class_names, totals.per_class(), strict=True))
        seen = {name: share for name, share in per_class.items() if share is not None}
        return entry(
            "unreliable" if weak else "ok",
            totals.accuracy,
            self._weakness() if weak else None,
            ci95=[low, high],
            real_ceiling=ceiling.accuracy,
            per_class=per_class,
            per_class_real=dict(zip(self.class_names, ceiling.per_class(), strict=True)),
            worst_class=min(seen, key=seen.get) if seen else None,
            mean_requested_prob=totals.requested_prob.item() / max(1, totals.count),
            unsure_share=totals.unsure.item() / max(1, totals.count),
            confusion=totals.confusion.tolist(),
            n=totals.count,
            n_real=ceiling.count,
            better="higher",
            classifier=self.details,
        )
