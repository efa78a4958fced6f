"""What is trained: a model with its optimizer, its learning rate and its average."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models import compile_model, usable_mode
from training.ema import EMA, WIDTHS
from training.job import Job
from training.optim import KEYS, OPTIMIZERS, build_lr_scheduler, build_optimizer
from training.sharding import load_model_state, load_optimizer_state, slice_as, wrap_for_training


class Learner:
    """All that optimizer steps change: the job's model, compiled and shared among the processes.

    `model` is the bare module, whose parameters, or slices of them, are trained and saved;
    `network` is what to call: `model`, or its wrapper that averages gradients over the ranks.
    """

    def __init__(self, job: Job) -> None:
        config, self.precision = job.config, job.precision
        obstacles = {
            # PyTorch has open faults with graphs under DDP (pytorch#140395)
            "several processes": job.runtime.world_size > 1,
            # gradients stay in the graphs' memory, which the next micro-batch overwrites
            "gradient_accumulation_steps": config.gradient_accumulation_steps > 1,
            # recomputed blocks free their inputs in another order than was recorded
            "activation_checkpointing": getattr(job.model, "activation_checkpointing", False),
        }
        mode = usable_mode(config.compile, job.runtime.device, obstacles)
        compile_model(job.model, mode)
        self.model, self.network = wrap_for_training(
            job.model, job.runtime, config.strategy, job.precision
        )
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.model, config)
        self.lr_scheduler = build_lr_scheduler(self.optimizer, config, job.schedule)
        widths = WIDTHS if config.ema_snapshots else ()
        self.ema = EMA(self.model, config.ema_decay, widths) if config.use_ema else None
        if self.ema is not None and config.eval_interval:
            # A copy of a compiled model is not compiled; for previews alone it need not be.
            compile_model(self.ema.model, mode)
        is_fp16 = self.precision == "fp16"
        self.scaler = torch.amp.GradScaler(job.runtime.device.type, enabled=is_fp16)

    @property
    def sampled_model(self) -> nn.Module:
        """The model to draw images with: the average, if there is one."""
        return self.model if self.ema is None else self.ema.model

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint holds but the average; of a sharded model, this rank's slices."""
        return {
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.lr_scheduler.state_dict(),
            "scaler_state_dict": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. Learning rate, decay and schedule follow the config."""
        load_model_state(self.model, state["model_state_dict"])
        groups = self.optimizer.param_groups
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        if type(self.optimizer) not in OPTIMIZERS.values():  # it may keep a part of its state there
            settings = [{k: v for k, v in setting.items() if k in KEYS} for setting in settings]
        load_optimizer_state(self.optimizer, state["optimizer_state_dict"])
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        self.lr_scheduler.last_epoch = state["step"] - 1
        self.lr_scheduler.step()
        if state["scaler_state_dict"]:  # empty unless that run was in fp16
            self.scaler.load_state_dict(state["scaler_state_dict"])
        if self.ema is not None:
            load_model_state(self.ema.model, state["ema_model_state_dict"])
            self.ema.num_updates = state["ema_num_updates"]
            self.ema.snapshots = dict(state.get("ema_snapshots", {}))
            for width, average in self.ema.averages.items():
                for name, own in average.items():
                    own.copy_(slice_as(own, state["ema_averages"][width][name]))
