"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import nn

from utils.config import Config

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Make the config's optimizer, with fused kernels: a fraction of the per-tensor loop's time.

    Frozen parameters are left out. Those that the model lists in `no_weight_decay()` are spared
    from `weight_decay`.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    decayed = [p for name, p in trained.items() if name not in spared]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}]
    if others := [p for name, p in trained.items() if name in spared]:
        groups.append({"params": others, "weight_decay": 0.0})
    return OPTIMIZERS[config.optimizer](groups, lr=config.learning_rate, fused=True)


def lr_factor(
    config: Config, *, steps_per_epoch: float, total_steps: int
) -> Callable[[int], float]:
    """Make the function from n, counted from 0, to the share of `learning_rate` of step n.

    `cosine` and `linear` go from 1 to 0 over `total_steps`; `step` multiplies by `gamma` every
    `step_size` epochs; `warmup_cosine` rises linearly from `warmup_start_factor` during
    `warmup_epochs`, then follows the cosine over what is left.
    """
    if not config.use_scheduler:
        return lambda step: 1.0
    if config.scheduler_type == "step":
        return lambda step: config.gamma ** (step / steps_per_epoch // config.step_size)
    if config.scheduler_type == "linear":
        return lambda step: max(0.0, 1 - step / total_steps)

    warmup = 0.0
    if config.scheduler_type == "warmup_cosine":
        warmup = min(config.warmup_epochs * steps_per_epoch, total_steps)

    def cosine(step: int) -> float:
        if step < warmup:
            start = config.warmup_start_factor
            return start + (1 - start) * step / warmup
        progress = (step - warmup) / max(1.0, total_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return cosine


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, factor: Callable[[int], float]
) -> torch.optim.lr_scheduler.LambdaLR:
    """Make what sets the learning rate of each step to `factor` of the base rate."""
    # It counts steps that are left out because they are not finite; torch takes that for a mistake.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
