"""A row for each of some images, wherever these are: pictures to show, features to keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.distributed import Runtime


class KeptRows:
    """Rows of chosen images, put there by the processes that see them.

    Args:
        chosen: global indices of these images, ascending.
        shape: of one row.

    Attributes:
        values: (len(chosen), *shape), on the CPU; after `all_reduce` the same on every process.
    """

    def __init__(
        self, chosen: Sequence[int] | Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.chosen = torch.as_tensor(chosen, dtype=torch.int64)
        self.shape, self.dtype = shape, dtype
        self.clear()

    def clear(self) -> None:
        self.values = torch.zeros((len(self.chosen), *self.shape), dtype=self.dtype)

    def put(self, rows: Tensor, indices: range) -> None:
        """Keep what is wanted of `rows` (b, *shape), which belong to the images `indices`."""
        bounds = torch.tensor([indices.start, indices.stop])
        first, stop = torch.searchsorted(self.chosen, bounds).tolist()
        self.values[first:stop] = rows[self.chosen[first:stop] - indices.start]

    def all_reduce(self, runtime: Runtime) -> None:
        runtime.all_reduce(self.values)  # each row is zero on all processes but one
