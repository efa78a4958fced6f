"""Text output: the console of the main process, and the run's log.txt."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from pathlib import Path

from tqdm import tqdm


class _ConsoleHandler(logging.Handler):
    """Prints above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # where the output goes the disk may be full; a run does not die of it
            self.handleError(record)


class _EarlyRecords(logging.Handler):
    """Keeps what is said before there is a file to write it to."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def setup_logging(*, is_main: bool) -> logging.Logger:
    """The project's logger: INFO on the main process, errors alone on the others."""
    logger = logging.getLogger("diffusion")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    console = _ConsoleHandler()
    console.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(console)
    logger.addHandler(_EarlyRecords())
    return logger


class _FileHandler(logging.FileHandler):
    """A full disk costs lines, not a traceback for each; the console has them all."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


def log_to_file(path: Path) -> None:
    """Append all that was said since `setup_logging`, and will be, to `path`, with UTC times."""
    handler = _FileHandler(path, encoding="utf-8")
    formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logger = logging.getLogger("diffusion")
    for early in [h for h in logger.handlers if isinstance(h, _EarlyRecords)]:
        logger.removeHandler(early)
        for record in early.records:
            handler.handle(record)
    logger.addHandler(handler)
