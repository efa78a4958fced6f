"""Optimizer steps whose loss or gradient is not finite: found without waiting for the device."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import EXIT_NON_FINITE, UserError

log = logging.getLogger("diffusion")


class NonFiniteError(UserError):
    """Loss or gradients became infinite or NaN; the weights are those from before that step."""

    exit_code = EXIT_NON_FINITE


class NonFiniteGuard:
    """Keeps bad steps from the weights, and counts them.

    Args:
        limit: bad steps that may be skipped in a run; 0: the first one stops it.
        on_host: read each flag at once, which is free on a CPU; else only in `read`.
        describe: step -> what to write about its batch.
        folder: gets `nonfinite_step_0000123.json`; None: no file, on ranks other than 0.
    """

    def __init__(
        self,
        limit: int,
        device: torch.device,
        *,
        on_host: bool,
        describe: Callable[[int], dict[str, Any]],
        folder: Path | None,
    ) -> None:
        self.limit, self.on_host, self.describe, self.folder = limit, on_host, describe, folder
        self.seen: list[int] = []  # steps that `read` has told of
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._make_slots()

    def add(self, is_finite: Tensor, step: int) -> Tensor:
        """Note a step's flag, a scalar on the device, the same on all ranks.

        Returns:
            1.0 where the optimizer must leave the weights alone, else 0.0; on the device.
        """
        is_bad = ~is_finite
        here = is_bad & (self._slots == self._count)
        self._steps = torch.where(here, step, self._steps)
        self._count += is_bad
        return (is_bad | (self._count > self.limit)).float()

    def read(self, last_saved: str) -> None:
        """Tell of bad steps since the last call; waits for the device.

        Raises:
            NonFiniteError: there were more than `limit`.
        """
        count = int(self._count)
        new = self._steps[len(self.seen) : count].tolist() if count > len(self.seen) else []
        for step in new:
            self.seen.append(step)
            where = self._write(step)
            if len(self.seen) <= self.limit:
                log.warning(
                    "loss or gradient is not finite at step %d: skipped, %d of at most %d (%s)",
                    step + 1,
                    len(self.seen),
                    self.limit,
                    where,
                )
        if count > self.limit:
            allowed = f" ({self.limit} were skipped)" if self.limit else ""
            raise NonFiniteError(
                f"loss or gradient is not finite at step {self.seen[-1] + 1}; the step was not "
                f"taken{allowed}. Last checkpoint: {last_saved}; the batch: {where}. Lower "
                "learning_rate, set grad_clip, or use precision=fp32"
            )

    def restore(self, steps: list[int]) -> None:
        """Steps that were skipped before a resume count. If there are `limit` or more of them,
        none is left: the next bad step stops the run.
        """
        self.seen = list(steps)
        self.limit = max(self.limit, len(steps))
        self._count.fill_(len(steps))
        self._make_slots()

    def _make_slots(self) -> None:
        """Room on the device for the numbers of the first `limit` + 1 bad steps."""
        self._slots = torch.arange(self.limit + 1, device=self._count.device)
        self._steps = torch.full_like(self._slots, -1)

    def _write(self, step: int) -> str:
        """The indices of the step's images, for a look at them; a disk that refuses is told."""
        if self.folder is None:
            return "described by rank 0"
        path = self.folder / f"nonfinite_step_{step + 1:07d}.json"
        try:
            path.write_text(json.dumps(self.describe(step)) + "\n", encoding="utf-8")
        except OSError as error:
            return f"not written, {error.strerror}"
        return str(path)
