"""What `python runs.py verify` does: train some steps of a run again, and compare the record."""

from __future__ import annotations

import contextlib
import math
import tempfile
from dataclasses import replace
from pathlib import Path

from reporting.run_files import CONFIG, METRICS, read_json, read_series
from training.build import build_trainer, fixed_state
from training.job import prepare
from training.learner import Learner
from training.pretrained import changed_settings
from training.resume import newest_checkpoint
from training.run_dir import Status
from training.saving import LOSS, BestScore
from utils.checkpoint import load_checkpoint
from utils.config import RawConfig, keys_by_resume, validate
from utils.distributed import Runtime, distributed_runtime  # noqa: F401 -- for runs.py
from utils.errors import EXIT_OK, ConfigError, UserError, show

# None of these keys changes what is trained. Saving does, in the last bits, on several processes.
QUIET = dict(use_swanlab=False, use_wandb=False, use_tensorboard=False, eval_interval=0)
QUIET |= dict(val_interval=0, eval_best_metric=None, sample_dir=None, port=None, gpu_ids=None)
MEASURED = ("train/images_per_sec", "train/memory_mib")
FACTS = ("versions", "device", "world_size", "num_threads", "backend", "data_fingerprint")
SETTINGS = (*keys_by_resume("architecture", "meaning", "run", "warn"), "epochs", "max_steps")


def verify_run(
    folder: Path, runtime: Runtime, *, num_steps: int, checkpoint: Path | None, dry_run: bool
) -> str:
    """Train steps of the run in `folder` again, by its config.json in a temporary folder, and
    compare the rows of training in its metrics.jsonl bit for bit, but for speed and memory.

    They begin with the first step, or after those of `checkpoint`, and end with the first row that
    is `num_steps` steps later, or else with the last row. A `dry_run` trains none. On every rank.
    Returns a line for the user. Raises a UserError that says what differs.
    """
    if not (values := read_json(folder / CONFIG)):
        raise ConfigError(f"{show(folder)}: has no {CONFIG} to train by; name the folder of a run")
    origin = None if checkpoint is None else load_checkpoint(checkpoint)
    start = origin["step"] if origin else 0
    record = {at: x for at, x in _values_of(folder / METRICS).items() if at[0] > start}
    if not (steps := sorted({step for step, _ in record})):
        raise UserError(f"{show(folder / METRICS)} has no row of training after step {start}")
    end = next((step for step in steps if step >= start + num_steps), steps[-1])
    span = f"{show(folder)}: steps {start + 1} to {end}, {steps.index(end) + 1} rows of {METRICS}"
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory()) if runtime.is_main else None
        values |= {**QUIET, "save_dir": runtime.broadcast_object(place), "resume_path": None}
        values |= {"resume_path": str(checkpoint), "init_from": None} if checkpoint else {}
        raw = RawConfig(values, dict.fromkeys(values, show(folder / CONFIG)))
        job = prepare(validate(raw), runtime)
        if dry_run:
            return f"{span}: not trained again"
        options = dict(best=BestScore(LOSS, lower_is_better=True), evaluate=None, preview=None)
        trainer = build_trainer(job, Learner(job), Status(None), **options)
        trainer.schedule = replace(job.schedule, total_steps=end)  # not that of the learning rate
        if trainer.train() != EXIT_OK:
            raise KeyboardInterrupt
        again = _values_of(job.config.run_dir / METRICS) if runtime.is_main else record
    if not (wrong := sorted(at for at, x in record.items() if at[0] <= end and again.get(at) != x)):
        return f"{span}: the same again, bit for bit"
    (step, key), was = wrong[0], origin or (newest_checkpoint(folder) or ("", {}))[1]
    first = f"{key} at step {step}: {record[step, key]} in the record, {again.get((step, key))} now"
    now = fixed_state(job)
    texts = [f"{k}: was {was[k]}, now {now[k]}" for k in FACTS if k in was and was[k] != now[k]]
    texts += changed_settings(was.get("config", {}), now["config"], SETTINGS) if was else []
    differing = "; ".join(texts) or "nothing that the run's checkpoints tell of"
    raise UserError(f"{span}: not the same\n       {first}\n       what differs: {differing}")


def _values_of(path: Path) -> dict[tuple[int, str], float]:
    """(step, name) -> value of all rows of training, without what is measured."""
    series = read_series(path)[0]
    names = [key for key in series if key.startswith("train/") and key not in MEASURED]
    return {(int(at), key): x for key in names for at, x in series[key] if math.isfinite(x)}
