"""Text output: the console of the main process, and the run's log.txt."""

from __future__ import annotations

import logging
import sys
import time
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


def setup_logging(*, is_main: bool) -> logging.Logger:
    """The project's logger: INFO on the main process, errors alone on the others."""
    logger = logging.getLogger("diffusion")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    console = _ConsoleHandler()
    console.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(console)
    return logger


def log_to_file(path: Path) -> None:
    """From now on also append to `path`, with UTC times."""
    handler = logging.FileHandler(path, encoding="utf-8")
    formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.getLogger("diffusion").addHandler(handler)
