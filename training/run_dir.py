"""A run's folder: made, locked against a second run, its state told to schedulers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import errors
from utils.config import Config, format_config
from utils.errors import ConfigError, UserError, one_line, reason_of, shell_line
from utils.files import write_text
from utils.logs import log_to_file

if TYPE_CHECKING:  # the import of torch takes seconds, for which a look at a folder need not wait
    from utils.distributed import Runtime

STATUS_BYTES = 4096  # a block of a disk: so much a status.json always takes
STATUS, LOCK = "status.json", "run.lock"
OWNER_SECONDS = 0.1  # whoever has just locked a folder has written its name by then
STATES = {errors.EXIT_OK: "complete", errors.EXIT_PREEMPTED: "preempted"}
STATES |= {errors.EXIT_NON_FINITE: "non_finite"}

log = logging.getLogger("diffusion")

Seen = frozenset[tuple[str, int, int]]


def checkpoints_in(folder: Path) -> Seen:
    """(name, time, size) of every checkpoint: two equal ones mean that nobody has trained there."""
    checkpoints = set()
    for path in folder.glob("*.pth"):
        with contextlib.suppress(OSError):  # somebody removes old ones right now; or no file at all
            stat = path.stat()
            checkpoints.add((path.name, stat.st_mtime_ns, stat.st_size))
    return frozenset(checkpoints)


def prepare_run_dir(folder: Path) -> None:
    """Make the folder, and sweep up what dead processes have left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.tmp-*"):
        pid = leftover.name.rpartition("-")[2]
        if pid.isdecimal() and not _is_running(int(pid)):
            leftover.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Callable[[], bool]]:
    """Keep other processes from training into `folder`. The lock dies with its process.

    Yields what tells whether the folder is still the one that was locked: it may be removed,
    renamed or replaced meanwhile, and then another run may have one of that name.

    A record lock, not `flock`: workers forked by a data loader do not inherit it, so a run can go
    on at once after a kill -9 although its workers still live for seconds.

    Raises a ConfigError if another process has the lock, and an OSError if the disk refuses.
    """
    path = folder / LOCK
    folder.mkdir(parents=True, exist_ok=True)
    # Unbuffered: on a full disk nothing is left over that closing would have to write.
    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                time.sleep(OWNER_SECONDS)
                file.seek(0)
                owner = file.read().decode(errors="replace").strip() or "another process"
                raise ConfigError(
                    f"{folder} is being written by {owner}; wait for its end, stop it, or choose "
                    "another experiment_name"
                ) from error
            log.warning("%s: this file system has no locks (%s)", path, error.strerror)
        with contextlib.suppress(OSError):  # the name is a help, the lock is what counts
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        ours = os.fstat(file.fileno())
        # Where a file system numbers a file anew at every look, nothing can be told.
        yield partial(_is_at, path, ours) if _is_at(path, ours) else lambda: True


def _is_at(path: Path, file: os.stat_result) -> bool:
    """Whether `path` leads to this file. Looking by name alone: opening it would drop the lock."""
    try:
        return os.path.samestat(path.stat(), file)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # a disk that does not answer tells nothing
        return True


def is_trained(folder: Path, status: Mapping[str, Any]) -> bool:
    """Tell whether the process that a `status.json` names still trains into `folder`.

    True where it runs on another host, of which nothing is known here. Not for that process itself:
    looking at the lock would drop it.
    """
    if status.get("host") != socket.gethostname():
        return True
    pid = status.get("pid")
    if not isinstance(pid, int) or not _is_running(pid):
        return False
    try:  # by now another process may have that number
        with open(folder / LOCK, "rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # else it is locked, or nothing can be locked here
        return not isinstance(error, FileNotFoundError)
    return False


class Status:
    """`status.json`: what a scheduler wants to know of a run. A disk that refuses is a warning.

    `facts` are the entries to begin with. Without a path, on ranks other than 0, none is written,
    nor where `is_ours` tells that the folder is another one by now.
    """

    def __init__(
        self,
        path: Path | None,
        facts: Mapping[str, Any] = {},
        is_ours: Callable[[], bool] = lambda: True,
    ) -> None:
        self._path, self._facts, self._has_warned = path, dict(facts), False
        self.is_ours = is_ours
        self._lock = threading.Lock()  # checkpoints are written, and told of, in another thread

    def update(self, **facts: Any) -> None:
        """Set these entries, and write the file."""
        with self._lock:
            self._facts |= facts
            if self._path is None or not self.is_ours():
                return
            now = datetime.now(UTC).isoformat(timespec="seconds")
            text = json.dumps(self._facts | {"updated": now}, indent=2).ljust(STATUS_BYTES - 1)
            text += "\n"
            try:
                write_text(self._path, text)
            except OSError as error:
                if self._facts.get("exit_code") is not None:  # the last word needs no new room
                    with contextlib.suppress(OSError), open(self._path, "r+b", 0) as file:
                        file.write(text.encode())
                        return
                if not self._has_warned:
                    log.warning("%s is not written: %s", self._path, error.strerror)
                self._has_warned = True

    def tell_saved(self, state: Mapping[str, Any]) -> None:
        """The newest checkpoint on disk holds `state`."""
        self.update(step=state["step"], epoch=state["epoch"], best=state["best"])

    def finish(self, code: int, reason: str | None = None) -> None:
        """The run has ended with this exit code."""
        self.update(state=STATES.get(code, "failed"), exit_code=code, reason=reason)

    @contextlib.contextmanager
    def of_run(self) -> Iterator[None]:
        """`running` at first; `failed`, or what the exit code means, where the body raises."""
        process = {"pid": os.getpid(), "host": socket.gethostname()}
        self.update(state="running", exit_code=None, reason=None, **process)
        try:
            yield
        except BaseException as error:
            self.finish(getattr(error, "exit_code", errors.EXIT_FAILURE), one_line(error, 500))
            raise


def mark_complete(folder: Path) -> None:
    """Say `complete` for a run that was killed between its last checkpoint and its last word."""
    path = folder / STATUS
    with contextlib.suppress(OSError, ValueError):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts.get("state") == "running":
            Status(path, facts).finish(errors.EXIT_OK)


@contextlib.contextmanager
def open_run_dir(config: Config, runtime: Runtime, seen: Seen) -> Iterator[Status]:
    """The run's folder while it trains: locked, with config.json, log.txt and status.json.

    On every rank; rank 0 alone touches the folder. Raises a UserError on every rank if it cannot be
    written, or another process trains into it, or has done so since its checkpoints were `seen`,
    which is when this run decided where to begin.
    """
    folder, error, is_ours = config.run_dir, None, lambda: True
    with contextlib.ExitStack() as stack:
        if runtime.is_main:
            try:
                is_ours = stack.enter_context(locked(folder))
                if checkpoints_in(folder) != seen:
                    raise ConfigError(
                        f"{folder} was written by another process while this one was starting; "
                        "start it again with resume_path=auto, or choose another experiment_name"
                    )
                prepare_run_dir(folder)  # after locking: what it sweeps is nobody's then
                log_to_file(folder / "log.txt")
                log.info("command: %s", shell_line(sys.executable, *sys.argv))
                write_text(folder / "config.json", format_config(config))
            except UserError as failure:
                error = failure
            except OSError as failure:
                error = UserError(
                    f"{folder}: cannot be written ({reason_of(failure)}); make it "
                    "writable and free some space, or set save_dir"
                )
        error = runtime.broadcast_object(error)
        if error is not None:
            raise error
        status = Status(folder / STATUS if runtime.is_main else None, is_ours=is_ours)
        stack.enter_context(status.of_run())
        yield status
