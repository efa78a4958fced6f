"""Text output: the console of the main process, and the run's log.txt."""

from __future__ import annotations

import logging
import sys
import time
from logging.handlers import MemoryHandler
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


class _FileHandler(logging.FileHandler):
    """A full disk costs lines of the file, not a traceback each; the console has them all."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


def setup_logging(*, is_main: bool) -> logging.Logger:
    """The project's logger: it prints from INFO on in the main process, errors alone in others."""
    logger = logging.getLogger("diffusion")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    console = _ConsoleHandler()
    console.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(console)
    logger.addHandler(MemoryHandler(1000, flushLevel=logging.CRITICAL + 1))
    return logger


def log_to_file(path: Path) -> None:
    """Append to `path` all that was logged since `setup_logging` or will be, with UTC times."""
    handler = _FileHandler(path, encoding="utf-8")
    formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logger = logging.getLogger("diffusion")
    for early in [h for h in logger.handlers if isinstance(h, MemoryHandler)]:
        logger.removeHandler(early)
        early.setTarget(handler)
        early.close()
    logger.addHandler(handler)
