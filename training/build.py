"""A job becomes a trainer, or a dry run; and the lines that are logged before and after."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets.remarks import remarks_on
from diffusion.guidance import conditioned
from models import backend_of
from training.job import Job
from training.learner import Learner
from training.nonfinite import NonFiniteGuard
from training.run_dir import Status
from training.saving import BestScore, Saver
from training.tracking import start_trackers
from training.trainer import Trainer
from utils.captions import class_captions, contact_sheet
from utils.checkpoint import BEST, CURRENT, FORMAT_VERSION
from utils.config import PART, Config, warnings_of
from utils.distributed import describe_device
from utils.errors import UserError, shell_line, show, told_as
from utils.images import as_pictures, save_image
from utils.labels import NULL_LABEL

SHEET_IMAGES, SHEET_COLUMNS = 64, 8
CLASSES_NAMED = 5
MOST_SIGNAL = 0.05  # sqrt(a_T) above which noise is not where training ended (Lin et al. 2023)
DROPPED = "none"  # on the sheet: the class was left out, for guidance

log = logging.getLogger("diffusion")


def try_batch(job: Job, sheet: str | None) -> None:
    """Log the loss of the first batch, and draw it to the file `sheet`: the images as the model
    gets them, cropped, flipped, with their classes, and ordered by these. Trains nothing.

    Raises a UserError if the file cannot be written.
    """
    example = next(job.examples(0))
    with torch.no_grad():
        loss = job.process.loss(conditioned(job.model, example.planes), *example[:-1]).mean()
    log.info("dry run: one batch has loss %.4f; nothing was written", float(loss))
    if sheet is None or not job.runtime.is_main:
        return
    images = as_pictures(example.x_0[:SHEET_IMAGES], job.config.preview_channels).cpu()
    labels = [0] * len(images) if example.y is None else example.y[:SHEET_IMAGES].tolist()
    order = sorted(range(len(images)), key=labels.__getitem__)
    rows = [order[i : i + SHEET_COLUMNS] for i in range(0, len(order), SHEET_COLUMNS)]
    names = class_captions(labels, job.dataset.class_names)
    names = [DROPPED if label == NULL_LABEL else names[i] for i, label in enumerate(labels)]
    above = [] if example.y is None else [[names[i] for i in row] for row in rows]
    with told_as(UserError, f"--sheet {sheet}: cannot be written", OSError, ValueError):
        save_image(Path(sheet), contact_sheet(images, rows, above=above))
    log.info("the first %d images of it: %s", len(images), sheet)


def build_trainer(
    job: Job,
    learner: Learner,
    status: Status,
    *,
    best: BestScore,
    evaluate: Callable[[int, int], dict[str, float | None]] | None,
    preview: Callable[[int, int], tuple[torch.Tensor, torch.Tensor] | None] | None,
) -> Trainer:
    """Put the trainer together, and take it to the step where the run begins or goes on.

    `best` decides which model becomes best_model.pth; for `evaluate` and `preview` see `Trainer`.
    """
    config, runtime, resume = job.config, job.runtime, job.resume
    step, state = (0, {}) if resume is None else (resume.step, resume.state)
    tracker = start_trackers(config, is_main=runtime.is_main, start_step=step, earlier=state)
    folder, state = config.run_dir, fixed_state(job)
    saver = Saver(folder, config.keep_last, runtime, best=best, status=status, fixed_state=state)
    guard = NonFiniteGuard(config, job.dataset, runtime)
    trainer = Trainer(job, learner, saver, guard, tracker, evaluate, preview)
    if resume is not None:
        trainer.load_state_dict(resume.state)
        log.info("going on from %s, step %d", resume.path, resume.step)
    return trainer


def fixed_state(job: Job) -> dict[str, Any]:
    """Collect what every checkpoint of this run says about its origin. Plain types only."""
    backend, schedule, dataset = backend_of(job.model), job.schedule, job.dataset
    device = job.runtime.device
    versions = {"torch": str(torch.__version__), "numpy": str(np.__version__)}
    return {
        "format_version": FORMAT_VERSION,
        "config": job.config.to_dict(),
        "spec": list(dataset.spec),
        "class_names": list(dataset.class_names),
        "data_fingerprint": dataset.fingerprint,
        **({"values": list(dataset.values)} if dataset.values else {}),
        "backend": backend and list(backend),
        "extended_steps": schedule.total_steps if schedule.is_extension else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "world_size": job.runtime.world_size,
        "num_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions},
    }


def log_start(job: Job) -> None:
    """Log the first lines of a run: what is odd about its config, and what it consists of."""
    config, schedule, runtime, spec = job.config, job.schedule, job.runtime, job.dataset.spec
    epochs = max(config.epochs, schedule.epochs_done(schedule.total_steps))  # more if trained on
    for warning in warnings_of(config.model_copy(update={"epochs": epochs})):
        log.warning(warning)
    if config.channels_last and config.compile is None and runtime.device.type != "cpu":
        undone = "without compile a UNet's group norms undo the layout on a GPU, at a cost"
        log.warning(f"channels_last=True: {undone}; add compile=blocks, or leave it out")
    last = config.num_timesteps - 1
    if (share := job.process.levels(last)[0] / job.process.scale) > MOST_SIGNAL:
        start = f"sampling starts at noise, but t={last} keeps {share:.2f} of the image"
        log.warning(f"{start}; raise beta_end, or take beta_schedule='cosine'")
    device = f"{describe_device(runtime.device)}, {job.precision}"
    size = "x".join(map(str, spec.shape))
    names = job.dataset.class_names
    shown = show(", ".join(names[:CLASSES_NAMED])) + (", ..." if names[CLASSES_NAMED:] else "")
    classes = f"{spec.num_classes} classes ({shown})" if spec.num_classes else "unlabelled"
    used = "conditional" if config.conditional else "unconditional"
    used += f", condition {config.condition!r}" * (config.condition is not None)
    count = sum(p.numel() for p in job.model.parameters())
    trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    log.info(f"run:    {config.run_dir}")
    log.info(f"device: {device}, {runtime.world_size} process(es), torch {torch.__version__}")
    log.info(f"data:   {config.dataset}, {len(job.dataset)} images {size}, {classes}")
    for line in remarks_on(job.dataset) if runtime.is_main else ():
        log.warning(f"data:   {line}")
    log.info(f"model:  {config.model_type}, {count / 1e6:.2f} M parameters, {used}")
    if trained < count:
        part = f"{trained / 1e6:.3f} M of them, {100 * trained / count:.1f} %"
        log.info(f"lora:   rank {config.lora_rank}, trains {part}")
    count, accumulated = runtime.world_size, config.gradient_accumulation_steps
    unit, units = ("GPU", "GPUs") if runtime.device.type == "cuda" else ("process", "processes")
    parts = [f"{count} {units}"] if count > 1 else []
    parts += [str(accumulated)] if accumulated > 1 else []
    share = f"{config.batch_size // (count * accumulated)} per {unit}"
    size = f" ({' x '.join([share, *parts])})" if parts else ""
    steps = f"{schedule.total_steps} steps, {config.batch_size} images a step{size}"
    log.info(f"plan:   {steps}, {schedule.steps_per_epoch:.1f} steps per epoch")


def log_end(config: Config, given: tuple[object, ...] = ()) -> None:
    """Log the last lines of a run: where everything is, and what to do next. Where parts of other
    packages may have been found beside the config file, commands repeat what was `given`."""
    folder = config.run_dir
    by = config.eval_best_metric or "lowest smoothed loss"
    if (folder / BEST).is_file():
        log.info(f"done. best ({by}): {folder / BEST}, last: {folder / CURRENT}")
    else:
        log.info(f"done. {folder / CURRENT}; no best model: {by} had no value yet")
    texts = json.dumps(config.to_dict()).split('"')
    words = "--checkpoint", folder, *(given if any(map(PART.fullmatch, texts)) else ())
    log.info("next:   " + shell_line("python", "sample.py", *words))
    log.info("        " + shell_line("python", "evaluate.py", *words))
    log.info("        " + shell_line("python", "runs.py", "report", folder))
