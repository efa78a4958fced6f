"""Optimizer steps whose loss or gradient is not finite: found without waiting for the device."""

from __future__ import annotations

import json
import logging
from typing import Any

import torch
from torch import Tensor

from datasets import ImageDataset
from datasets.loader import global_indices
from training.optim import FUSED
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import EXIT_NON_FINITE, UserError

MOST_OVERFLOWS, SMALLEST_SCALE = 50, 1e-4  # of fp16: steps in a row, and the loss times this

log = logging.getLogger("diffusion")


class NonFiniteError(UserError):
    """Loss or gradients became infinite or NaN; the weights are those from before that step."""

    exit_code = EXIT_NON_FINITE


class NonFiniteGuard:
    """Keeps bad steps from the weights, and counts them.

    `limit` of them may be skipped in a run; with 0 the first one stops it. Rank 0 describes the
    batch of each in the run's folder, in `nonfinite_step_0000123.json`.
    """

    def __init__(self, config: Config, dataset: ImageDataset, runtime: Runtime) -> None:
        self.config, self.dataset, self.is_main = config, dataset, runtime.is_main
        self.limit = config.max_nonfinite_steps if config.on_nonfinite == "skip" else 0
        # Whether each flag is read at once. On a GPU the host would wait for every step.
        self.on_host = runtime.device.type != "cuda" or config.optimizer not in FUSED
        self.seen: list[int] = []  # steps that `read` has told of
        self._count = torch.zeros((), dtype=torch.int64, device=runtime.device)
        self._overflows = torch.zeros_like(self._count)  # the latest steps in a row
        self._is_stuck = torch.zeros_like(self._count, dtype=torch.bool)
        self._make_slots()

    def add(self, is_finite: Tensor, step: int) -> Tensor:
        """Note a step's flag, a scalar on the device, the same on all ranks.

        Returns 1.0 where the optimizer must leave the weights alone, else 0.0; on the device.
        """
        is_bad = ~is_finite
        here = is_bad & (self._slots == self._count)
        self._steps = torch.where(here, step, self._steps)
        self._count += is_bad
        return (is_bad | (self._count > self.limit)).float()

    def add_scaled(self, is_finite: Tensor, scale: Tensor) -> None:
        """Note whether a step's gradients were finite in fp16, with the loss times `scale`; scalars
        on the device. One now and then that is not is how the largest scale is sought."""
        self._overflows = torch.where(is_finite, 0, self._overflows + 1)
        self._is_stuck |= (self._overflows >= MOST_OVERFLOWS) | (scale < SMALLEST_SCALE)

    def read(self, last_saved: str) -> None:
        """Tell of bad steps since the last call; waits for the device. Raises a NonFiniteError if
        there were more than `limit`, or if fp16 is too narrow at every scale of the loss."""
        count = int(self._count)
        new = self._steps[len(self.seen) : count].tolist() if count > len(self.seen) else []
        for step in new:
            self.seen.append(step)
            where, number = self._write(step), len(self.seen)
            if number <= self.limit:
                log.warning(
                    f"loss or gradient is not finite at step {step + 1}: skipped, {number} of at "
                    f"most {self.limit} ({where})"
                )
        if count > self.limit:
            allowed = f" ({self.limit} were skipped)" if self.limit else ""
            raise NonFiniteError(
                f"loss or gradient is not finite at step {self.seen[-1] + 1}; the step was not "
                f"taken{allowed}. Last checkpoint: {last_saved}; the batch: {where}. Lower "
                "learning_rate, set grad_clip, or use precision=fp32"
            )
        if self._is_stuck:
            raise NonFiniteError(
                f"precision=fp16: gradients were not finite {MOST_OVERFLOWS} steps in a row, or at "
                f"a loss scale that fell below {SMALLEST_SCALE:g}; no such step was taken. Last "
                f"checkpoint: {last_saved}. Use precision=bf16 or fp32, or lower learning_rate"
            )

    def restore(self, steps: list[int]) -> None:
        """Count steps that were skipped before a resume. If there are `limit` or more of them,
        none is left: the next bad step stops the run."""
        self.seen = list(steps)
        self.limit = max(self.limit, len(steps))
        self._count.fill_(len(steps))
        self._make_slots()

    def _make_slots(self) -> None:
        """Room on the device for the numbers of the first `limit` + 1 bad steps."""
        self._slots = torch.arange(self.limit + 1, device=self._count.device)
        self._steps = torch.full_like(self._slots, -1)

    def _write(self, step: int) -> str:
        """Name the images of a step in a file; returns its path, or why there is none."""
        if not self.is_main:
            return "described by rank 0"
        path = self.config.run_dir / f"nonfinite_step_{step + 1:07d}.json"
        try:
            path.write_text(json.dumps(self.describe(step)) + "\n", encoding="utf-8")
        except OSError as error:
            return f"not written, {error.strerror}"
        return str(path)

    def describe(self, step: int) -> dict[str, Any]:
        """Say which images optimizer step `step`, counted from 0, is made of."""
        size, seed = self.config.batch_size, self.config.seed
        steps = global_indices(len(self.dataset), batch_size=size, seed=seed, start_step=step)
        indices = next(steps).tolist()
        names = getattr(self.dataset, "names", None)
        named = {"names": [names[i] for i in indices]} if names else {}
        return {"step": step + 1, "indices": indices, **named}
