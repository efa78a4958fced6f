"""Inception score (Salimans et al. 2016, arXiv:1606.03498), streamed and summed over processes.

Equal to torch-fidelity's `isc_features_to_metric`, whose split of image i is fixed by the global
index alone; so batches and processes can come in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.distributed import Runtime

NUM_SPLITS = 10
SHUFFLE_SEED = 2020  # torch-fidelity's `rng_seed`


class InceptionScore(NamedTuple):
    mean: float
    std: float


def split_of_index(num_images: int, num_splits: int) -> Tensor:
    """(N,) int64: the split of each global index, as torch-fidelity deals them out."""
    bounds = [i * num_images // num_splits for i in range(num_splits + 1)]
    splits = np.empty(num_images, dtype=np.int64)
    order = np.random.RandomState(SHUFFLE_SEED).permutation(num_images)
    splits[order] = np.repeat(np.arange(num_splits), np.diff(bounds))
    return torch.from_numpy(splits)


class InceptionScoreSums:
    """Per split: number of images, sum of p, and sum of p log p, in float64.

    Args:
        num_images: over all processes. Fewer images than splits make as many splits as images.
        num_classes: width of the logits.
    """

    def __init__(
        self,
        num_images: int,
        num_classes: int,
        *,
        num_splits: int = NUM_SPLITS,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_splits = min(num_splits, num_images)
        self.splits = split_of_index(num_images, self.num_splits)
        # MPS has no float64.
        self.device = torch.device("cpu") if torch.device(device).type == "mps" else device
        # Columns: p of each class, then sum of p log p, then the count.
        self.sums = torch.zeros(
            self.num_splits, num_classes + 2, dtype=torch.float64, device=self.device
        )

    def update(self, logits: Tensor, indices: range) -> None:
        """Add logits (b, L) of the images with these global indices."""
        log_p = logits.to(self.device).double().log_softmax(dim=1)
        p = log_p.exp()
        rows = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], dim=1)
        splits = self.splits[indices.start : indices.stop].to(self.device)
        # One matrix product, not index_add_, whose order on CUDA changes from run to run.
        membership = torch.nn.functional.one_hot(splits, self.num_splits).double()
        self.sums += membership.T @ rows

    def all_reduce(self, runtime: Runtime) -> None:
        runtime.all_reduce(self.sums)

    def compute(self) -> InceptionScore:
        """exp of the mean KL(p || split's mean p) per split; mean and deviation over splits."""
        p, p_log_p, count = self.sums[:, :-2].cpu(), self.sums[:, -2].cpu(), self.sums[:, -1].cpu()
        q = p / count[:, None]
        cross = torch.xlogy(q, q).sum(1)  # = sum of q log q: the mean of p log q over the split
        scores = (p_log_p / count - cross).exp().numpy()
        return InceptionScore(float(scores.mean()), float(scores.std()))
