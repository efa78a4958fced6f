"""Where numbers and pictures of a run go. A tracker never stops a run."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from utils.config import Config, Problem
from utils.errors import one_line
from utils.files import atomic_path
from utils.images import to_array

MAX_FAILURES = 3
MAX_QUEUED = 1000  # calls that a slow tracker may lag behind
FINISH_SECONDS = 30
NOT_STARTED = "%s: not started, the run goes on without it (%s)"

log = logging.getLogger("diffusion")


class MetricsFile:
    """`metrics.jsonl`, the record of a run: what was logged is on disk when the call returns.

    When a run goes on from `start_step`, lines of later steps (they will be made again) and a
    line torn by a crash are dropped, so every step stands there once. A disk that refuses is a
    warning; one that is full now may have room later.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self._path, self._has_warned = path, False
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            lines = stack.enter_context(open(path, "rb")) if path.is_file() else ()
            kept = stack.enter_context(open(stack.enter_context(atomic_path(path)), "wb"))
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                    if json.loads(line)["step"] <= start_step:
                        kept.write(line.rstrip(b"\r\n") + b"\n")

    def append(self, scalars: Mapping[str, float], step: int) -> None:
        row = (json.dumps({"step": step, **scalars}) + "\n").encode()
        try:
            with open(self._path, "ab", buffering=0) as file:
                size = file.tell()
                if file.write(row) < len(row):  # the rest of a full disk
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._has_warned:
                log.warning("%s failed: %s; the run goes on", self._path.name, _reason(error))
            self._has_warned = True


class SwanlabTracker:
    """All use of SwanLab. Never asks for input; `run_id` lets a resumed run continue."""

    def __init__(self, config: Config, run_id: str | None) -> None:
        import swanlab

        self._swanlab, log_dir = swanlab, config.run_dir / "swanlog"
        mode = os.environ.get("SWANLAB_MODE") or config.swanlab_mode
        settings = swanlab.Settings(interactive=False)
        if mode == "auto":
            mode = "online" if settings.api_key else "offline"
        mode = "online" if mode == "cloud" else mode
        log_dir.mkdir(parents=True, exist_ok=True)
        goes_on = {"id": run_id, "resume": "allow"} if run_id and mode == "online" else {}
        init = partial(
            swanlab.init,
            project=config.project_name,
            name=config.experiment_name,
            config=config.to_dict(),
            log_dir=str(log_dir),
            settings=settings,
            **goes_on,
        )
        try:
            run = init(mode=mode)
        except Exception as error:
            if config.swanlab_mode != "auto" or mode == "offline":
                raise
            log.warning("SwanLab: no connection (%s); logging offline", _reason(error))
            run = init(mode="offline")
        self.run_id: str | None = run.id

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        self._swanlab.log(dict(scalars), step=step)

    def log_image(self, name: str, image: Tensor, step: int) -> None:
        self._swanlab.log({name: self._swanlab.Image(to_array(image))}, step=step)

    def finish(self) -> None:
        self._swanlab.finish()


class TensorboardTracker:
    """Event files, in which TensorBoard is told to forget the steps after `start_step`."""

    def __init__(self, log_dir: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(log_dir), purge_step=start_step + 1)

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def log_image(self, name: str, image: Tensor, step: int) -> None:
        self._writer.add_image(name, image.cpu(), step)

    def finish(self) -> None:
        self._writer.close()


Tracker = SwanlabTracker | TensorboardTracker


class Lane:
    """A tracker in a thread of its own, where it may raise, hang or lag behind.

    Each of these costs a warning. A call that finds the queue full is left out. After
    `MAX_FAILURES` in a row, or where `make` cannot start it, the run goes on without it.
    """

    def __init__(self, make: Callable[[], Tracker], name: str) -> None:
        self.name, self.tracker, self._is_full = name, None, False
        self._actions: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(MAX_QUEUED)
        self._thread = threading.Thread(target=self._work, args=(make,), name=name, daemon=True)
        self._thread.start()

    def call(self, action: Callable[[Tracker], None] | None) -> None:
        """Do `action` with the tracker, after all that came before; None ends the thread."""
        if not self._thread.is_alive():
            return
        try:
            self._actions.put_nowait(action)
        except queue.Full:
            if not self._is_full:
                log.warning("%s does not keep up: some values stay out of it", self.name)
            self._is_full = True

    def finish(self) -> None:
        """End the tracker, and wait for that up to `FINISH_SECONDS`."""
        self.call(lambda tracker: tracker.finish())
        self.call(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            log.warning("%s does not answer: left behind after %d s", self.name, FINISH_SECONDS)

    def _work(self, make: Callable[[], Tracker]) -> None:
        num_failed, has_warned = 0, False
        try:
            self.tracker = make()
        except (Exception, SystemExit) as error:
            log.warning(NOT_STARTED, self.name, _reason(error))
            return
        while (action := self._actions.get()) is not None:
            try:
                action(self.tracker)
                num_failed = 0
            except (Exception, SystemExit) as error:
                num_failed += 1
                if not has_warned:
                    log.warning("%s failed: %s; the run goes on", self.name, _reason(error))
                has_warned = True
                if num_failed == MAX_FAILURES:
                    log.warning("%s failed %d times in a row: dropped", self.name, num_failed)
                    return


@dataclass
class TrackerGroup:
    """The record of a run and its trackers behind one interface; none on ranks other than 0."""

    record: MetricsFile | None = None
    lanes: Sequence[Lane] = ()
    earlier_id: str | None = None  # what SwanLab called the run that goes on

    @property
    def run_id(self) -> str | None:
        """What SwanLab calls the run, for checkpoints."""
        ids = (getattr(lane.tracker, "run_id", None) for lane in self.lanes)
        return next(filter(None, ids), self.earlier_id)

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Log numbers by name; those that are not finite are left out."""
        finite = {k: float(v) for k, v in scalars.items() if math.isfinite(v)}
        if self.record is not None:
            self.record.append(finite, step)
        for lane in self.lanes:
            lane.call(lambda tracker: tracker.log_scalars(finite, step))

    def log_image(self, name: str, image: Tensor, step: int) -> None:
        """Log an image, uint8 (C, H, W); the record has none."""
        for lane in self.lanes:
            lane.call(lambda tracker: tracker.log_image(name, image, step))

    def finish(self) -> None:
        """End every tracker."""
        for lane in self.lanes:
            lane.finish()


def check_trackers(config: Config) -> Iterator[Problem]:
    """TensorBoard and SwanLab's local dashboard have to be there where they are asked for; the rest
    of SwanLab comes with requirements.txt."""
    mode = os.environ.get("SWANLAB_MODE") or config.swanlab_mode
    if config.use_swanlab and mode == "local" and find_spec("swanboard") is None:
        advice = "pip install 'swanlab[dashboard]'; or swanlab_mode=offline"
        message = f"swanlab_mode='local' needs a package that is not there: {advice}"
        yield Problem(("swanlab_mode",), message)
    if config.use_tensorboard and find_spec("tensorboard") is None:
        message = "use_tensorboard=True needs a package that is not there: pip install tensorboard"
        yield Problem(("use_tensorboard",), message)


def start_trackers(
    config: Config, *, is_main: bool, start_step: int, run_id: str | None
) -> TrackerGroup:
    """metrics.jsonl always, SwanLab and TensorBoard if asked for; nothing on other ranks."""
    if not is_main:
        return TrackerGroup(earlier_id=run_id)
    path, events = config.run_dir / "metrics.jsonl", config.run_dir / "tensorboard"
    record, lanes = None, []
    try:
        record = MetricsFile(path, start_step)
    except OSError as error:
        log.warning(NOT_STARTED, path.name, _reason(error))
    if config.use_swanlab:
        lanes.append(Lane(lambda: SwanlabTracker(config, run_id), "SwanLab"))
    if config.use_tensorboard:
        lanes.append(Lane(lambda: TensorboardTracker(events, start_step), "TensorBoard"))
    return TrackerGroup(record, lanes, run_id)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
