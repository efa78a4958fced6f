"""The training loop and nothing else. What it trains, on what, and where results go is given."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.ema import EMA
from training.nonfinite import NonFiniteGuard
from training.progress import Buckets, LossStats, Progress, memory_mib
from training.run_dir import Status
from training.saving import LOSS, BestScore, Saver
from training.schedule import Action, Schedule
from training.sharding import (
    full_state,
    full_tensor,
    load_model_state,
    load_optimizer_state,
    no_gradient_sync,
)
from training.signals import StopSignal
from training.tracking import TrackerGroup
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import EXIT_FAILURE, EXIT_OK, EXIT_PREEMPTED, UserError
from utils.precision import autocast
from utils.rng import Stream, derive_seed

log = logging.getLogger("diffusion")

LossFn = Callable[[nn.Module, tuple[Tensor | None, ...]], Tensor]


class Trainer:
    """Runs optimizer steps until `schedule.total_steps`.

    Args:
        model: the bare module; its parameters, or slices of them, are trained and saved.
        network: what to call: `model`, or its wrapper that averages gradients over ranks.
        loss_fn: (network, example) -> (b,) losses of the example's b rows.
        batches: start_step -> iterator over examples, tuples of tensors with equal first
            dimension: this rank's rows, a fresh iterator at any step.
        ema: None for none.
        precision: resolved: fp32, bf16 or fp16.
        extra_state: plain values that every checkpoint carries (config, spec, versions).
        status: told of every checkpoint.
        guard: keeps steps that are not finite from the weights.
        best: which model becomes best_model.pth.
        evaluate: (epoch, step) -> metric name -> value, the same on every rank; every
            `eval_interval` epochs.
        actions: run at epoch ends. One that raises is a warning.
        buckets: parts of the examples whose loss is logged on its own.
    """

    def __init__(
        self,
        model: nn.Module,
        network: nn.Module,
        loss_fn: LossFn,
        batches: Callable[[int], Iterator[tuple[Tensor | None, ...]]],
        *,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LambdaLR,
        ema: EMA | None,
        precision: str,
        schedule: Schedule,
        runtime: Runtime,
        tracker: TrackerGroup,
        config: Config,
        extra_state: dict[str, Any],
        status: Status,
        guard: NonFiniteGuard,
        best: BestScore,
        evaluate: Callable[[int, int], dict[str, float | None]] | None = None,
        actions: Sequence[Action] = (),
        buckets: Buckets | None = None,
    ) -> None:
        self.model, self.network, self.loss_fn, self.batches = model, network, loss_fn, batches
        self.optimizer, self.lr_scheduler, self.ema = optimizer, lr_scheduler, ema
        self.precision, self.schedule, self.runtime = precision, schedule, runtime
        self.tracker, self.config, self.actions = tracker, config, actions
        self.extra_state, self.evaluate, self.buckets = extra_state, evaluate, buckets
        self.status, self.guard, self.best = status, guard, best
        self.saver = Saver(config.run_dir, config.keep_last, runtime, self._tell_status)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=precision == "fp16")
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.step = 0
        self.best_loss = math.inf
        self._best_before: tuple[float | None, float] = None, math.inf  # the last save
        self._loss = LossStats(runtime.device, buckets.names if buckets else ())
        self._grad_norm = torch.zeros((), device=runtime.device)

    def train(self) -> int:
        """Train to the end, or to a signal that asks to stop. Returns the exit code.

        Raises:
            NonFiniteError: before the step that would have spoilt the weights.
        """
        self.network.train()
        batches = self.batches(self.step)
        on_cpu = self.runtime.device.type == "cpu"
        progress = Progress(self.schedule, self.step, is_main=self.runtime.is_main, on_cpu=on_cpu)
        with StopSignal() as stop, contextlib.closing(progress), contextlib.closing(self.saver):
            while self.step < self.schedule.total_steps:
                if self.runtime.any(stop.name is not None):
                    return self._stop_early(stop.name)
                self._train_step(next(batches))
                self.step += 1
                progress.advance()
                if self.step % self.config.log_interval == 0 or self.step == 1:
                    self._log(progress)
                with progress.pause():
                    self._end_of_step()
            self._settle()
            if self.saver.last_step != self.step and not self._save_now():
                raise UserError(
                    f"trained to step {self.step}, but it could not be saved; last checkpoint: "
                    f"{self.saver.describe_last()}"
                )
        return EXIT_OK

    def _train_step(self, example: tuple[Tensor | None, ...]) -> None:
        num_parts = self.config.gradient_accumulation_steps
        device, rank = self.runtime.device, self.runtime.rank
        parts = [() for _ in range(num_parts)]
        for tensor in example:
            chunks = [None] * num_parts if tensor is None else tensor.chunk(num_parts)
            parts = [(*part, chunk) for part, chunk in zip(parts, chunks, strict=True)]
        loss_sum, losses = torch.zeros((), device=device), []
        for i, part in enumerate(parts):
            # dropout draws from the global generator: key it by this step and these rows
            shard = rank * num_parts + i
            torch.manual_seed(derive_seed(self.config.seed, Stream.MODEL_DROPOUT, self.step, shard))
            is_last = i == num_parts - 1
            with contextlib.nullcontext() if is_last else no_gradient_sync(self.network):
                with autocast(self.precision, device):
                    per_example = self.loss_fn(self.network, part)
                    loss = per_example.mean() / num_parts
                # A loss that is not finite makes all gradients NaN, so every rank hears of it.
                seed = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
                self.scaler.scale(loss).backward(seed)
            loss_sum += loss.detach()
            losses.append(per_example.detach())
        self._optimizer_step(loss_sum)
        bucket = self.buckets and self.buckets.index_of(example)
        self._loss.add(loss_sum, torch.cat(losses), bucket)

    def _optimizer_step(self, loss: Tensor) -> None:
        self.scaler.unscale_(self.optimizer)
        limit = self.config.grad_clip or math.inf
        self._grad_norm = full_tensor(nn.utils.clip_grad_norm_(self.parameters, limit))
        # The norm is that of the averaged gradients, so all ranks agree on it. fp16 overflow is
        # the scaler's business; there only the loss counts, of all ranks.
        watched = self._grad_norm
        if self.scaler.is_enabled():
            watched = self.runtime.all_reduce(loss.clone())
        skip = self.guard.add(torch.isfinite(watched), self.step)
        if self.guard.on_host:
            self.guard.read(self.saver.describe_last())
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # leaves out what overflowed
            self.scaler.update()
        elif not self.guard.on_host:
            self.optimizer.found_inf = skip  # fused kernels leave out the step on the device
            self.optimizer.step()
        elif not skip:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.update(self.model)

    def _log(self, progress: Progress) -> None:
        self.guard.read(self.saver.describe_last())
        smoothed, loss, of_buckets = self._loss.read(self.runtime)
        self._loss.start_window()
        scalars = {
            "epoch": self.step / self.schedule.steps_per_epoch,
            "train/loss": loss,
            "train/loss_smoothed": smoothed,
            **of_buckets,
            "train/lr": self.lr_scheduler.get_last_lr()[0],
            "train/grad_norm": float(self._grad_norm),
            "train/images_per_sec": progress.lap(self.step),
            "train/memory_mib": memory_mib(self.runtime.device),
        }
        self.tracker.log_scalars(scalars, self.step)
        progress.report(self.step, scalars)

    def _end_of_step(self) -> None:
        """Evaluation, checkpoint and actions of the epochs this step completed."""
        epoch, config = self.schedule.epochs_done(self.step), self.config
        score = None
        if self.evaluate is not None and self._is_due(config.eval_interval):
            score = self._evaluate(epoch)
        is_due = self._is_due(config.save_interval)
        if is_due or self.best.is_beaten_by(score):
            self.save(epoch if is_due else None, score=score)
        for action in self.actions:
            if self.schedule.is_due(self.step, action.interval, action.start):
                try:
                    action.run(epoch, self.step)
                except Exception as error:
                    log.warning("%s failed after epoch %d: %s", action.name, epoch, error)
                self.network.train()

    def _is_due(self, interval: int) -> bool:
        return self.schedule.is_due(self.step, interval, interval)

    def _evaluate(self, epoch: int) -> float | None:
        """Log the values; returns the one that chooses the best model."""
        self.guard.read(self.saver.describe_last())
        values: dict[str, float | None] = {}
        try:
            values = self.evaluate(epoch, self.step)
        except Exception as error:
            log.warning("evaluation failed after epoch %d: %s", epoch, error)
        finally:
            self.network.train()
        known = {f"eval/{name}": value for name, value in values.items() if value is not None}
        if known:
            self.tracker.log_scalars(known, self.step)
        return values.get(self.best.metric)

    def _stop_early(self, signal_name: str | None) -> int:
        why = signal_name or "another process's signal"
        log.info("%s: stopping at step %d: saving", why, self.step)
        if not self._save_now():
            return EXIT_FAILURE
        self.status.update(signal=signal_name)
        log.info("saved; go on with resume_path=auto")
        return EXIT_PREEMPTED

    def save(self, epoch: int | None = None, *, score: float | None = None) -> None:
        """Begin to write a checkpoint, see `Saver`.

        Args:
            score: of this model, where a metric chooses the best one; else the loss does.
        """
        self._settle()
        self.guard.read(self.saver.describe_last())
        self._loss.share(self.runtime)
        smoothed, *_ = self._loss.read(self.runtime)
        if self.best.metric == LOSS:
            score = smoothed
        self._best_before = self.best.value, self.best_loss
        is_best = self.best.is_beaten_by(score)
        if is_best:
            self.best.value = score
        self.best_loss = min(smoothed, self.best_loss)
        self.saver.start(self.state_dict(), epoch=epoch, is_best=is_best)

    def _settle(self) -> bool:
        """Wait for the checkpoint that was begun; returns False if it is not on disk."""
        if self.saver.settle() is False:
            self.best.value, self.best_loss = self._best_before
            return False
        return True

    def _save_now(self) -> bool:
        self.save()
        return self._settle()

    def _tell_status(self, state: dict[str, Any]) -> None:
        self.status.update(step=state["step"], epoch=state["epoch"], best=self.best.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs; data order and noise follow from `step`. A collective."""
        state = {
            **self.extra_state,
            "epoch": self.schedule.epochs_done(self.step),
            "step": self.step,
            "best_loss": self.best_loss,
            "best": self.best.state_dict(),
            "nonfinite_steps": list(self.guard.seen),
            "loss_stats": self._loss.values.cpu(),
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.lr_scheduler.state_dict(),
            "scaler_state_dict": self.scaler.state_dict(),
            "tracker_run_id": self.tracker.run_id,
        }
        if self.ema is not None:
            state["ema_model_state_dict"] = self.ema.model.state_dict()
            state["ema_num_updates"] = self.ema.num_updates
        return full_state(state, keep=self.runtime.is_main)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Learning rate, decay and schedule follow the current config."""
        load_model_state(self.model, state["model_state_dict"])
        settings = [
            {k: v for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
        ]
        load_optimizer_state(self.optimizer, state["optimizer_state_dict"])
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        if state["scaler_state_dict"]:  # empty unless that run was in fp16
            self.scaler.load_state_dict(state["scaler_state_dict"])
        self.step, self.best_loss = state["step"], state["best_loss"]
        self.best.load_state_dict(state.get("best", {"metric": LOSS, "value": self.best_loss}))
        self.guard.restore(state.get("nonfinite_steps", []))
        self._loss.restore(state["loss_stats"])
        self.saver.last_step = self.step
        self.lr_scheduler.last_epoch = self.step
        factor = self.lr_scheduler.lr_lambdas[0](self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        if self.ema is not None:
            load_model_state(self.ema.model, state["ema_model_state_dict"])
            self.ema.num_updates = state["ema_num_updates"]
        self._tell_status(state)
