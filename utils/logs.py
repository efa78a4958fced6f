"""Text output: the console of the main process, and the run's log.txt."""

from __future__ import annotations

import logging
import sys
import time
from logging.handlers import MemoryHandler
from pathlib import Path

from tqdm import tqdm

from utils.errors import printable


class _Formatter(logging.Formatter):
    """Names of classes and files, and texts of errors, may hold what a terminal obeys."""

    converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _ConsoleHandler(logging.Handler):
    """Prints above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def setup_logging(*, is_main: bool) -> logging.Logger:
    """The project's logger: it prints from INFO on in the main process, errors alone in others."""
    logging.raiseExceptions = False  # a full disk costs lines of the file, not a traceback each
    logger = logging.getLogger("diffusion")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    console = _ConsoleHandler()
    console.setFormatter(_Formatter("%(message)s"))
    logger.addHandler(console)
    logger.addHandler(MemoryHandler(1000, flushLevel=logging.CRITICAL + 1))
    return logger


def log_to_file(path: Path) -> None:
    """Append to `path` all that was logged since `setup_logging` or will be, with UTC times."""
    handler = logging.FileHandler(path, encoding="utf-8")
    form = "%(asctime)sZ %(levelname)s %(message)s"
    handler.setFormatter(_Formatter(form, "%Y-%m-%dT%H:%M:%S"))
    logger = logging.getLogger("diffusion")
    for early in [h for h in logger.handlers if isinstance(h, MemoryHandler)]:
        logger.removeHandler(early)
        early.setTarget(handler)
        early.close()
    logger.addHandler(handler)
