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
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from datasets.real import RealSets
from diffusion.likelihood import Likelihood
from metrics.reference import Reference
from metrics.weights import Network, Weights
from reporting.pages import Picture
from utils.config import Config
from utils.distributed import Runtime
from utils.images import ImageSpec, Values

Entry = dict[str, Any]  # one metric in the report: status, value, reason, ... as plain JSON types
Row = tuple[str, str, str]  # a line of the summary: name, value, note


def entry(status: str, value: Any = None, reason: str | None = None, **details: Any) -> Entry:
    """Make the entry of a metric in the report; `reason` says why the status is not "ok".

    The status is "ok", "skipped", "unreliable" or "failed"; `value` is None where there is none.
    """
    return {"status": status, "value": value, "reason": reason, **details}


def measured(value: Any, doubt: str | None = None, **details: Any) -> Entry:
    """Make the entry of a metric that has run: "unreliable" if there is a reason for `doubt`."""
    return entry("unreliable" if doubt else "ok", value, doubt or None, **details)


class Generated(NamedTuple):
    """The images that are scored."""

    spec: ImageSpec  # their shape, and the number of classes of the data set that they imitate
    num_images: int  # over all processes
    labels: Sequence[int] | None  # the class asked for, by global index; None if none was
    unlabelled: str = "no class was asked for"  # why there are no labels
    values: Values | None = None  # of images that are floats; None: they are uint8
    shown: Sequence[int] | None = None  # which channels, see `as_pictures`
    drawn_from: Config | None = None  # whose `condition` made them, each from its own real image
    likelihood: Likelihood | None = None  # by the model that drew them


class Real(NamedTuple):
    """What the images are compared with."""

    sets: RealSets | None  # the real images
    missing: str | None = None  # why there are none
    statistics: Mapping[str, Reference] = MappingProxyType({})  # given ones, by `Metric.keeps`
    name: str | None = None  # what the data set is called
    flip: bool = False  # whether mirrored images are as good as the originals

    def facts(self) -> dict[str, Any]:
        """Which images these are, for the report."""
        images = self.sets and self.sets.reference
        dataset = {
            "name": self.name,
            "fingerprint": images and images.dataset.fingerprint,
            "num_images": images and len(images.indices),
        }
        return {"split": images and images.split, "dataset": dataset}


@dataclass(frozen=True)
class Context:
    """Everything that a collector is built from."""

    runtime: Runtime
    generated: Generated
    real: Real
    networks: Mapping[Network, Any] = field(default_factory=dict)  # as `Network.load` returns them
    weights: Mapping[Network, Weights] = field(default_factory=dict)  # the files they come from
    network: Network | None = None  # the collector's own
    keeps: frozenset[str] = frozenset()  # the `Metric.keeps` of the metrics that share it
    cache_dir: Path | None = None  # where a later evaluation finds classifiers and statistics

    def origin_of(self, network: Network) -> dict[str, Any]:
        """The path and the SHA-256 of a network's weights, for the report."""
        return self.weights[network]._asdict() if network in self.weights else {}


class Collector:
    """Looks at the real images once, then at any number of sets of generated ones.

    The constructor takes a `Context`. The methods are called in the order in which they stand
    here, from `reset` on again for each further set. `update_real` and `update` are local work:
    they may raise, and must not communicate. In `reduce_real` and `reduce`, which put together
    what the processes have seen, only collectives belong.
    """

    def update_real(self, real: RealSets, runtime: Runtime) -> None:
        """Look at the real images, if there are any, or at this process's share of them."""

    def reduce_real(self, runtime: Runtime) -> None:
        """Put together what the processes have seen of the real images."""

    def reset(self) -> None:
        """Forget the generated images, but not the real ones."""

    def update(self, images: Tensor, indices: range) -> None:
        """Look at generated images (b, C, H, W) on the CPU, with these global indices.

        Each process sees its share, in order.
        """
        raise NotImplementedError

    def reduce(self, runtime: Runtime) -> None:
        """Put together what the processes have seen of the generated images."""
        raise NotImplementedError


class Metric:
    """One metric: what it needs, its result, and how that is shown."""

    better: ClassVar[str | None] = None  # "lower" or "higher"; other text, or None, for neither
    network: ClassVar[Network | None] = None  # the pretrained one that it needs to run
    real_images: ClassVar[bool] = False  # it needs the real images
    classes: ClassVar[bool] = False  # it needs the classes of the real images
    labels: ClassVar[bool] = False  # it needs the class that each generated image was asked for
    likelihood: ClassVar[bool] = False  # it needs the model itself
    paired: ClassVar[bool] = False  # it needs images that were drawn from pictures of real ones
    package: ClassVar[str | None] = None  # an optional one that it needs
    collector: ClassVar[type[Collector] | None] = None  # shared; None: the metric is one itself
    keeps: ClassVar[str] = ""  # what a shared collector has to keep for this metric

    def __init__(self, collected: Any) -> None:
        """Take the shared collector; a metric that is one itself takes the `Context` instead."""
        self.collected = collected

    def compute(self) -> Entry:
        """The result. It is asked for on the main process alone, after `Collector.reduce`."""
        raise NotImplementedError

    def pictures(self) -> dict[str, Picture]:
        """Pictures for the page, by name; asked for on the main process, after `compute`."""
        return {}

    def files(self) -> dict[str, str]:
        """Texts to write beside the report, by the ends of their names; as `pictures`."""
        return {}

    @classmethod
    def rows(cls, name: str, result: Entry) -> list[Row]:
        """The lines of this metric in the summary; normally one."""
        status, value, reason = result["status"], result["value"], result["reason"]
        if status in ("skipped", "failed"):
            return [(name, status, reason)]
        notes = ["" if value is None else cls.note(result), reason and f"{status}: {reason}"]
        return [(result.get("name", name), number(value), "; ".join(filter(None, notes)))]

    @classmethod
    def note(cls, result: Entry) -> str:
        """What to read beside the value in the summary, of a result that has one."""
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
