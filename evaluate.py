"""Score a trained checkpoint: FID, IS, LPIPS diversity, accuracy of the requested class.

python evaluate.py --checkpoint checkpoints/digits_unet --num_samples 1000 --metrics class_acc
torchrun --standalone --nproc_per_node=2 evaluate.py --checkpoint checkpoints/cifar10_unet
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

import datasets
from datasets.loader import image_batches
from diffusion import SAMPLERS
from diffusion.generation import Run, Sampling, generate, sampling_from
from metrics import METRICS, check_metric_names
from metrics.plan import Plan, build_scorers, plan_metrics
from metrics.report import build_report, count_warnings, report_path, summary, write_report
from metrics.scoring import Batches, RealImages, choose_indices, run_scorers, save_batches
from metrics.weights import file_sha256
from sample import load_run
from utils.cli import add_sampling_options, new_parser, parse_args
from utils.config import Config, format_config
from utils.distributed import Runtime, describe_device, distributed_runtime
from utils.errors import EXIT_OK, ConfigError, DataError, UserError, exit_code_of
from utils.logs import setup_logging

TIMEOUT_MINUTES = 240.0  # the others wait while the main process downloads, trains, or is slower
log = logging.getLogger("diffusion")


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__ or "")
    add_sampling_options(parser, SAMPLERS)
    add = parser.add_argument
    add("--metrics", help=f"of {','.join(METRICS)}; default: the config's eval_metrics")
    add("--num_samples", "--n", type=int, help="images; default: the config's eval_num_samples")
    add("--num_real", type=int, help="real train images to compare with; default: all")
    add("--batch_size", type=int, default=128, help="images at a time, on each process")
    add("--save_images_dir", help="also write every image there as 000000.png ...")
    add("--output", help="report file (.json) or its folder; default: eval/ beside the checkpoint")
    add("--inception_weights", metavar="PATH", help="for fid and is; default: cache or download")
    add("--lpips_weights", metavar="PATH", help="AlexNet for lpips; default: cache or download")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(make_parser(), sys.argv[1:] if argv is None else argv)
    check_metric_names(args.metrics.split(",") if args.metrics is not None else METRICS)
    counts = (args.batch_size, args.num_samples, args.num_real)
    if any(count is not None and count < 1 for count in counts):
        raise ConfigError("--num_samples, --num_real and --batch_size must be at least 1")
    if args.seed is not None and args.seed < 0:
        raise ConfigError(f"--seed {args.seed}: must be 0 or more")
    with distributed_runtime(args.device, timeout_minutes=TIMEOUT_MINUTES) as runtime:
        setup_logging(is_main=runtime.is_main)
        run = load_run(
            args.checkpoint,
            runtime.device,
            use_ema=args.use_ema,
            config_path=args.config,
            overrides=args.overrides,
        )
        if args.print_config:
            log.info("%s", format_config(run.config))
            return EXIT_OK
        return evaluate(args, run, runtime)


def evaluate(args: argparse.Namespace, run: Run, runtime: Runtime) -> int:
    """Plan, sample, score, report. Returns the exit code: 0 even if metrics are skipped or fail."""
    started = time.perf_counter()
    config, spec = run.config, run.spec
    names = check_metric_names(args.metrics.split(",") if args.metrics else config.eval_metrics)
    sampling = sampling_from(
        config, args.sampling_method, args.num_inference_steps, args.ddim_eta, args.cfg_scale
    )
    count = args.num_samples or config.eval_num_samples
    seed = config.seed if args.seed is None else args.seed
    labels = [i % spec.num_classes for i in range(count)] if config.conditional else None
    real, test, no_real = real_images(run, runtime, args.batch_size, args.num_real)
    plan = plan_metrics(
        names,
        runtime=runtime,
        given_weights={"inception": args.inception_weights, "lpips": args.lpips_weights},
        unlabelled=None if labels else "the model was trained without class labels",
        no_real_images=no_real,
        download=not args.dry_run,
    )
    eval_dir = run.checkpoint.parent / "eval"
    path = report_path(args.output, eval_dir)
    describe(run, runtime, sampling, count, plan, path)
    if args.dry_run:
        return EXIT_OK
    make_folders(path.parent, args.save_images_dir)

    scorers = build_scorers(
        plan,
        runtime=runtime,
        num_images=count,
        labels=labels,
        shape=spec.shape,
        num_classes=spec.num_classes,
        test_images=test,
        cache_dir=eval_dir,
        flip=datasets.default_flip(config),
        log=log.info,
    )
    batches = generate(
        run,
        range(seed, seed + count),
        labels,
        sampling=sampling,
        batch_size=args.batch_size,
        runtime=runtime,
    )
    batches = with_progress(batches, -(-len(runtime.share(count)) // args.batch_size), runtime)
    if args.save_images_dir is not None:
        start = runtime.share(count).start
        batches = save_batches(batches, Path(args.save_images_dir), start, log.warning)
    entries = run_scorers(
        scorers,
        real=real,
        batches=batches,
        num_images=count,
        runtime=runtime,
        warn=log.warning,
        always_sample=args.save_images_dir is not None,
    )
    if runtime.is_main:
        report = build_report(
            plan.skipped | entries,
            provenance=provenance(run, runtime, sampling, count, seed, real, started),
            warnings=count_warnings(plan.runnable, count, spec.channels),
        )
        write_report(path, report)
        log.info("%s\nreport: %s", summary(report), path)
    return EXIT_OK


def make_folders(*folders: str | Path | None) -> None:
    """Before hours of sampling, not after.

    Raises:
        UserError: one cannot be made.
    """
    for folder in folders:
        try:
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror})") from error


def real_images(
    run: Run, runtime: Runtime, batch_size: int, limit: int | None
) -> tuple[RealImages | None, RealImages | None, str | None]:
    """The train images, the test images if there are any, and why there are no train images."""
    config = run.config

    def wrap(split: str, limit: int | None) -> RealImages:
        with runtime.main_first():  # it may download
            data = datasets.build_dataset(config, split)
        if data.spec != run.spec:
            raise DataError(f"real images are {data.spec}, the model draws {run.spec}")
        return RealImages(
            labels=data.labels.cpu(),
            indices=choose_indices(len(data), limit),
            fetch=lambda indices: image_batches(
                data, indices, batch_size, num_workers=config.num_workers
            ),
            num_classes=data.spec.num_classes,
            fingerprint=data.fingerprint,
            split=split,
            class_names=tuple(data.class_names),
        )

    try:
        real = wrap("train", limit)
    except DataError as error:
        return None, None, f"no real images: {error}"
    try:
        return real, wrap("test", None) if datasets.has_test_split(config) else None, None
    except DataError as error:
        log.warning("the test split cannot be used: %s", error)
        return real, None, None


def with_progress(batches: Batches, total: int, runtime: Runtime) -> Iterator[tuple]:
    """A bar whose clock starts with the first image, not with the classifier's training."""
    yield from tqdm(batches, total=total, unit="batch", disable=not runtime.is_main)


def describe(
    run: Run, runtime: Runtime, sampling: Sampling, count: int, plan: Plan, path: Path
) -> None:
    weights = "EMA weights" if run.ema else "raw weights"
    device = f"{describe_device(runtime.device)}, {runtime.world_size} process(es)"
    log.info("%s (step %d, %s) on %s", run.checkpoint, run.step, weights, device)
    log.info("%d images: %s", count, sampling.describe())
    for line in plan.lines():
        log.info("%s", line)
    log.info("report: %s", path)


def provenance(
    run: Run,
    runtime: Runtime,
    sampling: Sampling,
    count: int,
    seed: int,
    real: RealImages | None,
    started: float,
) -> dict[str, Any]:
    """How the images came about: enough to make them again."""
    config: Config = run.config
    return {
        "checkpoint": str(run.checkpoint),
        "sha256": file_sha256(run.checkpoint),
        "step": run.step,
        "epoch": run.epoch,
        "ema": run.ema,
        "sampler": sampling.method,
        "steps": sampling.num_inference_steps,
        "eta": sampling.eta,
        "cfg_scale": sampling.cfg_scale,
        "sampling": asdict(sampling),
        "seed": seed,
        "n": count,
        "label_mode": "balanced" if config.conditional else None,
        "split": "train",
        "dataset": {
            "name": config.dataset,
            "fingerprint": real and real.fingerprint,
            "num_images": real and len(real.indices),
        },
        "device": describe_device(runtime.device),
        "world_size": runtime.world_size,
        "seconds": round(time.perf_counter() - started, 1),
    }


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
