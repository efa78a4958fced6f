"""Where numbers and pictures of a run go. A tracker never stops a run."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from utils.config import Config, Problem
from utils.images import to_array

MAX_FAILURES = 3
MAX_QUEUED = 1000  # calls that a slow tracker may lag behind
FINISH_SECONDS = 30
SWANLAB_MODES = {"cloud": "online", "local": "local", "offline": "offline", "disabled": "disabled"}

log = logging.getLogger("diffusion")


class Tracker(Protocol):
    """One destination. Values are finite floats, images uint8 (C, H, W); steps never go back."""

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None: ...

    def log_image(self, name: str, image: Tensor, step: int) -> None: ...

    def finish(self) -> None: ...


class JsonlTracker:
    """Appends a line per call to `metrics.jsonl`: the record of the run.

    When a run goes on from `start_step`, lines of later steps (they will be made again) and a
    line torn by a crash are dropped, so every step stands there once.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self._path = path
        kept = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] <= start_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        row = (json.dumps({"step": step, **scalars}) + "\n").encode()
        with open(self._path, "ab", buffering=0) as file:
            size = file.tell()
            if file.write(row) < len(row):  # the rest of a full disk
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def log_image(self, name: str, image: Tensor, step: int) -> None:
        """Pictures are files already."""

    def finish(self) -> None: ...


class SwanlabTracker:
    """All use of SwanLab. Never asks for input; `run_id` lets a resumed run continue."""

    def __init__(self, config: Config, log_dir: Path, run_id: str | None) -> None:
        import swanlab

        self._swanlab = swanlab
        mode = os.environ.get("SWANLAB_MODE") or config.swanlab_mode
        mode = SWANLAB_MODES.get(mode, mode)
        settings = swanlab.Settings(interactive=False)
        if mode == "auto":
            mode = "online" if settings.api_key else "offline"
        log_dir.mkdir(parents=True, exist_ok=True)
        arguments: dict[str, Any] = dict(
            project=config.project_name,
            name=config.experiment_name,
            config=config.to_dict(),
            log_dir=str(log_dir),
            settings=settings,
        )
        if run_id is not None and mode == "online":
            arguments.update(id=run_id, resume="allow")
        try:
            run = swanlab.init(mode=mode, **arguments)
        except Exception as error:
            if config.swanlab_mode != "auto" or mode == "offline":
                raise
            log.warning("SwanLab: no connection (%s); logging offline", _first_line(error))
            run = swanlab.init(mode="offline", **arguments)
        self.run_id: str | None = run.id

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        self._swanlab.log(dict(scalars), step=step)

    def log_image(self, name: str, image: Tensor, step: int) -> None:
        self._swanlab.log({name: self._swanlab.Image(to_array(image))}, step=step)

    def finish(self) -> None:
        self._swanlab.finish()


class TensorboardTracker:
    """Event files for TensorBoard.

    Where a run goes on from `start_step`, TensorBoard is told to forget the later steps.
    """

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


class Lane:
    """One tracker, and what happens when it raises: a warning once, after too many in a row the
    end.

    Args:
        make: starts the tracker; one that cannot start is a warning.
        max_failures: in a row; None never gives up.
    """

    def __init__(
        self, make: Callable[[], Tracker], name: str, max_failures: int | None = MAX_FAILURES
    ) -> None:
        self.name, self.max_failures = name, max_failures
        self.tracker: Tracker | None = None
        self._num_failed, self._has_warned = 0, False
        self._start(make)

    def call(self, action: Callable[[Tracker], None]) -> None:
        self._run(action)

    def finish(self) -> None:
        self._run(lambda tracker: tracker.finish())

    @property
    def run_id(self) -> str | None:
        return getattr(self.tracker, "run_id", None)

    def _start(self, make: Callable[[], Tracker]) -> None:
        try:
            self.tracker = make()
        except (Exception, SystemExit) as error:
            reason = _first_line(error)
            log.warning("%s: not started, the run goes on without it (%s)", self.name, reason)

    def _run(self, action: Callable[[Tracker], None]) -> None:
        if self.tracker is None:
            return
        try:
            action(self.tracker)
            self._num_failed = 0
        except (Exception, SystemExit) as error:
            self._num_failed += 1
            if not self._has_warned:
                log.warning("%s failed: %s; the run goes on", self.name, _first_line(error))
            self._has_warned = True
            if self._num_failed == self.max_failures:
                log.warning("%s failed %d times in a row: dropped", self.name, self._num_failed)
                self.tracker = None


class BackgroundLane(Lane):
    """A tracker in a thread of its own: one that hangs costs the training nothing.

    What finds the queue full is left out of this tracker, never out of metrics.jsonl.
    """

    def __init__(self, make: Callable[[], Tracker], name: str) -> None:
        self._actions: queue.Queue[Callable[[], None] | None] = queue.Queue(MAX_QUEUED)
        self._is_full = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()
        super().__init__(make, name)

    def call(self, action: Callable[[Tracker], None]) -> None:
        self._put(lambda: self._run(action))

    def finish(self) -> None:
        self._put(lambda: self._run(lambda tracker: tracker.finish()))
        self._put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            log.warning("%s does not answer: left behind after %d s", self.name, FINISH_SECONDS)

    def _start(self, make: Callable[[], Tracker]) -> None:
        self._put(lambda: super(BackgroundLane, self)._start(make))

    def _put(self, action: Callable[[], None] | None) -> None:
        try:
            self._actions.put_nowait(action)
        except queue.Full:
            if not self._is_full:
                log.warning("%s does not keep up: some values stay out of it", self.name)
            self._is_full = True

    def _work(self) -> None:
        while (action := self._actions.get()) is not None:
            action()


class TrackerGroup:
    """Several trackers behind one interface; none on ranks other than 0.

    Args:
        run_id: of the run that goes on, until its tracker says another.
    """

    def __init__(self, run_id: str | None = None) -> None:
        self._lanes: list[Lane] = []
        self._run_id = run_id

    def add(self, lane: Lane) -> None:
        self._lanes.append(lane)

    @property
    def run_id(self) -> str | None:
        return next((lane.run_id for lane in self._lanes if lane.run_id), self._run_id)

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        finite = {k: float(v) for k, v in scalars.items() if math.isfinite(v)}
        for lane in self._lanes:
            lane.call(lambda tracker: tracker.log_scalars(finite, step))

    def log_image(self, name: str, image: Tensor, step: int) -> None:
        for lane in self._lanes:
            lane.call(lambda tracker: tracker.log_image(name, image, step))

    def finish(self) -> None:
        for lane in self._lanes:
            lane.finish()


def check_trackers(config: Config) -> Iterator[Problem]:
    """TensorBoard has to be there where it is asked for; SwanLab comes with requirements.txt."""
    if config.use_tensorboard and find_spec("tensorboard") is None:
        yield Problem(
            ("use_tensorboard",),
            "use_tensorboard=True needs a package that is not there: pip install tensorboard",
        )


def start_trackers(
    config: Config, *, is_main: bool, start_step: int, run_id: str | None
) -> TrackerGroup:
    """metrics.jsonl always, SwanLab and TensorBoard if asked for; nothing on other ranks."""
    group = TrackerGroup(run_id)
    if not is_main:
        return group
    path, swanlog = config.run_dir / "metrics.jsonl", config.run_dir / "swanlog"
    # a disk that is full now may have room later
    group.add(Lane(lambda: JsonlTracker(path, start_step), path.name, max_failures=None))
    if config.use_swanlab:
        group.add(BackgroundLane(lambda: SwanlabTracker(config, swanlog, run_id), "SwanLab"))
    if config.use_tensorboard:
        events = config.run_dir / "tensorboard"
        group.add(BackgroundLane(lambda: TensorboardTracker(events, start_step), "TensorBoard"))
    return group


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
