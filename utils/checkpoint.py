"""Checkpoint files: one `.pth` of tensors and plain types, written atomically, read safely."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils.errors import CheckpointError

FORMAT_VERSION = 2  # 1 has no checksum of the whole file
CHECKSUM = b"crc32 %08x"  # the zip's comment, the last bytes of the file
CHECKSUM_BYTES, COUNT_BYTES = len(CHECKSUM % 0), 2  # before a zip's comment stands its length
READ_BYTES = 2**20  # at a time
BEST, CURRENT = "best_model.pth", "current_model.pth"
FOLDER_ATTRIBUTE = 0x10  # of MS-DOS; no checksum covers it
EPOCH_PATTERN = re.compile(r"model_epoch_(\d+)\.pth")
KEY_TYPES = {
    "format_version": int,
    "model_state_dict": dict,
    "epoch": int,
    "step": int,
    "config": dict,
    "spec": list | tuple,
}


def epoch_name(epoch: int) -> str:
    return f"model_epoch_{epoch:04d}.pth"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that `path` is at every moment either the old file or the whole new one.

    Raises:
        OSError, RuntimeError: the disk refused; `path` is untouched (torch.save reports a full
            disk as RuntimeError).
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            summing = _SummingFile(file)
            torch.save(state, summing)
            _append_checksum(file, summing.crc32)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


class _SummingFile:
    """What torch.save needs of a file; knows the CRC32 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.crc32 = file, 0
        self.flush = file.flush

    def write(self, data: Any) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        return self._file.write(data)


def _append_checksum(file: BinaryIO, crc32: int) -> None:
    """As the comment of the zip that has just been written without one.

    The zip's own checksums leave out its directory and padding: there are bits in it that no other
    check notices, and that hide a tensor.
    """
    file.seek(-COUNT_BYTES, os.SEEK_END)
    file.write(_ending(crc32))


def _ending(crc32: int) -> bytes:
    return CHECKSUM_BYTES.to_bytes(COUNT_BYTES, "little") + CHECKSUM % crc32


def _has_its_checksum(path: Path) -> bool:
    """Whether the file ends with the checksum of what it was before that was appended."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END) - CHECKSUM_BYTES - COUNT_BYTES
        file.seek(0)
        crc32, left = 0, max(0, size)
        while left and (data := file.read(min(left, READ_BYTES))):
            crc32, left = zlib.crc32(data, crc32), left - len(data)
        return file.read() == _ending(zlib.crc32(bytes(COUNT_BYTES), crc32))


def link_checkpoint(source: Path, path: Path) -> None:
    """Give a finished checkpoint a second name; no bytes are copied where links exist."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read and verify a checkpoint; tensors arrive on the CPU.

    The checksum of the file (of old files, those in the zip) is checked first, because `torch.load`
    does not notice flipped bits, and `weights_only=True` keeps a file from running code.

    Raises:
        CheckpointError: missing, damaged, or not one of ours.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        if not (is_whole := _has_its_checksum(path)):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip() or _false_folder(archive)
            if damaged is not None:
                raise CheckpointError(f"{path}: damaged ({damaged} is not what was written)")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({reason})") from error
    check_state(path, state)
    if state["format_version"] > 1 and not is_whole:
        raise CheckpointError(f"{path}: damaged (its checksum is wrong, or was cut off)")
    return state


def check_state(path: Path, state: Any) -> None:
    """Whether what was read from `path` has the parts of a checkpoint.

    Raises:
        CheckpointError: it has not, or is of a newer format.
    """
    missing = [key for key in KEY_TYPES if not isinstance(state, dict) or key not in state]
    if missing:
        raise CheckpointError(f"{path}: not a checkpoint of this project, lacks {missing}")
    wrong = [key for key, kind in KEY_TYPES.items() if not isinstance(state[key], kind)]
    if wrong or len(state["spec"]) != 4:
        raise CheckpointError(f"{path}: not a checkpoint of this project, odd {wrong or ['spec']}")
    if state["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {state['format_version']} is newer than the {FORMAT_VERSION} "
            "this version reads; update the project"
        )


def _false_folder(archive: zipfile.ZipFile) -> str | None:
    """A member marked as a folder: torch would read nothing of it, and leave its tensor as the
    memory was."""
    marked = (i.filename for i in archive.infolist() if i.external_attr & FOLDER_ATTRIBUTE)
    return next(marked, None)


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint file, given itself or its run directory (best, else current).

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError(f"{path}: no such checkpoint or run directory")
        return path
    for name in (BEST, CURRENT):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path}: has neither {BEST} nor {CURRENT}")


def newest_checkpoint(run_dir: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """For `resume_path=auto`: `current_model.pth`, else the valid file with the most steps.

    Returns:
        path, its state, and a line for each damaged file passed over; None in a folder without
        checkpoints.

    Raises:
        CheckpointError: there are checkpoints, but none is readable. (Never restart silently.)
    """
    skipped: list[str] = []
    if (run_dir / CURRENT).is_file():
        try:
            return run_dir / CURRENT, load_checkpoint(run_dir / CURRENT), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    newest: tuple[Path, dict[str, Any]] | None = None
    for path in sorted(run_dir.glob("*.pth")) if run_dir.is_dir() else []:
        if path.name == BEST or EPOCH_PATTERN.fullmatch(path.name):
            try:
                state = load_checkpoint(path)
            except CheckpointError as error:
                skipped.append(str(error))
                continue
            if newest is None or state["step"] >= newest[1]["step"]:
                newest = path, state
    if newest is not None:
        return *newest, skipped
    if skipped:
        raise CheckpointError(
            "no readable checkpoint to resume from:\n       " + "\n       ".join(skipped)
        )
    return None


def epochs_saved(run_dir: Path) -> dict[int, Path]:
    """The `model_epoch_*.pth` files by epoch, ascending."""
    paths = run_dir.iterdir() if run_dir.is_dir() else ()
    found = {int(m[1]): path for path in paths if (m := EPOCH_PATTERN.fullmatch(path.name))}
    return dict(sorted(found.items()))


def remove_old_checkpoints(run_dir: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` of `model_epoch_*.pth`."""
    for path in list(epochs_saved(run_dir).values())[:-keep_last]:
        path.unlink()
