"""Cheap checks that need no network and no download: clipping, repeats, blank images, colours."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from datasets.real import RealSets
from metrics.base import Collector, Context, Entry, Metric, measured
from utils.distributed import Runtime
from utils.images import to_uint8


def count_pixels(images: Tensor) -> Tensor:
    """How often each channel of (b, C, H, W) takes each 8-bit value: int64 (C, 256), on the CPU."""
    channels = (to_uint8(images) if images.is_floating_point() else images).unbind(1)
    return torch.stack([torch.bincount(x.flatten(), minlength=256) for x in channels]).cpu()


def pixel_statistics(counts: Tensor) -> dict[str, Any] | None:
    """The shares of pixels at either end, and mean and deviation of each channel in [0, 1].

    `counts` is what `count_pixels` returns; without any pixel there are no statistics.
    """
    total = counts.sum()
    if total == 0:
        return None
    levels = torch.arange(256, dtype=torch.float64) / 255
    shares = counts / counts.sum(1, keepdim=True).double()  # (C, 256)
    mean = shares @ levels
    std = (shares * (levels - mean[:, None]).square()).sum(1).sqrt()
    at_0, at_255 = (counts[:, value].sum().item() / total.item() for value in (0, 255))
    return {"at_0": at_0, "at_255": at_255, "mean": mean.tolist(), "std": std.tolist()}


def image_hash(image: Tensor) -> int:
    """63 bits of an image's content, for the same shape; the same in every process."""
    content = image.contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) >> 1


class Sanity(Metric, Collector):
    """The share of images that are neither blank (every channel constant) nor an exact repeat of
    an earlier one.

    The rest of the entry is to be read beside the same of real images, where there are any: most
    of an MNIST image is black.
    """

    better = "higher"

    def __init__(self, context: Context) -> None:
        self.device = context.runtime.device
        self.num_images = context.generated.num_images
        self.real = torch.zeros(context.generated.spec.channels, 256, dtype=torch.int64)
        self.num_real = 0

    def update_real(self, real: RealSets, runtime: Runtime) -> None:
        self.num_real = len(real.reference.indices)
        for images, _ in real.reference.fetch(real.reference.share(runtime)):
            self.real += count_pixels(images.to(self.device))

    def reduce_real(self, runtime: Runtime) -> None:
        runtime.all_reduce(self.real)

    def reset(self) -> None:
        self.marks = torch.zeros(0, 2, dtype=torch.int64)  # hash, and whether it is blank
        self.generated = torch.zeros_like(self.real)

    def update(self, images: Tensor, indices: range) -> None:
        pixels = images.flatten(2)
        blank = (pixels.amax(2) == pixels.amin(2)).all(1).long()
        hashes = torch.tensor([image_hash(image) for image in images])
        self.marks = torch.cat([self.marks, torch.stack([hashes, blank], 1)])
        self.generated += count_pixels(images.to(self.device))

    def reduce(self, runtime: Runtime) -> None:
        runtime.all_reduce(self.generated)
        self.marks = runtime.gather(self.marks)

    def compute(self) -> Entry:
        hashes, blank = self.marks.unbind(1)
        num_images, num_blank = self.num_images, int(blank.sum())
        num_repeats = num_images - len(hashes.unique())
        return measured(
            len(hashes[blank == 0].unique()) / num_images,
            num_repeats=num_repeats,
            share_repeats=num_repeats / num_images,
            num_blank=num_blank,
            share_blank=num_blank / num_images,
            generated=pixel_statistics(self.generated),
            real=pixel_statistics(self.real),
            n=num_images,
            n_real=self.num_real,
        )
