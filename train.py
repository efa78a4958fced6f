"""Train a diffusion model from a config file.

python train.py --config configs/digits_unet.py
torchrun --standalone --nproc_per_node=2 train.py --config configs/digits_unet.py batch_size=256
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import datasets
import diffusion
import models
from datasets.loader import batches, global_indices, make_resident
from datasets.real import real_sets
from generation.run import CONFIG_CHECKS
from generation.sampling import Run, generate, sampling_from
from generation.sweep import settings_of
from metrics import METRICS, check_metric_names
from metrics.base import Generated, Real
from metrics.evaluation import Evaluation
from metrics.report import summary
from models.lora import add_adapters
from training.ema import EMA
from training.nonfinite import NonFiniteGuard
from training.objective import Example, timestep_quartiles, training_examples
from training.optim import build_lr_scheduler, build_optimizer, lr_factor
from training.pretrained import load_initial_weights
from training.resume import (
    check_backend,
    check_data,
    check_same_step,
    find_resume,
    plan_steps,
)
from training.run_dir import checkpoints_in, mark_complete, open_run_dir
from training.run_info import fixed_state, log_end, log_start
from training.saving import LOSS, BestScore
from training.schedule import Action
from training.sharding import check_processes, full_model, wrap_for_training
from training.tracking import TrackerGroup, check_trackers, start_trackers
from training.trainer import Trainer
from utils import images as pictures
from utils.captions import class_captions, contact_sheet
from utils.cli import new_parser, parse_args
from utils.config import Config, format_config, load_config
from utils.distributed import Runtime, distributed_runtime
from utils.errors import EXIT_OK, ConfigError, UserError, exit_code_of
from utils.images import ImageSpec, to_uint8
from utils.labels import NULL_LABEL, requested_labels
from utils.logs import setup_logging
from utils.precision import resolve_precision
from utils.rng import seed_everything

PREVIEW_BATCH_SIZE = 64
EVAL_BATCH_SIZE = 128
SHEET_IMAGES, SHEET_COLUMNS = 64, 8
DROPPED = "none"  # on the sheet: the class was left out, for guidance

log = logging.getLogger("diffusion")


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__ or "")
    parser.add_argument("--config", required=True, help="a .py, .yml or .yaml config file")
    parser.add_argument("--sheet", metavar="PNG", help="with --dry_run: draw the first batch there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(make_parser(), sys.argv[1:] if argv is None else argv)
    checks = (*CONFIG_CHECKS, check_processes, check_trackers)
    config = load_config(args.config, args.overrides, checks=checks)
    if args.print_config:
        print(format_config(config))
        return EXIT_OK
    if args.sheet and not args.dry_run:
        raise ConfigError(
            "--sheet draws a batch instead of training; give it together with --dry_run"
        )
    gpu_ids = config.gpu_ids if torch.cuda.is_available() else None
    with distributed_runtime(
        args.device,
        gpu_ids=gpu_ids,
        port=config.port,
        timeout_minutes=config.timeout_minutes,
    ) as runtime:
        setup_logging(is_main=runtime.is_main)
        if config.gpu_ids and gpu_ids is None:
            log.info("gpu_ids=%s: no CUDA here, ignored", list(config.gpu_ids))
        try:
            return train(config, runtime, dry_run=args.dry_run, sheet=args.sheet)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory on {runtime.device}; raise gradient_accumulation_steps (now "
                f"{config.gradient_accumulation_steps}), which keeps the result, or lower "
                f"batch_size (now {config.batch_size})"
            ) from error


def train(config: Config, runtime: Runtime, *, dry_run: bool, sheet: str | None = None) -> int:
    """Build everything the config names, and run it. Returns the exit code.

    Args:
        dry_run: one loss instead; nothing is written, but the first batch to `sheet`.
    """
    device = runtime.device
    precision = resolve_precision(config.precision, device)
    seen = checkpoints_in(config.run_dir)
    resume = find_resume(config)
    check_same_step(resume, runtime)
    with runtime.main_first():  # it may download
        dataset = datasets.build_dataset(config, "train")
    if resume is not None:
        check_data(resume, spec=dataset.spec, fingerprint=dataset.fingerprint)
    schedule = plan_steps(config, len(dataset), resume)
    if schedule is None:
        log.info("%s is complete, nothing is left to train", config.run_dir)
        if runtime.is_main and not dry_run:
            mark_complete(config.run_dir)
        return EXIT_OK

    seed_everything(config.seed)
    model = models.build_model(config, dataset.spec, device)
    if config.init_from is not None and resume is None:
        load_initial_weights(model, config, dataset.class_names)
    if config.lora_rank:
        add_adapters(model, config.lora_rank, config.lora_alpha)
    backend = models.backend_of(model)
    check_backend(resume, backend, runtime)
    process = diffusion.build_diffusion(config)
    resident = make_resident(
        dataset, device, resident=config.resident, num_workers=config.num_workers
    )
    examples = make_examples(config, resident, runtime)
    evaluation = None
    if config.eval_interval:
        evaluation = training_evaluation(config, dataset.spec, runtime)
    with contextlib.nullcontext() if dry_run else open_run_dir(config, runtime, seen) as status:
        log_start(
            config,
            runtime,
            spec=dataset.spec,
            num_images=len(dataset),
            model=model,
            schedule=schedule,
            precision=precision,
        )
        if dry_run:
            example = next(examples(0))
            with torch.no_grad():
                loss = process.loss(model, *example).mean()
            log.info("dry run: one batch has loss %.4f; nothing was written", float(loss))
            if sheet is not None and runtime.is_main:
                draw_sheet(Path(sheet), example, dataset.class_names)
            return EXIT_OK
        status.update(total_steps=schedule.total_steps)
        models.compile_model(model, config.compile)
        model, network = wrap_for_training(model, runtime, config.strategy, precision)
        ema = EMA(model, config.ema_decay) if config.use_ema else None
        optimizer = build_optimizer(model, config)
        factor = lr_factor(
            config, steps_per_epoch=schedule.steps_per_epoch, total_steps=schedule.total_steps
        )
        tracker = start_trackers(
            config,
            is_main=runtime.is_main,
            start_step=0 if resume is None else resume.step,
            run_id=None if resume is None else resume.state.get("tracker_run_id"),
        )
        run = Run(
            model if ema is None else ema.model, process, dataset.spec, config, ema=ema is not None
        )
        trainer = Trainer(
            model,
            network,
            lambda network, example: process.loss(network, *example),
            examples,
            optimizer=optimizer,
            lr_scheduler=build_lr_scheduler(optimizer, factor),
            ema=ema,
            precision=precision,
            schedule=schedule,
            runtime=runtime,
            tracker=tracker,
            config=config,
            extra_state=fixed_state(
                config,
                schedule,
                spec=dataset.spec,
                class_names=dataset.class_names,
                fingerprint=dataset.fingerprint,
                backend=backend,
                runtime=runtime,
            ),
            status=status,
            guard=make_guard(config, dataset, runtime),
            best=best_score(config),
            evaluate=evaluation and partial(evaluate, evaluation, run, runtime),
            actions=[
                Action(
                    "preview",
                    config.sample_interval,
                    config.sample_start_epoch,
                    partial(preview, run, runtime, tracker),
                )
            ],
            buckets=timestep_quartiles(config.num_timesteps),
        )
        if resume is not None:
            trainer.load_state_dict(resume.state)
            log.info("going on from %s, step %d", resume.path, resume.step)
        try:
            code = trainer.train()
        finally:
            tracker.finish()
        status.finish(code)
    if code == EXIT_OK:
        log_end(config)
    return code


def draw_sheet(path: Path, example: Example, class_names: Sequence[str]) -> None:
    """Images as the model gets them: cropped, flipped, with their classes, ordered by these.

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
        pictures.save_image(path, contact_sheet(images, rows, above=above))
    except (OSError, ValueError) as error:
        raise UserError(f"--sheet {path}: {error}") from error
    log.info("the first %d images of it: %s", len(images), path)


def best_score(config: Config) -> BestScore:
    """What chooses best_model.pth."""
    metric = config.eval_best_metric
    if metric is None:
        return BestScore(LOSS, lower_is_better=True)
    return BestScore(metric, lower_is_better=METRICS[metric].better == "lower")


def make_guard(config: Config, dataset: datasets.ImageDataset, runtime: Runtime) -> NonFiniteGuard:
    """Against steps that are not finite; it can say which images such a step saw."""

    def describe(step: int) -> dict[str, Any]:
        indices = next(
            global_indices(
                len(dataset), batch_size=config.batch_size, seed=config.seed, start_step=step
            )
        ).tolist()
        found: dict[str, Any] = {"step": step + 1, "indices": indices}
        if names := getattr(dataset, "names", None):
            found["names"] = [names[i] for i in indices]
        return found

    return NonFiniteGuard(
        config.max_nonfinite_steps if config.on_nonfinite == "skip" else 0,
        runtime.device,
        on_host=runtime.device.type != "cuda",  # there the host does not wait for each step
        describe=describe,
        folder=config.run_dir if runtime.is_main else None,
    )


def make_examples(
    config: Config, dataset: datasets.ImageDataset, runtime: Runtime
) -> Callable[[int], Iterator[Example]]:
    """start_step -> this rank's training examples from that step on."""
    share = runtime.share(config.batch_size)
    rows = slice(share.start, share.stop)

    def examples(start_step: int) -> Iterator[Example]:
        images = batches(
            dataset,
            batch_size=config.batch_size,
            seed=config.seed,
            device=runtime.device,
            rows=rows,
            horizontal_flip=datasets.default_flip(config),
            num_workers=config.num_workers,
            resident=config.resident,
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

    return examples


@contextlib.contextmanager
def evaluation_mode(run: Run) -> Iterator[Run]:
    """The run with its model whole and in eval mode. On every rank."""
    model = full_model(run.model)
    was_training = model.training
    model.eval()
    try:
        yield replace(run, model=model)
    finally:
        model.train(was_training)


def preview(run: Run, runtime: Runtime, tracker: TrackerGroup, epoch: int, step: int) -> None:
    """Sample a grid, a row per class, and save it as samples/epoch_0001.png. On every rank."""
    config = run.config
    count = config.num_samples
    labels = None
    if config.conditional:
        labels = pictures.block_labels(count, run.classes)
    images, error = torch.zeros((0, *run.spec.shape), dtype=torch.uint8), None
    try:
        with evaluation_mode(run) as whole:
            parts = generate(
                whole,
                range(count),
                labels,
                sampling=sampling_from(config),
                batch_size=PREVIEW_BATCH_SIZE,
                runtime=runtime,
            )
            images = torch.cat([images, *(part for part, _, _ in parts)])
    except Exception as failure:
        error = failure
    if runtime.any(error is not None):  # all ranks skip the gather, or none
        raise error or RuntimeError("sampling failed on another process")
    images = runtime.gather(images, count)
    if images is not None:
        grid = pictures.make_grid(images, pictures.grid_rows(count, labels))
        path = config.preview_dir / f"epoch_{epoch:04d}.png"
        pictures.save_image(path, grid)
        tracker.log_image("samples", grid, step)
        log.info("preview: %s", path)


def training_evaluation(config: Config, spec: ImageSpec, runtime: Runtime) -> Evaluation:
    """The config's `eval_metrics` on `eval_num_samples` images.

    Raises:
        ConfigError: the metric that is to choose the best model cannot run here.
    """
    count, folder = config.eval_num_samples, config.run_dir / "eval"
    labels = None
    if config.conditional:
        labels = requested_labels("balanced", count, spec.num_classes, classes=config.classes)
    evaluation = Evaluation(
        check_metric_names(config.eval_metrics),
        Generated(spec, count, labels),
        Real(
            real_sets(config, runtime, EVAL_BATCH_SIZE),
            name=config.dataset,
            flip=datasets.default_flip(config),
        ),
        runtime=runtime,
        cache_dir=folder,
    )
    log.info("every %d epochs an evaluation of %d images:", config.eval_interval, count)
    for line in evaluation.plan.lines():
        log.info("  %s", line)
    best = config.eval_best_metric
    if best in evaluation.plan.skipped:
        reason = evaluation.plan.skipped[best]["reason"]
        raise ConfigError(f"eval_best_metric={best!r} cannot run: {reason}")
    return evaluation


def evaluate(
    evaluation: Evaluation, run: Run, runtime: Runtime, epoch: int, step: int
) -> dict[str, float | None]:
    """Metric name -> value, on every rank; writes eval/epoch_0001.json and .html."""
    count = evaluation.generated.num_images
    setting = settings_of(run.config, count)[0]
    with evaluation_mode(run) as whole:
        images = generate(
            whole,
            range(setting.seed, setting.seed + count),
            evaluation.generated.labels,
            sampling=setting.sampling,
            batch_size=EVAL_BATCH_SIZE,
            runtime=runtime,
        )
        facts = {"step": step, "epoch": epoch, "ema": run.ema, "n": count, **setting.facts()}
        report = evaluation.score((batch for batch, _, _ in images), facts=facts)
    values = None
    if report is not None:
        path = run.config.run_dir / "eval" / f"epoch_{epoch:04d}.json"
        log.info("%s\nreport: %s", summary(report), path.with_suffix(".html"))
        try:
            evaluation.save(path, report)
        except OSError as error:
            log.warning("%s: not written, %s", path, error)
        values = {name: found["value"] for name, found in report["metrics"].items()}
    return runtime.broadcast_object(values)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
