"""Checkpoints, `.pth`: written whole and read safely. Exported weights, `.safetensors`: read."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

from utils.config_schema import Config
from utils.errors import CheckpointError, one_line, require, show, told_as
from utils.files import atomic_path, looks_like
from utils.images import VALUE_TYPES, is_range

FORMAT_VERSION = 2  # 1 has no checksum of the whole file
READ_BYTES = 2**20  # read at a time
CHECKSUM = b"crc32 %08x"  # the zip's comment, the last bytes of the file
CHECKSUM_BYTES, COUNT_BYTES = len(CHECKSUM % 0), 2  # before a zip's comment stands its length
BEST, CURRENT = "best_model.pth", "current_model.pth"
FOLDER_ATTRIBUTE = 0x10  # the folder bit of MS-DOS, which no checksum covers
EPOCH_PATTERN = re.compile(r"model_epoch_(\d+)\.pth")
MAX_ENTRIES, MAX_DEPTH = 10**6, 30  # of a whole file; lists may hold one another many times over
MAX_COUNT, MAX_SIDE, MAX_CLASSES = 2**53, 2**14, 2**20  # above it a number is no count of these
RUNS_NAMED = 10  # in a message
PICKLES = [bytes([0x80, protocol]) for protocol in range(2, 6)]  # how they begin
FOREIGN = "its network cannot be loaded here; train again with its config, see docs/migration.md"
# What every config has said since the first format: without it the weights mean nothing.
CONFIG_KEYS = {"seed", "batch_size", "model_type", "model_params", "conditional"}
CONFIG_KEYS |= {"num_timesteps", "beta_schedule", "prediction_type"}
WEIGHTS_SUFFIX, WEIGHTS_CHECKSUM = ".safetensors", "crc32"  # the checksum's name in the metadata
# What the metadata of such a file says, as JSON; the last three where there is something to say.
WEIGHTS_FACTS = ("format_version", "config", "spec", "step", "epoch", "ema")
WEIGHTS_FACTS += ("values", "class_names", "dtype")


def epoch_name(epoch: int) -> str:
    return f"model_epoch_{epoch:04d}.pth"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that `path` is at every moment the old file or the whole new one, on disk.
    After an OSError, or a RuntimeError of torch.save for a full disk, `path` is as it was."""
    save_checked(path, lambda file: torch.save(state, file))


def save_checked(path: Path, write: Callable[[Any], object]) -> None:
    """As `save_checkpoint`, whatever `write` puts into the file it is given. Its last two bytes,
    which must be zeros, make room for the checksum that `has_its_checksum` looks for."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        summing = _SummingFile(file)
        write(summing)
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


def has_its_checksum(path: Path) -> bool:
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
        raise CheckpointError(f"{show(path)}: no such checkpoint{_runs_near(path)}")
    try:
        if what := looks_like(path):
            raise ValueError(what)
        with open(path, "rb") as file:
            if file.read(2) in PICKLES:
                raise UnpicklingError(FOREIGN)
        _check_members(path)
        is_whole = has_its_checksum(path)
        damaged = None if is_whole else _damaged_member(path)
        state = read_tensors(path) if not damaged else {}
    except Exception as error:
        reason = one_line(error)
        if isinstance(error, UnpicklingError):  # in a file that is not damaged
            reason = f"it holds Python objects, as those of other projects do; {FOREIGN}"
        raise CheckpointError(f"{show(path)}: cannot be read as a checkpoint ({reason})") from error
    if damaged is not None:
        raise CheckpointError(f"{show(path)}: damaged ({damaged} is not what was written)")
    check_state(path, state)
    if state["format_version"] > 1 and not is_whole:
        raise CheckpointError(f"{show(path)}: damaged (its checksum is wrong, or was cut off)")
    return state


def read_tensors(path: Path, *, needs_checksum: bool = False) -> Any:
    """Read what torch.save wrote: tensors, on the CPU, and plain types. No code in it is run.

    It takes no more memory than the file has bytes. Raises whatever torch and zipfile do for a
    foreign file, and a ValueError for one that is made to take more.
    """
    if needs_checksum and not has_its_checksum(path):
        raise ValueError("its checksum is wrong, or missing")
    _check_members(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    todo, count = [(content, 0)], 0
    while todo:
        value, depth = todo.pop()
        count += 1 + (len(value) // 64 if isinstance(value, str | bytes) else 0)
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise ValueError("holds a tensor that is not a plain one")
            size = min(value.untyped_storage().nbytes(), path.stat().st_size)
            if value.numel() * value.element_size() > size:  # older versions of torch believe it
                raise ValueError(f"a tensor {tuple(value.shape)} has {size} bytes")
        elif isinstance(value, dict | list | tuple | set):
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            todo += ((part, depth + 1) for part in parts)
        if count + len(todo) > MAX_ENTRIES or depth > MAX_DEPTH:
            raise ValueError("nested too deeply, or many times over")
    return content


def _check_members(path: Path) -> None:
    """Raise a ValueError for a zip that unpacks to more than it is: zeros would fill the memory."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members, size = archive.infolist(), path.stat().st_size
    if any(m.compress_type for m in members) or sum(m.file_size for m in members) > size:
        raise ValueError("its parts are compressed or overlap, as torch.save never leaves them")


def load_weights(path: Path) -> dict[str, Any]:
    """Read and verify what `exporting.safetensors.save_weights` wrote: that part of what
    `load_checkpoint` gives that `WEIGHTS_FACTS` lists, with `ema_model_state_dict` or
    `model_state_dict`, whose 16-bit floats become float32. Raises a CheckpointError if the file is
    missing, damaged, or not of `save_weights`, a UserError if safetensors is not installed."""
    require("safetensors")
    from safetensors import safe_open

    with told_as(CheckpointError, f"{show(path)}: cannot be read as safetensors"):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = {k: metadata[k] for k in WEIGHTS_FACTS if k in metadata}
        state = {name: json.loads(text) for name, text in facts.items()}
    if missing := [k for k in (*WEIGHTS_FACTS[:-3], WEIGHTS_CHECKSUM) if k not in metadata]:
        raise CheckpointError(f"{path}: not written by export.py, its metadata lacks {missing}")
    if metadata[WEIGHTS_CHECKSUM] != checksum_of_weights(weights, facts):
        raise CheckpointError(f"{show(path)}: damaged (it is not what was written)")
    if state.pop("dtype", None) == "float16":
        weights = {k: v.float() if v.dtype == torch.float16 else v for k, v in weights.items()}
    check_state(path, state | {"model_state_dict": weights})
    kind = "ema_model_state_dict" if state.pop("ema") else "model_state_dict"
    return state | {kind: weights}


def checksum_of_weights(weights: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """CRC32 of parameter names, values and metadata, 8 hex digits: safetensors itself has none."""
    value = zlib.crc32(json.dumps([sorted(weights), facts], sort_keys=True).encode())
    for name in sorted(weights):
        value = zlib.crc32(weights[name].flatten().view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def is_count(value: Any, least: int = 0, most: int = MAX_COUNT) -> bool:
    """Whether it is an integer, no bool, of `least`..`most`."""
    return type(value) is int and least <= value <= most


def _is_spec(spec: Any) -> bool:
    *shape, num_classes = spec
    fits = len(shape) == 3 and is_count(num_classes, most=MAX_CLASSES)
    return fits and all(is_count(side, 1, MAX_SIDE) for side in shape)


def _is_config(config: Any) -> bool:
    json.dumps(config)  # plain types alone
    return config.keys() >= CONFIG_KEYS and isinstance(config["model_params"], dict)


def _is_weights(weights: Any) -> bool:
    return all(type(k) is str and isinstance(v, Tensor) for k, v in weights.items())


# What all who read a checkpoint rely on; where one is to go on, training.resume asks for more.
STATE = {"format_version": lambda value: is_count(value, 1), "model_state_dict": _is_weights}
STATE |= {"epoch": is_count, "step": is_count, "config": _is_config, "spec": _is_spec}
OPTIONAL_STATE = {
    "ema_model_state_dict": _is_weights,
    "ema_averages": lambda widths: all(0.001 <= w < 0.3 and _is_weights(widths[w]) for w in widths),
    "ema_snapshots": lambda losses: all(is_count(t, 1) and losses[t] == losses[t] for t in losses),
    "class_names": lambda names: not names or all(type(name) is str for name in names),
    "values": lambda x: x[0] in VALUE_TYPES and is_range(*x[1:]),
}


def misfit(value: Any, form: Any, name: str = "") -> str | None:
    """What keeps `value` from having this form, in a line that begins with `name`; else None.

    A tensor is the form of finite ones of its shape and type; a mapping that of others with its
    keys, and where it holds tensors, no more keys; a function tells, or raises.
    """
    if isinstance(form, Tensor):
        of_form = f"{form.dtype} {tuple(form.shape)}"
        given = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else value
        if given != of_form:
            return f"{name} is {one_line(given, 60)}, not {of_form}"
        return None if value.isfinite().all() else f"{name} is not finite"
    if not isinstance(form, Mapping):
        with contextlib.suppress(Exception):  # whatever a value of another type leads to
            if form(value):
                return None
        return f"{name} cannot be {one_line(value, 60)}"
    if not isinstance(value, Mapping):
        return f"{name} is {one_line(value, 60)}, not a mapping"
    has_tensors = any(isinstance(part, Tensor) for part in form.values())
    for key in dict.fromkeys((*form, *value)) if has_tensors else form:
        place = f"{name}.{key}" if name else str(key)
        if key not in form or key not in value:
            return f"{place} is " + ("missing" if key in form else "not expected")
        if problem := misfit(value[key], form[key], place):
            return problem
    return None


def check_state(path: Path, state: Any) -> None:
    """Raise a CheckpointError unless what was read from `path` has the parts of a checkpoint, of
    the right types, in no newer format."""
    there = OPTIONAL_STATE.keys() & (state.keys() if isinstance(state, dict) else ())
    form = STATE | {key: OPTIONAL_STATE[key] for key in there}
    if problem := misfit(state, form):
        problem = _of_another_project(state) or problem
        raise CheckpointError(f"{show(path)}: not a checkpoint of this project, {problem}")
    if (version := state["format_version"]) > FORMAT_VERSION:
        message = f"format {version} is newer than the {FORMAT_VERSION} this version reads"
        raise CheckpointError(f"{show(path)}: {message}; update the project")


def _of_another_project(state: Any) -> str | None:
    """What is to be done with a checkpoint that says nothing of our format; None if it does."""
    if not isinstance(state, dict) or not state or "format_version" in state:
        return None
    keys = one_line(", ".join(map(str, state)), 80)
    what = "bare weights" if _is_weights(state) else f"it holds {keys}"
    return f"but of another ({what}); {FOREIGN}"


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
        raise CheckpointError(f"{path}: no such checkpoint or run directory{_runs_near(path)}")
    if path.is_file():
        return path
    for name in (BEST, CURRENT):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path}: has neither {BEST} nor {CURRENT}{_runs_near(path)}")


def _runs_near(path: Path) -> str:
    """The end of a message, "; runs in checkpoints: a, b", or "" if there is none around."""
    default = Path(Config.model_fields["save_dir"].default)
    for folder in (path, path.parent, path.parent.parent, default):
        names = sorted({checkpoint.parent.name for checkpoint in folder.glob("*/*_model.pth")})
        if names:
            more = f" and {len(names) - RUNS_NAMED} more" if names[RUNS_NAMED:] else ""
            return f"; runs in {show(folder)}: {show(', '.join(names[:RUNS_NAMED]))}{more}"
    return ""


def epochs_saved(run_dir: Path) -> dict[int, Path]:
    """The `model_epoch_*.pth` files by epoch, ascending; none in a folder that does not exist."""
    named = ((EPOCH_PATTERN.fullmatch(p.name), p) for p in run_dir.glob("*.pth") if p.is_file())
    return dict(sorted((int(match[1]), path) for match, path in named if match))
