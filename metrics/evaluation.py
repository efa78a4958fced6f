"""From the names of metrics to a report, wherever the images come from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.real import RealSets
from metrics.comparison import compare
from metrics.features import remove_features
from metrics.gallery import Gallery
from metrics.inception import InceptionScorer
from metrics.plan import Plan, build_scorers, plan_metrics
from metrics.reference import Reference, write_reference
from metrics.report import build_report, count_warnings, pictures_of, save_report
from metrics.scoring import Batches, Scoring
from utils.distributed import Runtime
from utils.images import ImageSpec

Report = dict[str, Any]


class Evaluation:
    """One count of images, scored as often as wanted: `see_real` once, then `score` each set.

    Every method is to be called on every process.

    Args:
        names: metrics that are asked for; `plan` says which of them can run.
        spec: of the generated images; `num_classes` as in the real ones.
        labels: of the generated images by global index; None if no class was asked for.
        real: None if there are none, for the reason `no_real`.
        reference: statistics to compare with instead of the real images' (fid only).
        weights: network name -> path given for it, or None.
        folder: for features while it runs; all processes share it.
        cache_dir: for what serves the next evaluation: classifiers, statistics.
        flip: mirror images are as good as the originals.
        download: False looks for weights on this machine only.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        *,
        runtime: Runtime,
        spec: ImageSpec,
        num_images: int,
        labels: Sequence[int] | None,
        real: RealSets | None,
        no_real: str | None = None,
        unlabelled: str = "no class was asked for",
        reference: Reference | None = None,
        weights: Mapping[str, str | None] | None = None,
        folder: Path,
        cache_dir: Path,
        flip: bool,
        download: bool = True,
        log: Callable[[str], None] = lambda _: None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        if real is not None and real.train.spec.shape != spec.shape:
            shapes = [" x ".join(map(str, x.shape)) for x in (spec, real.train.spec)]
            real, no_real = None, f"these images are {shapes[0]}, the real ones {shapes[1]}"
        no_classes = "the data set has no class labels" if spec.num_classes == 0 else None
        if real is not None and real.train.num_classes != spec.num_classes:
            counts = f"{spec.num_classes}, but {real.train.num_classes} in the real images"
            no_classes = f"number of classes: {counts}"
        self.runtime, self.spec, self.num_images, self.labels = runtime, spec, num_images, labels
        self.real, self.reference = real, reference
        self.features_dir, self.cache_dir, self.flip = folder / "features", cache_dir, flip
        self.log, self.warn = log, warn
        self.plan: Plan = plan_metrics(
            names,
            runtime=runtime,
            given_weights=weights or {},
            unlabelled=None if labels else unlabelled,
            no_classes=no_classes,
            no_real_images=no_real,
            has_reference=reference is not None,
            download=download,
        )
        self.scoring: Scoring | None = None

    def see_real(self) -> None:
        """Load the networks, train the classifier or find it, and look at the real images."""
        if self.runtime.is_main:  # of a run that was interrupted
            remove_features(self.features_dir)
        self.runtime.barrier()
        scorers = build_scorers(
            self.plan,
            runtime=self.runtime,
            num_images=self.num_images,
            labels=self.labels,
            shape=self.spec.shape,
            num_classes=self.spec.num_classes,
            cache_dir=self.cache_dir,
            features_dir=self.features_dir,
            real=self.real,
            reference=self.reference,
            flip=self.flip,
            log=self.log,
        )
        self.gallery = Gallery(
            num_images=self.num_images, labels=self.labels, shape=self.spec.shape
        )
        self.scoring = Scoring([*scorers, self.gallery], runtime=self.runtime, warn=self.warn)
        self.scoring.see_real(self.real)

    def score(
        self,
        batches: Batches,
        *,
        facts: Mapping[str, Any],
        started: float,
        always_sample: bool = False,
    ) -> Report | None:
        """The report on one set of images; None on all processes but the main one.

        Args:
            batches: this process's `runtime.share(num_images)`, contiguous and in order.
            facts: how the images came about.
            started: `time.perf_counter()` before any work on them.
            always_sample: go through `batches` even if no metric can run.
        """
        if self.scoring is None:
            self.see_real()
        entries = self.scoring.score(batches, self.num_images, always_sample=always_sample)
        if not self.runtime.is_main:
            return None
        return build_report(
            self.plan.skipped | entries,
            provenance={**facts, "seconds": round(time.perf_counter() - started, 1)},
            warnings=count_warnings(self.plan.runnable, self.num_images, self.spec.channels),
        )

    def save(self, path: Path, report: Report, old: Report | None = None) -> None:
        """report.json and report.html at `path`, with the pictures of the latest `score`."""
        if old is not None:
            report["comparison"] = compare(report, old)
        save_report(path, report, pictures_of(self.scoring.scorers, self.gallery, self.real))

    def write_reference(self, path: Path) -> None:
        """The statistics that fid compares with, for others. A refusal is no reason to stop."""
        for scorer in self.scoring.alive if self.runtime.is_main else ():
            if isinstance(scorer, InceptionScorer) and "fid" in scorer.names:
                meta = scorer.store[1] if scorer.store else {}
                try:
                    write_reference(path, scorer.real_statistics(meta))
                    self.log(f"statistics of the real images: {path}")
                except (OSError, ValueError) as error:
                    self.warn(f"--write_reference {path}: not written, {error}")
                return
        self.warn("--write_reference: fid does not run, so there is nothing to write")

    def close(self) -> None:
        if self.runtime.is_main:
            remove_features(self.features_dir)
