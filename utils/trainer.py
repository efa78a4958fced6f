"""The training loop and nothing else. What it trains, on what, and where results go is given."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from utils import checkpoint as files
from utils.config import Config
from utils.distributed import Runtime, no_gradient_sync
from utils.ema import EMA
from utils.errors import EXIT_FAILURE, EXIT_NON_FINITE, EXIT_OK, EXIT_PREEMPTED, UserError
from utils.precision import autocast
from utils.progress import LossStats, Progress
from utils.rng import Stream, derive_seed
from utils.schedule import Action, Schedule
from utils.signals import StopSignal
from utils.tracking import TrackerGroup

MAX_FAILED_SAVES = 3

log = logging.getLogger("diffusion")

LossFn = Callable[[nn.Module, tuple[Tensor | None, ...]], Tensor]


class NonFiniteError(UserError):
    """Loss or gradients became infinite or NaN; the weights are those from before that step."""

    exit_code = EXIT_NON_FINITE


class Trainer:
    """Runs optimizer steps until `schedule.total_steps`.

    Args:
        model: the bare module; its parameters are trained and saved.
        network: what to call: `model`, or its wrapper that averages gradients over ranks.
        loss_fn: (network, example) -> (b,) losses of the example's b rows.
        batches: start_step -> iterator over examples, tuples of tensors with equal first
            dimension: this rank's rows, a fresh iterator at any step.
        ema: None for none.
        precision: resolved: fp32, bf16 or fp16.
        extra_state: plain values that every checkpoint carries (config, spec, versions).
        actions: run at epoch ends. One that raises is a warning.
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
        actions: Sequence[Action] = (),
    ) -> None:
        self.model, self.network, self.loss_fn, self.batches = model, network, loss_fn, batches
        self.optimizer, self.lr_scheduler, self.ema = optimizer, lr_scheduler, ema
        self.precision, self.schedule, self.runtime = precision, schedule, runtime
        self.tracker, self.config, self.actions = tracker, config, actions
        self.extra_state = extra_state
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=precision == "fp16")
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.step = 0
        self.best_loss = math.inf
        self.last_saved_step: int | None = None
        self._failed_saves = 0
        self._loss = LossStats(runtime.device)
        self._bad = torch.zeros((), device=runtime.device)  # 1 after a non-finite step, for good
        self._grad_norm = torch.zeros((), device=runtime.device)

    @property
    def _defers_check(self) -> bool:
        """On CUDA the host does not wait for each step's loss; elsewhere reading it is free."""
        return self.runtime.device.type == "cuda"

    def train(self) -> int:
        """Train to the end, or to a SIGINT or SIGTERM. Returns the exit code.

        Raises:
            NonFiniteError: before the step that would have spoilt the weights.
        """
        self.network.train()
        batches = self.batches(self.step)
        progress = Progress(self.schedule, self.step, is_main=self.runtime.is_main)
        with StopSignal() as stop, contextlib.closing(progress):
            while self.step < self.schedule.total_steps:
                if self.runtime.any(stop.requested):
                    return self._stop_early()
                self._train_step(next(batches))
                self.step += 1
                progress.advance()
                if self.step % self.config.log_interval == 0 or self.step == 1:
                    self._log(progress)
                with progress.pause():
                    self._end_of_step()
        if self.last_saved_step != self.step:
            self.save()
            if self.last_saved_step != self.step:
                raise UserError(
                    f"trained to step {self.step}, but it could not be saved in "
                    f"{self.config.run_dir}; the last checkpoint is of step {self.last_saved_step}"
                )
        return EXIT_OK

    def _train_step(self, example: tuple[Tensor | None, ...]) -> None:
        num_parts = self.config.gradient_accumulation_steps
        device, rank = self.runtime.device, self.runtime.rank
        parts = [() for _ in range(num_parts)]
        for tensor in example:
            chunks = [None] * num_parts if tensor is None else tensor.chunk(num_parts)
            parts = [(*part, chunk) for part, chunk in zip(parts, chunks, strict=True)]
        loss_sum = torch.zeros((), device=device)
        for i, part in enumerate(parts):
            # dropout draws from the global generator: key it by this step and these rows
            shard = rank * num_parts + i
            torch.manual_seed(derive_seed(self.config.seed, Stream.MODEL_DROPOUT, self.step, shard))
            is_last = i == num_parts - 1
            with contextlib.nullcontext() if is_last else no_gradient_sync(self.network):
                with autocast(self.precision, device):
                    loss = self.loss_fn(self.network, part).mean() / num_parts
                self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        self._optimizer_step(loss_sum)

    def _optimizer_step(self, loss: Tensor) -> None:
        self.scaler.unscale_(self.optimizer)
        limit = self.config.grad_clip or math.inf
        self._grad_norm = nn.utils.clip_grad_norm_(self.parameters, limit)
        # The norm is that of the averaged gradients, so all ranks agree on it. fp16 overflow is
        # the scaler's business; there only the loss counts.
        watched = loss if self.scaler.is_enabled() else self._grad_norm + loss
        self._bad = torch.maximum(self._bad, (~torch.isfinite(watched)).float())
        if not self._defers_check:
            self._raise_if_bad()
        elif not self.scaler.is_enabled():
            self.optimizer.found_inf = self._bad  # fused kernels skip the update on the device
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.update(self.model)
        self._loss.add(loss)

    def _raise_if_bad(self) -> None:
        """Stop all ranks if one saw a non-finite value (a host read, so only when due)."""
        if self.runtime.any(bool(self._bad)):
            last = (
                f"step {self.last_saved_step}" if self.last_saved_step is not None else "none yet"
            )
            raise NonFiniteError(
                f"loss or gradient is not finite near step {self.step + 1} (epoch "
                f"{self.schedule.epochs_done(self.step) + 1}); the step was not taken, last good "
                f"checkpoint: {last} in {self.config.run_dir}. Lower learning_rate, set grad_clip, "
                "or use precision=fp32"
            )

    def _log(self, progress: Progress) -> None:
        self._raise_if_bad()
        smoothed, loss = self._loss.read(self.runtime)
        self._loss.start_window()
        scalars = {
            "epoch": self.step / self.schedule.steps_per_epoch,
            "train/loss": loss,
            "train/loss_smoothed": smoothed,
            "train/lr": self.lr_scheduler.get_last_lr()[0],
            "train/grad_norm": float(self._grad_norm),
            "train/images_per_sec": progress.lap(self.step),
        }
        self.tracker.log_scalars(scalars, self.step)
        progress.report(self.step, scalars)

    def _end_of_step(self) -> None:
        """Checkpoints and actions of the epochs this step completed."""
        epoch = self.schedule.epochs_done(self.step)
        if self.schedule.is_due(self.step, self.config.save_interval, self.config.save_interval):
            self.save(epoch)
        for action in self.actions:
            if self.schedule.is_due(self.step, action.interval, action.start):
                try:
                    action.run(epoch, self.step)
                except Exception as error:
                    log.warning("%s failed after epoch %d: %s", action.name, epoch, error)
                self.network.train()

    def _stop_early(self) -> int:
        log.info("stopping at step %d: saving", self.step)
        self.save()
        if self.last_saved_step != self.step:
            return EXIT_FAILURE
        log.info("saved; go on with resume_path=auto")
        return EXIT_PREEMPTED

    def save(self, epoch: int | None = None) -> None:
        """Write current_model.pth; best_model.pth if it is; model_epoch_*.pth for an `epoch`.

        A disk that refuses is a warning, three times in a row an error.
        """
        self._raise_if_bad()
        self._loss.share(self.runtime)
        smoothed, _ = self._loss.read(self.runtime)
        is_best, best_before = smoothed < self.best_loss, self.best_loss
        self.best_loss = min(smoothed, self.best_loss)
        error = None
        if self.runtime.is_main:
            try:
                self._write(epoch, is_best)
            except (OSError, RuntimeError) as failure:
                error = " ".join(str(failure).split())
        error = self.runtime.broadcast_object(error)
        if error is None:
            self.last_saved_step, self._failed_saves = self.step, 0
            return
        self.best_loss = best_before
        self._failed_saves += 1
        log.warning("no checkpoint at step %d in %s: %s", self.step, self.config.run_dir, error)
        if self._failed_saves >= MAX_FAILED_SAVES:
            raise UserError(
                f"{self._failed_saves} checkpoints in a row could not be written: {error}"
            )

    def _write(self, epoch: int | None, is_best: bool) -> None:
        folder = self.config.run_dir
        files.save_checkpoint(folder / files.CURRENT, self.state_dict())
        if is_best:
            files.link_checkpoint(folder / files.CURRENT, folder / files.BEST)
        if epoch is not None:
            files.link_checkpoint(folder / files.CURRENT, folder / files.epoch_name(epoch))
            files.remove_old_checkpoints(folder, self.config.keep_last)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs; data order and noise follow from `step`."""
        state = {
            **self.extra_state,
            "epoch": self.schedule.epochs_done(self.step),
            "step": self.step,
            "best_loss": self.best_loss,
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
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Learning rate, decay and schedule follow the current config."""
        self.model.load_state_dict(state["model_state_dict"])
        settings = [
            {k: v for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer_state_dict"])
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        if state["scaler_state_dict"]:  # empty unless that run was in fp16
            self.scaler.load_state_dict(state["scaler_state_dict"])
        self.step, self.best_loss = state["step"], state["best_loss"]
        self._loss.values.copy_(state["loss_stats"])
        self.last_saved_step = self.step
        self.lr_scheduler.last_epoch = self.step
        factor = self.lr_scheduler.lr_lambdas[0](self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        if self.ema is not None:
            self.ema.model.load_state_dict(state["ema_model_state_dict"])
            self.ema.num_updates = state["ema_num_updates"]
