"""From the names of metrics to a report, wherever the images come from."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.random import fork_rng

from metrics import METRICS, networks_of
from metrics.base import Context, Entry, Generated, Real, entry
from metrics.gallery import Gallery
from metrics.reference import write_reference
from metrics.report import Report, build_report, compare, save_report
from metrics.scoring import Part, Scoring
from metrics.weights import Network, Weights, find_weights, usable
from utils.distributed import Runtime
from utils.errors import MissingWeightsError, show
from utils.files import write_text
from utils.images import image_suffix

log = logging.getLogger("diffusion")


class Plan:
    """What will run, and why the rest will not; made on every process, see `Evaluation`."""

    def __init__(
        self, names: Sequence[str], context: Context, given: dict[str, str | None], download: bool
    ) -> None:
        self.names = names
        self.weights: dict[Network, Weights] = {}  # of each network that the metrics need
        self.skipped: dict[str, Entry] = {}  # the entries of the metrics that will not run
        generated, real, runtime = context.generated, context.real, context.runtime
        num_classes = generated.spec.num_classes
        no_classes = {0: "the data set has no class labels", 1: "the data set has only one class"}
        no_classes = no_classes.get(num_classes)
        num_real = real.sets and real.sets.train.dataset.spec.num_classes
        if num_real not in (None, num_classes):
            no_classes = f"number of classes: {num_classes}, but {num_real} in the real images"
        for name in names:
            metric = METRICS[name]
            needs_images = metric.real_images and metric.keeps not in real.statistics
            if needs_images and real.missing is not None:
                self.skip([name], real.missing)
            if metric.classes and no_classes is not None:
                self.skip([name], no_classes)
            if metric.labels and not generated.labels:
                self.skip([name], generated.unlabelled)
            if metric.likelihood and generated.likelihood is None:
                what = "a model of 8-bit images without a condition, after its training"
                self.skip([name], f"needs {what}")
            if metric.paired and generated.drawn_from is None:
                self.skip([name], "these images were not drawn from pictures of real ones")
            if metric.package and importlib.util.find_spec(metric.package) is None:
                self.skip([name], f"{metric.package} is missing: pip install scikit-image")
        if image_suffix(generated.spec.channels, generated.values is None) != ".png":
            reason = "needs 8-bit images of 1 or 3 channels, for its network"
            self.skip([name for name in names if METRICS[name].network], reason)
        for network in networks_of(self.runnable):
            file, problem = None, None
            if runtime.is_main:
                fetch = download and not (network.large and set(names) >= set(METRICS))
                try:
                    file = find_weights(network, given.get(network.name), download=fetch)
                except MissingWeightsError as error:
                    problem = str(error)
            file, problem = runtime.broadcast_object((file, problem))
            if problem is None:
                self.weights[network] = file
            else:
                first, *others = self.users_of(network)
                self.skip([first], problem)
                self.skip(others, f"the weights that {first} needs, too, are missing")

    @property
    def runnable(self) -> tuple[str, ...]:
        """The requested metrics that are not skipped."""
        return tuple(name for name in self.names if name not in self.skipped)

    def users_of(self, network: Network) -> list[str]:
        """The runnable metrics that need this network."""
        return [name for name in self.runnable if METRICS[name].network is network]

    def skip(self, names: Iterable[str], reason: str) -> None:
        """Skip metrics for a reason, unless they are skipped already."""
        for name in names:
            self.skipped.setdefault(name, entry("skipped", None, reason))

    def lines(self) -> Iterator[str]:
        """What will happen to each metric, a line each."""
        for name in self.names:
            if name in self.skipped:
                yield f"{name}: skipped, {self.skipped[name]['reason']}"
            elif weights := self.weights.get(METRICS[name].network):
                yield f"{name}: {weights.path}, sha256 {weights.sha256}"
            else:
                yield f"{name}: nothing to download"

    def load_networks(self, runtime: Runtime) -> dict[Network, Any]:
        """Load the networks. What needs one that some process cannot load is skipped on all."""
        networks = {}
        for network, weights in self.weights.items():
            problem = None
            try:
                with usable(network, f"{show(weights.path)} does not fit"), fork_rng(devices=[]):
                    networks[network] = network.load(weights.path, runtime.device)
            except (MissingWeightsError, torch.OutOfMemoryError) as error:
                problem = str(error)
            if runtime.any(problem is not None):
                networks.pop(network, None)
                reason = problem or "its weights cannot be read on another process"
                self.skip(self.users_of(network), reason)
        return networks


def build_parts(runnable: Collection[str], context: Context) -> list[Part]:
    """Build the metrics of these names, those that share a collector in one part."""
    metrics = {name: METRICS[name] for name in METRICS.ordered(runnable)}
    parts: dict[Any, Part] = {}
    for name, metric in metrics.items():
        kind = metric.collector or metric, metric.network
        if kind not in parts:
            keeps = frozenset(m.keeps for m in metrics.values() if (m.collector, m.network) == kind)
            own = dataclasses.replace(context, network=metric.network, keeps=keeps)
            parts[kind] = Part(kind[0](own))
        collector = parts[kind].collector
        parts[kind].metrics[name] = metric(collector) if metric.collector else collector
    return list(parts.values())


class Evaluation:
    """One number of images, scored as often as wanted: `prepare` once, then `score` each set.

    Every method is to be called on every process. Real images of another shape than the generated
    ones count as missing.

    Args:
        names: the metrics that are asked for; `plan` says which of them can run.
        cache_dir: for what serves the next evaluation: classifiers, statistics.
        weights: name of a network -> path that the user gave for its weights, or None.
        download: False looks for weights on this machine only.
    """

    def __init__(
        self,
        names: Sequence[str],
        generated: Generated,
        real: Real,
        *,
        runtime: Runtime,
        cache_dir: Path,
        weights: dict[str, str | None] | None = None,
        download: bool = True,
    ) -> None:
        theirs = real.sets and real.sets.train.dataset
        kinds = [(x.spec.shape, x.values) for x in (generated, theirs) if x is not None]
        if kinds[0] != kinds[-1]:
            texts = [" x ".join(map(str, s)) + (f" of {v}" if v else "") for s, v in kinds]
            missing = "these images are {}, the real ones {}".format(*texts)
            real = real._replace(sets=None, missing=missing)
        self.context = Context(runtime, generated, real, cache_dir=cache_dir)
        self.generated, self.runtime = generated, runtime
        self.plan = Plan(names, self.context, weights or {}, download)
        self.scoring: Scoring | None = None

    def prepare(self) -> None:
        """Load the networks, train the classifier or find it, and look at the real images."""
        networks = self.plan.load_networks(self.runtime)
        context = dataclasses.replace(self.context, networks=networks, weights=self.plan.weights)
        self.gallery = Gallery(context)
        parts = [*build_parts(self.plan.runnable, context), Part(self.gallery)]
        self.scoring = Scoring(parts, self.runtime)
        self.scoring.update_real(context.real.sets)

    def score(
        self, batches: Iterable[Tensor], *, facts: Mapping[str, Any], always_sample: bool = False
    ) -> Report | None:
        """Make the report on one set of images; None on all processes but the main one.

        Takes the arguments of `Scoring.score`, and `facts`: how the images came about.
        """
        started = time.perf_counter()
        if self.scoring is None:
            self.prepare()
        count, channels = self.generated.num_images, self.generated.spec.channels
        entries = self.scoring.score(batches, count, always_sample=always_sample)
        if not self.runtime.is_main:
            return None
        told = (METRICS[name].warnings(count, channels) for name in self.plan.runnable)
        return build_report(
            self.plan.skipped | entries,
            provenance={**facts, "seconds": round(time.perf_counter() - started, 1)},
            warnings=list(dict.fromkeys(itertools.chain.from_iterable(told))),
        )

    def save(self, path: Path, report: Report, old: Report | None = None) -> None:
        """Write report.json and report.html at `path`, with the pictures of the latest `score`
        and, given an `old` report, what has changed since."""
        if old is not None:
            report["comparison"] = compare(report, old)
        pictures = self.gallery.pictures()
        for part in self.scoring.alive:
            for metric in part.metrics.values():
                pictures |= metric.pictures()
                for end, text in metric.files().items():
                    write_text(path.with_name(f"{path.stem}_{end}"), text)
        save_report(path, report, pictures)

    def write_reference(self, path: Path) -> None:
        """Write the statistics that fid compares with, for others. A refusal stops nothing."""
        if not self.runtime.is_main:
            return
        fids = [part.metrics["fid"] for part in self.scoring.alive if "fid" in part.metrics]
        try:
            if fids:
                write_reference(path, fids[0].collected.statistics("fid"))
                log.info("statistics of the real images: %s", path)
            else:
                log.warning("--write_reference: fid does not run, so there is nothing to write")
        except (OSError, ValueError) as error:
            log.warning("--write_reference %s: not written, %s", path, error)
