"""From the names of metrics to a report, wherever the images come from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from metrics.base import Context, Generated, Real
from metrics.comparison import compare
from metrics.gallery import Gallery
from metrics.plan import build_parts, fitting, load_networks, plan_metrics
from metrics.reference import write_reference
from metrics.report import Report, build_report, save_report, warnings_of
from metrics.scoring import Part, Scoring
from reporting.html import Picture
from utils.distributed import Runtime


class Evaluation:
    """One number of images, scored as often as wanted: `prepare` once, then `score` each set.

    Every method is to be called on every process.

    Args:
        names: the metrics that are asked for; `plan` says which of them can run.
        generated, real: the images to score, and what to compare them with.
        cache_dir: for what serves the next evaluation: classifiers, statistics.
        weights: name of a network -> path that the user gave for its weights, or None.
        download: False looks for weights on this machine only.
        log, warn: are told what is done, and what goes wrong.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        generated: Generated,
        real: Real,
        *,
        runtime: Runtime,
        cache_dir: Path,
        weights: Mapping[str, str | None] | None = None,
        download: bool = True,
        log: Callable[[str], None] = lambda _: None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.generated, self.real = generated, fitting(real, generated)
        self.runtime, self.cache_dir = runtime, cache_dir
        self.log, self.warn = log, warn
        self.plan = plan_metrics(
            names,
            generated,
            self.real,
            runtime=runtime,
            given_weights=weights or {},
            download=download,
        )
        self.scoring: Scoring | None = None

    def prepare(self) -> None:
        """Load the networks, train the classifier or find it, and look at the real images."""
        context = Context(
            self.runtime,
            self.generated,
            self.real,
            networks=load_networks(self.plan, self.runtime),
            weights=self.plan.weights,
            cache_dir=self.cache_dir,
            log=self.log,
        )
        self.gallery = Gallery(context)
        parts = [*build_parts(self.plan, context), Part(self.gallery)]
        self.scoring = Scoring(parts, runtime=self.runtime, warn=self.warn)
        self.scoring.update_real(self.real.sets)

    def score(
        self,
        batches: Iterable[Tensor],
        *,
        facts: Mapping[str, Any],
        started: float,
        always_sample: bool = False,
    ) -> Report | None:
        """Make the report on one set of images; None on all processes but the main one.

        Args:
            batches: uint8 (b, C, H, W) on the CPU: this process's `runtime.share(num_images)`,
                contiguous and in order.
            facts: how the images came about.
            started: `time.perf_counter()` before any work on them.
            always_sample: go through `batches` even if no metric can run.
        """
        if self.scoring is None:
            self.prepare()
        count = self.generated.num_images
        entries = self.scoring.score(batches, count, always_sample=always_sample)
        if not self.runtime.is_main:
            return None
        return build_report(
            self.plan.skipped | entries,
            provenance={**facts, "seconds": round(time.perf_counter() - started, 1)},
            warnings=warnings_of(self.plan.runnable, count, self.generated.spec.channels),
        )

    def save(self, path: Path, report: Report, old: Report | None = None) -> None:
        """Write report.json and report.html at `path`, with the pictures of the latest `score`.

        Args:
            old: an older report, to show what changed.
        """
        if old is not None:
            report["comparison"] = compare(report, old)
        save_report(path, report, self._pictures())

    def _pictures(self) -> dict[str, Picture]:
        pictures = self.gallery.pictures()
        for part in self.scoring.alive:
            for metric in part.metrics.values():
                pictures |= metric.pictures()
        return pictures

    def write_reference(self, path: Path) -> None:
        """Write the statistics that fid compares with, for others. A refusal stops nothing."""
        if not self.runtime.is_main:
            return
        metrics = (metric for part in self.scoring.alive for metric in part.metrics.values())
        try:
            statistics = next(filter(None, (metric.statistics() for metric in metrics)), None)
            if statistics is None:
                self.warn("--write_reference: fid does not run, so there is nothing to write")
            else:
                write_reference(path, statistics)
                self.log(f"statistics of the real images: {path}")
        except (OSError, ValueError) as error:
            self.warn(f"--write_reference {path}: not written, {error}")
