"""Train a diffusion model from a config file.

python train.py --config configs/digits_unet.py
torchrun --standalone --nproc_per_node=2 train.py --config configs/digits_unet.py batch_size=256
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from generation.in_training import best_score, evaluate, preview, training_evaluation
from generation.run import CONFIG_CHECKS, Run
from training import build
from training.job import prepare
from training.learner import Learner
from training.run_dir import mark_complete, open_run_dir
from training.sharding import check_processes
from training.tracking import check_trackers
from utils.cli import new_parser, parse_args
from utils.config import Config, format_config, load_config
from utils.distributed import Runtime, distributed_runtime
from utils.errors import EXIT_OK, ConfigError, UserError, exit_code_of, say
from utils.logs import setup_logging

log = logging.getLogger("diffusion")


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__ or "")
    parser.add_argument("--config", required=True, help="a .py, .yml or .yaml config file")
    parser.add_argument("--sheet", metavar="PNG", help="with --dry_run: draw the first batch there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(make_parser(), sys.argv[1:] if argv is None else argv)
    checks = (*CONFIG_CHECKS, check_processes, check_trackers)
    config = load_config(args.config, args.overrides, checks=checks)
    if args.print_config:
        say(format_config(config))
        return EXIT_OK
    if args.sheet and not args.dry_run:
        raise ConfigError("--sheet draws a batch, trains nothing: give it together with --dry_run")
    gpu_ids = config.gpu_ids if torch.cuda.is_available() else None
    with distributed_runtime(
        args.device, gpu_ids=gpu_ids, port=config.port, timeout_minutes=config.timeout_minutes
    ) as runtime:
        setup_logging(is_main=runtime.is_main)
        if config.gpu_ids and gpu_ids is None:
            log.info("gpu_ids=%s: no CUDA here, ignored", list(config.gpu_ids))
        try:
            given = "--config", Path(args.config), *args.overrides
            return train(config, runtime, dry_run=args.dry_run, sheet=args.sheet, given=given)
        except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU has no own
            if not re.search("out of memory|can't allocate memory", str(error)):
                raise
            raise UserError(
                f"out of memory on {runtime.device}; raise gradient_accumulation_steps (now "
                f"{config.gradient_accumulation_steps}), which keeps the result, or lower "
                f"batch_size (now {config.batch_size})"
            ) from error


def train(
    config: Config, runtime: Runtime, *, dry_run: bool, sheet: str | None = None, given: tuple = ()
) -> int:
    """Build everything the config names, and run it. Returns the exit code.

    A `dry_run` computes one loss instead, and writes nothing but the first batch to `sheet`. What
    was `given` on the command line to make this config, the commands of the last lines repeat.
    """
    job = prepare(config, runtime)
    if job is None:
        if runtime.is_main and not dry_run:
            mark_complete(config.run_dir)
        return EXIT_OK
    config, spec = job.config, job.dataset.spec
    evaluation = training_evaluation(job)
    if dry_run:
        build.log_start(job)
        build.try_batch(job, sheet)
        return EXIT_OK
    with open_run_dir(config, runtime, job.seen) as status:
        build.log_start(job)
        status.update(total_steps=job.schedule.total_steps)
        learner = Learner(job)
        facts = dict(ema=config.use_ema, values=job.dataset.values)
        run = Run(learner.sampled_model, job.process, spec, config, **facts)
        trainer = build.build_trainer(
            job,
            learner,
            status,
            best=best_score(config),
            evaluate=evaluation and partial(evaluate, evaluation, run, runtime),
            preview=partial(preview, run, runtime, images=job.held_out or job.dataset),
        )
        try:
            code = trainer.train()
        finally:
            trainer.tracker.finish()
        status.finish(code)
    if code == EXIT_OK:
        build.log_end(config, given)
    return code


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
