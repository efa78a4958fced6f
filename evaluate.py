"""Score a trained checkpoint: FID, IS, LPIPS diversity, accuracy of the requested class.

python evaluate.py --checkpoint checkpoints/digits_unet --num_samples 1000 --metrics class_acc
torchrun --standalone --nproc_per_node=2 evaluate.py --checkpoint checkpoints/cifar10_unet
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

import datasets
from datasets.loader import image_batches
from diffusion import SAMPLERS
from diffusion.generation import Run, Sampling, generate, sampling_from
from metrics import METRICS, check_metric_names
from metrics.comparison import compare, read_report
from metrics.features import remove_features
from metrics.gallery import Gallery
from metrics.inception import FID_FEATURES, InceptionScorer
from metrics.plan import Plan, build_scorers, plan_metrics
from metrics.reference import read_reference, write_reference
from metrics.report import (
    build_report,
    code_version,
    count_warnings,
    pictures_of,
    report_path,
    save_report,
    save_sweep,
    summary,
)
from metrics.samples import SampleStore, resumed, sample_key
from metrics.scoring import Batches, RealImages, Scorer, Scoring, choose_indices, save_batches
from metrics.weights import file_sha256
from sample import load_run
from utils.cli import add_sampling_options, new_parser, parse_args
from utils.config import Config, format_config
from utils.distributed import Runtime, describe_device, distributed_runtime
from utils.errors import (
    EXIT_INCOMPLETE,
    EXIT_OK,
    ConfigError,
    DataError,
    UserError,
    exit_code_of,
)
from utils.logs import setup_logging

TIMEOUT_MINUTES = 240.0  # the others wait while the main process downloads, trains, or is slower
# name -> images of one set, sets with seeds of their own
PRESETS = {"smoke": (64, 1), "quick": (5_000, 1), "paper": (50_000, 3)}
log = logging.getLogger("diffusion")


class Setting(NamedTuple):
    """One set of images to score."""

    sampling: Sampling
    seed: int

    def name(self, *, with_seed: bool) -> str:
        """Part of a file name."""
        scale, steps = self.sampling.cfg_scale, self.sampling.num_inference_steps
        return f"cfg{scale:g}_steps{steps}" + (f"_seed{self.seed}" if with_seed else "")


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__ or "")
    add_sampling_options(parser, SAMPLERS, sweep=True)
    add = parser.add_argument
    add("--metrics", help=f"of {','.join(METRICS)}, or all; default: the config's eval_metrics")
    add("--num_samples", "--n", type=int, help="images; default: the config's eval_num_samples")
    add("--repeats", type=int, help="sets of images with seeds of their own (default: 1)")
    add("--preset", choices=list(PRESETS), help="64 images, 5,000, or 3 sets of 50,000")
    add("--num_real", type=int, help="real train images to compare with; default: all")
    add("--reference", metavar="NPZ", help="mu and sigma to compare with (fid), e.g. of EDM")
    add("--write_reference", metavar="NPZ", help="write those of the real images (needs fid)")
    add("--batch_size", type=int, default=128, help="images at a time, on each process")
    add("--save_images_dir", help="also write every image there as 000000.png ...")
    add("--keep_samples", action="store_true", help="keep the images for another evaluation")
    add("--output", help="report file (.json) or its folder; default: eval/ beside the checkpoint")
    add("--compare", metavar="REPORT", help="an older report.json; shows what changed")
    add("--strict", action="store_true", help="exit with 3 if a metric has no value")
    add("--inception_weights", metavar="PATH", help="for fid, kid, is, prdc; default: cache")
    add("--lpips_weights", metavar="PATH", help="AlexNet for lpips; default: cache or download")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_args(make_parser(), argv)
    args.command = shlex.join(["python", "evaluate.py", *argv])
    check_metric_names(args.metrics.split(",") if args.metrics is not None else METRICS)
    counts = (args.batch_size, args.num_samples, args.num_real, args.repeats)
    if any(count is not None and count < 1 for count in counts):
        raise ConfigError(
            "--num_samples, --num_real, --repeats and --batch_size must be at least 1"
        )
    if args.seed is not None and args.seed < 0:
        raise ConfigError(f"--seed {args.seed}: must be 0 or more")
    if args.compare is not None:
        read_report(args.compare)
    with distributed_runtime(args.device, timeout_minutes=TIMEOUT_MINUTES) as runtime:
        setup_logging(is_main=runtime.is_main and not args.print_config)
        run = load_run(
            args.checkpoint,
            runtime.device,
            use_ema=args.use_ema,
            config_path=args.config,
            overrides=args.overrides,
        )
        if args.print_config:
            if runtime.is_main:
                print(format_config(run.config))
            return EXIT_OK
        return evaluate(args, run, runtime)


def evaluate(args: argparse.Namespace, run: Run, runtime: Runtime) -> int:
    """Plan, then sample, score and report each setting. Returns the exit code: 0 even if metrics
    are skipped or fail, unless --strict."""
    config, spec = run.config, run.spec
    names = check_metric_names(args.metrics.split(",") if args.metrics else config.eval_metrics)
    preset_count, preset_repeats = PRESETS.get(args.preset, (None, 1))
    count = args.num_samples or preset_count or config.eval_num_samples
    repeats = args.repeats or preset_repeats
    settings = plan_settings(args, config, count, repeats)
    labels = [i % spec.num_classes for i in range(count)] if config.conditional else None
    reference = None
    if args.reference is not None:
        reference = read_reference(args.reference, FID_FEATURES)
    real, test, no_real = real_images(run, runtime, args.batch_size, args.num_real)
    plan = plan_metrics(
        names,
        runtime=runtime,
        given_weights={"inception": args.inception_weights, "lpips": args.lpips_weights},
        unlabelled=None if labels else "the model was trained without class labels",
        no_classes=None if spec.num_classes else "the data set has no class labels",
        no_real_images=no_real,
        has_reference=reference is not None,
        download=not args.dry_run,
    )
    path = report_path(args.output, run.checkpoint.parent / "eval")
    describe(run, runtime, settings, count, plan, path)
    if args.dry_run:
        return EXIT_OK
    make_folders(path.parent, args.save_images_dir)

    features_dir = path.parent / "features"
    if runtime.is_main:  # of a run that was interrupted
        remove_features(features_dir)
    runtime.barrier()
    scorers = build_scorers(
        plan,
        runtime=runtime,
        num_images=count,
        labels=labels,
        shape=spec.shape,
        num_classes=spec.num_classes,
        test_images=test,
        cache_dir=run.checkpoint.parent / "eval",
        features_dir=features_dir,
        real=real,
        reference=reference,
        flip=datasets.default_flip(config),
        log=log.info,
    )
    gallery = Gallery(num_images=count, labels=labels, shape=spec.shape)
    scoring = Scoring([*scorers, gallery], runtime=runtime, warn=log.warning)
    scoring.see_real(real)
    if args.write_reference is not None and runtime.is_main:
        keep_statistics(Path(args.write_reference), scoring.alive)
    facts = provenance(args, run, runtime, count, real)
    old = None if args.compare is None else read_report(args.compare)
    reports = []
    for setting in settings:
        started = time.perf_counter()
        store = sample_store(path.parent, run, facts["sha256"], setting)
        name = setting.name(with_seed=repeats > 1)
        subfolder = () if len(settings) == 1 else (name,)
        batches = sampled(args, run, runtime, setting, count, labels, store, subfolder)
        entries = scoring.score(batches, count, always_sample=args.save_images_dir is not None)
        if not runtime.is_main:
            continue
        report = build_report(
            plan.skipped | entries,
            provenance=facts | of_setting(setting) | {"seconds": seconds_since(started)},
            warnings=count_warnings(plan.runnable, count, spec.channels),
        )
        if old is not None:
            report["comparison"] = compare(report, old)
        single = path if len(settings) == 1 else path.with_stem(f"{path.stem}_{name}")
        save_report(single, report, pictures_of(scorers, gallery, real))
        reports.append((setting, single, report))
        log.info("%s\nreport: %s", summary(report), single.with_suffix(".html"))
        if not args.keep_samples:
            store.remove()
    if runtime.is_main:
        remove_features(features_dir)
        if len(settings) > 1:
            save_sweep(path, reports, facts)
    values = [entry["value"] for _, _, report in reports for entry in report["metrics"].values()]
    incomplete = runtime.broadcast_object(None in values)
    return EXIT_INCOMPLETE if args.strict and incomplete else EXIT_OK


def keep_statistics(path: Path, scorers: Sequence[Scorer]) -> None:
    """What FID compares with, as a file for others; a refusal is no reason to stop."""
    for scorer in scorers:
        if isinstance(scorer, InceptionScorer) and "fid" in scorer.names:
            meta = scorer.store[1] if scorer.store else {}
            try:
                write_reference(path, scorer.real_statistics(meta))
                log.info("statistics of the real images: %s", path)
            except (OSError, ValueError) as error:
                log.warning("--write_reference %s: not written, %s", path, error)
            return
    log.warning("--write_reference: fid does not run, so there is nothing to write")


def plan_settings(
    args: argparse.Namespace, config: Config, count: int, repeats: int
) -> list[Setting]:
    """Every combination of the swept values; repeats do not share a seed."""
    seed = config.seed if args.seed is None else args.seed
    return [
        Setting(
            sampling_from(config, args.sampling_method, steps, args.ddim_eta, scale),
            seed + repeat * count,
        )
        for scale in args.cfg_scale or [None]
        for steps in args.num_inference_steps or [None]
        for repeat in range(repeats)
    ]


def sample_store(folder: Path, run: Run, sha256: str, setting: Setting) -> SampleStore:
    """Where the images of a setting wait for a restart; their name holds all they depend on."""
    content = {
        "checkpoint": sha256,
        "ema": run.ema,
        "precision": run.config.precision,
        **of_setting(setting),
    }
    return SampleStore(folder / f"samples_{sample_key(content)}", run.spec.shape)


def sampled(
    args: argparse.Namespace,
    run: Run,
    runtime: Runtime,
    setting: Setting,
    count: int,
    labels: list[int] | None,
    store: SampleStore,
    subfolder: tuple[str, ...],
) -> Batches:
    """This process's share of the images, those of an interrupted run first, with a bar."""
    share = runtime.share(count)
    alone = dataclasses.replace(runtime, rank=0, world_size=1)

    def draw(indices: range) -> Iterator[Tensor]:
        seeds = range(setting.seed + indices.start, setting.seed + indices.stop)
        asked = None if labels is None else labels[indices.start : indices.stop]
        for images, _, _ in generate(
            run,
            seeds,
            asked,
            sampling=setting.sampling,
            batch_size=args.batch_size,
            runtime=alone,
        ):
            yield images

    there = sum(len(part) for part, path in store.runs(share) if path is not None)
    if there:
        log.info("%d of %d images are there already: %s", there, len(share), store.folder)
    batches = resumed(store, share, labels, draw, log.warning)
    batches = with_progress(batches, len(share), runtime)
    if args.save_images_dir is not None:
        folder = Path(args.save_images_dir, *subfolder)
        batches = save_batches(batches, folder, share.start, log.warning)
    return batches


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
    with tqdm(total=total, unit="image", disable=not runtime.is_main) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch[0]))


def describe(
    run: Run, runtime: Runtime, settings: list[Setting], count: int, plan: Plan, path: Path
) -> None:
    weights = "EMA weights" if run.ema else "raw weights"
    device = f"{describe_device(runtime.device)}, {runtime.world_size} process(es)"
    log.info("%s (step %d, %s) on %s", run.checkpoint, run.step, weights, device)
    for setting in settings:
        log.info("%d images from seed %d: %s", count, setting.seed, setting.sampling.describe())
    for line in plan.lines():
        log.info("%s", line)
    log.info("report: %s", path)


def provenance(
    args: argparse.Namespace, run: Run, runtime: Runtime, count: int, real: RealImages | None
) -> dict[str, Any]:
    """How the images came about: enough to make them again."""
    config: Config = run.config
    return {
        "command": args.command,
        "checkpoint": str(run.checkpoint),
        "sha256": file_sha256(run.checkpoint),
        "step": run.step,
        "epoch": run.epoch,
        "ema": run.ema,
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
        "code": code_version(),
    }


def of_setting(setting: Setting) -> dict[str, Any]:
    sampling = setting.sampling
    return {
        "sampler": sampling.method,
        "steps": sampling.num_inference_steps,
        "eta": sampling.eta,
        "cfg_scale": sampling.cfg_scale,
        "sampling": asdict(sampling),
        "seed": setting.seed,
    }


def seconds_since(started: float) -> float:
    return round(time.perf_counter() - started, 1)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
