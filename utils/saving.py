"""When and under which names a run's checkpoints are written, and which model is the best."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils import checkpoint as files
from utils.distributed import Runtime
from utils.errors import UserError

MAX_FAILED_SAVES = 3
LOSS = "loss"

log = logging.getLogger("diffusion")


class BestScore:
    """The best value so far of the metric that chooses `best_model.pth`.

    Args:
        metric: its name; `LOSS`: the smoothed training loss.
    """

    def __init__(self, metric: str, *, lower_is_better: bool) -> None:
        self.metric, self.lower_is_better = metric, lower_is_better
        self.value: float | None = None

    def is_beaten_by(self, value: float | None) -> bool:
        """A value that is not finite beats nothing."""
        if value is None or not math.isfinite(value):
            return False
        if self.value is None:
            return True
        return value < self.value if self.lower_is_better else value > self.value

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The value, if it is of the same metric."""
        if state["metric"] == self.metric:
            self.value = state["value"]


class Saver:
    """Writes checkpoints. A disk that refuses is a warning, three times in a row an error.

    Attributes:
        last_step: of the newest checkpoint, None before the first.
    """

    def __init__(self, folder: Path, keep_last: int, runtime: Runtime) -> None:
        self.folder, self.keep_last, self.runtime = folder, keep_last, runtime
        self.last_step: int | None = None
        self._num_failed = 0

    def save(self, state: dict[str, Any], *, epoch: int | None, is_best: bool) -> bool:
        """Write current_model.pth; best_model.pth if it is; model_epoch_*.pth for an `epoch`.

        On every rank; rank 0 writes. Returns whether it is on disk.

        Raises:
            UserError: the third failure in a row.
        """
        error = None
        if self.runtime.is_main:
            try:
                self._write(state, epoch, is_best)
            except (OSError, RuntimeError) as failure:
                error = " ".join(str(failure).split())
        error = self.runtime.broadcast_object(error)
        if error is None:
            self.last_step, self._num_failed = state["step"], 0
            return True
        self._num_failed += 1
        log.warning("no checkpoint at step %d in %s: %s", state["step"], self.folder, error)
        if self._num_failed >= MAX_FAILED_SAVES:
            raise UserError(
                f"{self._num_failed} checkpoints in a row could not be written: {error}"
            )
        return False

    def describe_last(self) -> str:
        if self.last_step is None:
            return "none yet"
        return f"{self.folder / files.CURRENT}, step {self.last_step}"

    def _write(self, state: dict[str, Any], epoch: int | None, is_best: bool) -> None:
        current = self.folder / files.CURRENT
        files.save_checkpoint(current, state)
        if is_best:
            files.link_checkpoint(current, self.folder / files.BEST)
        if epoch is not None:
            files.link_checkpoint(current, self.folder / files.epoch_name(epoch))
            files.remove_old_checkpoints(self.folder, self.keep_last)
