"""Which of the requested metrics can run here, decided before any image is sampled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from datasets.real import RealImages, RealSets
from metrics import METRICS
from metrics.class_accuracy import ClassScorer
from metrics.inception import INCEPTION, Extractor, InceptionScorer, load_inception
from metrics.lpips_score import ALEXNET, LpipsScorer, load_lpips
from metrics.memorization import MemorizationScorer
from metrics.reference import Reference, read_reference, reference_key
from metrics.sanity import SanityScorer
from metrics.scoring import Entry, Scorer, entry
from metrics.weights import Weights, shared_weights
from utils.distributed import Runtime
from utils.errors import ConfigError, MissingWeightsError

SOURCES = {"inception": INCEPTION, "lpips": ALEXNET}
# Of metrics that need no network: (device, *, num_images, shape) -> Scorer.
PLAIN_SCORERS: dict[str, Callable[..., Scorer]] = {"sanity": SanityScorer}
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
    no_classes: str | None = None,
    no_real_images: str | None = None,
    has_reference: bool = False,
    download: bool = True,
) -> Plan:
    """Find the weights of each network that `names` need. To be called on every process.

    Args:
        given_weights: network name -> path from the command line, or None.
        unlabelled, no_classes, no_real_images: why there are no requested classes, no classes in
            the data, no real images; None where there are.
        has_reference: statistics stand in for real images where FID is concerned.
        download: False looks on this machine only.
    """
    plan = Plan(names)
    for name in names:
        needs_real = METRICS[name].real_images and not (name == "fid" and has_reference)
        if needs_real and no_real_images is not None:
            plan.skip([name], no_real_images)
        if METRICS[name].classes and no_classes is not None:
            plan.skip([name], no_classes)
        if METRICS[name].labels and unlabelled is not None:
            plan.skip([name], unlabelled)
    for network, source in SOURCES.items():
        users = [name for name in plan.runnable if METRICS[name].network == network]
        if not users:
            continue
        try:
            plan.weights[network] = shared_weights(
                source, given_weights.get(network), runtime, download=download
            )
        except MissingWeightsError as error:
            plan.skip(users[:1], str(error))
            plan.skip(users[1:], f"the weights that {users[0]} needs, too, are missing")
    return plan


def build_scorers(
    plan: Plan,
    *,
    runtime: Runtime,
    num_images: int,
    labels: Sequence[int] | None,
    shape: tuple[int, int, int],
    num_classes: int,
    cache_dir: Path | None = None,
    features_dir: Path | None = None,
    real: RealSets | None = None,
    reference: Reference | None = None,
    flip: bool = False,
    log: Callable[[str], None] = lambda _: None,
) -> list[Scorer]:
    """Load the networks of `plan` and hand them to their scorers.

    A network that cannot be loaded on one process is skipped, in `plan`, on all.

    Args:
        num_images, labels: of the generated images over all processes.
        shape: (C, H, W) of one image.
        cache_dir, flip: see `ClassScorer`.
        features_dir, reference: see `InceptionScorer`.
        real: their statistics may be in `cache_dir` from an earlier evaluation.
    """
    device = runtime.device
    scorers: list[Scorer] = []
    inception = tuple(name for name in plan.runnable if METRICS[name].network == "inception")
    if inception:
        weights = plan.weights["inception"]
        extractor = _load(lambda: load_inception(weights.path, device), inception, plan, runtime)
        if extractor is not None:
            store = None
            if reference is None and real is not None and cache_dir is not None:
                store = _reference_store(cache_dir, extractor, weights, real.reference, shape)
                if not {"kid", "prdc"} & set(inception):  # those need the images themselves
                    reference = _stored_reference(store[0], extractor.feature_dim, runtime)
            scorers.append(
                InceptionScorer(
                    inception,
                    extractor,
                    device,
                    num_images=num_images,
                    weights=weights,
                    features_dir=features_dir,
                    reference=reference,
                    store=store,
                )
            )
    distance = None
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
    by_classifier = tuple(name for name in plan.runnable if METRICS[name].classes)
    if by_classifier:
        scorers.append(
            ClassScorer(
                device,
                names=by_classifier,
                num_images=num_images,
                shape=shape,
                num_classes=num_classes,
                cache_dir=cache_dir,
                flip=flip,
                log=log,
            )
        )
    if "memorization" in plan.runnable:
        scorers.append(
            MemorizationScorer(device, num_images=num_images, shape=shape, distance=distance)
        )
    plain = [name for name in plan.runnable if name in PLAIN_SCORERS]
    scorers += [PLAIN_SCORERS[name](device, num_images=num_images, shape=shape) for name in plain]
    return scorers


def _reference_store(
    folder: Path,
    extractor: Extractor,
    weights: Weights,
    real: RealImages,
    shape: tuple[int, int, int],
) -> tuple[Path, dict[str, Any]]:
    """File and description of the real images' statistics; the name changes with any of it."""
    meta = {
        "extractor": dict(extractor.details),
        "weights_sha256": weights.sha256,
        "data_fingerprint": real.fingerprint,
        "split": real.split,
        "num_images": len(real.indices),
        "shape": list(shape),
        "range": "uint8, grey repeated to three channels",
    }
    return folder / f"reference_{reference_key(**meta)}.npz", meta


def _stored_reference(path: Path, dim: int, runtime: Runtime) -> Reference | None:
    """The statistics at `path`, if the main process can read them; the others need to know only
    that they are there."""
    found = None
    if runtime.is_main and path.is_file():
        with contextlib.suppress(ConfigError):  # a damaged one is made again
            found = read_reference(path, dim)
    if runtime.broadcast_object(found is not None):
        return found or Reference(torch.zeros(dim), torch.zeros(dim, dim))
    return None


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
