"""Starting a run or going on with one: what is allowed, and from where."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datasets import ImageDataset
from models import skeleton
from models.lora import add_adapters
from training.ema import WIDTHS, trained_parameters
from training.optim import MUON, build_optimizer, parameter_groups
from training.pretrained import SAME_MODEL, changed_settings
from training.progress import Schedule
from training.tracking import ID_KEYS
from utils import checkpoint as files
from utils.config import RULES, Config, RawConfig, keys_by_resume, validate
from utils.distributed import Runtime, world_size
from utils.errors import CheckpointError, ConfigError, UserError, one_line, show
from utils.images import ImageSpec

AUTO = "auto"
SCALER_KEYS = ("scale", "growth_factor", "backoff_factor")

log = logging.getLogger("diffusion")


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]

    def continued(self, config: Config) -> Config:
        """`config`, but where it has no value for a key, and the run began with what was the
        default then, that default stays."""
        given, began = config.model_fields_set, self.state["config"]
        earlier = {k: rules.get("was") for k, rules in RULES.items() if k not in given}
        kept = {k: was for k, was in earlier.items() if was is not None and began.get(k) == was}
        return Config.model_construct(given, **{**dict(config), **kept})


def find_resume(config: Config) -> Resume | None:
    """The checkpoint that `resume_path` means, or None for a fresh run. Writes nothing.

    Raises a CheckpointError if it is missing or damaged, or does not continue under this config,
    and a ConfigError if the run's folder belongs to another run.
    """
    folder, resume, is_ours = config.run_dir, None, config.resume_path == AUTO
    if is_ours:
        if (newest := newest_checkpoint(folder, check_goes_on)) is None:
            return None
        path, state, skipped = newest
        for reason in skipped:
            log.warning("passed over %s", reason)
        resume = Resume(path, state)
    elif config.resume_path is not None:
        path = Path(config.resume_path)
        path = path / files.CURRENT if path.is_dir() else path
        resume = Resume(path, files.load_checkpoint(path))
        check_goes_on(path, resume.state)
        is_ours = path.resolve().parent == folder.resolve()
        epoch, last_epoch = resume.state["epoch"], max(files.epochs_saved(folder), default=0)
        if is_ours and last_epoch > epoch:
            raise ConfigError(
                f"{path} is of epoch {epoch}, but {folder} has epoch {last_epoch}; to branch off, "
                "keep resume_path and choose another experiment_name"
            )
    if not is_ours and any(folder.glob("*.pth")):
        raise ConfigError(
            f"{folder} already holds a run; go on with it by resume_path=auto, choose another "
            "experiment_name, or remove the folder"
        )
    if resume is not None:
        _check_matches(resume, resume.continued(config))
    return resume


def newest_checkpoint(
    run_dir: Path, check: Callable[[Path, dict[str, Any]], None] = files.check_state
) -> tuple[Path, dict[str, Any], list[str]] | None:
    """For `resume_path=auto`: `current_model.pth`, else the valid file with the most steps, as its
    path, its state, and a line for each damaged file passed over; None without checkpoints. A file
    of which `check` raises a CheckpointError counts as damaged.

    Raises a CheckpointError if there are checkpoints, but none is readable: nothing may start anew
    silently.
    """
    current, skipped = run_dir / files.CURRENT, []
    newest: tuple[Path, dict[str, Any]] | None = None
    latest = [path for path in (current, run_dir / files.BEST) if path.is_file()]
    for path in [*latest, *files.epochs_saved(run_dir).values()]:
        try:
            state = files.load_checkpoint(path)
            check(path, state)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        if path == current:
            return path, state, skipped
        if newest is None or state["step"] >= newest[1]["step"]:
            newest = path, state
    if newest is None and skipped:
        lines = "\n       ".join(skipped)
        raise CheckpointError(f"no readable checkpoint to resume from:\n       {lines}")
    return None if newest is None else (*newest, skipped)


def check_goes_on(path: Path, state: dict[str, Any]) -> None:
    """Raise a CheckpointError unless a run can take over every part of a `state` read from `path`:
    each must be there, of the shape and type that the state's own config makes it, and finite."""
    saved = {"optimizer_state_dict": {"state": lambda moments: isinstance(moments, dict)}}
    try:
        problem = files.misfit(state, saved) or files.misfit(state, _form_of(state))
    except Exception as error:  # a config and sizes that make no model
        problem = one_line(error)
    if problem is not None:
        raise CheckpointError(f"{show(path)} cannot be continued: {problem}")


def _form_of(state: dict[str, Any]) -> dict[str, Any]:
    """The form, see `misfit`, of a checkpoint of that config and step."""
    config = validate(RawConfig(dict(state["config"]), {}))
    model, step = skeleton(config, ImageSpec(*state["spec"])), state["step"]
    if config.lora_rank:
        add_adapters(model, config.lora_rank, config.lora_alpha)
    numbers, moments = [], {}
    for group in parameter_groups(model, config):
        numbers.append(list(range(len(moments), len(moments) + len(group["params"]))))
        for p in group["params"]:
            adam = {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p}
            is_muon = config.optimizer == MUON and len(numbers) == 1
            moments[len(moments)] = {"momentum_buffer": p} if is_muon else adam
    saved = state["optimizer_state_dict"]["state"]
    if saved or state.get("scaler_state_dict") or len(state.get("nonfinite_steps", ())) == step:
        # The others have had no gradient, or no step was taken yet.
        moments = {i: form for i, form in moments.items() if i in saved}
    averages = {"ema_model_state_dict": model.state_dict()}
    averages["ema_num_updates"] = lambda number: files.is_count(number, most=step)
    if config.ema_snapshots:
        averages["ema_averages"] = dict.fromkeys(WIDTHS, trained_parameters(model))
        averages["ema_snapshots"] = lambda losses: all(t <= step for t in losses)
    needed = {
        "model_state_dict": model.state_dict(),
        **(averages if config.use_ema else {}),
        "optimizer_state_dict": {
            "state": moments,
            "param_groups": lambda saved: (
                isinstance(saved, list) and [group["params"] for group in saved] == numbers
            ),
        },
        "scaler_state_dict": lambda saved: (
            not saved or all(0 < saved[key] < math.inf for key in SCALER_KEYS)
        ),
        "best_loss": lambda loss: isinstance(loss, float) and not math.isnan(loss),
        "loss_stats": lambda x: x.dim() == 1 and x.is_floating_point() and x.isfinite().all(),
    }
    if ":" in config.optimizer:  # only its own code knows what belongs there
        saved, needed["optimizer_state_dict"] = state["optimizer_state_dict"], {}
        build_optimizer(model.to_empty(device="cpu"), config).load_state_dict(saved)
    optional = {
        "scheduler_state_dict": lambda saved: saved["last_epoch"] == step and "lr_lambdas" in saved,
        "nonfinite_steps": lambda steps: all(files.is_count(number, most=step) for number in steps),
        "failures": lambda names: all(isinstance(name, str) for name in names),
        "best": {
            "metric": lambda name: isinstance(name, str),
            "value": lambda value: value is None or math.isfinite(value),
        },
        "extended_steps": lambda steps: steps is None or files.is_count(steps),
        "world_size": files.is_count,
        "num_threads": files.is_count,
        "backend": lambda names: names is None or [type(name) for name in names] == [str, str],
        **dict.fromkeys(ID_KEYS, lambda name: name is None or isinstance(name, str)),
    }
    return needed | {key: form for key, form in optional.items() if key in state}


def _check_matches(resume: Resume, config: Config) -> None:
    old, new = {**Config().to_dict(), **resume.state["config"]}, config.to_dict()
    # Another value of a "run" key would not continue the run, but silently begin another one.
    if changed := changed_settings(old, new, (*SAME_MODEL, *keys_by_resume("run"))):
        raise CheckpointError(
            f"{resume.path} cannot be continued with changed settings; restore them, or start a "
            "new run:\n       " + "\n       ".join(changed)
        )
    now = world_size(), torch.get_num_threads()
    before = resume.state.get("world_size", now[0]), resume.state.get("num_threads", now[1])
    if before != now:
        counts = "was %d process(es) of %d threads, now %d of %d"
        log.info(f"{counts}: same data and noise, other rounding", *before, *now)
    for key in keys_by_resume("warn"):
        if old[key] != new[key]:
            log.warning("%s: was %s, from here on %s", key, old[key], new[key])


def check_data(resume: Resume, dataset: ImageDataset) -> None:
    """Compare the images with those that the run was trained on so far. Raises a CheckpointError
    if their shape or classes differ. (Other pictures are only a warning.)"""
    old, new = tuple(resume.state["spec"]), tuple(dataset.spec)
    if old != new:
        raise CheckpointError(
            f"{resume.path} was trained on images of (channels, height, width, classes) = {old}, "
            f"the data set has {new}"
        )
    old, new = resume.state.get("values", "8 bits"), list(dataset.values or ()) or "8 bits"
    if old != new:
        keep = f"the data set has {new}; to go on, value_range must be that of the checkpoint"
        raise CheckpointError(f"{resume.path} was trained on values (type, -1, 1) = {old}, {keep}")
    if resume.state.get("data_fingerprint") != dataset.fingerprint:
        log.warning("the data set is not the one this run was trained on so far")
        return
    epoch = resume.step * resume.state["config"]["batch_size"] // len(dataset)
    if epoch != resume.state["epoch"]:
        wrong = f"step {resume.step} is of epoch {epoch}, not {resume.state['epoch']}"
        raise CheckpointError(f"{show(resume.path)} cannot be continued: {wrong}")


def check_backend(resume: Resume | None, backend: tuple[str, str] | None, runtime: Runtime) -> None:
    """Compare the processes, which may have other packages installed. A collective.

    `backend` says who computes the model, and why; None where there is nothing to choose. Raises a
    UserError on every rank if they would compute the model in different ways.
    """
    first = runtime.broadcast_object(backend)
    if backend is None:
        return
    if runtime.any(first[0] != backend[0]):
        raise UserError(
            f"the processes would compute the model in different ways, rank 0: {first[0]} "
            f"({first[1]}), this one, rank {runtime.rank}: {backend[0]} ({backend[1]}); make the "
            "installations equal, or set model_params.mamba_backend=torch"
        )
    before = (None if resume is None else resume.state.get("backend")) or backend
    if before[0] != backend[0]:
        log.info("computed with %s before, with %s now: the same function", before[0], backend[0])


def plan_steps(config: Config, num_images: int, resume: Resume | None) -> Schedule | None:
    """How far to train; None if an automatically resumed run is already complete.

    A `resume_path` that names a file, with no more `epochs` than are done, trains that many
    epochs more, and says so. Raises a UserError if the named file has `max_steps` steps already.
    """
    total, is_extension = math.ceil(config.epochs * num_images / config.batch_size), False
    done, is_auto = 0 if resume is None else resume.step, config.resume_path == AUTO
    if is_auto and resume is not None and resume.state.get("extended_steps"):
        total, is_extension = max(total, resume.state["extended_steps"]), True
    elif not is_auto and total <= done:
        epochs_done = done * config.batch_size // num_images
        last = epochs_done + config.epochs
        total, is_extension = math.ceil(last * num_images / config.batch_size), True
        log.info(
            f"epochs={config.epochs}, but {epochs_done} are done: training {config.epochs} more, "
            f"to epoch {last}"
        )
    total = min(total, config.max_steps or total)
    if total > done:
        return Schedule(num_images, config.batch_size, total, is_extension)
    if is_auto:
        return None
    raise UserError(f"max_steps={config.max_steps}: {resume.path} has {done} already")
