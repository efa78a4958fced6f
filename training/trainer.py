"""The training loop and nothing else. What it trains, on what, and where results go is given."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.guidance import conditioned
from training.failures import FailureWatch
from training.job import Job
from training.learner import Learner
from training.nonfinite import NonFiniteGuard
from training.objective import QUARTILES, Example, quartile_of
from training.progress import LossStats, Progress, memory_mib
from training.saving import VAL_LOSS, Saver
from training.sharding import full_tensor, no_gradient_sync
from training.signals import StopSignal
from training.tracking import TrackerGroup
from training.validation import validate
from utils.errors import EXIT_FAILURE, EXIT_OK, EXIT_PREEMPTED, UserError
from utils.precision import autocast
from utils.rng import Stream, derive_seed

# Several processes ask each other whether to stop after so many steps, or after about so many
# seconds where steps are slow: torchrun kills what has not ended 30 seconds after a signal.
STEPS_UNHEARD, SECONDS_UNHEARD = 10, 1.0

log = logging.getLogger("diffusion")


@dataclass
class Trainer:
    """Runs optimizer steps of `job` until `schedule.total_steps`.

    `evaluate` and `preview` get (epoch, step), on every rank; one that raises is a warning.
    """

    job: Job
    learner: Learner
    saver: Saver
    guard: NonFiniteGuard  # keeps steps that are not finite from the weights
    tracker: TrackerGroup
    # every `eval_interval` epochs: metric name -> value, the same on every rank
    evaluate: Callable[[int, int], dict[str, float | None]] | None = None
    # every `sample_interval` epochs: a picture, uint8 (C, H, W), and its images, on rank 0
    preview: Callable[[int, int], tuple[Tensor, Tensor] | None] | None = None
    step: int = 0  # done so far

    def __post_init__(self) -> None:
        self.config, self.runtime = self.job.config, self.job.runtime
        self.schedule = self.job.schedule
        self._loss = LossStats(self.runtime.device, QUARTILES)
        self._grad_norm = torch.zeros((), device=self.runtime.device)
        self._vote: tuple[int, float] | None = None  # step and time of the last one
        self._next_vote = self.step
        self._snapshots = [(self.config.use_ema and self.config.ema_snapshots) or math.inf] * 2
        self._failures = FailureWatch(self.job)
        self._scores: dict[str, float] = {}  # the newest values of validation and evaluation

    def train(self) -> int:
        """Train to the end, or to a signal that asks to stop. Returns the exit code.

        Raises a NonFiniteError before the step that would have spoilt the weights, and a UserError
        if the last checkpoint, or the third in a row, could not be written.
        """
        self.learner.network.train()
        examples = self.job.examples(self.step)
        progress = Progress(self.schedule, self.step, self.runtime)
        with StopSignal() as stop, progress.bar, contextlib.closing(self.saver):
            while self.step < self.schedule.total_steps:
                if self._is_to_stop(stop):
                    return self._stop_early(stop.name)
                self._train_step(next(examples))
                self.step += 1
                progress.bar.update()
                if self.step % self.config.log_interval == 0 or self.step == 1:
                    self._log(progress)
                with progress.pause():
                    self._end_of_step()
            self.saver.settle()
            if self.saver.last_step != self.step and not self._save_now():
                raise UserError(
                    f"trained to step {self.step}, but it could not be saved; last checkpoint: "
                    f"{self.saver.describe_last()}"
                )
        return EXIT_OK

    def _is_to_stop(self, stop: StopSignal) -> bool:
        """Tell, the same on every rank, whether one of them is asked to stop, or has lost its
        folder. Several do not ask at every step: each vote makes all wait for the slowest."""
        if self.step < self._next_vote:
            return False
        is_asked = stop.name is not None or not self.saver.status.is_ours()
        if self.runtime.world_size == 1:
            return is_asked
        now, last = time.monotonic(), self._vote
        seconds = math.inf if last is None else (now - last[1]) / (self.step - last[0])
        vote = torch.tensor([float(is_asked), seconds], dtype=torch.float64)
        asked, seconds = self.runtime.all_reduce(vote, "max").tolist()
        steps = min(SECONDS_UNHEARD / max(seconds, 1e-9), STEPS_UNHEARD)
        self._vote, self._next_vote = (self.step, now), self.step + max(int(steps), 1)
        return asked > 0

    def _train_step(self, example: Example) -> None:
        learner, num_parts = self.learner, self.config.gradient_accumulation_steps
        network, device = learner.network, self.runtime.device
        loss_sum, losses = torch.zeros((), device=device), []
        chunks = [[None] * num_parts if x is None else x.chunk(num_parts) for x in example]
        for i, (*part, planes) in enumerate(zip(*chunks, strict=True)):
            # dropout draws from the global generator: key it by this step and these rows
            key = self.step, self.runtime.rank * num_parts + i
            torch.manual_seed(derive_seed(self.config.seed, Stream.MODEL_DROPOUT, *key))
            is_last = i == num_parts - 1
            with contextlib.nullcontext() if is_last else no_gradient_sync(network):
                with autocast(learner.precision, device):
                    per_example = self.job.process.loss(conditioned(network, planes), *part)
                    loss = per_example.mean() / num_parts
                # A loss that is not finite makes all gradients NaN, so every rank hears of it.
                seed = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
                learner.scaler.scale(loss).backward(seed)
            loss_sum += loss.detach()
            losses.append(per_example.detach())
        self._optimizer_step(loss_sum)
        quartile = quartile_of(example.t, self.config.num_timesteps)
        self._loss.add(loss_sum, torch.cat(losses), quartile)

    def _optimizer_step(self, loss: Tensor) -> None:
        optimizer, scaler = self.learner.optimizer, self.learner.scaler
        scaler.unscale_(optimizer)
        limit = self.config.grad_clip or math.inf
        self._grad_norm = full_tensor(nn.utils.clip_grad_norm_(self.learner.parameters, limit))
        # The norm is that of the averaged gradients, so all ranks agree on it. fp16 overflow is
        # the scaler's business; there only the loss counts, of all ranks.
        is_fp16 = scaler.is_enabled()
        watched = self.runtime.all_reduce(loss.clone()) if is_fp16 else self._grad_norm
        skip = self.guard.add(torch.isfinite(watched), self.step)
        if is_fp16:
            scale = scaler.scale(torch.ones_like(loss))
            self.guard.add_scaled(torch.isfinite(self._grad_norm), scale)
        if self.guard.on_host:
            self.guard.read(self.saver.describe_last())
        if is_fp16:
            scaler.step(optimizer)  # leaves out what overflowed
            scaler.update()
        elif not self.guard.on_host:
            optimizer.found_inf = skip  # fused kernels leave out the step on the device
            optimizer.step()
        elif not skip:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.learner.lr_scheduler.step()
        if self.learner.ema is not None:
            self.learner.ema.update(self.learner.model)

    def _log(self, progress: Progress) -> None:
        self.guard.read(self.saver.describe_last())
        smoothed, loss, of_buckets = self._loss.read(self.runtime)
        self._loss.start_window()
        scaler = self.learner.scaler
        scalars = {
            "epoch": self.step / self.schedule.steps_per_epoch,
            "train/loss": loss,
            "train/loss_smoothed": smoothed,
            **of_buckets,
            "train/lr": self.learner.lr_scheduler.get_last_lr()[0],
            "train/grad_norm": float(self._grad_norm),
            **({"train/loss_scale": scaler.get_scale()} if scaler.is_enabled() else {}),
            "train/images_per_sec": progress.lap(self.step),
            "train/memory_mib": memory_mib(self.runtime.device),
        }
        self._record(scalars)
        self._failures.take_losses(self.step, scalars)
        progress.report(self.step, {**self._scores, **scalars})

    def _record(self, scalars: Mapping[str, float]) -> None:
        if self.saver.status.is_ours():
            self.tracker.log_scalars(scalars, self.step)

    def _end_of_step(self) -> None:
        """Scores, checkpoint and preview of the epochs this step completed."""
        config, is_due = self.config, partial(self.schedule.is_due, self.step)
        epoch, best = self.schedule.epochs_done(self.step), self.saver.best
        score = self._score(epoch)
        to_save = is_due(config.save_interval, config.save_interval)
        if to_save or is_due(*self._snapshots) or best.is_beaten_by(score):
            self.save(epoch if to_save else None, score=score)
        if self.preview and is_due(config.sample_interval, config.sample_start_epoch):
            made = self._attempt("preview", epoch, self.preview)
            if made is not None:
                self.tracker.log_image("samples", made[0], self.step)
                self._failures.take_samples(made[1])

    def _score(self, epoch: int) -> float | None:
        """Validate and evaluate where due; the new value, if any, that chooses the best model."""
        config, metric, scores = self.config, self.saver.best.metric, {}
        validation = partial(validate, self.job, self.learner.sampled_model)
        for name, prefix, interval, measure in (
            ("validation", "val", config.val_interval, validation),
            ("evaluation", "eval", config.eval_interval, self.evaluate),
        ):
            if not interval or not self.schedule.is_due(self.step, interval, interval):
                continue
            self.guard.read(self.saver.describe_last())
            values = self._attempt(name, epoch, measure) or {}
            known = {f"{prefix}/{key}": value for key, value in values.items() if value is not None}
            if known:
                self._record(known)
            scores |= known
            self.saver.settle()  # a checkpoint that was refused takes its score back
        self._scores |= scores
        return scores.get("val/loss" if metric == VAL_LOSS else f"eval/{metric}")

    def _attempt(self, name: str, epoch: int, action: Callable[[int, int], Any]) -> Any:
        """Call `action`, which a run does not die of: None and a warning if it raises."""
        try:
            return action(epoch, self.step)
        except Exception as error:
            log.warning("%s failed after epoch %d: %s", name, epoch, error)
            return None
        finally:
            self.learner.network.train()
            torch.cuda.empty_cache()  # what sampling took at its peak; nothing without CUDA

    def _stop_early(self, signal_name: str | None) -> int:
        if self.runtime.any(not self.saver.status.is_ours()):
            raise UserError(
                f"stopped at step {self.step}: {self.saver.folder} was removed, renamed or "
                "replaced while this run wrote there; nothing more is written. Start it again"
            )
        why = signal_name or "another process's signal"
        log.info("%s: stopping at step %d: saving", why, self.step)
        if not self._save_now():
            return EXIT_FAILURE
        self.saver.status.update(signal=signal_name)
        log.info("saved; go on with resume_path=auto")
        return EXIT_PREEMPTED

    def save(self, epoch: int | None = None, *, score: float | None = None) -> None:
        """Begin to write a checkpoint, see `Saver`; `score` is this model's, see `BestScore`."""
        self.saver.settle()
        self.guard.read(self.saver.describe_last())
        self._loss.share(self.runtime)
        smoothed, *_ = self._loss.read(self.runtime)
        is_best = self.saver.best.take(smoothed, score)
        if self.schedule.is_due(self.step, *self._snapshots):
            self.learner.ema.snapshots[self.step] = smoothed
        self.saver.start(self.state_dict(), epoch=epoch, is_best=is_best)

    def _save_now(self) -> bool:
        self.save()
        return self.saver.settle()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs; data order and noise follow from `step`."""
        return {
            "epoch": self.schedule.epochs_done(self.step),
            "step": self.step,
            **self.saver.best.state_dict(),
            "nonfinite_steps": list(self.guard.seen),
            "failures": list(self._failures.told),
            "loss_stats": self._loss.values.cpu(),
            **self.learner.state_dict(),
            **self.tracker.run_ids,
            **({} if self.learner.ema is None else self.learner.ema.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state in a checkpoint, which is the newest one on disk."""
        self.step = self.saver.last_step = state["step"]
        self.learner.load_state_dict(state)
        self.guard.restore(state.get("nonfinite_steps", []))
        self._loss.restore(state["loss_stats"])
        self.saver.best.load_state_dict(state)
        self.saver.status.tell_saved({**state, **self.saver.best.state_dict()})
