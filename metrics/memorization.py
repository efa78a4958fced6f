"""Are generated images copies of train images? Nearest neighbours, beside those of held-out images.

A distance alone says little: MNIST digits are close to each other by nature. Hence the comparison
with real images that are not in the set searched (Meehan et al. 2020, arXiv:2004.05675). A noisy
copy may be as far from its original as other images are from theirs, but all the rest is farther:
hence the ratio of the two nearest distances (Yoon et al. 2023, SPIGM workshop at ICML).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.real import RealSets
from metrics.base import Context, Entry, Metric, measured
from metrics.gallery import ChosenImages
from metrics.lpips_score import ALEXNET, PAIR_BATCH, Distance, distances
from metrics.reference import float64_device
from metrics.sanity import image_hash
from reporting.pages import Picture
from utils.distributed import Runtime
from utils.images import as_pictures, make_grid, to_array
from utils.rng import EvaluationDraw, fixed_subset

NUM_CHECKED = 1000
MIN_CHECKED = 100
NUM_NEIGHBOURS = 10
NUM_PAIRS = 8
PAIRS_PER_ROW = 4  # a pair is a generated image with its neighbours
CLOSE_PERCENTILE = 1  # percentile of the held-out distances; what is below is close
MAX_CHANCE = 0.001  # of a false alarm, in each of three tests
SIGNS = {  # what raises the alarm -> its words in the summary
    "distance": "more so than held-out images",
    "ratio": "much nearer to one train image than to all others",
    "copies": "exact copies",
}
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
BLOCK_ROWS, BLOCK_VALUES = 2048, 2**23  # the most in one block; 64 MB in float64
RERANK_ROWS = 100
LEFT_OUT = "train, each image left out of its own search"
NEVER = torch.iinfo(torch.int64).max


class Distances(NamedTuple):
    """The distances of images to their k nearest train images, nearest first."""

    pixels: np.ndarray  # (n, k) root mean square over pixels in [0, 1]
    positions: Tensor  # (n, k) int64 places in `train.indices`
    lpips: Tensor | None  # (n, k) float64, of the same train images


def nearest_images(
    queries: Tensor,
    train: Iterable[Tensor],
    num_train: int,
    *,
    num_neighbours: int,
    left_out: Tensor,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Search exactly, by matrix products: float64 holds every integer that occurs in them.

    Takes queries (Q, C, H, W), batches of `num_train` train images (b, C, H, W), and (Q,) int64 the
    position of the one train image that a query must not find, or -1. Returns, of the k nearest
    train images of each query, nearest first and of equal ones the first: the squared distance in
    steps of `_levels`, and the place in the stream, int64 (Q, k) both.
    """
    rows = max(1, min(BLOCK_ROWS, BLOCK_VALUES // queries[0].numel()))
    left_out = left_out.to(device)
    best = torch.full((len(queries), num_neighbours), NEVER, device=device)
    start = 0
    for block in itertools.chain.from_iterable(batch.split(rows) for batch in train):
        b = _levels(block.to(device))  # (rows, C * H * W)
        positions = torch.arange(start, start + len(b), device=device)
        for first in range(0, len(queries), rows):
            part = slice(first, first + rows)
            a = _levels(queries[part].to(device))
            squared = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T
            # Distance and position in one integer: ties are broken the same way in any blocks.
            keys = squared.long() * num_train + positions
            keys.masked_fill_(left_out[part, None] == positions, NEVER)
            best[part] = torch.cat([best[part], keys], 1).topk(num_neighbours, largest=False)[0]
        start += len(b)
    assert start == num_train, f"{start} train images came, not {num_train}"
    best = best.cpu()
    return best // num_train, best % num_train


def _levels(images: Tensor) -> Tensor:
    """Images (B, ...) as whole numbers, float64 (B, D), whose squared distances 64 bits hold."""
    x = images.flatten(1).double()
    return (x.clamp(-2, 2) * 2040).round() if images.is_floating_point() else x


def chance_of_hits(hits: int, count: int, hits_real: int, count_real: int) -> float:
    """How probable `hits` or more of `count` generated images are if they are like the real ones.

    All distances then come in random order, and `hits` generated ones lie ahead of the
    (hits_real + 1)-th real one just if at most `hits_real` real ones are among the first
    hits + hits_real. A binomial tail at p = 0.01 would take the threshold for exact, though a
    finite baseline gave it, and raise too many alarms.
    """
    from scipy.stats import hypergeom

    tail = hypergeom.cdf(hits_real, count + count_real, count_real, hits + hits_real)
    return min(1.0, float(tail))


def compare(
    generated: np.ndarray, held_out: np.ndarray, *, equal: int = 0, searched: int = 0
) -> dict[str, Any]:
    """Compare distances to the k nearest train images, ascending: (n, k) and held out (m, k).

    Close is what is no farther than the 1st percentile of held-out images: about 0.01 of images
    like those, all of the copies. More than 0.01 of the held-out images are close only where that
    many of them equal train images. The same is asked of the ratio of the two nearest distances.
    Copies, at distance 0, are a sign by themselves if no real image is one; else there must be
    more than of the real ones, which are the held-out ones and the `searched` train images, `equal`
    of which equal another one.
    """
    counts = len(generated), len(held_out)
    copies, copies_real = (int((x[:, 0] == 0).sum()) for x in (generated, held_out))
    num_real, equal = counts[1] + searched, copies_real + equal
    chances, thresholds = {}, {}
    for sign, values in {"distance": lambda x: x[:, 0], "ratio": ratios}.items():
        pair = values(generated), values(held_out)
        thresholds[sign] = float(np.percentile(pair[1], CLOSE_PERCENTILE))
        hits = [int((x <= thresholds[sign]).sum()) for x in pair]
        chances[sign] = chance_of_hits(hits[0], counts[0], hits[1], counts[1])
    chances["copies"] = float(not copies)
    if equal:
        chances["copies"] = chance_of_hits(copies, counts[0], equal, num_real)
    signs = [sign for sign, chance in chances.items() if chance < MAX_CHANCE]
    return {
        "flagged": bool(signs),
        "signs": signs,
        "p_value": chances["distance"],
        "p_values": chances,
        "threshold": thresholds["distance"],
        "ratio_threshold": thresholds["ratio"],
        "generated": _summary(generated, *thresholds.values()),
        "held_out": _summary(held_out, *thresholds.values()),
    }


def ratios(distances: np.ndarray) -> np.ndarray:
    """(n, k) ascending -> (n,): nearest to second nearest; 1 where both are 0, or k is 1."""
    first, second = distances[:, 0], distances[:, min(1, distances.shape[1] - 1)]
    return np.divide(first, second, out=np.ones_like(first), where=second > 0)


def num_equal(hashes: Iterable[int]) -> int:
    """How many images equal another one, by the hashes of all."""
    return sum(count for count in Counter(hashes).values() if count > 1)


def _summary(distances: np.ndarray, close: float, close_ratio: float) -> dict[str, Any]:
    first, ratio = distances[:, 0], ratios(distances)
    percentiles = zip(PERCENTILES, np.percentile(first, PERCENTILES).tolist(), strict=True)
    return {
        "share_close": float((first <= close).mean()),
        "share_close_ratio": float((ratio <= close_ratio).mean()),
        "num_copies": int((first == 0).sum()),
        "median_ratio": float(np.median(ratio)) if distances.shape[1] > 1 else None,
        "percentiles": {f"p{p}": value for p, value in percentiles},
    }


class Memorization(ChosenImages, Metric):
    """The share of generated images that are as close to a train image as few held-out ones are.

    Processes send the images that are checked to the main one, which alone searches the train
    images: one pass for the held-out images and one for each set of generated ones. Without test
    images, train images take their place, each left out of its own search, so that copies of them
    are still found. Where LPIPS is there for another metric, it compares the ten nearest in pixels
    again. That takes twenty distances for each checked image: seconds on a GPU, minutes on a CPU.

    After `compute` the closest generated images, and the train images nearest to them in pixels,
    and by LPIPS if it is there, are in `closest`: (n, C, H, W) each.
    """

    better = "lower"
    real_images = True

    def __init__(self, context: Context) -> None:
        draw = EvaluationDraw.CHECKED_FOR_COPIES
        super().__init__(fixed_subset(context.generated.num_images, NUM_CHECKED, draw))
        self.device, self.shown = context.runtime.device, context.generated.shown
        self.distance: Distance | None = context.networks.get(ALEXNET)

    def update_real(self, real: RealSets, runtime: Runtime) -> None:
        if len(real.train.indices) < 2:
            raise ValueError("a search for copies needs at least 2 real train images")
        self.train, self.test = real.train, real.test
        if runtime.is_main:
            source, draw = self.test or self.train, EvaluationDraw.STAND_INS_FOR_TEST_IMAGES
            chosen = fixed_subset(len(source.indices), NUM_CHECKED, draw)
            left_out = None if self.test else torch.from_numpy(chosen)
            self.held_out = self._search(source.load(source.at(chosen))[0], left_out)

    def reset(self) -> None:
        super().reset()
        self.closest: list[Tensor] = []

    def compute(self) -> Entry:
        train, images, held_out = self.train, self.values, self.held_out
        near = self._search(images)
        real = {"equal": self.num_equal, "searched": len(train.indices)}
        compared, by_lpips = compare(near.pixels, held_out.pixels, **real), None
        rows = near.pixels[:, 0].argsort(kind="stable")[:NUM_PAIRS].tolist()
        nearest = [near.positions[rows, 0]]
        if near.lpips is not None:
            by_lpips = compare(*(x.lpips.sort(1).values.numpy() for x in (near, held_out)), **real)
            nearest.append(near.positions[rows, near.lpips[rows].argmin(1)])
        self.closest = [images[rows], *(train.load(train.at(p.tolist()))[0] for p in nearest)]
        columns = self.chosen[rows], nearest[0], near.pixels[rows, 0]
        closest = [
            {"index": index, "train_index": train.indices[place], "distance": distance}
            for index, place, distance in zip(*(c.tolist() for c in columns), strict=True)
        ]
        num_held_out, num_train = len(held_out.pixels), len(train.indices)
        searched = f"{num_train} of {len(train.dataset)} train images are searched"
        doubts = {
            f"only {len(images)} generated images are checked": len(images) < MIN_CHECKED,
            f"only {num_held_out} held-out real images to compare with": num_held_out < MIN_CHECKED,
            f"{searched}, copies of the others are missed": num_train < len(train.dataset),
        }
        counts = {"n_checked": len(images), "n_held_out": num_held_out, "n_train": num_train}
        baseline = self.test.split if self.test else LEFT_OUT
        counts["n_train_equal"] = self.num_equal
        details = {"lpips": by_lpips, "closest": closest, "baseline": baseline, **counts}
        share = compared["generated"]["share_close"]
        return measured(share, "; ".join(filter(doubts.get, doubts)), **compared, **details)

    def pictures(self) -> dict[str, Picture]:
        if not self.closest:
            return {}
        width = len(self.closest)
        images = torch.stack(self.closest, 1).flatten(0, 1)  # each image before its neighbours
        lines = torch.arange(len(images)).split(width * PAIRS_PER_ROW)
        grid = make_grid(as_pictures(images, self.shown), [line.tolist() for line in lines])
        columns = ("generated", "nearest train image", "nearest by LPIPS")
        caption = f"In turn: {', '.join(columns[:width])}"
        return {"neighbours": Picture(to_array(grid), "Closest to the train images", caption)}

    @classmethod
    def note(cls, result: Entry) -> str:
        verdict = ", ".join(map(SIGNS.get, result["signs"])) or "no sign of copies"
        return f"share nearer to the train images than 99 % of held-out ones; {verdict}"

    def _search(self, images: Tensor, left_out: Tensor | None = None) -> Distances:
        """The nearest train images of each image, but for the position `left_out` if given."""
        num_train = len(self.train.indices)
        squared, positions = nearest_images(
            images,
            self._train_batches(),
            num_train,
            num_neighbours=min(NUM_NEIGHBOURS, num_train - (self.test is None)),
            left_out=torch.full((len(images),), -1) if left_out is None else left_out,
            device=float64_device(self.device),
        )
        num_steps = 4080 if images.is_floating_point() else 255
        pixels = (squared.double() / images[0].numel()).sqrt().numpy() / num_steps
        lpips = None if self.distance is None else self._lpips(images, positions)
        return Distances(pixels, positions, lpips)

    def _train_batches(self) -> Iterator[Tensor]:
        """The train images; after the last `num_equal` is how many of them equal another one."""
        hashes: list[int] = []
        for images, _ in self.train.fetch(self.train.indices):
            hashes += map(image_hash, images)
            yield images
        self.num_equal = num_equal(hashes)

    def _lpips(self, queries: Tensor, positions: Tensor) -> Tensor:
        """(Q, k) float64: the distance of each query to the train images at `positions` (Q, k)."""
        parts = []
        blocks = zip(queries.split(RERANK_ROWS), positions.split(RERANK_ROWS), strict=True)
        for block, near in blocks:
            needed, rows = near.unique(return_inverse=True)
            a = block.repeat_interleave(near.shape[1], 0)
            b = self.train.load(self.train.at(needed.tolist()))[0][rows.flatten()]
            pairs = zip(a.split(PAIR_BATCH), b.split(PAIR_BATCH), strict=True)
            parts.append(distances(self.distance, pairs, self.device))
        return torch.cat(parts).view(positions.shape)
