"""train.py with faults: `python -m tests.faults.launcher '{"poison": {...}}' --config ...`.

What it needs of the product is public: `Trainer.train` is wrapped, so that the trainer's loss
function, parameters, optimizer and tracker can be watched or spoilt before the first step.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import train
from tests.faults.harness import state_hash
from training.trainer import Trainer
from utils import checkpoint
from utils.errors import CheckpointError, exit_code_of

UNLIMITED = resource.RLIM_INFINITY


def record_states(trainer: Trainer, path: str) -> None:
    """[step, state hash] after every step, by rank 0 (with log_interval=1)."""
    log_scalars = trainer.tracker.log_scalars

    def record(scalars: dict[str, float], step: int) -> None:
        append(path, [step, state_hash(trainer.state_dict())])
        log_scalars(scalars, step)

    if trainer.runtime.is_main:
        trainer.tracker.log_scalars = record


def record_examples(trainer: Trainer, path: str) -> None:
    """[step, rank, a hash per row of (image, label, t, noise)] as the loss gets them."""
    loss_fn = trainer.job.process.loss

    def record(network: nn.Module, *example: Tensor | None) -> Tensor:
        parts = [part for part in example if part is not None]
        rows = [
            hashlib.sha256(b"".join(part[i].numpy().tobytes() for part in parts)).hexdigest()[:16]
            for i in range(len(parts[0]))
        ]
        append(f"{path}.{trainer.runtime.rank}", [trainer.step, trainer.runtime.rank, rows])
        return loss_fn(network, *example)

    trainer.job.process.loss = record


def poison(trainer: Trainer, value: str, where: str, step: int, rank: int | None = None) -> None:
    """Make the loss or a gradient of one step `nan` or `inf`, on one rank or on all."""
    if rank not in (None, trainer.runtime.rank):
        return
    loss_fn, bad = trainer.job.process.loss, float(value)

    def spoilt_loss(network: nn.Module, *example: Tensor | None) -> Tensor:
        loss = loss_fn(network, *example)
        return loss + bad if trainer.step == step else loss

    def spoilt_gradient(gradient: Tensor) -> Tensor:
        if trainer.step != step:
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[0] = bad
        return gradient

    if where == "loss":
        trainer.job.process.loss = spoilt_loss
    else:
        trainer.learner.parameters[0].register_hook(spoilt_gradient)


def watch_optimizer(trainer: Trainer, path: str) -> None:
    """Append a line for every optimizer step taken with, or leading to, non-finite values."""

    def finite(tensors: list[Tensor]) -> bool:
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)

    def before(*_: Any) -> None:
        if not finite([p.grad for p in trainer.learner.parameters if p.grad is not None]):
            append(path, [trainer.step, trainer.runtime.rank, "gradient"])

    def after(*_: Any) -> None:
        if not finite(trainer.learner.parameters):
            append(path, [trainer.step, trainer.runtime.rank, "weights"])

    trainer.learner.optimizer.register_step_pre_hook(before)
    trainer.learner.optimizer.register_step_post_hook(after)


def time_training(trainer: Trainer, path: str) -> Callable[[], None]:
    """Returns what writes {seconds of training, seconds of it inside the tracker}."""
    spent, started = [0.0], time.monotonic()

    def timed(call: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            begin = time.monotonic()
            call(*arguments)
            spent[0] += time.monotonic() - begin

        return run

    trainer.tracker.log_scalars = timed(trainer.tracker.log_scalars)
    trainer.tracker.log_image = timed(trainer.tracker.log_image)
    return lambda: append(path, {"train": time.monotonic() - started, "tracker": spent[0]})


def fail_saves(trainer: Trainer, path: str, kind: str, plan: list[int | None]) -> None:
    """The n-th save finds a disk that is full after `plan[n]` bytes; None: enough room.

    The last entry goes for all later saves too. After each save that should fail, `path` gets
    [step, what the save raised, step of the file that loads].

    Args:
        kind: `limit`, the kernel refuses to let a file grow; `disk`, the file system is full.
    """
    save, calls = checkpoint.save_checkpoint, []
    fill, free = (limit_files, free_files) if kind == "limit" else (fill_disk, free_disk)

    def save_on_full_disk(target: Path, state: dict[str, Any]) -> None:
        num_bytes = plan[min(len(calls), len(plan) - 1)]
        calls.append(1)
        if num_bytes is None:
            return save(target, state)
        fill(target.parent, num_bytes)
        raised = None
        try:
            save(target, state)
        except (OSError, RuntimeError) as error:
            raised = type(error).__name__
            raise
        finally:
            free(target.parent)
            append(path, [state["step"], raised, step_in(target)])

    checkpoint.save_checkpoint = save_on_full_disk


def fill_for_steps(trainer: Trainer, first: int, stop: int) -> None:
    """The disk of the run's folder has no free page while steps first ... stop - 1 are made."""
    loss_fn, folder = trainer.job.process.loss, trainer.config.run_dir

    def fill_or_free(network: nn.Module, *example: Tensor | None) -> Tensor:
        if trainer.step == first:
            fill_disk(folder, 0)
        if trainer.step == stop:
            free_disk(folder)
        return loss_fn(network, *example)

    trainer.job.process.loss = fill_or_free


def hang_in_saves(_trainer: Trainer, quick: int, seconds: float) -> None:
    """All saves but the first `quick` take that long."""
    save, calls = checkpoint.save_checkpoint, []

    def slow_save(target: Path, state: dict[str, Any]) -> None:
        calls.append(1)
        if len(calls) > quick:
            time.sleep(seconds)
        save(target, state)

    checkpoint.save_checkpoint = slow_save


def limit_files(_folder: Path, num_bytes: int) -> None:
    """Python ignores SIGXFSZ, so a write that goes further is an OSError."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, UNLIMITED))


def free_files(_folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (UNLIMITED, UNLIMITED))


def fill_disk(folder: Path, num_bytes: int) -> None:
    """Leave `num_bytes`, rounded down to pages."""
    status = os.statvfs(folder)
    size = status.f_bavail * status.f_frsize - num_bytes
    with open(folder / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, size))


def free_disk(folder: Path) -> None:
    (folder / "filler").unlink()


def step_in(path: Path) -> int:
    try:
        return checkpoint.load_checkpoint(path)["step"]
    except CheckpointError:
        return -1


def install_tracker(how: str, where: str) -> None:
    """A SwanLab that raises or hangs (ten minutes) in `init`, `log` or `finish`."""

    def fault(name: str) -> None:
        if name == where:
            if how == "hang":
                time.sleep(600)
            else:
                raise ConnectionError("the server is down")

    def init(**_: Any) -> types.SimpleNamespace:
        fault("init")
        return types.SimpleNamespace(id="fake")

    module = types.ModuleType("swanlab")
    module.Settings = lambda **_: types.SimpleNamespace(api_key=None)
    module.Image = lambda array: array
    module.init = init
    module.log = lambda *_, **__: fault("log")
    module.finish = lambda: fault("finish")
    sys.modules["swanlab"] = module


def append(path: str, row: Any) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


INJECTIONS: dict[str, Callable[..., None]] = {
    "poison": poison,
    "watch": watch_optimizer,
    "examples": record_examples,
    "states": record_states,
    "saves": fail_saves,
    "full_steps": fill_for_steps,
    "slow_saves": hang_in_saves,
}


def main(inject: dict[str, Any], arguments: list[str]) -> int:
    """Run train.py's main with the faults that `inject` names."""
    if "tracker" in inject:
        install_tracker(**inject["tracker"])
    honest_train = Trainer.train

    def spoilt_train(trainer: Trainer) -> int:
        for name, prepare in INJECTIONS.items():
            if name in inject:
                prepare(trainer, **inject[name])
        finish = time_training(trainer, **inject["time"]) if "time" in inject else lambda: None
        code = honest_train(trainer)
        finish()
        return code

    Trainer.train = spoilt_train
    return train.main(arguments)


if __name__ == "__main__":
    sys.argv[0] = "train.py"
    spec = json.loads(sys.argv.pop(1))
    sys.exit(exit_code_of(lambda: main(spec, sys.argv[1:])))
