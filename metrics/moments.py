"""Mean and covariance of features, streamed and summed over processes."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.distributed import Runtime

BLOCK = 256  # rows of the sum of outer products that one matrix product adds to


def float64_device(device: torch.device | str) -> torch.device:
    """The device if it can compute in float64, else the CPU: MPS (Apple GPUs) has no float64."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


class FeatureMoments:
    """Count, sum and sum of outer products of features, in float64.

    In float32 the covariance is lost where the mean is large beside the spread. Of `outer`, which
    is symmetric, only the blocks on and below the diagonal are filled: nearly half the work.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        device = float64_device(device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add features (b, D); b may be 0."""
        x = features.to(self.sum.device).double()
        self.count += len(x)
        self.sum += x.sum(0)
        for start in range(0, x.shape[1], BLOCK):
            stop = start + BLOCK
            self.outer[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])

    def all_reduce(self, runtime: Runtime) -> None:
        for total in (self.count, self.sum, self.outer):
            runtime.all_reduce(total)

    def mean_cov(self) -> tuple[Tensor, Tensor]:
        """(D,) mean and (D, D) unbiased covariance; a ValueError for fewer than two images."""
        count = self.count.item()
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 images, there are {count:.0f}")
        mean, outer = self.sum / count, self.outer.tril()
        outer += outer.tril(-1).T
        return mean, outer.addr_(mean, mean, alpha=-count).div_(count - 1)
