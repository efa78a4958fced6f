"""A run's folder: made and probed, locked against a second run, its state told to schedulers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from utils.config import Config, format_config
from utils.distributed import Runtime
from utils.errors import (
    EXIT_FAILURE,
    EXIT_NON_FINITE,
    EXIT_OK,
    EXIT_PREEMPTED,
    ConfigError,
    UserError,
)
from utils.logs import log_to_file

STATUS, LOCK = "status.json", "run.lock"
STATES = {EXIT_OK: "complete", EXIT_PREEMPTED: "preempted", EXIT_NON_FINITE: "non_finite"}

log = logging.getLogger("diffusion")


def prepare_run_dir(folder: Path) -> None:
    """Make the folder, make sure that it can be written, and sweep up after dead processes.

    Raises:
        UserError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); set save_dir") from error
    for leftover in folder.glob("*.tmp-*"):
        pid = leftover.name.rpartition("-")[2]
        if pid.isdecimal() and not _is_running(int(pid)):
            leftover.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    except OverflowError:
        return False
    return True


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training into `folder`. The lock dies with its process.

    A record lock, not `flock`: workers forked by a data loader do not inherit it, so a run can go
    on at once after a kill -9 although its workers still live for seconds.

    Raises:
        ConfigError: another process has it.
    """
    path = folder / LOCK
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise ConfigError(
                    f"{folder} is being written by {owner}; wait for its end, stop it, or choose "
                    "another experiment_name"
                ) from error
            log.warning("%s: this file system has no locks (%s)", path, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


class Status:
    """`status.json`: what a scheduler wants to know of a run. A disk that refuses is a warning.

    Args:
        path: None on ranks other than 0: nothing is written.
    """

    def __init__(self, path: Path | None, **facts: Any) -> None:
        self._path = path
        self._facts: dict[str, Any] = facts
        self._has_warned = False

    def update(self, **facts: Any) -> None:
        self._facts |= facts
        if self._path is None:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        temporary = self._path.with_name(f"{self._path.name}.tmp-{os.getpid()}")
        try:
            text = json.dumps(self._facts | {"updated": now}, indent=2)
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if not self._has_warned:
                log.warning("%s is not written: %s", self._path, error.strerror)
            self._has_warned = True

    @contextlib.contextmanager
    def of_run(self) -> Iterator[None]:
        """`running` at first; `failed`, or what the exit code means, where the body raises."""
        self.update(
            state="running",
            exit_code=None,
            reason=None,
            pid=os.getpid(),
            host=socket.gethostname(),
        )
        try:
            yield
        except BaseException as error:
            code = getattr(error, "exit_code", EXIT_FAILURE)
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            self.update(state=STATES.get(code, "failed"), exit_code=code, reason=reason)
            raise

    def finish(self, code: int, reason: str | None = None) -> None:
        self.update(state=STATES.get(code, "failed"), exit_code=code, reason=reason)


@contextlib.contextmanager
def open_run_dir(config: Config, runtime: Runtime) -> Iterator[Status]:
    """The run's folder while it trains: locked, with config.json, log.txt and status.json.

    On every rank; rank 0 alone touches the folder.

    Raises:
        UserError: it cannot be written, or another process trains into it.
    """
    folder = config.run_dir
    with contextlib.ExitStack() as stack:
        if runtime.is_main:
            prepare_run_dir(folder)
            stack.enter_context(locked(folder))
            log_to_file(folder / "log.txt")
            log.info("command: %s", shlex.join([sys.executable, *sys.argv]))
            (folder / "config.json").write_text(format_config(config), encoding="utf-8")
        runtime.barrier()
        status = Status(folder / STATUS if runtime.is_main else None)
        stack.enter_context(status.of_run())
        yield status
