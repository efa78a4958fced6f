"""Errors meant for the user: one readable message, no traceback."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

EXIT_OK, EXIT_FAILURE, EXIT_USAGE = 0, 1, 2
EXIT_INCOMPLETE = 3  # evaluate.py --strict: a requested metric has no value
EXIT_NON_FINITE = 41  # training stopped before a non-finite optimizer step
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: SIGTERM or SIGINT, state saved, run again to go on


class UserError(ValueError):
    """Something the user can fix. The message says what was given, what is allowed, how to fix."""

    exit_code = EXIT_FAILURE


class ConfigError(UserError):
    """One or more faults in a config file or on the command line, a line each."""

    exit_code = EXIT_USAGE


class DataError(UserError):
    """A data set that is missing, broken or labelled wrongly. Names the file or folder."""

    exit_code = EXIT_USAGE


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or does not fit."""


class MissingWeightsError(UserError):
    """Pretrained weights of a metric that are neither on disk nor downloadable."""


def one_line(error: object, limit: int = 200) -> str:
    """The message of an error on one line, cut to `limit` characters; without one, its class."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def show(path: Path | str) -> str:
    """`path` for a one-line message: unprintable names (line breaks, broken bytes) are escaped."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def require(*packages: str) -> None:
    """Make sure, without importing them, that optional packages are installed; if not, a UserError
    says how to install all of them."""
    missing = " ".join(name for name in packages if importlib.util.find_spec(name) is None)
    if missing:
        raise UserError(f"{missing}: not installed; pip install {' '.join(packages)}")


def exit_code_of(main: Callable[[], int]) -> int:
    """Run `main`; print a `UserError` as text on stderr and return its exit code."""
    try:
        return main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        prefix = "error" if rank == "0" else f"error (rank {rank})"
        print(f"{prefix}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
