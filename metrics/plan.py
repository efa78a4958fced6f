"""Which of the requested metrics can run here, decided before any image is sampled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from metrics import METRICS, networks_of
from metrics.base import Collector, Context, Entry, Generated, Real, entry
from metrics.scoring import Part
from metrics.weights import Network, Weights, shared_weights
from utils.distributed import Runtime
from utils.errors import MissingWeightsError


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
    *,
    runtime: Runtime,
    given_weights: Mapping[str, str | None],
    download: bool = True,
) -> Plan:
    """Find the weights of each network that `names` need. To be called on every process.

    Args:
        given_weights: name of a network -> path that the user gave for its weights, or None.
        download: False looks on this machine only.
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
            plan.weights[network] = shared_weights(
                network, given_weights.get(network.name), runtime, download=download
            )
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
    users: dict[type[Collector], list[str]] = {}
    for name in names:
        users.setdefault(METRICS[name].collector or METRICS[name], []).append(name)
    parts = []
    for kind, of_kind in users.items():
        collector = kind(context)
        metrics = {
            name: METRICS[name](collector) if METRICS[name].collector else collector
            for name in of_kind
        }
        parts.append(Part(collector, metrics))
    return parts
