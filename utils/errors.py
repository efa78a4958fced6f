"""Errors meant for the user: one readable message, no traceback."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

EXIT_OK, EXIT_FAILURE, EXIT_USAGE = 0, 1, 2
EXIT_INCOMPLETE = 3  # evaluate.py --strict: a requested metric has no value
EXIT_NON_FINITE = 41  # training stopped before a non-finite optimizer step
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: SIGTERM or SIGINT, state saved, run again to go on
EXIT_INTERRUPTED = 130  # Ctrl-C, where no state is to be saved

# What a terminal obeys: control characters, and marks that turn the direction of the text. Half of
# a surrogate pair stands for a byte of a file name that is no UTF-8.
OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


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


def reason_of(error: Exception) -> str:
    """Why something failed, on one line; where the system refused it, in its words alone."""
    return getattr(error, "strerror", None) or one_line(error)


@contextlib.contextmanager
def told_as(kind: type[UserError], message: str, *causes: type[Exception]) -> Iterator[None]:
    """Raise errors of the body, of these classes or any, as one of `kind`: "message (reason)"."""
    try:
        yield
    except causes or Exception as error:  # noqa: B030
        raise kind(f"{message} ({reason_of(error)})") from error


def show(path: Path | str) -> str:
    """`path` for a one-line message: unprintable names (line breaks, broken bytes) are escaped."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def printable(text: object) -> str:
    """`text` with what a terminal obeys as escapes such as `\\u001b`, which JSON reads back. Line
    breaks, tabs and letters of every language stay."""
    return OBEYED.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text))


def say(text: object) -> None:
    """Print what a script has to tell on stdout, see `printable`. `exit_code_of` reports it if the
    text is lost there."""
    print(printable(text), flush=True)
    _Console.is_incomplete |= _Console.failure is not None


def shell_line(*words: object) -> str:
    """A command to copy, in which every word is quoted where a shell would change it. A `Path` is
    no option, even if its name begins with a dash."""
    texts = (f"./{w}" if isinstance(w, Path) and str(w).startswith("-") else str(w) for w in words)
    return shlex.join(texts)


def require(*packages: str) -> None:
    """Make sure, without importing them, that optional packages are installed; if not, a UserError
    says how to install all of them."""
    missing = " ".join(name for name in packages if importlib.util.find_spec(name) is None)
    if missing:
        raise UserError(f"{missing}: not installed; pip install {' '.join(packages)}")


class _Console(io.FileIO):
    """A stream's file that never fails: what it cannot take is dropped. `failure` says why stdout
    took no more, unless its reader has gone away, which is nobody's fault."""

    failure: OSError | None = None
    is_incomplete = False

    def write(self, content: bytes) -> int:
        try:
            return super().write(content) or 0  # 0, which is tried again, where it would block
        except OSError as error:
            if self.fileno() == 1 and error.errno not in (errno.EPIPE, errno.EIO, errno.EBADF):
                _Console.failure = error
            return len(content)


def make_streams_safe() -> None:
    """Let stdout and stderr take any text, and outlive a console that is closed or goes away."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the next file to be opened would get its number, and the text with it
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None or stream is getattr(sys, f"__{name}__"):
            encoding = getattr(stream, "encoding", "utf-8")
            file = io.BufferedWriter(_Console(number, "w", closefd=False))
            safe = io.TextIOWrapper(file, encoding, "backslashreplace", line_buffering=True)
            setattr(sys, name, safe)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def exit_code_of(main: Callable[[], int]) -> int:
    """Run `main` with streams that take everything. Print a `UserError`, or what the system
    refuses, as text on stderr and return the exit code; a success of which stdout has lost some
    text is none."""
    make_streams_safe()
    try:
        code = main()
        if code == EXIT_OK and _Console.is_incomplete:
            raise UserError(f"standard output has lost some text: {_Console.failure.strerror}")
        return code
    except (UserError, OSError, MemoryError) as error:
        message = "not enough memory" if isinstance(error, MemoryError) else str(error)
        if isinstance(error, OSError):  # a full disk, a name that is too long: whatever named it
            place = f"{show(os.fsdecode(error.filename))}: " if error.filename else ""
            message = place + reason_of(error)
        rank = os.environ.get("RANK", "0")
        prefix = "error" if rank == "0" else f"error (rank {rank})"
        print(printable(f"{prefix}: {message}"), file=sys.stderr, flush=True)
        return getattr(error, "exit_code", EXIT_FAILURE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
