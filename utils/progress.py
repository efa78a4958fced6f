"""What a run shows of itself: running loss statistics, and a progress bar or log lines."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from utils.distributed import Runtime
from utils.schedule import Schedule

LOSS_SMOOTHING = 0.99  # per step; best_model.pth goes by the smoothed loss

log = logging.getLogger("diffusion")


class LossStats:
    """Smoothed loss, and mean loss since the last log line, without ever waiting for the device.

    `values` (4,) is the whole state: smoothed loss, its bias correction, sum and count.
    """

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self.values = torch.zeros(4, dtype=dtype, device=device)

    def add(self, loss: Tensor) -> None:
        """Take in one step's mean loss, a scalar on the device; one that is not finite is none."""
        keep = LOSS_SMOOTHING
        is_finite = torch.isfinite(loss)
        new = torch.stack([torch.where(is_finite, loss, 0.0), is_finite.to(loss.dtype)])
        self.values[:2].mul_(torch.where(is_finite, keep, 1.0)).add_(new * (1 - keep))
        self.values[2:].add_(new)

    def share(self, runtime: Runtime) -> None:
        """Replace every rank's values by their mean, which is what a checkpoint holds."""
        self.values = runtime.all_reduce(self.values) / runtime.world_size

    def read(self, runtime: Runtime) -> tuple[float, float]:
        """(smoothed loss, mean loss since `start_window`), averaged over ranks; a collective."""
        mean = runtime.all_reduce(self.values.clone()) / runtime.world_size
        smoothed, correction, loss_sum, count = mean.tolist()
        return (
            smoothed / correction if correction else math.inf,
            loss_sum / count if count else math.nan,
        )

    def start_window(self) -> None:
        self.values[2:].zero_()


class Progress:
    """A bar on a terminal, a log line per report elsewhere; nothing on ranks other than 0."""

    def __init__(self, schedule: Schedule, step: int, *, is_main: bool) -> None:
        self._schedule = schedule
        self._is_main = is_main
        self._step, self._time = step, time.monotonic()
        self._bar = tqdm(
            initial=step,
            total=schedule.total_steps,
            unit="step",
            dynamic_ncols=True,
            disable=not (is_main and sys.stderr.isatty()),
        )

    def advance(self) -> None:
        self._bar.update()

    def close(self) -> None:
        self._bar.close()

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
        loss, speed = scalars["train/loss"], scalars["train/images_per_sec"]
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s")
        elif self._is_main:
            images_left = (self._schedule.total_steps - step) * self._schedule.batch_size
            log.info(
                "step %d/%d  epoch %.2f  loss %.4f  lr %.2e  %.0f images/s  %s left",
                step,
                self._schedule.total_steps,
                scalars["epoch"],
                loss,
                scalars["train/lr"],
                speed,
                tqdm.format_interval(images_left / speed),
            )
