"""What every data set is to the rest of the project."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from utils.images import ImageSpec

__all__ = ["ImageDataset", "ImageSpec"]


class ImageDataset(Protocol):
    """A deterministic, finite sequence of labelled 8-bit images."""

    spec: ImageSpec
    labels: Tensor  # (N,) int64 in [0, K); all 0 when unlabelled
    class_names: tuple[str, ...]  # K names; empty when unlabelled
    fingerprint: str  # changes when the images, labels or their order change

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """image uint8 (C, H, W) in [0, 255], label in [0, K)."""
        ...
