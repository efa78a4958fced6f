"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import inspect
import io
import math
import warnings
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from training.progress import Schedule
from training.sharding import load_optimizer_state
from utils.config import Config, Parts
from utils.errors import ConfigError, told_as

MUON = "muon"
KEYS = {"betas": "adam_betas", "weight_decay": "weight_decay"}  # an optimizer's name of the key


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the first of `groups`, AdamW with these options for the others.
    Muon's steps have the root mean square of AdamW's, so that one `lr` and one weight decay serve
    both: those of a matrix (m, n) are scaled by 0.2 sqrt(max(m, n)), arXiv 2502.16982, eq. 4."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, **options: Any) -> None:
        matrices = torch.optim.Muon(groups[:1], lr=lr, adjust_lr_fn="match_rms_adamw")
        self._parts = matrices, torch.optim.AdamW(groups[1:], lr=lr, **options)
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    def step(self, closure: None = None) -> None:
        """Take a step with both; there is no `closure`."""
        groups = self.param_groups  # which, like the state, loading a checkpoint replaces
        for part, own in zip(self._parts, (groups[:1], groups[1:]), strict=True):
            part.param_groups, part.state = own, self.state
            part.step()


FUSED = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
OPTIMIZERS = Parts({**FUSED, MUON: MuonAdamW}, lambda part: part)


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Make the config's optimizer, with fused kernels: a fraction of the per-tensor loop's time.
    One of another package gets `betas` and `weight_decay` if its signature has them, or if they are
    no defaults, which is an error then."""
    groups, make = parameter_groups(model, config), OPTIMIZERS[config.optimizer]
    given = {name: getattr(config, key) for name, key in KEYS.items()}
    if ":" not in config.optimizer:
        return make(groups, lr=config.learning_rate, fused=True, **given)
    known, usual = inspect.signature(make).parameters, Config()
    taken = {n: x for n, x in given.items() if n in known or x != getattr(usual, KEYS[n])}
    return make(groups, lr=config.learning_rate, **taken)


def try_optimizer(model: nn.Module, config: Config) -> None:
    """Raise a ConfigError where the optimizer is not for this model or, being of another package,
    cannot take a step, or go on from a checkpoint, which has tensors and plain types alone."""
    parameter_groups(model, config)
    if ":" not in config.optimizer:
        return
    layer, file = nn.Linear(2, 2, device=next(model.parameters()).device), io.BytesIO()
    fault = f"optimizer={config.optimizer} cannot take a step and go on from a checkpoint of it"
    with told_as(ConfigError, fault):  # by a stranger's code
        build_optimizer(model, config)
        optimizer = build_optimizer(layer, config)
        LambdaLR(optimizer, lambda _: 1.0)
        layer(layer.weight).sum().backward()
        optimizer.step()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        load_optimizer_state(optimizer, torch.load(file, weights_only=True))


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """What the optimizer changes: frozen parameters are left out, and those that the model lists in
    `no_weight_decay()` are spared from `weight_decay`.

    Under Muon the first group is its matrices: the two-dimensional weights in the model's `blocks`
    that see tokens; modulations see one vector an image. A ConfigError if there are none.
    """
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    matrices, decayed, others = [], [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            of_tokens = name.startswith("blocks.") and ".modulation." not in name
            is_weight = name.endswith(".weight") and p.ndim == 2  # else a table, say, or decays
            is_matrix = config.optimizer == MUON and of_tokens and is_weight
            (others if name in spared else matrices if is_matrix else decayed).append(p)
    if config.optimizer == MUON and not matrices:
        fault = f"optimizer='muon' trains matrices in blocks, and {config.model_type} has none"
        raise ConfigError(f"{fault}; use optimizer='adamw', or model_type dit, jit or dim")
    groups = [{"params": part, "weight_decay": config.weight_decay} for part in (matrices, decayed)]
    groups.append({"params": others, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


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
