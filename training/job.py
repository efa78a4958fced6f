"""From a config to a job: the run to go on from, the data, the steps, the model, the process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

import datasets
import diffusion
import models
from datasets.loader import make_resident
from models.lora import add_adapters
from training.objective import Example, training_examples
from training.optim import try_optimizer
from training.pretrained import load_initial_weights
from training.progress import Schedule
from training.resume import Resume, check_backend, check_data, find_resume, plan_steps
from training.run_dir import Seen, checkpoints_in
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import UserError, show
from utils.precision import resolve_precision
from utils.rng import seed_everything

# keys that may differ between processes
OF_A_NODE = ("gpu_ids", "data_root", "condition_root", "num_workers")

log = logging.getLogger("diffusion")


@dataclass(frozen=True)
class Job:
    """What a config names, built as far as a dry run needs it."""

    config: Config
    runtime: Runtime
    dataset: datasets.ImageDataset
    schedule: Schedule
    model: nn.Module
    process: diffusion.Process
    examples: Callable[[int], Iterator[Example]]  # start_step -> this rank's examples from it on
    precision: str = "fp32"  # resolved: fp32, bf16 or fp16
    resume: Resume | None = None
    seen: Seen = frozenset()  # the run's checkpoints when it was decided where to begin
    held_out: datasets.ImageDataset | None = None  # the test split, if needed


def prepare(config: Config, runtime: Runtime) -> Job | None:
    """Build what the config names, and draw its weights. Writes nothing. On every rank.

    Returns None where an automatically resumed run is complete already, which is logged. Raises a
    UserError where what the config names is missing, or does not fit together.
    """
    shared = {k: v for k, v in config.to_dict().items() if k not in OF_A_NODE}
    if runtime.any(runtime.broadcast_object(shared) != shared):
        raise UserError("the processes read different configs; no value may depend on the process")
    precision = resolve_precision(config.precision, runtime.device)
    seen, resume = checkpoints_in(config.run_dir), find_resume(config)
    config = config if resume is None else resume.continued(config)
    step = -1 if resume is None else resume.step
    if runtime.any(runtime.broadcast_object(step) != step):
        raise UserError(
            "the processes would resume from different steps; save_dir must be one folder that "
            "all nodes share"
        )
    has_class_folders = datasets.DATASETS[config.dataset].native is None and config.use_subdirs
    for written in (config.run_dir, config.preview_dir) if has_class_folders else ():
        if written.resolve().is_relative_to(Path(config.data_root).resolve()):
            place = f"{show(written)} would lie among the classes in {show(config.data_root)}"
            raise UserError(f"{place}; set save_dir and sample_dir to folders outside")
    with runtime.main_first():  # it may download
        dataset = datasets.build_dataset(config, "train")
        needed = config.val_interval or (config.condition and datasets.has_test_split(config))
        held_out = datasets.build_dataset(config, "test") if needed else None
    if runtime.any(runtime.broadcast_object(dataset.fingerprint) != dataset.fingerprint):
        raise UserError("the processes have different images; data_root needs the same everywhere")
    if resume is not None:
        check_data(resume, dataset)
    schedule = plan_steps(config, len(dataset), resume)
    if schedule is None:
        log.info("%s is complete, nothing is left to train", config.run_dir)
        return None
    seed_everything(config.seed)
    model = models.build_model(config, dataset.spec, runtime.device)
    if config.init_from is not None and resume is None:
        load_initial_weights(model, config, dataset.class_names)
    if config.lora_rank:
        add_adapters(model, config.lora_rank, config.lora_alpha)
    try_optimizer(model, config)
    check_backend(resume, models.backend_of(model), runtime)
    process, workers = diffusion.build_process(config), config.num_workers
    images = make_resident(dataset, runtime, resident=config.resident, num_workers=workers)
    examples = partial(training_examples, config, process, images, runtime)
    made = dataset, schedule, model, process, examples
    return Job(config, runtime, *made, precision, resume, seen, held_out)
