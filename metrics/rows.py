"""Rows of some of the images, wherever these are: pictures to show, features to keep."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from utils.distributed import Runtime


class KeptRows:
    """Rows of chosen images, kept by the processes that see them.

    Args:
        chosen: the global indices of these images, ascending.

    Attributes:
        values: after `reduce`, the rows of all chosen images on the CPU, (len(chosen), ...), the
            same on every process.
    """

    def __init__(self, chosen: Sequence[int] | np.ndarray) -> None:
        self.chosen = torch.as_tensor(chosen, dtype=torch.int64)
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self.parts: list[Tensor] = []
        self.values = torch.zeros(0)

    def update(self, rows: Tensor, indices: range) -> None:
        """Keep what is wanted of `rows` (b, ...), which belong to the images `indices`."""
        bounds = torch.tensor([indices.start, indices.stop])
        first, stop = torch.searchsorted(self.chosen, bounds).tolist()
        self.parts.append(rows[self.chosen[first:stop] - indices.start].cpu())

    def reduce(self, runtime: Runtime) -> None:
        """Bring the rows of all processes together. A collective."""
        shares = runtime.gather_objects(self.parts)
        parts = [part for share in shares for part in share]
        self.values = torch.cat(parts) if parts else torch.zeros(0)
        self.parts = []
