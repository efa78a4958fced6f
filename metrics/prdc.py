"""Precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2), density and
coverage (Naeem et al. 2020, arXiv:2002.09797, section 3).

Each point has a ball that reaches to the k-th nearest other point of its own set. A duplicate of
the point counts as such, at distance 0, so k or more duplicates make a ball of radius 0. Balls are
closed (<=), as in Kynkaanniemi's eq. 1: a duplicate lies inside even such a ball, and a set against
itself has precision, recall and coverage 1 and, without ties, density (k + 1) / k. Naeem's own code
has open balls (<), which differs in such ties only. Distances are float64; what exceeds a radius by
no more than rounding (see `SLACK`) is a tie, and inside.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metrics.base import Entry, Metric, Row, measured, number
from metrics.features import DINOV2, INCEPTION, Features
from utils.precision import full_float32
from utils.rng import EvaluationDraw, fixed_subset

K = 5
MAX_ROWS = 10_000
BLOCK = 256  # rows whose distances to all others are held at a time: 20 MB at `MAX_ROWS`
SLACK = 1e-12  # share of |x|^2 + |y|^2; bounds the error of a float64 product of 2048 features


class Shares(NamedTuple):
    """All higher is better; shares in [0, 1], but density can exceed 1."""

    precision: float  # share of generated points inside the ball of a real one
    recall: float  # share of real points inside the ball of a generated one
    density: float  # real balls around a generated point, over k: expected 1 for equal sources
    coverage: float  # share of real points whose ball holds a generated one
    k: int
    num_real: int
    num_generated: int


def squared_distances(x: Tensor, y: Tensor, slack: float = 0.0) -> Tensor:
    """(m, D), (n, D) -> (m, n): |x|^2 + |y|^2 - 2 x.y, less the share `slack` of the first two."""
    norms = [torch.linalg.vector_norm(points, dim=1).square() for points in (x, y)]
    with full_float32(x.device):
        return torch.addmm(norms[0][:, None] + norms[1], x, y.T, beta=1 - slack, alpha=-2)


def squared_radii(points: Tensor, k: int, block: int) -> Tensor:
    """(N, D) -> (N,): squared distance of each point to its k-th nearest other one."""
    radii = []
    for start in range(0, len(points), block):
        squared = squared_distances(points[start : start + block], points)  # (b, N)
        squared.diagonal(start).fill_(torch.inf)  # the points themselves
        radii.append(squared.topk(k, largest=False).values.amax(1))
    return torch.cat(radii)


def prdc(real: Tensor, generated: Tensor, *, k: int = K, block: int = BLOCK) -> Shares:
    """Compare real (N, D) with generated (M, D) features.

    Time grows with N M D, memory with `block` max(N, M). Raises a ValueError for a set of k or
    fewer points, and for features that are not finite.
    """
    x, y = (points.to("cpu", torch.float64, copy=True) for points in (real, generated))
    if k < 1 or min(len(x), len(y)) <= k:
        needs = f"k={k} nearest neighbours need k >= 1 and more than k images of each kind"
        raise ValueError(f"{needs}, got {len(x)} real and {len(y)} generated")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("features are not finite")
    centre = x.mean(0)  # far from 0 the products would cancel
    x, y = x.sub_(centre), y.sub_(centre)  # in place: they are copies
    radii_x, radii_y = squared_radii(x, k, block), squared_radii(y, k, block)
    num_around = torch.zeros(len(y), dtype=torch.int64)  # real balls around each generated point
    num_recalled = num_covered = 0
    for part, radii in zip(x.split(block), radii_x.split(block), strict=True):
        squared = squared_distances(part, y, SLACK)  # (b, M)
        inside_real = squared <= radii[:, None]
        num_around += inside_real.sum(0)
        num_covered += int(inside_real.any(1).sum())
        num_recalled += int((squared <= radii_y).any(1).sum())
    precision = float((num_around > 0).double().mean())
    density = float(num_around.double().mean()) / k
    recall, coverage = num_recalled / len(x), num_covered / len(x)
    return Shares(precision, recall, density, coverage, k, len(x), len(y))


def prdc_entry(real: Tensor, generated: Tensor, **details: Any) -> Entry:
    """The entry on features (N, D) and (M, D); without a value where they are too few.

    Of more than `MAX_ROWS` rows, neighbours are searched among as many, always the same ones.
    """
    counts = f"{len(real)} real, {len(generated)} generated"
    if min(len(real), len(generated)) <= K:
        return measured(None, f"{K} neighbours need more than {K} images: {counts}", **details)
    draw = EvaluationDraw.NEIGHBOUR_ROWS
    shares = prdc(*(x[fixed_subset(len(x), MAX_ROWS, draw)] for x in (real, generated)))
    return measured(shares.precision, **shares._asdict(), **details)


class Prdc(Metric):
    """Precision, recall, density and coverage in a network's features; the value is precision."""

    better = "higher"
    network = INCEPTION
    real_images = True
    collector = Features
    keeps = "features"

    def compute(self) -> Entry:
        seen: Features = self.collected
        real, generated = (kind.rows["features"] for kind in (seen.real, seen.generated))
        return prdc_entry(real, generated, **seen.counts())

    @classmethod
    def rows(cls, name: str, result: Entry) -> list[Row]:
        if result["value"] is None:
            return super().rows(name, result)
        others = ("recall", "density", "coverage")
        more = [(f"{name} {other}", number(result[other]), "") for other in others]
        return [*super().rows(f"{name} precision", result), *more]


PrdcDinov2 = type("PrdcDinov2", (Prdc,), {"network": DINOV2})
