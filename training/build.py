"""From a config to a run: data, model, process, trainer."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import datasets
import diffusion
import models
from datasets.loader import batches, global_indices, make_resident
from models.lora import add_adapters
from training.ema import EMA
from training.learner import Learner
from training.nonfinite import NonFiniteGuard
from training.objective import Example, timestep_quartiles, training_examples
from training.optim import build_lr_scheduler, build_optimizer, lr_factor
from training.pretrained import load_initial_weights
from training.progress import Schedule
from training.resume import (
    Resume,
    check_backend,
    check_data,
    check_same_step,
    find_resume,
    plan_steps,
)
from training.run_dir import Seen, Status, checkpoints_in
from training.saving import BestScore, Saver
from training.sharding import wrap_for_training
from training.tracking import start_trackers
from training.trainer import Objective, Trainer
from utils.captions import class_captions, contact_sheet
from utils.checkpoint import BEST, CURRENT, FORMAT_VERSION
from utils.config import Config, warnings_of
from utils.distributed import Runtime, describe_device
from utils.errors import UserError
from utils.images import save_image, to_uint8
from utils.labels import NULL_LABEL
from utils.precision import resolve_precision
from utils.rng import seed_everything

SHEET_IMAGES, SHEET_COLUMNS = 64, 8
DROPPED = "none"  # on the sheet: the class was left out, for guidance

log = logging.getLogger("diffusion")


@dataclass(frozen=True)
class Job:
    """What a config names, built as far as a dry run needs it."""

    config: Config
    runtime: Runtime
    precision: str  # resolved: fp32, bf16 or fp16
    seen: Seen  # the run's checkpoints when it was decided where to begin
    resume: Resume | None
    dataset: datasets.ImageDataset
    schedule: Schedule
    model: nn.Module
    process: diffusion.GaussianDiffusion
    examples: Callable[[int], Iterator[Example]]  # start_step -> this rank's examples from it on


def prepare(config: Config, runtime: Runtime) -> Job | None:
    """Build what the config names, and draw its weights. Writes nothing. On every rank.

    Returns:
        None where an automatically resumed run is complete already, which is said.

    Raises:
        UserError: what the config names is missing, or does not fit together.
    """
    device = runtime.device
    precision = resolve_precision(config.precision, device)
    seen = checkpoints_in(config.run_dir)
    resume = find_resume(config)
    check_same_step(resume, runtime)
    with runtime.main_first():  # it may download
        dataset = datasets.build_dataset(config, "train")
    check_data(resume, spec=dataset.spec, fingerprint=dataset.fingerprint)
    schedule = plan_steps(config, len(dataset), resume)
    if schedule is None:
        log.info("%s is complete, nothing is left to train", config.run_dir)
        return None

    seed_everything(config.seed)
    model = models.build_model(config, dataset.spec, device)
    if config.init_from is not None and resume is None:
        load_initial_weights(model, config, dataset.class_names)
    if config.lora_rank:
        add_adapters(model, config.lora_rank, config.lora_alpha)
    check_backend(resume, models.backend_of(model), runtime)
    process = diffusion.build_diffusion(config)
    resident = make_resident(
        dataset, device, resident=config.resident, num_workers=config.num_workers
    )
    examples = partial(examples_from, config, resident, runtime)
    return Job(
        config, runtime, precision, seen, resume, dataset, schedule, model, process, examples
    )


def examples_from(
    config: Config, dataset: datasets.ImageDataset, runtime: Runtime, start_step: int
) -> Iterator[Example]:
    """Yield this rank's training examples, one a step, from `start_step` on, without end."""
    share = runtime.share(config.batch_size)
    rows = slice(share.start, share.stop)
    images = batches(
        dataset,
        batch_size=config.batch_size,
        seed=config.seed,
        device=runtime.device,
        rows=rows,
        horizontal_flip=datasets.default_flip(config),
        num_workers=config.num_workers,
        start_step=start_step,
    )
    return training_examples(
        images,
        num_timesteps=config.num_timesteps,
        batch_size=config.batch_size,
        rows=rows,
        seed=config.seed,
        conditional=config.conditional,
        label_dropout=config.label_dropout,
        start_step=start_step,
    )


def try_batch(job: Job, sheet: Path | None) -> None:
    """Log the loss of the first batch, and draw that batch to `sheet`. Trains nothing.

    Raises:
        UserError: `sheet` cannot be written.
    """
    example = next(job.examples(0))
    with torch.no_grad():
        loss = job.process.loss(job.model, *example).mean()
    log.info("dry run: one batch has loss %.4f; nothing was written", float(loss))
    if sheet is not None and job.runtime.is_main:
        draw_sheet(sheet, example, job.dataset.class_names)


def draw_sheet(path: Path, example: Example, class_names: Sequence[str]) -> None:
    """Draw images as the model gets them, cropped, flipped, with their classes, ordered by these.

    Raises:
        UserError: the file cannot be written.
    """
    images = to_uint8(example.x_0[:SHEET_IMAGES]).cpu()
    labels = [0] * len(images) if example.y is None else example.y[:SHEET_IMAGES].tolist()
    order = sorted(range(len(images)), key=labels.__getitem__)
    rows = [order[i : i + SHEET_COLUMNS] for i in range(0, len(order), SHEET_COLUMNS)]
    names = class_captions(labels, class_names)
    names = [DROPPED if label == NULL_LABEL else names[i] for i, label in enumerate(labels)]
    above = [] if example.y is None else [[names[i] for i in row] for row in rows]
    try:
        save_image(path, contact_sheet(images, rows, above=above))
    except (OSError, ValueError) as error:
        raise UserError(f"--sheet {path}: {error}") from error
    log.info("the first %d images of it: %s", len(images), path)


def build_learner(job: Job) -> Learner:
    """Compile the model, share it among the processes, and give it its optimizer and average."""
    config, schedule = job.config, job.schedule
    models.compile_model(job.model, config.compile)
    model, network = wrap_for_training(job.model, job.runtime, config.strategy, job.precision)
    optimizer = build_optimizer(model, config)
    factor = lr_factor(
        config, steps_per_epoch=schedule.steps_per_epoch, total_steps=schedule.total_steps
    )
    return Learner(
        model,
        network,
        optimizer,
        lr_scheduler=build_lr_scheduler(optimizer, factor),
        ema=EMA(model, config.ema_decay) if config.use_ema else None,
        precision=job.precision,
    )


def build_trainer(
    job: Job,
    learner: Learner,
    status: Status,
    *,
    best: BestScore,
    evaluate: Callable[[int, int], dict[str, float | None]] | None,
    preview: Callable[[int, int], torch.Tensor | None],
) -> Trainer:
    """Put the trainer together, and take it to the step where the run begins or goes on.

    Args:
        best: decides which model becomes best_model.pth.
        evaluate, preview: what is done at the ends of epochs, see `Trainer`.
    """
    config, runtime, resume = job.config, job.runtime, job.resume
    tracker = start_trackers(
        config,
        is_main=runtime.is_main,
        start_step=0 if resume is None else resume.step,
        run_id=None if resume is None else resume.state.get("tracker_run_id"),
    )
    folder, state = config.run_dir, fixed_state(job)
    saver = Saver(folder, config.keep_last, runtime, best=best, status=status, fixed_state=state)
    trainer = Trainer(
        learner,
        Objective(
            lambda network, example: job.process.loss(network, *example),
            job.examples,
            timestep_quartiles(config.num_timesteps),
        ),
        schedule=job.schedule,
        config=config,
        runtime=runtime,
        tracker=tracker,
        guard=make_guard(config, job.dataset, runtime),
        saver=saver,
        evaluate=evaluate,
        preview=preview,
    )
    if resume is not None:
        trainer.load_state_dict(resume.state)
        log.info("going on from %s, step %d", resume.path, resume.step)
    return trainer


def make_guard(config: Config, dataset: datasets.ImageDataset, runtime: Runtime) -> NonFiniteGuard:
    """Make the guard against steps that are not finite; it can say which images they saw."""
    return NonFiniteGuard(
        config.max_nonfinite_steps if config.on_nonfinite == "skip" else 0,
        runtime.device,
        on_host=runtime.device.type != "cuda",  # there the host does not wait for each step
        describe=partial(describe_batch, config, dataset),
        folder=config.run_dir if runtime.is_main else None,
    )


def describe_batch(config: Config, dataset: datasets.ImageDataset, step: int) -> dict[str, Any]:
    """Say which images optimizer step `step`, counted from 0, is made of."""
    steps = global_indices(
        len(dataset), batch_size=config.batch_size, seed=config.seed, start_step=step
    )
    indices = next(steps).tolist()
    description: dict[str, Any] = {"step": step + 1, "indices": indices}
    if names := getattr(dataset, "names", None):
        description["names"] = [names[i] for i in indices]
    return description


def fixed_state(job: Job) -> dict[str, Any]:
    """Collect what every checkpoint of this run says about its origin. Plain types only."""
    backend, schedule, dataset = models.backend_of(job.model), job.schedule, job.dataset
    return {
        "format_version": FORMAT_VERSION,
        "config": job.config.to_dict(),
        "spec": list(dataset.spec),
        "class_names": list(dataset.class_names),
        "data_fingerprint": dataset.fingerprint,
        "backend": backend and list(backend),
        "extended_steps": schedule.total_steps if schedule.is_extension else None,
        "world_size": job.runtime.world_size,
        "num_threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": str(np.__version__),
        },
    }


def log_start(job: Job) -> None:
    """Log the first lines of a run: what is odd about its config, and what it consists of."""
    config, schedule, runtime, spec = job.config, job.schedule, job.runtime, job.dataset.spec
    for warning in warnings_of(config):
        log.warning(warning)
    device = f"{describe_device(runtime.device)}, {job.precision}"
    size = "x".join(map(str, spec.shape))
    classes = f"{spec.num_classes} classes" if spec.num_classes else "unlabelled"
    used = "conditional" if config.conditional else "unconditional"
    count = sum(p.numel() for p in job.model.parameters())
    trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    log.info(f"run:    {config.run_dir}")
    log.info(f"device: {device}, {runtime.world_size} process(es), torch {torch.__version__}")
    log.info(f"data:   {config.dataset}, {len(job.dataset)} images {size}, {classes}")
    log.info(f"model:  {config.model_type}, {count / 1e6:.2f} M parameters, {used}")
    if trained < count:
        part = f"{trained / 1e6:.3f} M of them, {100 * trained / count:.1f} %"
        log.info(f"lora:   rank {config.lora_rank}, trains {part}")
    steps = f"{schedule.total_steps} steps of {schedule.batch_size} images"
    log.info(f"plan:   {steps}, {schedule.steps_per_epoch:.1f} steps per epoch")


def log_end(config: Config) -> None:
    """Log the last lines of a run: where everything is, and what to do next."""
    folder = config.run_dir
    by = config.eval_best_metric or "lowest smoothed loss"
    if (folder / BEST).is_file():
        log.info(f"done. best ({by}): {folder / BEST}, last: {folder / CURRENT}")
    else:
        log.info(f"done. {folder / CURRENT}; no best model: {by} had no value yet")
    log.info(f"next:   python sample.py --checkpoint {folder}")
    log.info(f"        python evaluate.py --checkpoint {folder}")
    log.info(f"        python runs.py report {folder}")
