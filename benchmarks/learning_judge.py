"""The judge of benchmarks/learning.py, which no contestant knows, and the curves it leads to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.learning_peer import OWN_SHARE, SEED, batches_of
from metrics.class_accuracy import wilson_interval
from metrics.classifier import shift_randomly
from metrics.fid import frechet_distance
from metrics.prdc import prdc
from metrics.reference import FeatureMoments
from reporting.charts import STYLE, Lines, draw_lines, legend_of
from utils.images import to_float


class Judge(nn.Module):
    """Strided convolutions, group norms and a layer over all places: 64 features, then classes."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        widths, layers = (channels, 32, 64, 64), []
        for stride, (before, after) in enumerate(pairwise(widths), start=1):
            convolution = nn.Conv2d(before, after, 5, stride=min(stride, 2), padding=2)
            layers += [convolution, nn.GroupNorm(8, after), nn.SiLU()]
        pooled = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3)]
        self.body = nn.Sequential(*layers, *pooled, nn.Linear(64 * 16, 64))
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.body(x)))

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float32 (N, 64)."""
        return torch.cat([self.body(to_float(part)) for part in images.split(500)])

    @torch.inference_mode()
    def classes(self, features: Tensor) -> Tensor:
        """(N, 64) -> (N,) int64."""
        return self.head(F.silu(features)).argmax(1)


def train_judge(judge: Judge, images: Tensor, labels: Tensor, *, flip: bool, epochs: int = 3):
    """Train on uint8 images (N, C, H, W), shifted a little at random."""
    judge.train()
    rng = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    size = min(100, len(images))
    steps, batches = epochs * (len(images) // size), batches_of(images, labels, size, flip=flip)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        x, y = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(judge(shift_randomly(2 * x - 1, rng)), y, label_smoothing=0.1).backward()
        optimizer.step()
        schedule.step()


def judge_of(path: Path, images: Tensor, labels: Tensor, *, flip: bool) -> Judge:
    """The judge of these images kept in `path`, or a new one."""
    torch.manual_seed(SEED)
    judge = Judge(images.shape[1], int(labels.max()) + 1)
    if not path.exists():
        train_judge(judge, images, labels, flip=flip)
        torch.save(judge.state_dict(), path)
    judge.load_state_dict(torch.load(path, weights_only=True))
    return judge.eval()


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    moments = FeatureMoments(features.shape[1])
    moments.update(features)
    return moments.mean_cov()


class Court:
    """Judges images beside the real ones, of which it keeps features (N, 64)."""

    def __init__(self, judge: Judge, real: Tensor) -> None:
        self.judge, self.real = judge, judge.features(real)
        self.target = gaussian(self.real)

    def verdict_of_some(self, images: Tensor, labels: Tensor, count: int) -> dict[str, Any]:
        """What `count` of these real images score, drawn with a fixed seed."""
        rng = torch.Generator().manual_seed(SEED)
        chosen = torch.randperm(len(images), generator=rng)[:count]
        return self.verdict(images[chosen], labels[chosen])

    def verdict(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """Score uint8 images (N, C, H, W) of the classes (N,); recall is of N real images.

        "of a share" is the distance of fewer of them, as many as there are of `OWN` samples.
        """
        features = self.judge.features(images)
        part = gaussian(features[::OWN_SHARE])
        hits, count = int((self.judge.classes(features) == labels).sum()), len(images)
        shares = prdc(self.real[:: max(1, len(self.real) // count)][:count], features)
        low, high = wilson_interval(hits, count)
        return {
            "distance": frechet_distance(*gaussian(features), *self.target)[0],
            "of a share": frechet_distance(*part, *self.target)[0],
            "accuracy": hits / count,
            "low": low,
            "high": high,
            "precision": shares.precision,
            "recall": shares.recall,
        }


def compute_needed(curve: Sequence[tuple[float, float]], target: float) -> str:
    """The budget at which a curve of (budget, distance) first reaches a distance, as a share of the
    last budget; logarithms of both are taken as linear in between."""
    last = curve[-1][0]
    for number, (budget, distance) in enumerate(curve):
        if distance <= target and number == 0:
            return f"< {budget / last:.2g}"
        if distance <= target:
            before, above = curve[number - 1]
            part = math.log(above / target) / math.log(above / distance)
            return f"{before / last * (budget / before) ** part:.2g}"
    return "> 1"


def draw_curves(path: Path, title: str, lines: Lines, real: float) -> None:
    """A PNG of (budget, distance) for each name, both logarithmic, above that of `real` images."""
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with matplotlib.style.context(["default", STYLE]):
        figure = Figure((7.6, 3.6), layout="constrained", dpi=150)
        labels = {"xlabel": "CPU seconds of training", "ylabel": "Frechet distance"}
        axes = figure.add_subplot(xscale="log", yscale="log", title=title, **labels)
        draw_lines(axes, lines)
        axes.axhline(real, color="#5c6470", linewidth=0.8)
        axes.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
        looks = legend_of(lines).items()
        handles = [Line2D([], [], color=c, linestyle=dash, label=name) for name, (c, dash) in looks]
        figure.legend(handles=handles, loc="outside right upper", frameon=False)
        figure.savefig(path, facecolor="white")
