"""What `python runs.py verify` does: train some steps of a run again, and compare the record."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from reporting.run_files import CONFIG, METRICS, parse_row, read_json
from training.build import build_trainer, fixed_state
from training.job import Job, prepare
from training.learner import Learner
from training.resume import changed_settings, newest_checkpoint
from training.run_dir import Status
from training.saving import LOSS, BestScore
from utils.checkpoint import load_checkpoint
from utils.config import RawConfig, keys_by_resume, validate
from utils.distributed import Runtime
from utils.errors import EXIT_OK, ConfigError, UserError, show

# None of these keys changes what is trained. Saving does, in the last bits, on several processes.
QUIET = dict(use_swanlab=False, use_wandb=False, use_tensorboard=False, eval_interval=0)
QUIET |= dict(val_interval=0, eval_best_metric=None, sample_dir=None, port=None, gpu_ids=None)
MEASURED = ("train/images_per_sec", "train/memory_mib")
FACTS = ("versions", "device", "world_size", "num_threads", "backend", "data_fingerprint")
SETTINGS = (*keys_by_resume("architecture", "meaning", "run", "warn"), "epochs", "max_steps")

Rows = dict[int, dict[str, float]]  # step -> the values of its row


def verify_run(
    folder: Path, runtime: Runtime, *, num_steps: int, checkpoint: Path | None, dry_run: bool
) -> tuple[int, str]:
    """Train steps of the run in `folder` again, by its config.json in a temporary folder, and
    compare the rows of training in its metrics.jsonl bit for bit, but for speed and memory.

    They begin with the first step, or after those of `checkpoint`, and end with the first row that
    is `num_steps` steps later, or else with the last row. A `dry_run` trains none. On every rank.
    Returns the exit code and a line for the user. Raises a UserError that says what differs.
    """
    values = read_json(folder / CONFIG)
    if not values:
        raise ConfigError(f"{show(folder)}: has no {CONFIG} to train by; name the folder of a run")
    start = 0 if checkpoint is None else load_checkpoint(checkpoint)["step"]
    rows = {step: row for step, row in rows_of(folder / METRICS).items() if step > start}
    if not rows:
        raise UserError(f"{show(folder / METRICS)} has no loss of a step after {start}")
    end = next((step for step in rows if step >= start + num_steps), max(rows))
    rows = {step: row for step, row in rows.items() if step <= end}
    span = f"{show(folder)}: steps {start + 1} to {end}, {len(rows)} rows of {METRICS}"
    with contextlib.ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="verify-")
        place = stack.enter_context(temporary) if runtime.is_main else None
        values |= {**QUIET, "save_dir": runtime.broadcast_object(place)}
        if checkpoint is not None:
            values |= {"resume_path": str(checkpoint), "init_from": None}
        else:
            values["resume_path"] = None
        job = prepare(
            validate(RawConfig(values, dict.fromkeys(values, str(folder / CONFIG)))), runtime
        )
        if dry_run:
            return EXIT_OK, f"{span}: not trained again"
        if code := _train(job, end):
            return code, f"{span}: interrupted"
        again = rows_of(job.config.run_dir / METRICS) if runtime.is_main else rows
    unequal = list(_unequal(rows, again))
    if not unequal:
        return EXIT_OK, f"{span}: the same again, bit for bit"
    reasons = _changes(folder, checkpoint, job) or ["nothing that the checkpoints tell of"]
    texts = [f"{span}: not the same again", *unequal[:1], "what differs:", *reasons]
    raise UserError("\n       ".join(texts))


def rows_of(path: Path) -> Rows:
    """The rows of training in a metrics.jsonl, without what depends on the machine's mood."""
    rows: Rows = {}
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for row in filter(None, map(parse_row, file)):
            if "train/loss" in row:
                names = (key for key in row if key.startswith("train/") and key not in MEASURED)
                rows[int(row["step"])] = {key: row[key] for key in names}
    return rows


def _train(job: Job, end: int) -> int:
    """Train from where the job begins to step `end`. Returns the exit code."""
    total = job.resume and job.resume.state.get("extended_steps")
    schedule = replace(job.schedule, total_steps=total or job.schedule.total_steps)
    job, best = replace(job, schedule=schedule), BestScore(LOSS, lower_is_better=True)
    learner = Learner(job)
    trainer = build_trainer(job, learner, Status(None), best=best, evaluate=None, preview=None)
    trainer.schedule = replace(schedule, total_steps=end)  # the learning rate keeps its own
    return trainer.train()


def _unequal(rows: Rows, again: Rows) -> Iterator[str]:
    """A text for each value that is not the same again."""
    for step, row in rows.items():
        for key, value in row.items():
            if (now := again.get(step, {}).get(key)) != value:
                yield f"{key} at step {step}: {value!r} in {METRICS}, {now!r} now"


def _changes(folder: Path, checkpoint: Path | None, job: Job) -> list[str]:
    """What differs from the facts and settings that a checkpoint of the run tells of."""
    newest = newest_checkpoint(folder) if checkpoint is None else None
    if checkpoint is None and newest is None:
        return ["unknown, the run has no checkpoint"]
    state: dict[str, Any] = newest[1] if newest else load_checkpoint(checkpoint)
    now = fixed_state(job)
    texts = [
        f"{key}: was {state[key]}, now {now[key]}"
        for key in FACTS
        if key in state and state[key] != now[key]
    ]
    return texts + changed_settings(state["config"], now["config"], SETTINGS)
