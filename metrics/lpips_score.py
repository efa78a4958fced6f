"""Diversity: mean LPIPS distance (Zhang et al. 2018, arXiv:1801.03924) between pairs of images.

Above the real images' own value is not better: noise scores high. Hence the same statistic on real
images beside it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.real import RealSets
from metrics.rows import KeptRows
from metrics.scoring import Entry, entry
from metrics.weights import Weights, WeightsSource, load_plain, wrong_weights
from utils.distributed import Runtime
from utils.images import to_float, to_rgb
from utils.precision import full_float32
from utils.rng import Stream, numpy_generator

ALEXNET = WeightsSource(
    name="LPIPS (AlexNet)",
    url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    flag="--lpips_weights",
    file_names=("alexnet-owt-7be5be79.pth",),
    hash_prefix="7be5be79",
)
NUM_PAIRS = 2000
MIN_SIZE = 64  # pixels; AlexNet fails below 31, and values at different sizes do not compare
PAIR_BATCH = 32

Distance = Callable[[Tensor, Tensor], Tensor]


class MeanError(NamedTuple):
    """A mean and its standard error (None where one pair cannot give it)."""

    mean: float
    sem: float | None


def load_lpips(path: Path, device: torch.device) -> Distance:
    """LPIPS (alex, v0.1) on torchvision's AlexNet weights at `path`.

    Returns:
        distance(a, b): float32 (B, 3, H, W) in [-1, 1], twice -> (B,).

    Raises:
        MissingWeightsError: the file is damaged, not plain tensors, or of another network.
    """
    import lpips

    state = load_plain(path, ALEXNET)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision the old way
        # `pnet_rand` keeps it from downloading; the heads come with the package.
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    try:
        for name, parameter in network.net.named_parameters():
            layer, kind = re.fullmatch(r"slice\d\.(\d+)\.(weight|bias)", name).groups()
            parameter.data.copy_(state[f"features.{layer}.{kind}"])
    except (KeyError, RuntimeError) as error:
        raise wrong_weights(path, ALEXNET, error) from error
    network.requires_grad_(False).eval().to(device)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return network(a, b).flatten()

    return distance


def lpips_input(images: Tensor) -> Tensor:
    """uint8 (B, 1 or 3, H, W) -> float32 (B, 3, H', W') in [-1, 1], smaller side >= 64."""
    x = to_float(to_rgb(images))
    height, width = x.shape[-2:]
    if min(height, width) < MIN_SIZE:
        scale = MIN_SIZE / min(height, width)
        size = (round(height * scale), round(width * scale))
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return x


def draw_pairs(num_images: int, num_pairs: int, seed: int, *index: int) -> Tensor:
    """(P, 2) int64 pairs of different images: every pair if there are at most `num_pairs`."""
    if num_images * (num_images - 1) // 2 <= num_pairs:
        return torch.combinations(torch.arange(num_images))
    rng = numpy_generator(seed, Stream.EVALUATION, *index)
    first = rng.integers(num_images, size=num_pairs)
    second = (first + rng.integers(1, num_images, size=num_pairs)) % num_images
    return torch.stack([torch.from_numpy(first), torch.from_numpy(second)], dim=1)


def pool_of(indices: Sequence[int], num_pairs: int, seed: int) -> list[int]:
    """The images that pairs are drawn from, sorted: no more than that many pairs can use."""
    if len(indices) <= 2 * num_pairs:
        return list(indices)
    order = numpy_generator(seed, Stream.EVALUATION).permutation(len(indices))
    return sorted(indices[i] for i in order[: 2 * num_pairs])


def mean_distance(
    distance: Distance, images: Tensor, pairs: Tensor, device: torch.device
) -> MeanError:
    """Mean of `distance` over pairs of rows of uint8 (N, C, H, W)."""
    found = []
    with torch.inference_mode(), full_float32(device):
        for part in pairs.split(PAIR_BATCH):
            a, b = (lpips_input(images[part[:, side]].to(device)) for side in (0, 1))
            found.append(distance(a, b).cpu().double())
    values = torch.cat(found)
    sem = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return MeanError(values.mean().item(), sem)


def diversity(
    distance: Distance,
    images: Tensor,
    labels: Tensor | None,
    device: torch.device,
    *,
    num_pairs: int = NUM_PAIRS,
    seed: int = 0,
) -> dict[str, MeanError | None]:
    """`lpips_inter` over any pairs, and `lpips_intra` within a label, averaged over the labels.

    `lpips_intra` is None without labels, or where no label has two images. Pairs share images, so
    standard errors are a little too small where `num_pairs` is large beside the number of images.

    Raises:
        ValueError: fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"a distance needs at least 2 images, there are {len(images)}")
    inter = mean_distance(distance, images, draw_pairs(len(images), num_pairs, seed, 1), device)
    if labels is None:
        return {"lpips_inter": inter, "lpips_intra": None}
    classes = [rows for k in labels.unique() if len(rows := (labels == k).nonzero()[:, 0]) > 1]
    per_class = []
    for k, rows in enumerate(classes):
        pairs = draw_pairs(len(rows), max(1, num_pairs // len(classes)), seed, 2, k)
        per_class.append(mean_distance(distance, images, rows[pairs], device))
    return {"lpips_inter": inter, "lpips_intra": _average(per_class)}


def _average(parts: list[MeanError]) -> MeanError | None:
    if not parts:
        return None
    errors = [part.sem for part in parts if part.sem is not None]
    sem = math.hypot(*errors) / len(parts) if len(errors) == len(parts) else None
    return MeanError(sum(part.mean for part in parts) / len(parts), sem)


class LpipsScorer:
    """LPIPS diversity (see `metrics.scoring.Scorer`).

    Processes send the images that pairs are drawn from (4000 at most) to the main one, which alone
    computes distances: seconds on a GPU, a minute on a CPU.

    Args:
        num_images: generated images over all processes.
        labels: of all of them by global index, or None.
        shape: (C, H, W) of one image.
    """

    names = ("lpips",)

    def __init__(
        self,
        distance: Distance,
        device: torch.device,
        *,
        num_images: int,
        labels: Sequence[int] | None,
        shape: tuple[int, int, int],
        num_pairs: int = NUM_PAIRS,
        seed: int = 0,
        weights: Weights | None = None,
    ) -> None:
        self.distance = distance
        self.device = device
        self.num_images = num_images
        self.num_pairs = num_pairs
        self.seed = seed
        pool = pool_of(range(num_images), num_pairs, seed)
        self.images = KeptRows(pool, shape, torch.uint8)
        self.labels = None if labels is None else torch.tensor(labels)[pool]
        self.real: dict[str, MeanError | None] = {}
        size = list(lpips_input(torch.zeros(1, *shape, dtype=torch.uint8)).shape[-2:])
        self.details: dict[str, Any] = {"net": "alex", "size": size}
        if weights is not None:
            self.details |= {"path": str(weights.path), "sha256": weights.sha256}

    def clear(self) -> None:
        self.images.clear()

    def see_real(self, real: RealSets | None, runtime: Runtime) -> None:
        if real is None or not runtime.is_main:
            return
        real = real.reference
        pool = pool_of(real.indices, self.num_pairs, self.seed)
        labels = real.labels[pool] if real.num_classes and self.labels is not None else None
        self.real = self._diversity(real.load(pool), labels)

    def reduce_real(self, runtime: Runtime) -> None:
        pass

    def see_generated(self, images: Tensor, labels: list[int] | None, indices: range) -> None:
        self.images.put(images, indices)

    def reduce_generated(self, runtime: Runtime) -> None:
        self.images.all_reduce(runtime)

    def results(self) -> dict[str, Entry]:
        generated = self._diversity(self.images.values, self.labels)
        inter, real = generated["lpips_inter"], self.real.get("lpips_inter")
        details: dict[str, Any] = {}
        for name, found in generated.items():
            baseline = self.real.get(name)
            details[name] = found and {
                "value": found.mean,
                "sem": found.sem,
                "real_value": baseline and baseline.mean,
                "real_sem": baseline and baseline.sem,
            }
        return {
            "lpips": entry(
                "ok",
                inter.mean,
                sem=inter.sem,
                real_value=real and real.mean,
                **details,
                n=self.num_images,
                num_pairs=min(self.num_pairs, self.num_images * (self.num_images - 1) // 2),
                better="near the real value",
                extractor=self.details,
            )
        }

    def _diversity(self, images: Tensor, labels: Tensor | None) -> dict[str, MeanError | None]:
        return diversity(
            self.distance, images, labels, self.device, num_pairs=self.num_pairs, seed=self.seed
        )
