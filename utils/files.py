"""Writing files whole, and naming what is in them: used wherever something is put on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError

KEY_DIGITS = 12


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the body ends.

    At every moment readers see the old file or the whole new one. If the body raises, `path` stays
    as it was and the temporary file is removed. A killed process leaves a file named
    `*.tmp-PID`, which the next run in that folder sweeps up.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file so that readers see the old or the new one; makes its folder. An
    OSError leaves `path` as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """Bound how long the body's downloads wait for an answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def make_output_dir(path: str | Path, option: str) -> None:
    """Make a folder for results before hours of work, not after. A UserError tells that it cannot
    be made or written to, and the command-line option that named it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"{option} {path}: cannot be written")


def check_picture_folder(folder: Path, num_images: int) -> None:
    """Raise a UserError if older pictures in `folder` would stay among the new 000000.png ..."""
    replaced = {f"{i:06d}.png" for i in range(num_images)}
    if others := sorted(path.name for path in folder.glob("*.png") if path.name not in replaced):
        older = f"{folder} holds {len(others)} pictures ({others[0]} ...)"
        advice = "choose another --output_dir, or remove them"
        message = f"{older} that these {num_images} would not replace; {advice}"
        raise UserError(f"--save_images: {message}")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_key(depends_on: Mapping[str, Any] | Sequence[Any]) -> str:
    """12 hex digits for a file name, which change with anything in `depends_on` (as JSON)."""
    content = json.dumps(depends_on, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:KEY_DIGITS]
