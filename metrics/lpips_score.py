"""Diversity: mean LPIPS distance (Zhang et al. 2018, arXiv:1801.03924) between pairs of images.

Above the real images' own value is not better: noise scores high. Hence the same statistic on real
images beside it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.real import RealSets
from metrics.base import Collector, Context, Entry, Metric, Row, entry, number
from metrics.rows import KeptRows
from metrics.weights import Network, load_plain, wrong_weights
from utils.distributed import Runtime
from utils.images import to_float, to_rgb
from utils.precision import full_float32
from utils.rng import Stream, fixed_subset, numpy_generator

NUM_PAIRS = 2000
MIN_SIZE = 64  # pixels; AlexNet fails below 31, and values at different sizes do not compare
PAIR_BATCH = 32

Distance = Callable[[Tensor, Tensor], Tensor]


class MeanError(NamedTuple):
    """A mean and its standard error (None where one pair cannot give it)."""

    mean: float
    sem: float | None


class Diversity(NamedTuple):
    """Mean distance of any two images, and of two with one label, averaged over the labels.

    `intra` is None without labels, or where no label has two images.
    """

    inter: MeanError
    intra: MeanError | None


def load_lpips(path: Path, device: torch.device) -> Distance:
    """Load LPIPS (alex, v0.1) on torchvision's AlexNet weights at `path`.

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


ALEXNET = Network(
    name="lpips",
    title="LPIPS (AlexNet)",
    load=load_lpips,
    url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    file_names=("alexnet-owt-7be5be79.pth",),
    help="AlexNet for lpips; default: cache or download",
    hash_prefix="7be5be79",
)


def lpips_input(images: Tensor) -> Tensor:
    """uint8 (B, 1 or 3, H, W) -> float32 (B, 3, H', W') in [-1, 1], smaller side >= 64."""
    x = to_float(to_rgb(images))
    height, width = x.shape[-2:]
    if min(height, width) < MIN_SIZE:
        scale = MIN_SIZE / min(height, width)
        size = (round(height * scale), round(width * scale))
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return x


def distances(distance: Distance, a: Tensor, b: Tensor, device: torch.device) -> Tensor:
    """(N,) float64 on the CPU: from each row of uint8 `a` (N, C, H, W) to the same row of `b`."""
    found = []
    with torch.inference_mode(), full_float32(device):
        for pair in zip(a.split(PAIR_BATCH), b.split(PAIR_BATCH), strict=True):
            x, y = (lpips_input(images.to(device)) for images in pair)
            found.append(distance(x, y).cpu().double())
    return torch.cat(found)


def draw_pairs(num_images: int, num_pairs: int, seed: int, *index: int) -> Tensor:
    """(P, 2) int64 pairs of different images: every pair if there are at most `num_pairs`."""
    if num_images * (num_images - 1) // 2 <= num_pairs:
        return torch.combinations(torch.arange(num_images))
    rng = numpy_generator(seed, Stream.EVALUATION, *index)
    first = rng.integers(num_images, size=num_pairs)
    second = (first + rng.integers(1, num_images, size=num_pairs)) % num_images
    return torch.stack([torch.from_numpy(first), torch.from_numpy(second)], dim=1)


def mean_distance(
    distance: Distance, images: Tensor, pairs: Tensor, device: torch.device
) -> MeanError:
    """Mean of `distance` over pairs of rows of uint8 (N, C, H, W)."""
    parts = [
        distances(distance, images[part[:, 0]], images[part[:, 1]], device)
        for part in pairs.split(PAIR_BATCH)  # few copies of images at a time
    ]
    values = torch.cat(parts)
    sem = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return MeanError(values.mean().item(), sem)


def diversity(
    distance: Distance,
    images: Tensor,
    labels: Tensor | None,
    device: torch.device,
    *,
    num_pairs: int = NUM_PAIRS,
) -> Diversity:
    """Compare pairs of uint8 images (N, C, H, W), drawn with a fixed seed.

    Pairs share images, so standard errors are a little too small where `num_pairs` is large beside
    the number of images.

    Raises:
        ValueError: fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"a distance needs at least 2 images, there are {len(images)}")
    inter = mean_distance(distance, images, draw_pairs(len(images), num_pairs, 0, 1), device)
    if labels is None:
        return Diversity(inter, None)
    classes = [rows for k in labels.unique() if len(rows := (labels == k).nonzero()[:, 0]) > 1]
    per_class = []
    for k, rows in enumerate(classes):
        pairs = draw_pairs(len(rows), max(1, num_pairs // len(classes)), 0, 2, k)
        per_class.append(mean_distance(distance, images, rows[pairs], device))
    return Diversity(inter, _average(per_class))


def _average(parts: list[MeanError]) -> MeanError | None:
    if not parts:
        return None
    errors = [part.sem for part in parts if part.sem is not None]
    sem = math.hypot(*errors) / len(parts) if len(errors) == len(parts) else None
    return MeanError(sum(part.mean for part in parts) / len(parts), sem)


class Lpips(Metric, Collector):
    """LPIPS diversity of the generated images, beside that of the real ones, if there are any.

    Processes send the images that pairs are drawn from (4000 at most) to the main one, which alone
    computes distances: seconds on a GPU, a minute on a CPU.
    """

    better = "near the real value"
    network = ALEXNET

    def __init__(self, context: Context) -> None:
        self.distance: Distance = context.networks[ALEXNET]
        self.device = context.runtime.device
        generated = context.generated
        self.num_images = generated.num_images
        self.images = KeptRows(self._pool(self.num_images))
        labels = generated.labels
        self.labels = None if labels is None else torch.tensor(labels)[self.images.chosen]
        self.real: Diversity | None = None
        size = lpips_input(torch.zeros(1, *generated.spec.shape, dtype=torch.uint8)).shape[-2:]
        self.details = {"net": "alex", "size": list(size), **context.origin_of(ALEXNET)}

    def _pool(self, num_images: int) -> Any:
        """Sorted indices of the images that pairs are drawn from: no more than pairs can use."""
        return fixed_subset(num_images, 2 * NUM_PAIRS)

    def update_real(self, real: RealSets | None, runtime: Runtime) -> None:
        if real is None or not runtime.is_main:
            return
        images = real.reference
        pool = [images.indices[i] for i in self._pool(len(images.indices))]
        labels = images.labels[pool] if images.num_classes and self.labels is not None else None
        self.real = diversity(self.distance, images.load(pool), labels, self.device)

    def reset(self) -> None:
        self.images.reset()

    def update(self, images: Tensor, indices: range) -> None:
        self.images.update(images, indices)

    def reduce(self, runtime: Runtime) -> None:
        self.images.reduce(runtime)

    def compute(self) -> Entry:
        generated = diversity(self.distance, self.images.values, self.labels, self.device)
        baselines = self.real or (None, None)
        inter, intra = (
            part
            and {
                "value": part.mean,
                "sem": part.sem,
                "real_value": baseline and baseline.mean,
                "real_sem": baseline and baseline.sem,
            }
            for part, baseline in zip(generated, baselines, strict=True)
        )
        return entry(
            "ok",
            inter["value"],
            sem=inter["sem"],
            real_value=inter["real_value"],
            lpips_inter=inter,
            lpips_intra=intra,
            n=self.num_images,
            num_pairs=min(NUM_PAIRS, self.num_images * (self.num_images - 1) // 2),
            better=self.better,
            extractor=self.details,
        )

    @classmethod
    def rows(cls, name: str, result: Entry) -> list[Row]:
        rows = super().rows("lpips_inter", result)
        if intra := result.get("lpips_intra"):
            rows.append(("lpips_intra", number(intra["value"]), _note(intra)))
        return rows

    @classmethod
    def note(cls, result: Entry) -> str:
        return _note(result["lpips_inter"])


def _note(part: dict[str, Any]) -> str:
    notes = [] if part["sem"] is None else [f"+- {number(part['sem'])}"]
    if part["real_value"] is not None:
        notes.append(f"real {number(part['real_value'])}")
    return ", ".join(notes)
