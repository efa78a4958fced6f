"""FID from features: our streamed moments and distance beside kept features, np.cov and sqrtm.

python -m benchmarks.metrics
python -m benchmarks.metrics --num_images 50000 --rounds 3

Time: both sides in turn on the same features in every round, medians of the time and of its ratio.
Memory: growth of the peak resident set, each side in a process of its own into which the features
come batch by batch, as from a network.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy
import torch
from scipy.linalg import sqrtm
from threadpoolctl import threadpool_limits
from torch import Tensor

from metrics.fid import frechet_distance
from metrics.reference import FeatureMoments

BATCH_SIZE = 128
MANY = 5  # times as many images, for memory
MIB = 2**20

Moments = tuple[Any, Any]  # mean (D,) and covariance (D, D)


class Source(NamedTuple):
    """Normal features whose k-th principal variance is proportional to 1 / k.

    Attributes:
        factor: (D, D) root of the covariance.
        mean: of every feature.
        seed: of the generator.
    """

    factor: Tensor
    mean: float
    seed: int

    def batches(self, num_images: int) -> Iterator[Tensor]:
        """float32 (b, D)."""
        generator = torch.Generator().manual_seed(self.seed)
        for start in range(0, num_images, BATCH_SIZE):
            count = min(BATCH_SIZE, num_images - start)
            normal = torch.randn(count, len(self.factor), generator=generator)
            yield self.mean + normal @ self.factor


def make_sources(dim: int) -> list[Source]:
    """Generated and real features: other principal axes, spreads and means."""
    sources = []
    for seed, mean in enumerate((0.40, 0.45)):
        generator = torch.Generator().manual_seed(100 + seed)
        noise = torch.randn(dim, dim, generator=generator)
        axes = torch.linalg.qr(torch.eye(dim) + seed * 0.1 * noise / dim**0.5).Q
        deviations = (1 + 0.1 * seed) * torch.arange(1, dim + 1) ** -0.5
        sources.append(Source(deviations[:, None] * axes, mean, seed))
    return sources


def our_moments(batches: Iterable[Tensor], dim: int) -> Moments:
    sums = FeatureMoments(dim)
    for features in batches:
        sums.update(features)
    return sums.mean_cov()


def our_distance(moments1: Moments, moments2: Moments) -> float:
    return frechet_distance(*moments1, *moments2)[0]


def kept_moments(batches: Iterable[Tensor], dim: int) -> Moments:
    """Keep everything, then the mean and the covariance."""
    features = np.concatenate([batch.numpy() for batch in batches])
    return np.mean(features, axis=0), np.cov(features, rowvar=False)


def sqrtm_distance(moments1: Moments, moments2: Moments) -> float:
    """The usual formula, with the root of the product of both covariances."""
    (mu1, sigma1), (mu2, sigma2) = moments1, moments2
    root = sqrtm(sigma1 @ sigma2)
    shift = mu1 - mu2
    return float(shift @ shift + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root.real))


class Side(NamedTuple):
    moments: Callable[[Iterable[Tensor], int], Moments]
    distance: Callable[[Moments, Moments], float]

    def compute(self, sets: Iterable[Iterable[Tensor]], dim: int) -> tuple[float, float, float]:
        """Seconds for the moments of both sets, seconds for the distance, and the distance."""
        start = time.perf_counter()
        moments = [self.moments(batches, dim) for batches in sets]
        between = time.perf_counter()
        distance = self.distance(*moments)
        return between - start, time.perf_counter() - between, distance


SIDES = {"ours": Side(our_moments, our_distance), "kept": Side(kept_moments, sqrtm_distance)}


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return 1024 * float(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def peak_growth(name: str, num_images: int, dim: int) -> float:
    """Bytes beyond what stands before the first batch comes. In a fresh process."""
    small = [[torch.randn(64, 16)]] * 2
    SIDES[name].compute(small, 16)  # libraries load on first use
    sources = make_sources(dim)
    before = resident("VmRSS")
    SIDES[name].compute((source.batches(num_images) for source in sources), dim)
    return resident("VmHWM") - before


def memory_of(name: str, num_images: int) -> float:
    command = [sys.executable, "-m", "benchmarks.metrics", *sys.argv[1:]]
    output = subprocess.run(
        [*command, "--memory_of", name, "--num_images", str(num_images)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)},  # what is freed goes back at once
    ).stdout
    return float(output.split()[-1])


def measure(args: argparse.Namespace) -> tuple[dict[str, list[tuple[float, float]]], list[float]]:
    """Seconds of each round, side by side, and the distances of the last one."""
    sets = [list(source.batches(args.num_images)) for source in make_sources(args.dim)]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    for number in range(args.rounds + 1):
        distances = []
        for name, side in SIDES.items():
            *seconds, distance = side.compute(sets, args.dim)
            distances.append(distance)
            if number:  # the first round warms up
                times[name].append(tuple(seconds))
    return times, distances


def row(step: str, ours: list[float], kept: list[float]) -> str:
    ratios = [b / a for a, b in zip(ours, kept, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    seconds = " | ".join(f"{statistics.median(side):.2f}" for side in (ours, kept))
    return f"| {step}, s | {seconds} | {middle:.2f} ({low:.2f} to {high:.2f}) |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_images", type=int, default=10_000, help="of each kind")
    parser.add_argument("--dim", type=int, default=2048, help="features of an image")
    parser.add_argument("--rounds", type=int, default=5, help="at least 2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory_of", choices=list(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    threadpool_limits(args.threads)  # of NumPy and SciPy, for good
    if args.memory_of:
        print(peak_growth(args.memory_of, args.num_images, args.dim))
        return

    times, distances = measure(args)
    print(
        f"N={args.num_images} D={args.dim}, {args.threads} thread(s), torch {torch.__version__}, "
        f"numpy {np.__version__}, scipy {scipy.__version__}, medians of {args.rounds} interleaved "
        f"rounds; distances {distances[0]:.8g} and {distances[1]:.8g}\n"
    )
    print("| step | ours | features kept, np.cov, sqrtm | x ours (quartiles) |")
    print("| --- | --- | --- | --- |")
    steps = {"moments of both sets": (1, 0), "Frechet distance": (0, 1), "total": (1, 1)}
    for step, (a, b) in steps.items():
        print(row(step, *([a * m + b * f for m, f in times[name]] for name in SIDES)))
    for count in (args.num_images, MANY * args.num_images):
        ours, kept = (memory_of(name, count) / MIB for name in SIDES)
        sizes = f"{ours:.0f} | {kept:.0f} | {kept / ours:.2f}"
        print(f"| peak memory for {count} images, MiB | {sizes} |")


if __name__ == "__main__":
    main()
