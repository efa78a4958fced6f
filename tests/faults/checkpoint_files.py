"""Checkpoint files: killed writers, damage, and what resume makes of it."""

from __future__ import annotations

import io
import os
import signal
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.faults.harness import Fault, Figure, Lab, count_bad, leftovers, state_hash
from training.resume import find_resume, newest_checkpoint
from training.run_dir import prepare_run_dir
from training.saving import remove_old_checkpoints
from utils import checkpoint as files
from utils.config import Config
from utils.errors import CheckpointError

PAGE = 4096
# of 400 damages, how many of each kind
DAMAGES = {
    "bit flip": 0.5,
    "truncated": 0.15,
    "zeroed page": 0.15,
    "garbage": 0.15,
    "foreign": 0.05,
}


def trained_state(lab: Lab) -> dict[str, Any]:
    """The last state of the reference run."""
    lab.reference()
    return files.load_checkpoint(lab.run_dir("reference_1") / files.CURRENT)


# --- killed writers


def kill_writers(lab: Lab, trials: int) -> Figure:
    """kill -9 inside checkpoint writing. The writer is forked: no start-up, only its files."""
    state = trained_state(lab)
    config = Config(experiment_name=lab.new_name("writers"), save_dir=str(lab.folder / "runs"))
    folder, torn = config.run_dir, Counter()
    prepare_run_dir(config.run_dir)
    write(folder, state, 1)
    last = [1]

    def trial() -> None:
        acknowledged = kill_a_writer(folder, state, last[0], lab.random.uniform(0, 0.08))
        torn["kills inside a write"] += bool(leftovers(folder))
        try:
            _, found, skipped = newest_checkpoint(folder)
        except CheckpointError as error:
            raise Fault(str(error)) from error
        if skipped:
            raise Fault(f"unreadable: {skipped[0]}")
        if found["step"] < acknowledged:
            raise Fault(f"save {acknowledged} was acknowledged, found {found['step']}")
        if state_hash({**found, "step": 0}) != state_hash({**state, "step": 0}):
            raise Fault("read other tensors than were written")
        prepare_run_dir(config.run_dir)
        if left := leftovers(folder):
            raise Fault(f"left behind: {', '.join(left)}")
        last[0] = found["step"]

    bad, detail = count_bad([trial] * trials)
    inside = f"{torn['kills inside a write']} left a temporary file, swept at the next start"
    return Figure("kill -9 inside a checkpoint write", trials, bad, "lost", detail or inside)


def write(folder: Path, state: dict[str, Any], step: int) -> None:
    """What the trainer does at the end of an epoch that is also the best one."""
    files.save_checkpoint(folder / files.CURRENT, {**state, "step": step})
    files.link_checkpoint(folder / files.CURRENT, folder / files.BEST)
    files.link_checkpoint(folder / files.CURRENT, folder / files.epoch_name(step))
    remove_old_checkpoints(folder, 3)


def kill_a_writer(folder: Path, state: dict[str, Any], start: int, delay: float) -> int:
    """Fork a process that saves without pause, and kill it. Returns the last acknowledged save."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for step in range(start + 1, start + 1000):
                write(folder, state, step)
                os.write(writer, step.to_bytes(4, "little"))
        finally:
            os._exit(1)
    os.close(writer)
    acknowledged = os.read(reader, 4)  # it is writing now
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while block := os.read(reader, 4):
        acknowledged = block
    os.close(reader)
    return int.from_bytes(acknowledged, "little")


# --- damage


def damage_files(lab: Lab, trials: int) -> Figure:
    path = lab.folder / "damaged.pth"
    files.save_checkpoint(path, trained_state(lab))
    good, generator = path.read_bytes(), np.random.default_rng(1)
    kinds = [kind for kind, share in DAMAGES.items() for _ in range(round(share * trials))]
    bad, detail = count_bad(
        [lambda kind=kind: refused(path, damaged(good, kind, generator), kind) for kind in kinds]
    )
    name = "damaged checkpoint (flip, truncate, zero, garbage, foreign)"
    return Figure(name, len(kinds), bad, "not refused", detail)


def refused(path: Path, content: bytes, what: str) -> None:
    """
    Raises:
        Fault: a checkpoint of this content is loaded, or ends in another error.
    """
    path.write_bytes(content)
    try:
        files.load_checkpoint(path)
    except CheckpointError:
        return
    except Exception as error:
        raise Fault(f"{what}: {type(error).__name__} instead of CheckpointError") from error
    raise Fault(f"{what}: loaded")


def every_bit(lab: Lab, trials: int) -> Figure:
    """All single bit flips of a small checkpoint, or `trials` of them."""
    path = lab.folder / "bits.pth"
    files.save_checkpoint(path, small_state())
    good = path.read_bytes()
    count = 8 * len(good)
    chosen = range(count) if trials >= count else lab.random.sample(range(count), trials)

    def trial(bit: int) -> None:
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        refused(path, bytes(bad), f"bit {bit % 8} of byte {bit // 8}")

    bad, detail = count_bad([lambda bit=bit: trial(bit) for bit in chosen])
    label = f"every bit flip of a {len(good)} byte checkpoint"
    return Figure(label, len(chosen), bad, "not refused", detail)


def small_state() -> dict[str, Any]:
    tensors = {"w": torch.arange(16.0), "b": torch.ones(5)}
    state = {"format_version": files.FORMAT_VERSION, "epoch": 1, "step": 3, "config": {"seed": 1}}
    return {
        **state,
        "spec": [1, 8, 8, 10],
        "model_state_dict": tensors,
        "ema_model_state_dict": {"w": torch.zeros(3)},
        "optimizer_state_dict": {},
    }


def damaged(good: bytes, kind: str, generator: np.random.Generator) -> bytes:
    """`good` with one fault of a kind of `DAMAGES`; never `good` itself."""
    while True:
        bad = bytearray(good)
        start = int(generator.integers(len(bad)))
        if kind == "bit flip":
            bad[start] ^= 1 << int(generator.integers(8))
        elif kind == "truncated":
            del bad[start:]
        elif kind == "zeroed page":
            start = start // PAGE * PAGE
            bad[start : start + PAGE] = bytes(len(bad[start : start + PAGE]))
        elif kind == "garbage":
            length = min(int(generator.integers(1, 2 * PAGE)), len(bad) - start)
            bad[start : start + length] = generator.bytes(length)
        else:
            bad = bytearray(foreign(good, int(generator.integers(8))))
        if bad != good:
            return bytes(bad)


def foreign(good: bytes, number: int) -> bytes:
    """A file of another kind, or another project."""
    return [
        lambda: b"",
        lambda: b"\x89PNG\r\n\x1a\n" + good[:1000],
        lambda: b'{"step": 3}',
        lambda: good[: len(good) // 2] + good,
        lambda: saved({"w": torch.zeros(3)}),
        lambda: saved({"model_state_dict": {"w": torch.zeros(3)}, "epoch": 1, "step": 3}),
        lambda: saved([torch.zeros(3)]),
        lambda: zipped({"archive/readme": b"hello", "archive/data": b"\x80\x02."}),
    ][number]()


def saved(value: Any) -> bytes:

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


# --- what resume makes of it


def fall_back(lab: Lab, trials: int) -> Figure:
    """`auto` takes the newest good file; a named file or nothing but damage is an error."""
    state, generator = trained_state(lab), np.random.default_rng(2)
    kinds = [list(DAMAGES)[i % len(DAMAGES)] for i in range(trials)]

    def trial(kind: str) -> None:
        folder = lab.run_dir(lab.new_name("fall_back"))
        folder.mkdir()
        for step in (1, 2, 3):
            write(folder, state, step)
        spoil = [files.CURRENT, files.BEST, files.epoch_name(3), files.epoch_name(2)]
        for name, wanted in zip(spoil, (3, 3, 2, 1), strict=True):
            good = (folder / name).read_bytes()
            (folder / name).unlink()  # the others may be links to it
            (folder / name).write_bytes(damaged_for_sure(good, kind, generator))
            if (step := newest_checkpoint(folder)[1]["step"]) != wanted:
                raise Fault(f"{kind}: without {name} step {step} was chosen, not {wanted}")
        (folder / files.epoch_name(1)).write_bytes(b"")
        for name in ("auto", str(folder / files.CURRENT)):
            options = {"save_dir": str(lab.folder / "runs"), "resume_path": name}
            try:
                find_resume(Config(experiment_name=folder.name, **options))
                raise Fault(f"{kind}: resume_path={name} went on")
            except CheckpointError:
                continue

    bad, detail = count_bad([lambda kind=kind: trial(kind) for kind in kinds])
    return Figure("damaged newest files: auto falls back", trials, bad, "lost", detail)


def damaged_for_sure(good: bytes, kind: str, generator: np.random.Generator) -> bytes:
    """As `damaged`, but not in the padding of the zip."""

    while True:
        bad = damaged(good, kind, generator)
        try:
            with zipfile.ZipFile(io.BytesIO(bad)) as archive:
                if archive.testzip() is None:
                    continue
        except Exception:
            return bad
        return bad
