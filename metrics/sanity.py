"""Cheap checks that need no network and no download: clipping, repeats, blank images, colours."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from datasets.real import RealSets
from metrics.scoring import Entry, entry
from utils.distributed import Runtime


class PixelCounts:
    """How often each channel takes each of the 256 values: all pixel statistics, exactly."""

    def __init__(self, num_channels: int) -> None:
        self.counts = torch.zeros(num_channels, 256, dtype=torch.int64)

    def update(self, images: Tensor) -> None:
        """Add uint8 (b, C, H, W)."""
        for channel, pixels in enumerate(images.unbind(1)):
            self.counts[channel] += torch.bincount(pixels.flatten(), minlength=256).cpu()

    def summary(self) -> dict[str, Any] | None:
        """Shares of pixels at either end, mean and deviation per channel of pixels in [0, 1].

        None without any pixel.
        """
        total = self.counts.sum()
        if total == 0:
            return None
        levels = torch.arange(256, dtype=torch.float64) / 255
        shares = self.counts / self.counts.sum(1, keepdim=True).double()  # (C, 256)
        mean = shares @ levels
        variance = (shares * (levels - mean[:, None]).square()).sum(1)
        return {
            "at_0": (self.counts[:, 0].sum() / total.double()).item(),
            "at_255": (self.counts[:, 255].sum() / total.double()).item(),
            "mean": mean.tolist(),
            "std": variance.sqrt().tolist(),
        }


def image_hash(image: Tensor) -> int:
    """63 bits of a uint8 image's content, for the same shape; the same in every process."""
    content = image.contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) >> 1


class SanityScorer:
    """Pixel statistics, repeats and blank images (see `metrics.scoring.Scorer`).

    The value is the share of images that are neither blank (every channel constant) nor an exact
    repeat of an earlier one. The rest is to be read beside the same of real images, where there are
    any: most of an MNIST image is black.

    Args:
        num_images: generated images over all processes.
        shape: (C, H, W) of one image.
    """

    names = ("sanity",)

    def __init__(
        self, device: torch.device, *, num_images: int, shape: tuple[int, int, int]
    ) -> None:
        self.device = device
        self.num_images = num_images
        self.num_channels = shape[0]
        self.real = PixelCounts(self.num_channels)
        self.num_real = 0
        self.clear()

    def clear(self) -> None:
        self.hashes = torch.zeros(self.num_images, dtype=torch.int64)
        self.blank = torch.zeros(self.num_images, dtype=torch.int64)  # 1 or 0
        self.generated = PixelCounts(self.num_channels)

    def see_real(self, real: RealSets | None, runtime: Runtime) -> None:
        if real is None:
            return
        real = real.reference
        self.num_real = len(real.indices)
        for images, _ in real.fetch(real.share(runtime)):
            self.real.update(images.to(self.device))

    def reduce_real(self, runtime: Runtime) -> None:
        runtime.all_reduce(self.real.counts)

    def see_generated(self, images: Tensor, labels: list[int] | None, indices: range) -> None:
        part = slice(indices.start, indices.stop)
        self.hashes[part] = torch.tensor([image_hash(image) for image in images])
        pixels = images.flatten(2)
        self.blank[part] = (pixels.amax(2) == pixels.amin(2)).all(1).long()
        self.generated.update(images.to(self.device))

    def reduce_generated(self, runtime: Runtime) -> None:
        # Each image's own row is zero on all processes but one.
        for tensor in (self.hashes, self.blank, self.generated.counts):
            runtime.all_reduce(tensor)

    def results(self) -> dict[str, Entry]:
        num_images, num_blank = self.num_images, int(self.blank.sum())
        num_repeats = num_images - len(self.hashes.unique())
        num_good = len(self.hashes[self.blank == 0].unique())
        return {
            "sanity": entry(
                "ok",
                num_good / num_images,
                num_repeats=num_repeats,
                share_repeats=num_repeats / num_images,
                num_blank=num_blank,
                share_blank=num_blank / num_images,
                generated=self.generated.summary(),
                real=self.real.summary(),
                n=num_images,
                n_real=self.num_real,
                better="higher",
            )
        }
