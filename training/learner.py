"""What is trained: a model with its optimizer, its learning rate and its average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from training.ema import EMA
from training.sharding import load_model_state, load_optimizer_state


@dataclass
class Learner:
    """All that optimizer steps change.

    Args:
        model: the bare module; its parameters, or slices of them, are trained and saved.
        network: what to call: `model`, or its wrapper that averages gradients over ranks.
        ema: the average of the weights; None for none.
        precision: resolved: fp32, bf16 or fp16.
    """

    model: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    ema: EMA | None
    precision: str

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        device_type = self.parameters[0].device.type
        self.scaler = torch.amp.GradScaler(device_type, enabled=self.precision == "fp16")

    @property
    def sampled_model(self) -> nn.Module:
        """The model to draw images with: the average, if there is one."""
        return self.model if self.ema is None else self.ema.model

    def state_dict(self) -> dict[str, Any]:
        """What training needs; of a sharded model, this rank's slices. The average is apart."""
        return {
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.lr_scheduler.state_dict(),
            "scaler_state_dict": self.scaler.state_dict(),
        }

    def average_state_dict(self) -> dict[str, Any]:
        """What sampling prefers, and needs alone; empty without an average."""
        if self.ema is None:
            return {}
        return {
            "ema_model_state_dict": self.ema.model.state_dict(),
            "ema_num_updates": self.ema.num_updates,
        }

    def load_state_dict(self, state: dict[str, Any], learning_rate: float) -> None:
        """Continue from a checkpoint. Learning rate, decay and schedule follow the config.

        Args:
            learning_rate: the config's, before the schedule's factor.
        """
        load_model_state(self.model, state["model_state_dict"])
        groups = self.optimizer.param_groups
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        load_optimizer_state(self.optimizer, state["optimizer_state_dict"])
        self.lr_scheduler.last_epoch = state["step"]
        factor = self.lr_scheduler.lr_lambdas[0](state["step"])
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)
            group["lr"] = learning_rate * factor
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        if state["scaler_state_dict"]:  # empty unless that run was in fp16
            self.scaler.load_state_dict(state["scaler_state_dict"])
        if self.ema is not None:
            load_model_state(self.ema.model, state["ema_model_state_dict"])
            self.ema.num_updates = state["ema_num_updates"]
