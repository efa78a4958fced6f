"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from training.progress import Schedule
from utils.config import Config

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Make the config's optimizer, with fused kernels: a fraction of the per-tensor loop's time."""
    groups = parameter_groups(model, config)
    return OPTIMIZERS[config.optimizer](groups, lr=config.learning_rate, fused=True)


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """What the optimizer changes: frozen parameters are left out, and those that the model lists in
    `no_weight_decay()` are spared from `weight_decay`."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    decayed = [p for name, p in trained.items() if name not in spared]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}]
    if others := [p for name, p in trained.items() if name in spared]:
        groups.append({"params": others, "weight_decay": 0.0})
    return groups


def lr_factor(config: Config, schedule: Schedule, step: int) -> float:
    """The share of `learning_rate` that `step`, counted from 0, is taken with.

    `cosine` and `linear` go from 1 to 0 over all steps of the schedule; `step` multiplies by
    `gamma` every `step_size` epochs; `warmup_cosine` rises linearly from `warmup_start_factor`
    during `warmup_epochs`, then follows the cosine over what is left.
    """
    if not config.use_scheduler:
        return 1.0
    if config.scheduler_type == "step":
        return config.gamma ** (step / schedule.steps_per_epoch // config.step_size)
    if config.scheduler_type == "linear":
        return max(0.0, 1 - step / schedule.total_steps)
    warmup = 0.0
    if config.scheduler_type == "warmup_cosine":
        warmup = min(config.warmup_epochs * schedule.steps_per_epoch, schedule.total_steps)
    if step < warmup:
        return config.warmup_start_factor + (1 - config.warmup_start_factor) * step / warmup
    progress = (step - warmup) / max(1.0, schedule.total_steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, config: Config, schedule: Schedule
) -> LambdaLR:
    """Make what sets the learning rate of each step, see `lr_factor`."""
    # It counts steps that are left out because they are not finite; torch takes that for a mistake.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    return LambdaLR(optimizer, lambda step: lr_factor(config, schedule, step))
