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
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
        lines = path.read_bytes().splitlines() if path.is_file() else []
        with atomic_path(path) as temporary, open(temporary, "wb") as kept:
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                    if json.loads(line)["step"] <= start_step:
                        kept.write(line + b"\n")

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


class HostedTracker:
    """SwanLab or W&B, which never ask for input. By its `run_id`, which checkpoints hold, a run
    resumed online continues. Where `mode` fails and `asked` is "auto", it logs offline."""

    def __init__(
        self, module: Any, config: Config, run_id: str | None, *, asked: str, mode: str, **own: Any
    ) -> None:
        own |= {"project": config.project_name, "name": config.experiment_name}
        own |= {"id": run_id, "resume": "allow"} if run_id and mode == "online" else {}
        start = partial(module.init, config=config.to_dict(), **own)
        try:
            run = start(mode=mode)
        except Exception as error:
            if asked != "auto" or mode == "offline":
                raise
            log.warning("%s: not online (%s); logging offline", self.name, _reason(error))
            run = start(mode="offline")
        self._module, self.run_id = module, run.id

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        self._module.log(dict(scalars), step=step)

    def log_image(self, name: str, image: Tensor, step: int) -> None:
        self._module.log({name: self._module.Image(to_array(image))}, step=step)

    def finish(self) -> None:
        self._module.finish()


class SwanlabTracker(HostedTracker):
    """SwanLab, whose files go to the run's `swanlog/`."""

    name, id_key = "SwanLab", "tracker_run_id"

    def __init__(self, config: Config, run_id: str | None) -> None:
        import swanlab

        log_dir, settings = config.run_dir / "swanlog", swanlab.Settings(interactive=False)
        log_dir.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("SWANLAB_MODE") or config.swanlab_mode
        if mode == "auto":
            mode = "online" if settings.api_key else "offline"
        mode, own = mode.replace("cloud", "online"), {"log_dir": str(log_dir), "settings": settings}
        super().__init__(swanlab, config, run_id, asked=config.swanlab_mode, mode=mode, **own)


class WandbTracker(HostedTracker):
    """Weights & Biases, whose files go to the run's `wandb/`."""

    name, id_key = "W&B", "wandb_run_id"

    def __init__(self, config: Config, run_id: str | None) -> None:
        import wandb

        # Silent it does not ask for a key, and what a lane leaves behind would delay the exit.
        patience = dict.fromkeys(("init_timeout", "finish_timeout"), FINISH_SECONDS / 2)
        own = {"settings": wandb.Settings(silent=True, console="off", **patience)}
        wandb.setup(**own)
        own["dir"], asked = str(config.run_dir), config.wandb_mode
        mode = (os.environ.get("WANDB_MODE") or asked).replace("auto", "online")
        super().__init__(wandb, config, run_id, asked=asked, mode=mode, **own)


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


Tracker = HostedTracker | TensorboardTracker
ID_KEYS = SwanlabTracker.id_key, WandbTracker.id_key


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
    earlier_ids: Mapping[str, str | None] = field(default_factory=dict)  # of a run that goes on

    @property
    def run_ids(self) -> dict[str, str | None]:
        """What SwanLab and W&B call the run, by the keys of checkpoints."""
        hosted = [lane.tracker for lane in self.lanes if isinstance(lane.tracker, HostedTracker)]
        return {**self.earlier_ids, **{tracker.id_key: tracker.run_id for tracker in hosted}}

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
    """TensorBoard, W&B and SwanLab's local dashboard have to be there where they are asked for; the
    rest of SwanLab comes with requirements.txt."""
    mode = os.environ.get("SWANLAB_MODE") or config.swanlab_mode
    if config.use_swanlab and mode == "local" and find_spec("swanboard") is None:
        advice = "pip install 'swanlab[dashboard]'; or swanlab_mode=offline"
        message = f"swanlab_mode='local' needs a package that is not there: {advice}"
        yield Problem(("swanlab_mode",), message)
    for package in ("tensorboard", "wandb"):
        if getattr(config, f"use_{package}") and find_spec(package) is None:
            message = f"needs a package that is not there: pip install {package}"
            yield Problem((f"use_{package}",), f"use_{package}=True {message}")


def start_trackers(
    config: Config, *, is_main: bool, start_step: int, earlier: Mapping[str, Any] = {}
) -> TrackerGroup:
    """metrics.jsonl always, others if asked for; on rank 0. `earlier` is a resumed checkpoint."""
    ids = {key: earlier.get(key) for key in ID_KEYS}
    if not is_main:
        return TrackerGroup(earlier_ids=ids)
    path, events = config.run_dir / "metrics.jsonl", config.run_dir / "tensorboard"
    record, lanes = None, []
    try:
        record = MetricsFile(path, start_step)
    except OSError as error:
        log.warning(NOT_STARTED, path.name, _reason(error))
    asked = ((config.use_swanlab, SwanlabTracker), (config.use_wandb, WandbTracker))
    for hosted in (kind for is_asked, kind in asked if is_asked):
        lanes.append(Lane(partial(hosted, config, ids[hosted.id_key]), hosted.name))
    if config.use_tensorboard:
        lanes.append(Lane(lambda: TensorboardTracker(events, start_step), "TensorBoard"))
    return TrackerGroup(record, lanes, ids)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
