"""A disk that is full, at any byte of a checkpoint, and has room again later."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.harness import Fault, Figure, Lab, count_bad, leftovers
from tests.faults.launcher import fill_disk, free_disk
from utils.checkpoint import CURRENT
from utils.errors import EXIT_FAILURE

STEPS = 110  # a save every second or third
DISK_BYTES = 16 * 2**20
FULL_STEPS = 40  # the last page of metrics.jsonl has room for half of that


def full_disk(lab: Lab, trials: int) -> list[Figure]:
    """By a limit on the size of files (works for anyone), and on a real full file system (root)."""
    figures = [saves_that_fail(lab, "limit", trials, lab.folder / "runs")]
    if trials < 20:
        return figures
    with small_disk(lab.folder / "disk") as folder:
        if folder is None:
            return [*figures, Figure("disk full, tmpfs", 0, 0, "lost", "SKIPPED: needs root")]
        figures.append(saves_that_fail(lab, "disk", trials, folder))
        figures.append(rows_after_full_disk(lab, folder))
        figures.append(disk_full_at_start(lab, folder))
    return [*figures, disk_that_stays_full(lab)]


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A tmpfs of 16 MB; None if this user may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def saves_that_fail(lab: Lab, kind: str, trials: int, save_dir: Path) -> Figure:
    """Every second save of one run meets a full disk, at another byte each time."""
    label = f"disk full at {trials} byte offsets, {'RLIMIT_FSIZE' if kind == 'limit' else 'tmpfs'}"
    lab.reference()
    size = (lab.run_dir("reference_1") / CURRENT).stat().st_size
    offsets = [size * i // trials for i in range(trials)]
    plan = [limit for offset in offsets for limit in (None, offset)] + [None]
    name, path = lab.new_name("full"), lab.folder / f"full_{kind}.jsonl"
    inject = {"saves": {"path": str(path), "kind": kind, "plan": plan}}
    try:
        job = lab.complete(name, f"save_dir={save_dir}", f"max_steps={STEPS}", inject=inject)
        lab.check_final(save_dir / name, steps=STEPS)
    except Fault as fault:
        return Figure(label, trials, trials, "lost", str(fault))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    bad = [row for row in rows if row[1] is None or not 0 < row[2] < row[0]]
    if left := leftovers(save_dir / name):
        bad.append(f"left behind: {', '.join(left)}")
    lost = len(bad) + abs(trials - len(rows))
    warned = job.text().count(b"no checkpoint at step")
    errors = ", ".join(sorted({str(row[1]) for row in rows}))
    detail = f"{errors}; {warned} warnings; final hash equal"
    return Figure(label, trials, lost, "lost", str(bad[0]) if bad else detail)


def rows_after_full_disk(lab: Lab, folder: Path) -> Figure:
    """The disk is full for some steps: the rows of all other steps stand in metrics.jsonl."""
    label = f"disk full for {FULL_STEPS} steps: metrics.jsonl afterwards"
    name, first = lab.new_name("full_rows"), 20
    full = range(first, first + FULL_STEPS)
    inject = {"full_steps": {"first": full.start, "stop": full.stop}}
    try:
        lab.complete(name, f"save_dir={folder}", "save_interval=16", "max_steps=90", inject=inject)
        lab.check_final(folder / name, steps=90)
    except Fault as fault:
        return Figure(label, 90 - FULL_STEPS, 90 - FULL_STEPS, "rows missing", str(fault))
    text = (folder / name / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    found = set()
    for line in text.splitlines():
        try:
            found.add(json.loads(line)["step"])
        except ValueError:
            continue
    wanted = [step for step in range(1, 91) if step - 1 not in full]
    missing = [step for step in wanted if step not in found]
    detail = f"first missing: step {missing[0]}" if missing else "run and hash unharmed"
    return Figure(label, len(wanted), len(missing), "rows missing", detail)


def disk_full_at_start(lab: Lab, folder: Path) -> Figure:
    """A start and a resume without a free byte: an error in a line; later the run is complete."""
    label = "disk full at the start, and at a resume"
    name = lab.new_name("full_start")
    options = (f"save_dir={folder}", "resume_path=auto")

    def refused() -> None:
        fill_disk(folder, 0)
        try:
            job = lab.start(name, *options, "max_steps=40")
            codes, text = job.finish(), job.text()
        finally:
            free_disk(folder)
        if codes != [EXIT_FAILURE] or b"Traceback" in text or b"error: " not in text:
            raise Fault(f"exit codes {codes}: {job.tail()}")

    def completed(steps: int) -> None:
        lab.complete(name, *options, f"max_steps={steps}")
        lab.check_final(folder / name, steps=steps)

    trials = [refused, lambda: completed(20), refused, lambda: completed(40)]
    bad, detail = count_bad(trials)
    return Figure(label, len(trials), bad, "lost", detail)


def disk_that_stays_full(lab: Lab) -> Figure:
    """Three failed saves in a row end the run with code 1; with room it goes on to the end."""
    label = "disk that stays full: stops, goes on later"
    name, path = lab.new_name("stays_full"), lab.folder / "stays_full.jsonl"
    inject = {"saves": {"path": str(path), "kind": "limit", "plan": [None, None, 1000]}}
    try:
        job = lab.start(name, inject=inject)
        if (codes := job.finish()) != [EXIT_FAILURE]:
            raise Fault(f"exit codes {codes}: {job.tail()}")
        lab.complete(name, "resume_path=auto")
        lab.check_final(lab.run_dir(name))
    except Fault as fault:
        return Figure(label, 1, 1, "lost", str(fault))
    return Figure(label, 1, 0, "lost")
