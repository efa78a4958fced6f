"""What a run says about itself: its first and last lines, and what its checkpoints carry."""

from __future__ import annotations

import logging
import platform
from typing import Any

import numpy as np
import torch
from torch import nn

from training.schedule import Schedule
from utils.checkpoint import BEST, CURRENT, FORMAT_VERSION
from utils.config import Config, warnings_of
from utils.distributed import Runtime, describe_device
from utils.images import ImageSpec

log = logging.getLogger("diffusion")


def fixed_state(
    config: Config,
    schedule: Schedule,
    *,
    spec: ImageSpec,
    class_names: tuple[str, ...],
    fingerprint: str,
    backend: tuple[str, str] | None,
    runtime: Runtime,
) -> dict[str, Any]:
    """What every checkpoint of this run says about where it came from. Plain types only."""
    return {
        "format_version": FORMAT_VERSION,
        "config": config.to_dict(),
        "spec": list(spec),
        "class_names": list(class_names),
        "data_fingerprint": fingerprint,
        "backend": backend and list(backend),
        "extended_steps": schedule.total_steps if schedule.is_extension else None,
        "world_size": runtime.world_size,
        "num_threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": str(np.__version__),
        },
    }


def log_start(
    config: Config,
    runtime: Runtime,
    *,
    spec: ImageSpec,
    num_images: int,
    model: nn.Module,
    schedule: Schedule,
    precision: str,
) -> None:
    """The first lines of a run."""
    for warning in warnings_of(config):
        log.warning("%s", warning)
    classes = f"{spec.num_classes} classes" if spec.num_classes else "unlabelled"
    used = "conditional" if config.conditional else "unconditional"
    log.info("run:    %s", config.run_dir)
    log.info(
        "device: %s, %s, %d process(es), torch %s",
        describe_device(runtime.device),
        precision,
        runtime.world_size,
        torch.__version__,
    )
    log.info("data:   %s, %d images %dx%dx%d, %s", config.dataset, num_images, *spec.shape, classes)
    num_parameters = sum(p.numel() for p in model.parameters())
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info("model:  %s, %.2f M parameters, %s", config.model_type, num_parameters / 1e6, used)
    if num_trained < num_parameters:
        log.info(
            "lora:   rank %d, trains %.3f M of them, %.1f %%",
            config.lora_rank,
            num_trained / 1e6,
            100 * num_trained / num_parameters,
        )
    log.info(
        "plan:   %d steps of %d images, %.1f steps per epoch",
        schedule.total_steps,
        schedule.batch_size,
        schedule.steps_per_epoch,
    )


def log_end(config: Config) -> None:
    """The last lines of a run: where everything is, and what to do next."""
    folder = config.run_dir
    by = config.eval_best_metric or "lowest smoothed loss"
    if (folder / BEST).is_file():
        log.info("done. best (%s): %s, last: %s", by, folder / BEST, folder / CURRENT)
    else:
        log.info("done. %s; no best model: %s had no value yet", folder / CURRENT, by)
    log.info("next:   python sample.py --checkpoint %s", folder)
    log.info("        python evaluate.py --checkpoint %s", folder)
    log.info("        python runs.py report %s", folder)
