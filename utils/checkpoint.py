"""Checkpoints, `.pth`: written whole and read safely. Exported weights, `.safetensors`: read."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from utils.errors import CheckpointError, one_line, require
from utils.files import atomic_path

FORMAT_VERSION = 2  # 1 has no checksum of the whole file
READ_BYTES = 2**20  # read at a time
CHECKSUM = b"crc32 %08x"  # the zip's comment, the last bytes of the file
CHECKSUM_BYTES, COUNT_BYTES = len(CHECKSUM % 0), 2  # before a zip's comment stands its length
BEST, CURRENT = "best_model.pth", "current_model.pth"
FOLDER_ATTRIBUTE = 0x10  # the folder bit of MS-DOS, which no checksum covers
EPOCH_PATTERN = re.compile(r"model_epoch_(\d+)\.pth")
KEY_TYPES = {"format_version": int, "model_state_dict": dict, "epoch": int, "step": int}
KEY_TYPES |= {"config": dict, "spec": list | tuple}
WEIGHTS_SUFFIX = ".safetensors"
# What the metadata of such a file says, as JSON, and under which name it has the checksum.
WEIGHTS_FACTS = ("format_version", "config", "spec", "step", "epoch", "ema")
WEIGHTS_CHECKSUM = "crc32"


def epoch_name(epoch: int) -> str:
    return f"model_epoch_{epoch:04d}.pth"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that `path` is at every moment the old file or the whole new one, on disk.
    After an OSError, or a RuntimeError of torch.save for a full disk, `path` is as it was."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        summing = _SummingFile(file)
        torch.save(state, summing)
        file.seek(-COUNT_BYTES, os.SEEK_END)
        file.write(_ending(summing.crc32))
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


class _SummingFile:
    """The methods of a file that torch.save needs, and the CRC32 of what it has written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.crc32 = file, 0
        self.flush = file.flush

    def write(self, block: Any) -> int:
        self.crc32 = zlib.crc32(block, self.crc32)
        return self._file.write(block)


def _ending(crc32: int) -> bytes:
    """The checksum as a comment of the zip that torch.save has written, with the comment's length.
    The zip's own checksums leave out its directory and padding, whose bits can hide a tensor."""
    return CHECKSUM_BYTES.to_bytes(COUNT_BYTES, "little") + CHECKSUM % crc32


def _has_its_checksum(path: Path) -> bool:
    """True if the file ends with the checksum of what it was before that was appended."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END) - CHECKSUM_BYTES - COUNT_BYTES
        file.seek(0)
        crc32, left = 0, max(0, size)
        while left and (block := file.read(min(left, READ_BYTES))):
            crc32, left = zlib.crc32(block, crc32), left - len(block)
        return file.read() == _ending(zlib.crc32(bytes(COUNT_BYTES), crc32))


def link_checkpoint(source: Path, path: Path) -> None:
    """Give a finished checkpoint a second name; no bytes are copied where links exist."""
    with atomic_path(path) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_any(path: Path) -> dict[str, Any]:
    """Read a checkpoint or an exported `.safetensors` file; the file's name tells which it is."""
    return load_weights(path) if path.suffix == WEIGHTS_SUFFIX else load_checkpoint(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read and verify a checkpoint; tensors arrive on the CPU. Raises a CheckpointError if the file
    is missing, damaged, or not one of ours.

    The checksum of the file (of old files, those in the zip) is checked first, because `torch.load`
    does not notice flipped bits, and `weights_only=True` keeps a file from running code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        is_whole = _has_its_checksum(path)
        damaged = None if is_whole else _damaged_member(path)
        state = torch.load(path, map_location="cpu", weights_only=True) if not damaged else {}
    except Exception as error:
        message = f"{path}: cannot be read as a checkpoint ({one_line(error)})"
        raise CheckpointError(message) from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged ({damaged} is not what was written)")
    check_state(path, state)
    if state["format_version"] > 1 and not is_whole:
        raise CheckpointError(f"{path}: damaged (its checksum is wrong, or was cut off)")
    return state


def load_weights(path: Path) -> dict[str, Any]:
    """Read and verify what `exporting.safetensors.save_weights` wrote: that part of what
    `load_checkpoint` gives that `WEIGHTS_FACTS` lists, with `ema_model_state_dict` or
    `model_state_dict`. Raises a CheckpointError if the file is missing, damaged, or not written by
    `save_weights`, a UserError if safetensors is not installed."""
    require("safetensors")
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        reason = one_line(error)
        raise CheckpointError(f"{path}: cannot be read as safetensors ({reason})") from error
    if missing := [k for k in (*WEIGHTS_FACTS, WEIGHTS_CHECKSUM) if k not in metadata]:
        raise CheckpointError(f"{path}: not written by export.py, its metadata lacks {missing}")
    facts = {name: metadata[name] for name in WEIGHTS_FACTS}
    if metadata[WEIGHTS_CHECKSUM] != checksum_of_weights(weights, facts):
        raise CheckpointError(f"{path}: damaged (it is not what was written)")
    state = {name: json.loads(text) for name, text in facts.items()}
    check_state(path, state | {"model_state_dict": weights})
    kind = "ema_model_state_dict" if state.pop("ema") else "model_state_dict"
    return state | {kind: weights}


def checksum_of_weights(weights: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """CRC32 of parameter names, values and metadata, 8 hex digits: safetensors itself has none."""
    value = zlib.crc32(json.dumps([sorted(weights), facts], sort_keys=True).encode())
    for name in sorted(weights):
        value = zlib.crc32(weights[name].flatten().view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def check_state(path: Path, state: Any) -> None:
    """Raise a CheckpointError unless what was read from `path` has the parts of a checkpoint, of
    the right types, in no newer format."""
    parts = state if isinstance(state, dict) else {}
    wrong = [key for key, kind in KEY_TYPES.items() if not isinstance(parts.get(key), kind)]
    if wrong or len(parts["spec"]) != 4:
        message = f"lacks, or has with another type, {', '.join(wrong or ['spec'])}"
        raise CheckpointError(f"{path}: not a checkpoint of this project, {message}")
    if (version := parts["format_version"]) > FORMAT_VERSION:
        message = f"format {version} is newer than the {FORMAT_VERSION} this version reads"
        raise CheckpointError(f"{path}: {message}; update the project")


def _damaged_member(path: Path) -> str | None:
    """The first member of the zip that is not what was written, by the zip's own checksums.

    A member marked as a folder counts: torch would read nothing of it, and leave its tensor as the
    memory was.
    """
    with zipfile.ZipFile(path) as archive:
        marked = (i.filename for i in archive.infolist() if i.external_attr & FOLDER_ATTRIBUTE)
        return archive.testzip() or next(marked, None)


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint file, given itself or its run directory (best, else current). Raises a
    CheckpointError if there is none."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint or run directory")
    if not path.is_dir():
        return path
    for name in (BEST, CURRENT):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path}: has neither {BEST} nor {CURRENT}")


def newest_checkpoint(run_dir: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """For `resume_path=auto`: `current_model.pth`, else the valid file with the most steps, as its
    path, its state, and a line for each damaged file passed over; None without checkpoints.

    Raises a CheckpointError if there are checkpoints, but none is readable: nothing may start anew
    silently.
    """
    current, skipped = run_dir / CURRENT, []
    newest: tuple[Path, dict[str, Any]] | None = None
    latest = [path for path in (current, run_dir / BEST) if path.is_file()]
    for path in [*latest, *epochs_saved(run_dir).values()]:
        try:
            state = load_checkpoint(path)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        if path == current:
            return path, state, skipped
        if newest is None or state["step"] >= newest[1]["step"]:
            newest = path, state
    if newest is None and skipped:
        lines = "\n       ".join(skipped)
        raise CheckpointError(f"no readable checkpoint to resume from:\n       {lines}")
    return None if newest is None else (*newest, skipped)


def epochs_saved(run_dir: Path) -> dict[int, Path]:
    """The `model_epoch_*.pth` files by epoch, ascending; none in a folder that does not exist."""
    named = ((EPOCH_PATTERN.fullmatch(path.name), path) for path in run_dir.glob("*.pth"))
    return dict(sorted((int(match[1]), path) for match, path in named if match))


def remove_old_checkpoints(run_dir: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` of `model_epoch_*.pth`."""
    for path in list(epochs_saved(run_dir).values())[:-keep_last]:
        path.unlink()
