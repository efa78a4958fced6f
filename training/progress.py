"""How far a run is: steps and epochs, running loss statistics, a progress bar or log lines."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.distributed import Runtime

LONG_SECONDS = 3 * 3600
LOSS_SMOOTHING = 0.99  # per step; best_model.pth goes by the smoothed loss
MEMORY = Path("/proc/self/statm")  # sizes in pages; the second one is resident

log = logging.getLogger("diffusion")


@dataclass(frozen=True)
class Schedule:
    """How far a run trains. Step s ends when s * `batch_size` images have been seen."""

    num_images: int
    batch_size: int
    total_steps: int
    is_extension: bool = False  # a finished run trains on, beyond its config's epochs

    @property
    def steps_per_epoch(self) -> float:
        return self.num_images / self.batch_size

    def epochs_done(self, step: int) -> int:
        """Count the whole epochs that are over after `step` steps."""
        return step * self.batch_size // self.num_images

    def is_due(self, step: int, interval: int, start: int = 1) -> bool:
        """Tell whether `step` completed an epoch that is `start` or a multiple of `interval`."""
        before, now = self.epochs_done(step - 1), self.epochs_done(step)
        return now >= start and (before < start or now // interval > before // interval)


class LossStats:
    """The smoothed loss, and mean losses since the last log line, without waiting for the device.

    `values` (4 + 2n,) is the whole state: smoothed loss, its bias correction, sum and count of the
    steps' losses; then, for n buckets, sums and counts of the examples' losses.
    """

    def __init__(self, device: torch.device, bucket_names: tuple[str, ...]) -> None:
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self.values = torch.zeros(4 + 2 * len(bucket_names), dtype=dtype, device=device)
        self._names = bucket_names
        self._numbers = torch.arange(len(bucket_names), device=device)

    def add(self, loss: Tensor, losses: Tensor, bucket: Tensor) -> None:
        """Take in one step's mean loss, a scalar on the device. One not finite is left out.

        `losses` and `bucket` (the place among the names) are (b,), of each example of that step.
        """
        keep = LOSS_SMOOTHING
        is_finite = torch.isfinite(loss)
        new = torch.stack([torch.where(is_finite, loss, 0.0), is_finite.to(loss.dtype)])
        self.values[:2].mul_(torch.where(is_finite, keep, 1.0)).add_(new * (1 - keep))
        self.values[2:4].add_(new)
        is_here = (bucket[:, None] == self._numbers) & is_finite  # (b, n)
        sums = torch.where(is_here, losses[:, None], 0.0).sum(0)
        self.values[4:].add_(torch.cat([sums, is_here.sum(0)]))

    def share(self, runtime: Runtime) -> None:
        """Replace every rank's values by their mean, which is what a checkpoint holds."""
        self.values = runtime.all_reduce(self.values) / runtime.world_size

    def read(self, runtime: Runtime) -> tuple[float, float, dict[str, float]]:
        """(smoothed loss, mean loss, bucket -> mean loss), of all ranks; a collective.

        The means are those since `start_window`, NaN without any loss.
        """
        mean = runtime.all_reduce(self.values.clone()) / runtime.world_size
        smoothed, correction, loss_sum, count, *parts = mean.tolist()
        sums, counts = parts[: len(self._names)], parts[len(self._names) :]
        loss, *of_buckets = (
            total / number if number else math.nan
            for total, number in zip([loss_sum, *sums], [count, *counts], strict=True)
        )
        smoothed = smoothed / correction if correction else math.inf
        return smoothed, loss, dict(zip(self._names, of_buckets, strict=True))

    def restore(self, values: Tensor) -> None:
        """Take over the `values` of a checkpoint; one of an older version has no buckets."""
        known = min(len(values), len(self.values))
        self.values[:known] = values[:known]

    def start_window(self) -> None:
        """Begin the means anew; the smoothed loss goes on."""
        self.values[2:].zero_()


def memory_mib(device: torch.device) -> float:
    """MiB: on CUDA the most that tensors have held on `device`, else this process's resident set,
    NaN where the system has no /proc."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if not MEMORY.is_file():
        return math.nan
    return int(MEMORY.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Progress:
    """A bar on a terminal, a log line per report elsewhere; nothing on ranks other than 0.

    A run on a CPU that will take long is told so, once.
    """

    def __init__(self, schedule: Schedule, step: int, runtime: Runtime) -> None:
        self._schedule, self._is_main = schedule, runtime.is_main
        self._may_warn, self._num_reports = runtime.device.type == "cpu" and runtime.is_main, 0
        self._step, self._time = step, time.monotonic()
        self.bar = tqdm(
            initial=step,
            total=schedule.total_steps,
            unit="step",
            dynamic_ncols=True,
            disable=not (runtime.is_main and sys.stderr.isatty()),
        )

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent in here (saving, sampling) does not count as training."""
        started = time.monotonic()
        yield
        self._time += time.monotonic() - started

    def lap(self, step: int) -> float:
        """Images per second since the last lap."""
        steps, seconds = step - self._step, max(time.monotonic() - self._time, 1e-9)
        self._step, self._time = step, time.monotonic()
        return steps * self._schedule.batch_size / seconds

    def report(self, step: int, scalars: Mapping[str, float]) -> None:
        """Show some of the numbers that are logged at `step`, and the time that is left."""
        loss, speed = scalars["train/loss"], scalars["train/images_per_sec"]
        seconds = (self._schedule.total_steps - step) * self._schedule.batch_size / speed
        left, val = tqdm.format_interval(seconds), scalars.get("val/loss")
        held_out = "" if val is None else f"  val {val:.4f}"
        if not self.bar.disable:
            self.bar.set_postfix_str(f"loss {loss:.4f}{held_out}, {speed:.0f} images/s")
        elif self._is_main:
            log.info(
                f"step {step}/{self._schedule.total_steps}  epoch {scalars['epoch']:.2f}  "
                f"loss {loss:.4f}{held_out}  lr {scalars['train/lr']:.2e}  {speed:.0f} images/s  "
                f"{left} left"
            )
        self._num_reports += 1  # the first one is of the first step, which is slow
        if self._may_warn and self._num_reports == 2 and seconds > LONG_SECONDS:
            log.warning(
                f"about {left} to go on this CPU; for a quick look take configs/digits_unet.py, "
                "fewer epochs, or smaller model_params (a unet's model_channels, else hidden_size)"
            )
