"""Diversity: mean LPIPS distance (Zhang et al. 2018, arXiv:1801.03924) between pairs of images.

Above the real images' own value is not better: noise scores high. Hence the same statistic on real
images beside it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.real import RealSets
from metrics.base import Context, Entry, Metric, Row, measured, number
from metrics.gallery import ChosenImages
from metrics.weights import Network, load_plain
from utils.distributed import Runtime
from utils.images import to_float, to_rgb
from utils.precision import full_float32
from utils.rng import Stream, fixed_subset, numpy_generator

NUM_PAIRS = 2000
MIN_SIZE = 64  # pixels; AlexNet fails below 31, and values at different sizes do not compare
PAIR_BATCH = 32

Distance = Callable[[Tensor, Tensor], Tensor]
MeanError = tuple[float, float | None]  # mean, and standard error: one pair cannot give it


def load_lpips(path: Path, device: torch.device) -> Distance:
    """Load LPIPS (alex, v0.1) on torchvision's AlexNet weights at `path`.

    Returns distance(a, b): float32 (B, 3, H, W) in [-1, 1], twice -> (B,).
    """
    import lpips

    state = load_plain(path, ALEXNET)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision the old way
        # `pnet_rand` keeps it from downloading; the heads come with the package.
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    names = {name: re.sub(r"slice\d", "features", name) for name in network.net.state_dict()}
    network.net.load_state_dict({ours: state[theirs] for ours, theirs in names.items()})
    network.requires_grad_(False).eval().to(device)
    return lambda a, b: network(a, b).flatten()


ALEXNET = Network(
    name="lpips",
    title="LPIPS (AlexNet)",
    load=load_lpips,
    url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    help="AlexNet for lpips; default: cache or download",
    hash_prefix="7be5be79",
)


def lpips_input(images: Tensor) -> Tensor:
    """uint8 (B, 1 or 3, H, W) -> float32 (B, 3, H', W') in [-1, 1], smaller side >= 64."""
    x = to_float(to_rgb(images))
    side = min(x.shape[-2:])
    if side < MIN_SIZE:
        size = [round(length * (MIN_SIZE / side)) for length in x.shape[-2:]]
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return x


def distances(
    distance: Distance, pairs: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Tensor:
    """(N,) float64 on the CPU: the distances of pairs, batches of uint8 (b, C, H, W) twice."""
    with torch.inference_mode(), full_float32(device):
        parts = [distance(*(lpips_input(x.to(device)) for x in pair)).cpu() for pair in pairs]
    return torch.cat(parts).double()


def draw_pairs(num_images: int, num_pairs: int, *index: int) -> Tensor:
    """(P, 2) int64 pairs of different images, all if there are at most `num_pairs`.

    They are a function of the arguments alone; `index` is the number of the draw.
    """
    if num_images * (num_images - 1) // 2 <= num_pairs:
        return torch.combinations(torch.arange(num_images))
    rng = numpy_generator(0, Stream.EVALUATION, *index)
    first = rng.integers(num_images, size=num_pairs)
    second = (first + rng.integers(1, num_images, size=num_pairs)) % num_images
    return torch.stack([torch.from_numpy(first), torch.from_numpy(second)], dim=1)


def diversity(
    distance: Distance, images: Tensor, labels: Tensor | None, device: torch.device
) -> dict[str, MeanError | None]:
    """Compare pairs of uint8 images (N, C, H, W), at most `NUM_PAIRS`, drawn with a fixed seed.

    Returns the mean distance of any two images as "lpips_inter", and of two with one label,
    averaged over the labels, as "lpips_intra"; that is None without labels, or where no label has
    two images. Pairs share images, so the errors are a little too small where the pairs are many
    beside the images. Raises a ValueError if there are fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"a distance needs at least 2 images, there are {len(images)}")
    classes = [] if labels is None else [(labels == k).nonzero()[:, 0] for k in labels.unique()]
    by_class = {(2, k): rows for k, rows in enumerate(r for r in classes if len(r) > 1)}
    results: dict[str, MeanError | None] = {"lpips_inter": None, "lpips_intra": None}
    for name, groups in zip(results, ({(1,): torch.arange(len(images))}, by_class), strict=True):
        means, errors = [], []
        for draw, rows in groups.items():
            pairs = rows[draw_pairs(len(rows), max(1, NUM_PAIRS // len(groups)), *draw)]
            batches = ((images[some[:, 0]], images[some[:, 1]]) for some in pairs.split(PAIR_BATCH))
            values = distances(distance, batches, device)
            means.append(values.mean().item())
            if len(values) > 1:
                errors.append(values.std().item() / math.sqrt(len(values)))
        if means:
            sem = math.hypot(*errors) / len(means) if len(errors) == len(means) else None
            results[name] = (sum(means) / len(means), sem)
    return results


class Lpips(ChosenImages, Metric):
    """LPIPS diversity of the generated images, beside that of the real ones, if there are any.

    Processes send the images that pairs are drawn from (4000 at most) to the main one, which alone
    computes distances: seconds on a GPU, a minute on a CPU.
    """

    better = "near the real value"
    network = ALEXNET

    def __init__(self, context: Context) -> None:
        generated, labels = context.generated, context.generated.labels
        super().__init__(fixed_subset(generated.num_images, 2 * NUM_PAIRS))
        self.distance: Distance = context.networks[ALEXNET]
        self.device = context.runtime.device
        self.num_images = generated.num_images
        self.labels = None if labels is None else torch.tensor(labels)[self.chosen]
        self.real: dict[str, MeanError | None] = {}
        size = lpips_input(torch.zeros(1, *generated.spec.shape, dtype=torch.uint8)).shape[-2:]
        self.details = {"net": "alex", "size": list(size), **context.origin_of(ALEXNET)}

    def update_real(self, real: RealSets, runtime: Runtime) -> None:
        if not runtime.is_main:
            return
        images = real.reference
        pool = images.at(fixed_subset(len(images.indices), 2 * NUM_PAIRS))
        pictures, labels = images.load(pool)
        if self.labels is None or not images.dataset.spec.num_classes:
            labels = None
        self.real = diversity(self.distance, pictures, labels, self.device)

    def compute(self) -> Entry:
        parts = {}
        for name, ours in diversity(self.distance, self.values, self.labels, self.device).items():
            keys, real = ("value", "sem", "real_value", "real_sem"), self.real.get(name)
            parts[name] = ours and dict(zip(keys, (*ours, *(real or (None, None))), strict=True))
        value, sem, real_value, _ = parts["lpips_inter"].values()
        num_pairs = min(NUM_PAIRS, self.num_images * (self.num_images - 1) // 2)
        details = {"n": self.num_images, "num_pairs": num_pairs, "extractor": self.details}
        return measured(value, sem=sem, real_value=real_value, **parts, **details)

    @classmethod
    def rows(cls, name: str, result: Entry) -> list[Row]:
        intra = result.get("lpips_intra")
        more = [("lpips_intra", number(intra["value"]), cls.note(intra))] if intra else []
        return [*super().rows("lpips_inter", result), *more]

    @classmethod
    def note(cls, result: Entry) -> str:
        parts = {"+-": result["sem"], "real": result["real_value"]}
        return ", ".join(f"{text} {number(x)}" for text, x in parts.items() if x is not None)
