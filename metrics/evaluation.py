"""From the names of metrics to a report, wherever the images come from."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metrics import METRICS, networks_of
from metrics.base import Context, Entry, Generated, Metric, Real, entry
from metrics.gallery import Gallery
from metrics.reference import write_reference
from metrics.report import Report, build_report, compare, save_report, warnings_of
from metrics.scoring import Part, Scoring
from metrics.weights import Network, Weights, shared_weights
from utils.distributed import Runtime
from utils.errors import MissingWeightsError

log = logging.getLogger("diffusion")


@dataclass
class Plan:
    """What will run, and why the rest will not.

    Attributes:
        names: the requested metrics.
        weights: the weights of each network that they need.
        skipped: the entry in the report of each metric that will not run.
    """

    names: tuple[str, ...]
    weights: dict[Network, Weights] = field(default_factory=dict)
    skipped: dict[str, Entry] = field(default_factory=dict)

    @property
    def runnable(self) -> tuple[str, ...]:
        """The requested metrics that are not skipped."""
        return tuple(name for name in self.names if name not in self.skipped)

    def users_of(self, network: Network) -> list[str]:
        """The runnable metrics that need this network."""
        return [name for name in self.runnable if METRICS[name].network is network]

    def lines(self) -> list[str]:
        """What will happen to each metric, a line each."""
        lines = []
        for name in self.names:
            weights = self.weights.get(METRICS[name].network)
            if name in self.skipped:
                lines.append(f"{name}: skipped, {self.skipped[name]['reason']}")
            elif weights is not None:
                lines.append(f"{name}: {weights.path}, sha256 {weights.sha256}")
            else:
                lines.append(f"{name}: nothing to download")
        return lines

    def skip(self, names: Iterable[str], reason: str) -> None:
        """Skip metrics for a reason, unless they are skipped already."""
        for name in names:
            self.skipped.setdefault(name, entry("skipped", None, reason))


def fitting(real: Real, generated: Generated) -> Real:
    """`real`, without images whose shape is not that of the generated ones."""
    shapes = generated.spec.shape, None if real.sets is None else real.sets.train.spec.shape
    if shapes[1] in (None, shapes[0]):
        return real
    ours, theirs = (" x ".join(map(str, shape)) for shape in shapes)
    return real._replace(sets=None, missing=f"these images are {ours}, the real ones {theirs}")


def plan_metrics(
    names: tuple[str, ...],
    generated: Generated,
    real: Real,
    runtime: Runtime,
    *,
    weights: Mapping[str, str | None],
    download: bool = True,
) -> Plan:
    """Find the weights of each network that `names` need. To be called on every process.

    Args:
        weights, download: see `Evaluation`.
    """
    plan = Plan(names)
    num_classes = generated.spec.num_classes
    no_classes = None if num_classes else "the data set has no class labels"
    if real.sets is not None and real.sets.train.num_classes != num_classes:
        counts = f"{num_classes}, but {real.sets.train.num_classes} in the real images"
        no_classes = f"number of classes: {counts}"
    for name in names:
        metric = METRICS[name]
        needs_images = metric.real_images and not (metric.statistics_suffice and real.statistics)
        if needs_images and real.missing is not None:
            plan.skip([name], real.missing)
        if metric.classes and no_classes is not None:
            plan.skip([name], no_classes)
        if metric.labels and not generated.labels:
            plan.skip([name], generated.unlabelled)
    for network in networks_of(plan.runnable):
        first, *others = plan.users_of(network)
        try:
            given = weights.get(network.name)
            plan.weights[network] = shared_weights(network, given, runtime, download=download)
        except MissingWeightsError as error:
            plan.skip([first], str(error))
            plan.skip(others, f"the weights that {first} needs, too, are missing")
    return plan


def load_networks(plan: Plan, runtime: Runtime) -> dict[Network, Any]:
    """Load the networks of `plan`. To be called on every process.

    The users of one that cannot be loaded on some process are skipped, in `plan`, on all.
    """
    networks = {}
    for network, weights in plan.weights.items():
        problem = None
        try:
            networks[network] = network.load(weights.path, runtime.device)
        except MissingWeightsError as error:
            problem = str(error)
        except (ImportError, torch.OutOfMemoryError) as error:
            problem = f"{type(error).__name__}: {error}"
        if runtime.any(problem is not None):
            networks.pop(network, None)
            reason = problem or "its weights cannot be read on another process"
            plan.skip(plan.users_of(network), reason)
    return networks


def build_parts(plan: Plan, context: Context) -> list[Part]:
    """Build the runnable metrics, those that share a collector in one part."""
    names = [name for name in METRICS if name in plan.runnable]
    context = dataclasses.replace(context, keeps=frozenset(METRICS[name].keeps for name in names))
    parts: dict[type, Part] = {}
    for name in names:
        metric, kind = METRICS[name], METRICS[name].collector or METRICS[name]
        if kind not in parts:
            parts[kind] = Part(kind(context))
        collector = parts[kind].collector
        parts[kind].metrics[name] = metric(collector) if metric.collector else collector
    return list(parts.values())


class Evaluation:
    """One number of images, scored as often as wanted: `prepare` once, then `score` each set.

    Every method is to be called on every process.

    Args:
        names: the metrics that are asked for; `plan` says which of them can run.
        generated, real: the images to score, and what to compare them with.
        cache_dir: for what serves the next evaluation: classifiers, statistics.
        weights: name of a network -> path that the user gave for its weights, or None.
        download: False looks for weights on this machine only.
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
    ) -> None:
        self.generated, self.real = generated, fitting(real, generated)
        self.runtime, self.cache_dir = runtime, cache_dir
        self.plan = plan_metrics(
            names, generated, self.real, runtime, weights=weights or {}, download=download
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
        )
        self.gallery = Gallery(context)
        parts = [*build_parts(self.plan, context), Part(self.gallery)]
        self.scoring = Scoring(parts, self.runtime)
        self.scoring.update_real(self.real.sets)

    def score(
        self, batches: Iterable[Tensor], *, facts: Mapping[str, Any], always_sample: bool = False
    ) -> Report | None:
        """Make the report on one set of images; None on all processes but the main one.

        Args:
            batches, always_sample: see `Scoring.score`.
            facts: how the images came about.
        """
        started = time.perf_counter()
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
        pictures = self.gallery.pictures()
        for metric in self._metrics():
            pictures |= metric.pictures()
        save_report(path, report, pictures)

    def _metrics(self) -> list[Metric]:
        return [metric for part in self.scoring.alive for metric in part.metrics.values()]

    def write_reference(self, path: Path) -> None:
        """Write the statistics that fid compares with, for others. A refusal stops nothing."""
        if not self.runtime.is_main:
            return
        try:
            known = (metric.statistics() for metric in self._metrics())
            statistics = next(filter(None, known), None)
            if statistics is None:
                log.warning("--write_reference: fid does not run, so there is nothing to write")
            else:
                write_reference(path, statistics)
                log.info("statistics of the real images: %s", path)
        except (OSError, ValueError) as error:
            log.warning("--write_reference %s: not written, %s", path, error)
