"""Which of the requested metrics can run here, decided before any image is sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from metrics import METRICS
from metrics.classifier import ClassScorer
from metrics.inception import INCEPTION, InceptionScorer, load_inception
from metrics.lpips_score import ALEXNET, LpipsScorer, load_lpips
from metrics.scoring import Entry, RealImages, Scorer, entry
from metrics.weights import Weights, shared_weights
from utils.distributed import Runtime
from utils.errors import MissingWeightsError

SOURCES = {"inception": INCEPTION, "lpips": ALEXNET}
Loaded = TypeVar("Loaded")


@dataclass
class Plan:
    """What will run, the weights it needs, and why the rest will not."""

    names: tuple[str, ...]
    weights: dict[str, Weights] = field(default_factory=dict)  # by network
    skipped: dict[str, Entry] = field(default_factory=dict)  # by metric

    @property
    def runnable(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name not in self.skipped)

    def lines(self) -> list[str]:
        """What will happen to each metric, a line each."""
        found = []
        for name in self.names:
            weights = self.weights.get(METRICS[name].network or "")
            if name in self.skipped:
                found.append(f"{name}: skipped, {self.skipped[name]['reason']}")
            elif weights is not None:
                found.append(f"{name}: {weights.path}, sha256 {weights.sha256}")
            else:
                found.append(f"{name}: nothing to download")
        return found

    def skip(self, names: Sequence[str], reason: str) -> None:
        for name in names:
            self.skipped.setdefault(name, entry("skipped", None, reason))


def plan_metrics(
    names: tuple[str, ...],
    *,
    runtime: Runtime,
    given_weights: Mapping[str, str | None],
    unlabelled: str | None = None,
    no_real_images: str | None = None,
    download: bool = True,
) -> Plan:
    """Find the weights of each network that `names` need. To be called on every process.

    Args:
        given_weights: network name -> path from the command line, or None.
        unlabelled, no_real_images: why there are no requested classes or no real images; None
            where there are.
        download: False looks on this machine only.
    """
    plan = Plan(names)
    for name in names:
        if METRICS[name].labels and unlabelled is not None:
            plan.skip([name], unlabelled)
        if METRICS[name].real_images and no_real_images is not None:
            plan.skip([name], no_real_images)
    for network, source in SOURCES.items():
        users = [name for name in plan.runnable if METRICS[name].network == network]
        if not users:
            continue
        try:
            plan.weights[network] = shared_weights(
                source, given_weights.get(network), runtime, download=download
            )
        except MissingWeightsError as error:
            plan.skip(users, str(error))
    return plan


def build_scorers(
    plan: Plan,
    *,
    runtime: Runtime,
    num_images: int,
    labels: Sequence[int] | None,
    shape: tuple[int, int, int],
    num_classes: int,
    test_images: RealImages | None = None,
    cache_dir: Path | None = None,
    flip: bool = False,
    log: Callable[[str], None] = lambda _: None,
) -> list[Scorer]:
    """Load the networks of `plan` and hand them to their scorers.

    A network that cannot be loaded on one process is skipped, in `plan`, on all.

    Args:
        num_images, labels: of the generated images over all processes.
        shape: (C, H, W) of one image.
        test_images, cache_dir, flip: see `ClassScorer`.
    """
    device = runtime.device
    scorers: list[Scorer] = []
    inception = tuple(name for name in plan.runnable if METRICS[name].network == "inception")
    if inception:
        weights = plan.weights["inception"]
        extractor = _load(lambda: load_inception(weights.path, device), inception, plan, runtime)
        if extractor is not None:
            scorers.append(
                InceptionScorer(
                    inception, extractor, device, num_images=num_images, weights=weights
                )
            )
    if "lpips" in plan.runnable:
        weights = plan.weights["lpips"]
        distance = _load(lambda: load_lpips(weights.path, device), ("lpips",), plan, runtime)
        if distance is not None:
            scorers.append(
                LpipsScorer(
                    distance,
                    device,
                    num_images=num_images,
                    labels=labels,
                    shape=shape,
                    weights=weights,
                )
            )
    if "class_acc" in plan.runnable:
        scorers.append(
            ClassScorer(
                device,
                shape=shape,
                num_classes=num_classes,
                test=test_images,
                cache_dir=cache_dir,
                flip=flip,
                log=log,
            )
        )
    return scorers


def _load(
    load: Callable[[], Loaded], names: Sequence[str], plan: Plan, runtime: Runtime
) -> Loaded | None:
    """What `load` returns, if it works on every process."""
    loaded, problem = None, "its weights cannot be read on another process"
    try:
        loaded = load()
    except MissingWeightsError as error:
        problem = str(error)
    except (ImportError, torch.OutOfMemoryError) as error:
        problem = f"{type(error).__name__}: {error}"
    if runtime.any(loaded is None):
        plan.skip(names, problem)
        return None
    return loaded
