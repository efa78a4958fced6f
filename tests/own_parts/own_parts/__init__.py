"""A backbone, a data set, a schedule, a sampler, a metric and an optimizer of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from datasets import DatasetEntry
from datasets.storage import InMemoryDataset
from diffusion import Process, Sampler, Step
from diffusion.ddim import ddim
from metrics.base import Collector, Entry, Metric, measured
from utils.config import Config, PositiveInt
from utils.distributed import Runtime
from utils.images import ImageSpec


class Pointwise(nn.Module):
    """A network without neighbours, which is enough for images of one grey level."""

    def __init__(
        self, *, in_channels: int, out_channels: int, num_classes: int, width: PositiveInt = 32
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels + 1, width, 1)
        self.label = nn.Embedding(num_classes + 1, width)  # the first row stands for no class
        self.last = nn.Conv2d(width, out_channels, 1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        time = (t / 1000).to(x.dtype)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        h = self.first(torch.cat([x, time], dim=1)) + self.label(y + 1)[:, :, None, None]
        return self.last(torch.relu(h))


def build_levels(config: Config, split: str) -> InMemoryDataset:
    """Two classes: dark and bright images."""
    labels = torch.arange(64 if split == "train" else 16) % 2
    images = (64 + 128 * labels).to(torch.uint8)[:, None, None, None].repeat(1, 1, 8, 8)
    return InMemoryDataset(images, labels, ("dark", "bright"))


levels = DatasetEntry(build_levels, ImageSpec(1, 8, 8, 2), flip=False)


def constant_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """The same beta at every timestep."""
    return torch.full((num_timesteps,), beta_end, dtype=torch.float64)


def every_other(
    denoise: Callable, x_T: Tensor, process: Process, timesteps: Sequence[int], randn_like: Callable
) -> Iterator[Step]:
    """DDIM that leaves out every other step but the last."""
    steps = sorted({*timesteps[::2], timesteps[-1]}, reverse=True)
    yield from ddim(denoise, x_T, process, steps, randn_like, eta=0.0)


half_ddim = Sampler(every_other, 20, deterministic=True)


class Darkness(Metric, Collector):
    """The share of pixels below half of the range."""

    better = "lower"

    def __init__(self, context: object) -> None:
        super().__init__(context)
        self.reset()

    def reset(self) -> None:
        self.counts = torch.zeros(2, dtype=torch.float64)

    def update(self, images: Tensor, indices: range) -> None:
        self.counts += torch.tensor([(images < 128).sum(), images.numel()], dtype=torch.float64)

    def reduce(self, runtime: Runtime) -> None:
        self.counts = runtime.all_reduce(self.counts)

    def compute(self) -> Entry:
        return measured(float(self.counts[0] / self.counts[1]))


class SignDescent(torch.optim.Optimizer):
    """The sign of an average of the gradients (Bernstein et al. 2018), which counts its steps."""

    def __init__(self, params: Iterable, lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, steps=0))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["steps"] += 1
            rate = group["lr"] / group["steps"] ** 0.5
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                p.mul_(1 - rate * group["weight_decay"]).sub_(rate * average.sign())


def sign_descent(params: Iterable, lr: float, weight_decay: float) -> SignDescent:
    """With the momentum that serves small networks."""
    return SignDescent(params, lr, weight_decay, momentum=0.9)
