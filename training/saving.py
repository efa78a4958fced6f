"""When and under which names a run's checkpoints are written, and which model is the best."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

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


def snapshot(state: Any) -> Any:
    """A copy of a state dict, on the CPU, that further training does not change."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        whole = copy.copy(state)  # its type and attributes, too: a module's has `_metadata`
        for key, value in state.items():
            whole[key] = snapshot(value)
        return whole
    return [snapshot(value) for value in state] if isinstance(state, list) else state


class Saver:
    """Writes checkpoints in a thread of its own, one at a time, while the training goes on.

    A disk that refuses is a warning, three times in a row an error.

    Args:
        on_written: called in that thread with each state that has arrived on disk.

    Attributes:
        last_step: of the newest checkpoint known to be on disk, None before the first.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int,
        runtime: Runtime,
        on_written: Callable[[dict[str, Any]], None] = lambda state: None,
    ) -> None:
        self.folder, self.keep_last, self.runtime = folder, keep_last, runtime
        self.on_written = on_written
        self.last_step: int | None = None
        self._num_failed = 0
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._step: int | None = None  # of the one being written
        self._error: Future[str | None] | None = None

    def start(self, state: dict[str, Any], *, epoch: int | None, is_best: bool) -> None:
        """Begin to write current_model.pth; best_model.pth if it is; model_epoch_*.pth for an
        `epoch`. On every rank; rank 0 writes. The one before must be settled."""
        assert self._step is None
        self._step = state["step"]
        if self.runtime.is_main:
            self._error = self._thread.submit(self._write, snapshot(state), epoch, is_best)

    def settle(self) -> bool | None:
        """Wait for the checkpoint that was begun. On every rank.

        Returns:
            whether it is on disk; None if none was begun.

        Raises:
            UserError: the third failure in a row.
        """
        if self._step is None:
            return None
        error = self.runtime.broadcast_object(self._error.result() if self._error else None)
        step, self._step, self._error = self._step, None, None
        if error is None:
            self.last_step, self._num_failed = step, 0
            return True
        self._num_failed += 1
        log.warning("no checkpoint at step %d in %s: %s", step, self.folder, error)
        if self._num_failed >= MAX_FAILED_SAVES:
            raise UserError(
                f"{self._num_failed} checkpoints in a row could not be written: {error}"
            )
        return False

    def close(self) -> None:
        """Wait for what this rank writes."""
        self._thread.shutdown()
        if self._error is not None and (error := self._error.result()) is not None:
            log.warning("no checkpoint at step %d in %s: %s", self._step, self.folder, error)

    def describe_last(self) -> str:
        if self.last_step is None:
            return "none yet"
        return f"{self.folder / files.CURRENT}, step {self.last_step}"

    def _write(self, state: dict[str, Any], epoch: int | None, is_best: bool) -> str | None:
        """In the thread. Returns what went wrong."""
        current = self.folder / files.CURRENT
        try:
            files.save_checkpoint(current, state)
            if is_best:
                files.link_checkpoint(current, self.folder / files.BEST)
            if epoch is not None:
                files.link_checkpoint(current, self.folder / files.epoch_name(epoch))
                files.remove_old_checkpoints(self.folder, self.keep_last)
        except (OSError, RuntimeError) as failure:
            return " ".join(str(failure).split())
        self.on_written(state)
        return None
