"""What a metric is, and what it is made from.

A metric is a class in the table of `metrics/__init__.py`. The class says what the metric needs,
which way is better, and how its result is shown. A *collector* looks at the images. Metrics of one
network share a collector, so each image passes through the network once; a simple metric is a
collector itself.

A collector's local work and its collectives are separate methods: one that raises can be left out
on every process, and no process waits in a reduction that another one never reaches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from datasets.real import RealSets
from metrics.reference import Reference
from metrics.weights import Network, Weights
from reporting.pages import Picture
from utils.distributed import Runtime
from utils.images import ImageSpec

Entry = dict[str, Any]  # one metric in the report: status, value, reason, ... as plain JSON types
Row = tuple[str, str, str]  # of the summary: name, value, note


def entry(status: str, value: Any = None, reason: str | None = None, **details: Any) -> Entry:
    """Make the entry of a metric in the report; `reason` says why the status is not "ok".

    The status is "ok", "skipped", "unreliable" or "failed"; `value` is None where there is none.
    """
    return {"status": status, "value": value, "reason": reason, **details}


class Generated(NamedTuple):
    """The images that are scored.

    Attributes:
        spec: their shape, and the number of classes of the data set that they imitate.
        num_images: how many there are over all processes.
        labels: the class that was asked for, by global index; None if none was.
        unlabelled: why there are no labels.
    """

    spec: ImageSpec
    num_images: int
    labels: Sequence[int] | None
    unlabelled: str = "no class was asked for"


class Real(NamedTuple):
    """What the images are compared with.

    Attributes:
        sets: the real images; None if there are none, for the reason `missing`.
        statistics: mean and covariance that FID takes in the place of the real images' own.
        name: of the data set.
        flip: whether mirrored images are as good as the originals.
    """

    sets: RealSets | None
    missing: str | None = None
    statistics: Reference | None = None
    name: str | None = None
    flip: bool = False

    def facts(self) -> dict[str, Any]:
        """Which images these are, for the report."""
        images = None if self.sets is None else self.sets.reference
        return {
            "split": images and images.split,
            "dataset": {
                "name": self.name,
                "fingerprint": images and images.fingerprint,
                "num_images": images and len(images.indices),
            },
        }


@dataclass(frozen=True)
class Context:
    """Everything that a collector is built from.

    Attributes:
        networks: the pretrained networks that were loaded, each as its `Network.load` returns it.
        weights: the files they were read from.
        keeps: the `Metric.keeps` of all metrics that run.
        cache_dir: where a later evaluation finds classifiers and statistics; None keeps nothing.
    """

    runtime: Runtime
    generated: Generated
    real: Real
    networks: Mapping[Network, Any] = field(default_factory=dict)
    weights: Mapping[Network, Weights] = field(default_factory=dict)
    keeps: frozenset[str] = frozenset()
    cache_dir: Path | None = None

    def origin_of(self, network: Network) -> dict[str, str]:
        """The path and the SHA-256 of a network's weights, for the report."""
        weights = self.weights.get(network)
        return {} if weights is None else {"path": str(weights.path), "sha256": weights.sha256}


class Collector:
    """Looks at the real images once, then at any number of sets of generated ones.

    The methods are called in the order in which they stand here; from `reset` on again for each
    further set. The constructor takes a `Context`.
    """

    def update_real(self, real: RealSets | None, runtime: Runtime) -> None:
        """Look at real images. This is local work: it may raise, and must not communicate."""

    def reduce_real(self, runtime: Runtime) -> None:
        """Put together what the processes have seen. Only collectives belong here."""

    def reset(self) -> None:
        """Forget the generated images, but not the real ones."""

    def update(self, images: Tensor, indices: range) -> None:
        """Look at generated images, uint8 (b, C, H, W) on the CPU, with these global indices.

        This is local work, as in `update_real`. Each process sees its share, in order.
        """
        raise NotImplementedError

    def reduce(self, runtime: Runtime) -> None:
        """Put together what the processes have seen. Only collectives belong here."""
        raise NotImplementedError


class Metric:
    """One metric: what it needs, its result, and how that is shown.

    Attributes:
        better: "lower" or "higher"; any other text, or None, where neither is.
        network: the pretrained network without which it cannot run.
        real_images: it needs the real images.
        statistics_suffice: given mean and covariance of real images can take their place.
        classes: it needs the classes of the real images.
        labels: it needs to know the class that each generated image was asked for.
        collector: the class that looks at the images, shared with other metrics; None: the
            metric is a `Collector` itself.
        keeps: what a shared collector has to keep for this metric.
    """

    better: ClassVar[str | None] = None
    network: ClassVar[Network | None] = None
    real_images: ClassVar[bool] = False
    statistics_suffice: ClassVar[bool] = False
    classes: ClassVar[bool] = False
    labels: ClassVar[bool] = False
    collector: ClassVar[type[Collector] | None] = None
    keeps: ClassVar[str] = ""

    def __init__(self, collected: Any) -> None:
        """Take the shared collector, an instance of `collector`. A metric that is a collector
        itself has a constructor of its own, which takes the `Context`."""
        self.collected = collected

    def compute(self) -> Entry:
        """The result. It is asked for on the main process alone, after `Collector.reduce`."""
        raise NotImplementedError

    def pictures(self) -> dict[str, Picture]:
        """Pictures for the page, by name; asked for on the main process, after `compute`."""
        return {}

    def statistics(self) -> Reference | None:
        """Mean and covariance of the real images, to be written to a file, if there are any."""
        return None

    @classmethod
    def rows(cls, name: str, result: Entry) -> list[Row]:
        """The lines of this metric in the summary; normally one."""
        if result["status"] in ("skipped", "failed"):
            return [(name, result["status"], result["reason"])]
        reason = f"{result['status']}: {result['reason']}" if result["reason"] else ""
        notes = filter(None, (cls.note(result), reason))
        return [(name, number(result["value"]), "; ".join(notes))]

    @classmethod
    def note(cls, result: Entry) -> str:
        """What to read beside the value in the summary, of a result that is not skipped."""
        return ""

    @classmethod
    def table(cls, result: Entry) -> tuple[str, list[Row]] | None:
        """A heading and lines to show below the summary, if there is more to say."""
        return None

    @staticmethod
    def warnings(num_images: int, channels: int) -> Iterable[str]:
        """What readers have to know about values of so many images with so many channels."""
        return ()


def number(value: float | None) -> str:
    """A value as the summary shows it, with four digits after the point."""
    return "-" if value is None else f"{value:.4f}"
