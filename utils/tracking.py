"""Where numbers and pictures of a run go. A tracker never stops a run."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from utils.config import Config
from utils.images import to_array

MAX_FAILURES = 3
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
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")

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


class TrackerGroup:
    """Several trackers behind one interface; none on ranks other than 0.

    A tracker that raises is warned about once, and dropped after three failures in a row.
    """

    def __init__(self) -> None:
        self._trackers: list[Tracker] = []
        self._failures: dict[int, int] = {}
        self._warned: set[str] = set()
        self.run_id: str | None = None

    def add(self, make: Callable[[], Tracker], name: str) -> None:
        """Start a tracker; one that cannot start is a warning."""
        try:
            tracker = make()
        except (Exception, SystemExit) as error:
            log.warning(
                "%s: not started, the run goes on without it (%s)", name, _first_line(error)
            )
            return
        self._trackers.append(tracker)
        self.run_id = getattr(tracker, "run_id", None) or self.run_id

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        finite = {k: float(v) for k, v in scalars.items() if math.isfinite(v)}
        self._call(lambda tracker: tracker.log_scalars(finite, step))

    def log_image(self, name: str, image: Tensor, step: int) -> None:
        self._call(lambda tracker: tracker.log_image(name, image, step))

    def finish(self) -> None:
        self._call(lambda tracker: tracker.finish())

    def _call(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                action(tracker)
                self._failures[id(tracker)] = 0
            except (Exception, SystemExit) as error:
                failures = self._failures.get(id(tracker), 0) + 1
                self._failures[id(tracker)] = failures
                name = type(tracker).__name__
                if name not in self._warned:
                    self._warned.add(name)
                    log.warning("%s failed: %s; the run goes on", name, _first_line(error))
                if failures >= MAX_FAILURES:
                    log.warning("%s failed %d times in a row: dropped", name, failures)
                    self._trackers.remove(tracker)


def start_trackers(
    config: Config, *, is_main: bool, start_step: int, run_id: str | None
) -> TrackerGroup:
    """metrics.jsonl always, SwanLab if asked for; nothing on other ranks."""
    group = TrackerGroup()
    if not is_main:
        return group
    group.add(lambda: JsonlTracker(config.run_dir / "metrics.jsonl", start_step), "metrics.jsonl")
    if config.use_swanlab:
        group.run_id = run_id
        group.add(lambda: SwanlabTracker(config, config.run_dir / "swanlog", run_id), "SwanLab")
    return group


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
