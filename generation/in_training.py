"""What a training run draws and scores while it goes on: previews and evaluations."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from datasets import ImageDataset, default_flip, has_test_split
from datasets.conditions import condition_sheet, planes_at
from datasets.real import real_sets
from generation.evaluated import Setting
from generation.run import Run
from generation.sampling import Labels, gather_images, generate, sampling_from
from metrics import METRICS, check_metric_names
from metrics.base import Generated, Real
from metrics.evaluation import Evaluation
from metrics.report import summary
from training.job import Job
from training.saving import LOSS, VAL_LOSS, BestScore
from training.sharding import full_model
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import ConfigError
from utils.images import as_pictures, block_labels, grid_rows, make_grid, save_image
from utils.labels import requested_labels

PREVIEW_BATCH_SIZE, EVAL_BATCH_SIZE = 64, 128

log = logging.getLogger("diffusion")


def best_score(config: Config) -> BestScore:
    """What chooses best_model.pth: `eval_best_metric`, or the training loss."""
    metric = config.eval_best_metric
    lower = metric in (None, VAL_LOSS) or METRICS[metric].better == "lower"
    return BestScore(metric or LOSS, lower_is_better=lower)


def draw(run: Run, seeds: Sequence[int], labels: Labels, **options: Any) -> Iterator[Tensor]:
    """Sample as the config says, see `generate`, with the model whole. On every rank.

    The model stays in eval mode; the trainer puts it back.
    """
    whole, how = replace(run, model=full_model(run.model).eval()), sampling_from(run.config)
    return generate(whole, seeds, labels, sampling=how, **options)


def preview(
    run: Run, runtime: Runtime, epoch: int, step: int, images: ImageDataset | None = None
) -> tuple[Tensor, Tensor] | None:
    """Draw a grid, a row per class, and save it as samples/epoch_0001.png. On every rank.

    A model with a condition is given those of the first of `images`: a row is picture, what was
    drawn from it, and image. Returns on rank 0 the grid, uint8 (C, H, W), and what was drawn.
    """
    config, count, planes_of = run.config, run.config.num_samples, None
    labels = block_labels(count, run.classes) if config.conditional else None
    if config.condition:
        count = min(count, len(images))
        planes_of = partial(planes_at, config, images, range(count))
        labels = labels and images.labels[:count].tolist()
    options = dict(batch_size=PREVIEW_BATCH_SIZE, runtime=runtime, planes_of=planes_of)
    with runtime.all_or_none("sampling failed on another process"):
        parts = list(draw(run, range(count), labels, **options))
    drawn = gather_images(parts, run, runtime)
    if drawn is None:
        return None
    pictures = as_pictures(drawn, config.preview_channels)
    grid = make_grid(pictures, grid_rows(count, labels))
    if config.condition:
        targets = torch.stack([images[i][0] for i in range(count)])
        pairs = [pictures, as_pictures(targets, config.preview_channels)]
        grid = condition_sheet(planes_of(), config, pairs)
    path = config.preview_dir / f"epoch_{epoch:04d}.png"
    save_image(path, grid)
    log.info("preview: %s", path)
    return grid, drawn


def training_evaluation(job: Job) -> Evaluation | None:
    """The config's `eval_metrics` on `eval_num_samples` images; None without `eval_interval`.

    Raises a ConfigError if the metric that is to choose the best model cannot run here.
    """
    config, dataset, runtime = job.config, job.dataset, job.runtime
    if not config.eval_interval:
        return None
    count, labels, spec = config.eval_num_samples, None, dataset.spec
    split = "test" if config.condition and has_test_split(config) else "train"
    sets = real_sets(config, runtime, EVAL_BATCH_SIZE, split=split)
    if config.conditional and config.condition:
        labels = sets.reference.dataset.labels[sets.reference.at(range(count))].tolist()
    elif config.conditional:
        labels = requested_labels("balanced", count, spec.num_classes, classes=config.classes)
    made = dict(values=dataset.values, shown=config.preview_channels)
    evaluation = Evaluation(
        check_metric_names(config.eval_metrics),
        Generated(spec, count, labels, drawn_from=config.condition and config, **made),
        Real(sets, name=config.dataset, flip=default_flip(config)),
        runtime=runtime,
        cache_dir=config.run_dir / "eval",
    )
    log.info("every %d epochs an evaluation of %d images:", config.eval_interval, count)
    for line in evaluation.plan.lines():
        log.info("  %s", line)
    if (best := config.eval_best_metric) in evaluation.plan.skipped:
        reason = evaluation.plan.skipped[best]["reason"]
        raise ConfigError(f"eval_best_metric={best!r} cannot run: {reason}")
    return evaluation


def evaluate(
    evaluation: Evaluation, run: Run, runtime: Runtime, epoch: int, step: int
) -> dict[str, float | None]:
    """Metric name -> value, on every rank; writes eval/epoch_0001.json and .html."""
    config, generated = run.config, evaluation.generated
    setting, count = Setting(sampling_from(config), config.seed), generated.num_images
    seeds = range(config.seed, config.seed + count)
    facts = {"step": step, "epoch": epoch, "ema": run.ema, "n": count, **setting.facts()}
    pairs, options = evaluation.context.real.sets.reference, dict(batch_size=EVAL_BATCH_SIZE)
    options["planes_of"] = pairs.planes and partial(pairs.planes, pairs.at(range(count)))
    images = draw(run, seeds, generated.labels, runtime=runtime, **options)
    report = evaluation.score(images, facts=facts)
    values = None
    if report is not None:
        path = config.run_dir / "eval" / f"epoch_{epoch:04d}.json"
        log.info("%s\nreport: %s", summary(report), path.with_suffix(".html"))
        try:
            evaluation.save(path, report)
        except OSError as error:
            log.warning("%s: not written, %s", path, error)
        values = {name: entry["value"] for name, entry in report["metrics"].items()}
    return runtime.broadcast_object(values)
