"""When a run's checkpoints are written, and which model is the best."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.ema import snapshot_name
from training.run_dir import Status
from training.sharding import snapshot
from utils import checkpoint as files
from utils.distributed import Runtime
from utils.errors import UserError, one_line

MAX_FAILED_SAVES = 3
LOSS, VAL_LOSS = "loss", "val_loss"

log = logging.getLogger("diffusion")


@dataclass
class BestScore:
    """The best value so far of the metric that chooses `best_model.pth`."""

    metric: str  # its name; LOSS is the smoothed training loss, VAL_LOSS that of a validation
    lower_is_better: bool
    value: float | None = None  # None before the first one
    lowest_loss: float = math.inf  # the lowest smoothed loss of a checkpoint, whatever the metric
    _before: tuple[float | None, float] = None, math.inf

    def is_beaten_by(self, value: float | None) -> bool:
        """Tell whether `value` is better. A value that is not finite beats nothing."""
        if value is None or not math.isfinite(value):
            return False
        better = operator.lt if self.lower_is_better else operator.gt
        return self.value is None or better(value, self.value)

    def take(self, smoothed_loss: float, score: float | None = None) -> bool:
        """Take in a model that is about to be saved, with its value of `metric`, if it has one
        (where the loss chooses, none is needed). Returns whether it is the best so far."""
        self._before = self.value, self.lowest_loss
        score = smoothed_loss if self.metric == LOSS else score
        self.lowest_loss = min(smoothed_loss, self.lowest_loss)
        is_best = self.is_beaten_by(score)
        self.value = score if is_best else self.value
        return is_best

    def undo(self) -> None:
        """Go back to before the last `take`, whose model did not arrive on disk."""
        self.value, self.lowest_loss = self._before

    def state_dict(self) -> dict[str, Any]:
        """Two entries of a checkpoint: `best_loss` and `best`."""
        best = {"metric": self.metric, "value": self.value}
        return {"best_loss": self.lowest_loss, "best": best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint's values; the best one only if it is of the same metric."""
        self.lowest_loss = state["best_loss"]
        best = state.get("best", {"metric": LOSS, "value": self.lowest_loss})
        if best["metric"] == self.metric:
            self.value = best["value"]


def remove_old_checkpoints(run_dir: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` of `model_epoch_*.pth`, with a line for each."""
    for path in list(files.epochs_saved(run_dir).values())[:-keep_last]:
        path.unlink()
        log.info("deleted %s: keep_last=%d", path, keep_last)


@dataclass
class Saver:
    """Writes checkpoints in a thread of its own, one at a time, while the training goes on.

    A checkpoint that cannot be written costs a warning, and its score is no longer the best; the
    third in a row is an error.
    """

    folder: Path
    keep_last: int  # so many `model_epoch_*.pth` files stay
    runtime: Runtime
    best: BestScore  # decides which model becomes best_model.pth
    status: Status  # is told of each checkpoint that has arrived on disk
    fixed_state: Mapping[str, Any] = field(default_factory=dict)  # what every checkpoint holds
    last_step: int | None = None  # that of the newest checkpoint known to be on disk

    def __post_init__(self) -> None:
        self._num_failed = 0
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._step: int | None = None  # that of the checkpoint being written
        self._error: Future[str | None] | None = None

    def start(self, state: dict[str, Any], *, epoch: int | None, is_best: bool) -> None:
        """Begin to write `state`; the checkpoint before must be settled. On every rank.

        Rank 0 writes current_model.pth, which gets best_model.pth as a second name if it `is_best`,
        and model_epoch_*.pth if an `epoch` is given; at the step of a snapshot also that.
        """
        assert self._step is None
        self._step = state["step"]
        whole = snapshot({**self.fixed_state, **state}, keep=self.runtime.is_main)
        if self.runtime.is_main:
            self._error = self._thread.submit(self._write, whole, epoch, is_best)

    def settle(self) -> bool | None:
        """Wait for the checkpoint that was begun. On every rank.

        Returns whether it is on disk, or None if none was begun. Raises a UserError for the third
        failure in a row.
        """
        if self._step is None:
            return None
        error = self.runtime.broadcast_object(self._error.result() if self._error else None)
        step, self._step, self._error = self._step, None, None
        if error is None:
            self.last_step, self._num_failed = step, 0
            return True
        self.best.undo()
        self._num_failed += 1
        log.warning("no checkpoint at step %d in %s: %s", step, self.folder, error)
        if self._num_failed < MAX_FAILED_SAVES:
            return False
        raise UserError(f"{self._num_failed} checkpoints in a row could not be written: {error}")

    def close(self) -> None:
        """Wait for what this rank writes."""
        self._thread.shutdown()
        if self._error is not None and (error := self._error.result()) is not None:
            log.warning("no checkpoint at step %d in %s: %s", self._step, self.folder, error)

    def describe_last(self) -> str:
        """Name the newest checkpoint that is on disk, for messages."""
        if self.last_step is None:
            return "none yet"
        return f"{self.folder / files.CURRENT}, step {self.last_step}"

    def _write(self, state: dict[str, Any], epoch: int | None, is_best: bool) -> str | None:
        """In the thread: write, and return what went wrong."""
        if not self.status.is_ours():
            return f"{self.folder} is not the folder of this run any more"
        current = self.folder / files.CURRENT
        try:
            if (step := state["step"]) in (snapshots := state.get("ema_snapshots", {})):
                parts = {"step": step, "loss": snapshots[step], "averages": state["ema_averages"]}
                files.save_checkpoint(self.folder / snapshot_name(step), parts)
            files.save_checkpoint(current, state)
            if is_best:
                files.link_checkpoint(current, self.folder / files.BEST)
            if epoch is not None:
                files.link_checkpoint(current, self.folder / files.epoch_name(epoch))
                remove_old_checkpoints(self.folder, self.keep_last)
        except (OSError, RuntimeError) as error:
            return one_line(error, 500)
        self.status.tell_saved(state)
        return None
