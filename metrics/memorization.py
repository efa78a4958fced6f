"""Are generated images copies of train images? Nearest neighbours, beside those of held-out images.

A distance alone says little: MNIST digits are close to each other by nature. Hence the comparison
with real images that are not in the set searched (Meehan et al. 2020, arXiv:2004.05675).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.real import RealImages, RealSets
from metrics.lpips_score import PAIR_BATCH, Distance, lpips_input
from metrics.rows import KeptRows
from metrics.scoring import Entry, entry
from utils.distributed import Runtime
from utils.images import to_array
from utils.precision import full_float32
from utils.rng import Stream, numpy_generator

NUM_CHECKED = 1000
MIN_CHECKED = 100
NUM_NEIGHBOURS = 10
NUM_PAIRS = 8
CLOSE_PERCENTILE = 1  # of held-out distances
CONFIDENCE = 0.99
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
BLOCK_ROWS, BLOCK_VALUES = 2048, 2**23  # at most; 64 MB in float64
RERANK_ROWS = 100
NEVER = torch.iinfo(torch.int64).max


class Neighbours(NamedTuple):
    """The k nearest train images of each query, nearest first; of equal ones the first."""

    squared: Tensor  # (Q, k) int64 squared distance in 8-bit steps, exact
    positions: Tensor  # (Q, k) int64 place of the train image in the stream


class Distances(NamedTuple):
    """Of images to their k nearest train images, nearest first."""

    pixels: np.ndarray  # (n, k) root mean square over pixels in [0, 1]
    positions: Tensor  # (n, k) int64 places in `real.indices`
    lpips: Tensor | None  # (n, k) float64, of the same train images


def nearest_images(
    queries: Tensor,
    train: Iterable[Tensor],
    num_train: int,
    *,
    num_neighbours: int,
    left_out: Tensor,
    device: torch.device,
    block_rows: int | None = None,
) -> Neighbours:
    """Exact search by matrix products: float64 holds every integer that occurs in them.

    Args:
        queries: uint8 (Q, C, H, W).
        train: batches of uint8 (b, C, H, W), `num_train` images in all; few are held at a time.
        left_out: (Q,) int64 position of the one train image that a query must not find, or -1.
        block_rows: images per block; changes no result.
    """
    rows = block_rows or max(1, min(BLOCK_ROWS, BLOCK_VALUES // queries[0].numel()))
    left_out = left_out.to(device)
    best = torch.full((len(queries), num_neighbours), NEVER, device=device)
    start = 0
    for block in _regroup(train, rows):
        b = block.to(device).flatten(1).double()  # (rows, C * H * W)
        positions = torch.arange(start, start + len(b), device=device)
        for first in range(0, len(queries), rows):
            part = slice(first, first + rows)
            a = queries[part].to(device).flatten(1).double()
            squared = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T
            # Distance and position in one integer: ties are broken the same way in any blocks.
            keys = squared.long() * num_train + positions
            keys.masked_fill_(left_out[part, None] == positions, NEVER)
            best[part] = torch.cat([best[part], keys], 1).topk(num_neighbours, largest=False)[0]
        start += len(b)
    assert start == num_train, f"{start} train images came, not {num_train}"
    best = best.cpu()
    return Neighbours(best // num_train, best % num_train)


def _regroup(batches: Iterable[Tensor], num_rows: int) -> Iterator[Tensor]:
    """The same rows in order, `num_rows` at a time or fewer."""
    held: list[Tensor] = []
    for batch in batches:
        held.append(batch)
        if sum(map(len, held)) >= num_rows:
            yield from torch.cat(held).split(num_rows)
            held = []
    if held:
        yield from torch.cat(held).split(num_rows)


def chance_of_hits(hits: int, count: int, hits_real: int, count_real: int) -> float:
    """How probable `hits` or more of `count` generated images are if they are like the real ones.

    All distances then come in random order, and the number of generated ones ahead of the
    (hits_real + 1)-th real one is negative hypergeometric. A binomial tail at p = 0.01 would take
    the threshold for exact, though a finite baseline gave it, and raise too many alarms.
    """
    if hits_real == count_real:
        return 1.0
    after = count_real - hits_real - 1
    total = _log_comb(count + count_real, count)
    logs = (
        _log_comb(hits_real + x, x) + _log_comb(after + count - x, after) - total
        for x in range(hits, count + 1)
    )
    return min(1.0, math.fsum(map(math.exp, logs)))


def _log_comb(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def compare(generated: np.ndarray, held_out: np.ndarray) -> dict[str, Any]:
    """Distances to the k nearest train images, ascending: generated (n, k), held out (m, k).

    Close is what is no farther than the 1st percentile of held-out images: about 0.01 of images
    like those, all of the copies. More than 0.01 of the held-out images are close only where that
    many of them equal train images.
    """
    threshold = float(np.percentile(held_out[:, 0], CLOSE_PERCENTILE))
    hits, hits_real = (int((x[:, 0] <= threshold).sum()) for x in (generated, held_out))
    chance = chance_of_hits(hits, len(generated), hits_real, len(held_out))
    return {
        "flagged": chance < 1 - CONFIDENCE,
        "p_value": chance,
        "threshold": threshold,
        "generated": _summary(generated, hits),
        "held_out": _summary(held_out, hits_real),
    }


def _summary(distances: np.ndarray, hits: int) -> dict[str, Any]:
    first, ratio = distances[:, 0], None
    if distances.shape[1] > 1:
        second = distances[:, 1]
        ratios = np.divide(first, second, out=np.ones_like(first), where=second > 0)
        ratio = float(np.median(ratios))
    percentiles = zip(PERCENTILES, np.percentile(first, PERCENTILES).tolist(), strict=True)
    return {
        "share_close": hits / len(first),
        "num_copies": int((first == 0).sum()),
        "median_ratio": ratio,  # nearest to second nearest; 1 where both are 0
        "percentiles": {f"p{p}": value for p, value in percentiles},
    }


def choose(num_items: int, limit: int, seed: int, key: int) -> Tensor:
    """int64, sorted: `limit` of `num_items`, or all; a function of the arguments alone."""
    order = numpy_generator(seed, Stream.EVALUATION, key).permutation(num_items)
    return torch.from_numpy(order[:limit]).sort().values


class MemorizationScorer:
    """Nearest train images of generated ones (see `metrics.scoring.Scorer`).

    Processes send the images that are checked to the main one, which alone searches the train
    images: one pass for the held-out images and one for each set of generated ones. Without test
    images, train images take their place, each left out of its own search, so that copies of them
    are still found.

    Args:
        num_images: generated images over all processes; `num_checked` of them are checked.
        shape: (C, H, W) of one image.
        distance: LPIPS; also compare by it, over the ten nearest in pixels. That takes twenty
            distances for each checked image: seconds on a GPU, minutes on a CPU.

    Attributes:
        pairs: after `results`, pictures of the closest pairs as uint8 (H, W) or (H, W, 3): the
            generated image, the train image nearest in pixels, and by `distance` if there is one.
    """

    names = ("memorization",)

    def __init__(
        self,
        device: torch.device,
        *,
        num_images: int,
        shape: tuple[int, int, int],
        seed: int = 0,
        num_checked: int = NUM_CHECKED,
        distance: Distance | None = None,
    ) -> None:
        self.device = device
        self.test: RealImages | None = None
        self.seed = seed
        self.num_checked = num_checked
        self.distance = distance
        self.images = KeptRows(choose(num_images, num_checked, seed, 5), shape, torch.uint8)
        self.real: RealImages | None = None
        self.held_out: Distances | None = None
        self.clear()

    def clear(self) -> None:
        self.images.clear()
        self.pairs: list[tuple[np.ndarray, ...]] = []

    def see_real(self, real: RealSets | None, runtime: Runtime) -> None:
        if real is None or len(real.train.indices) < 2:
            raise ValueError("a search for copies needs at least 2 real train images")
        self.real, self.test = real.train, real.test
        if runtime.is_main:
            source = self.real if self.test is None else self.test
            chosen = choose(len(source.indices), self.num_checked, self.seed, 6)
            self.held_out = self._search(
                _load(source, chosen), chosen if self.test is None else torch.full_like(chosen, -1)
            )

    def reduce_real(self, runtime: Runtime) -> None:
        pass

    def see_generated(self, images: Tensor, labels: list[int] | None, indices: range) -> None:
        self.images.put(images, indices)

    def reduce_generated(self, runtime: Runtime) -> None:
        self.images.all_reduce(runtime)

    def results(self) -> dict[str, Entry]:
        real, held_out = self.real, self.held_out
        images, checked = self.images.values, self.images.chosen
        found = self._search(images, torch.full_like(checked, -1))
        compared, by_lpips = compare(found.pixels, held_out.pixels), None
        closest = found.pixels[:, 0].argsort(kind="stable")[:NUM_PAIRS].tolist()
        near = [found.positions[closest, 0]]
        if found.lpips is not None:
            by_lpips = compare(*(x.lpips.sort(1).values.numpy() for x in (found, held_out)))
            near.append(found.positions[closest, found.lpips[closest].argmin(1)])
        shown = [images[closest], *(_load(real, positions) for positions in near)]
        self.pairs = [tuple(map(to_array, images)) for images in zip(*shown, strict=True)]
        reasons = self._doubts()
        return {
            "memorization": entry(
                "unreliable" if reasons else "ok",
                compared["generated"]["share_close"],
                "; ".join(reasons) or None,
                **compared,
                lpips=by_lpips,
                closest=[
                    {
                        "index": int(checked[row]),
                        "train_index": int(real.indices[position]),
                        "distance": float(found.pixels[row, 0]),
                    }
                    for row, position in zip(closest, near[0].tolist(), strict=True)
                ],
                baseline="train, each image left out of its own search"
                if self.test is None
                else self.test.split,
                n_checked=len(found.pixels),
                n_held_out=len(held_out.pixels),
                n_train=len(real.indices),
                better="lower",
            )
        }

    def _search(self, images: Tensor, left_out: Tensor) -> Distances:
        """All train images for each image, but for the position `left_out`."""
        num_train = len(self.real.indices)
        found = nearest_images(
            images,
            (batch for batch, _ in self.real.fetch(self.real.indices)),
            num_train,
            num_neighbours=min(NUM_NEIGHBOURS, num_train - (self.test is None)),
            left_out=left_out,
            # MPS has no float64.
            device=torch.device("cpu") if self.device.type == "mps" else self.device,
        )
        pixels = (found.squared.double() / images[0].numel()).sqrt().numpy() / 255
        lpips = None if self.distance is None else self._lpips(images, found.positions)
        return Distances(pixels, found.positions, lpips)

    def _doubts(self) -> list[str]:
        found, num_held_out = [], len(self.held_out.pixels)
        if len(self.images.chosen) < MIN_CHECKED:
            found.append(f"only {len(self.images.chosen)} generated images are checked")
        if num_held_out < MIN_CHECKED:
            found.append(f"only {num_held_out} held-out real images to compare with")
        if len(self.real.indices) < len(self.real.labels):
            searched = f"{len(self.real.indices)} of {len(self.real.labels)}"
            found.append(f"{searched} train images are searched, copies of the others are missed")
        return found

    def _lpips(self, queries: Tensor, positions: Tensor) -> Tensor:
        """(Q, k) float64: `distance` of each query to the train images at `positions` (Q, k)."""
        found = []
        for start in range(0, len(queries), RERANK_ROWS):
            near = positions[start : start + RERANK_ROWS]
            needed, rows = near.unique(return_inverse=True)
            a = queries[start : start + RERANK_ROWS].repeat_interleave(near.shape[1], 0)
            b = _load(self.real, needed)[rows.flatten()]
            with torch.inference_mode(), full_float32(self.device):
                for pair in zip(a.split(PAIR_BATCH), b.split(PAIR_BATCH), strict=True):
                    x, y = (lpips_input(images.to(self.device)) for images in pair)
                    found.append(self.distance(x, y).double().cpu())
        return torch.cat(found).view(positions.shape)


def _load(real: RealImages, positions: Tensor) -> Tensor:
    """uint8 (n, C, H, W) on the CPU: the images at these places of `real.indices`."""
    return real.load([real.indices[i] for i in positions.tolist()]).cpu()
