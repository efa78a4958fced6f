"""Score a trained checkpoint, or pictures that exist: FID, IS, LPIPS, accuracy of the class ...

python evaluate.py --checkpoint checkpoints/digits_unet --num_samples 1000 --metrics class_acc
python evaluate.py --images samples/images --config configs/digits_unet.py
torchrun --standalone --nproc_per_node=2 evaluate.py --checkpoint checkpoints/cifar10_unet
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

import datasets
from datasets.loader import image_batches
from datasets.pictures import folder_settings, read_pictures
from datasets.real import RealSets, chosen_images, real_sets
from diffusion import SAMPLERS
from generation.run import CONFIG_CHECKS, load_run_of
from generation.sampling import Run, generate
from generation.sweep import Setting, settings_of
from metrics import METRICS, check_metric_names
from metrics.comparison import read_report
from metrics.evaluation import Evaluation, Report
from metrics.inception import FID_FEATURES
from metrics.reference import Reference, read_reference
from metrics.report import code_version, report_path, save_sweep, summary
from metrics.samples import SampleStore, resumed, sample_key, save_batches
from metrics.scoring import Batches
from metrics.weights import file_sha256
from utils.cli import add_sampling_options, new_parser, parse_args
from utils.config import Config, apply_overrides, format_config, load_config, validate
from utils.config_files import RawConfig
from utils.distributed import Runtime, describe_device, distributed_runtime
from utils.errors import (
    EXIT_INCOMPLETE,
    EXIT_OK,
    ConfigError,
    DataError,
    UserError,
    exit_code_of,
)
from utils.images import ImageSpec
from utils.labels import LABEL_MODES, requested_labels, save_labels
from utils.logs import setup_logging

TIMEOUT_MINUTES = 240.0  # the others wait while the main process downloads, trains, or is slower
# name -> images of one set, sets with seeds of their own
PRESETS = {"smoke": (64, 1), "quick": (5_000, 1), "paper": (50_000, 3)}
ONLY_CHECKPOINT = (
    "use_ema", "sampling_method", "num_inference_steps", "ddim_eta", "cfg_scale", "seed",
    "repeats", "preset", "save_images_dir", "label_mode",
)  # fmt: skip
log = logging.getLogger("diffusion")


class Source(NamedTuple):
    """Images to be scored.

    Attributes:
        name: what they are of, in a line.
        spec: shape of the images, and classes they may be asked for.
        labels: by global index, or None, for the reason `unlabelled`.
        settings: one for each set of `num_images` images; None: these exist.
        batches: (setting, name of its own subfolder or "") -> this process's share.
        discard: forget the images of a setting that were stored for a restart.
        facts: how the images came about.
        home: folder for reports, and for what serves later evaluations.
    """

    name: str
    spec: ImageSpec
    num_images: int
    labels: list[int] | None
    unlabelled: str
    settings: list[Setting | None]
    batches: Callable[[Setting | None, str], Batches]
    discard: Callable[[Setting | None], None]
    facts: dict[str, Any]
    home: Path


class Real(NamedTuple):
    """What images are compared with; `missing` says why there are no `sets`."""

    config: Config  # whose data set they are
    sets: RealSets | None = None
    missing: str | None = None
    statistics: Reference | None = None  # in their place, where FID is concerned


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__ or "")
    add_sampling_options(parser, SAMPLERS, sweep=True, needs_checkpoint=False)
    add = parser.add_argument
    add("--images", metavar="DIR|NPZ", help="score these pictures instead of a checkpoint's")
    add("--metrics", help=f"of {','.join(METRICS)}, or all; default: the config's eval_metrics")
    add("--num_samples", "--n", type=int, help="images; default: the config's eval_num_samples")
    add("--repeats", type=int, help="sets of images with seeds of their own (default: 1)")
    add("--preset", choices=list(PRESETS), help="64 images, 5,000, or 3 sets of 50,000")
    add("--label_mode", help=f"{', '.join(LABEL_MODES)} or a class; default: balanced")
    add("--real_split", choices=datasets.SPLITS, default="train", help="images to compare with")
    add("--num_real", type=int, help="how many of them; default: all")
    add("--reference", metavar="NPZ|DIR", help="compare with mu and sigma (fid), or a folder")
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
    check_arguments(args)
    with distributed_runtime(args.device, timeout_minutes=TIMEOUT_MINUTES) as runtime:
        setup_logging(is_main=runtime.is_main and not args.print_config)
        run = None if args.images is not None else load_run_of(args, runtime.device, args.compile)
        config = config_of_pictures(args) if run is None else run.config
        if args.print_config:
            if runtime.is_main:
                print(format_config(config))
            return EXIT_OK
        real = compared_with(args, config, run, runtime)
        if run is None:
            source = from_pictures(args, config, real, runtime)
        else:
            source = from_checkpoint(args, run, real, runtime)
        return evaluate(args, source, real, runtime)


def check_arguments(args: argparse.Namespace) -> None:
    """What can be said without reading anything but a report.

    Raises:
        ConfigError: unknown metrics, counts below 1, or options that exclude each other.
    """
    check_metric_names(args.metrics.split(",") if args.metrics is not None else METRICS)
    if (args.checkpoint is None) == (args.images is None):
        raise ConfigError("give --checkpoint or --images, one of them")
    if args.images is not None:
        given = [name for name in ONLY_CHECKPOINT if getattr(args, name) is not None]
        if given:
            raise ConfigError(
                f"--{given[0]} is for images drawn from a --checkpoint; those of --images exist"
            )
    counts = (args.batch_size, args.num_samples, args.num_real, args.repeats)
    if any(count is not None and count < 1 for count in counts):
        raise ConfigError(
            "--num_samples, --num_real, --repeats and --batch_size must be at least 1"
        )
    if args.seed is not None and args.seed < 0:
        raise ConfigError(f"--seed {args.seed}: must be 0 or more")
    if args.compare is not None:
        read_report(args.compare)


def config_of_pictures(args: argparse.Namespace) -> Config:
    """That of --config, or the default one, with what the command line says laid over it."""
    if args.config is not None:
        return load_config(args.config, args.overrides, checks=CONFIG_CHECKS)
    raw = RawConfig({"experiment_name": Path(args.images).stem or "pictures"}, {})
    return validate(raw, problems=apply_overrides(raw, args.overrides))


def compared_with(
    args: argparse.Namespace, config: Config, run: Run | None, runtime: Runtime
) -> Real:
    """The images of the config's data set or of a --reference folder, or statistics."""
    statistics, in_folder = None, args.reference is not None and Path(args.reference).is_dir()
    if args.reference is not None and not in_folder:
        statistics = read_reference(args.reference, FID_FEATURES)
    if in_folder:
        config = config.model_copy(update=folder_settings(args.reference))
        if run is not None:  # as its own images were: brought to the size of the model
            shape = {"image_size": run.spec.shape[1:], "image_channels": run.spec.channels}
            config = config.model_copy(update=shape)
    elif run is None and args.config is None:
        missing = "no real images: name their data set by --config, or a folder by --reference"
        return Real(config, None, missing, statistics)
    try:
        sets = real_sets(
            config, runtime, args.batch_size, split=args.real_split, limit=args.num_real
        )
        return Real(config, sets, None, statistics)
    except DataError as error:
        return Real(config, None, f"no real images: {error}", statistics)


def from_checkpoint(args: argparse.Namespace, run: Run, real: Real, runtime: Runtime) -> Source:
    """Images that a trained model draws."""
    preset_count, preset_repeats = PRESETS.get(args.preset, (None, 1))
    count = args.num_samples or preset_count or run.config.eval_num_samples
    mode, labels = None, None
    if run.config.conditional:
        mode = args.label_mode or "balanced"
        train = None if real.sets is None else real.sets.train
        labels = requested_labels(
            mode,
            count,
            run.spec.num_classes,
            classes=run.classes,
            train_labels=train and train.labels,
        )
    elif args.label_mode is not None:
        raise ConfigError("--label_mode: this model was trained without class labels")
    settings = settings_of(
        run.config,
        count,
        method=args.sampling_method,
        eta=args.ddim_eta,
        cfg_scales=args.cfg_scale,
        step_counts=args.num_inference_steps,
        seed=args.seed,
        repeats=args.repeats or preset_repeats,
    )
    facts = {
        "checkpoint": str(run.checkpoint),
        "sha256": file_sha256(run.checkpoint),
        "step": run.step,
        "epoch": run.epoch,
        "ema": run.ema,
        "label_mode": mode,
    }
    home = run.checkpoint.parent / "eval"
    folder = report_path(args.output, home).parent

    def store(setting: Setting) -> SampleStore:
        """Where images wait for a restart; the name holds all they depend on."""
        content = facts | {"precision": run.config.precision, **setting.facts()}
        return SampleStore(folder / f"samples_{sample_key(content)}", run.spec.shape)

    def batches(setting: Setting, name: str) -> Batches:
        drawn = sampled(run, runtime, setting, count, labels, store(setting), args.batch_size)
        if args.save_images_dir is None:
            return drawn
        subfolder = Path(args.save_images_dir, name)
        if runtime.is_main and labels is not None:
            with contextlib.suppress(OSError):  # the images will say so
                save_labels(subfolder, labels)
        return save_batches(drawn, subfolder, runtime.share(count).start, log.warning)

    return Source(
        name=run.describe(),
        spec=run.spec,
        num_images=count,
        labels=labels,
        unlabelled="the model was trained without class labels",
        settings=settings,
        batches=batches,
        discard=lambda setting: None if args.keep_samples else store(setting).remove(),
        facts=facts,
        home=home,
    )


def sampled(
    run: Run,
    runtime: Runtime,
    setting: Setting,
    count: int,
    labels: list[int] | None,
    store: SampleStore,
    batch_size: int,
) -> Iterator[tuple]:
    """This process's share of the images, those of an interrupted run first, with a bar."""
    share = runtime.share(count)

    def draw(indices: range) -> Iterator[Tensor]:
        seeds = range(setting.seed + indices.start, setting.seed + indices.stop)
        asked = None if labels is None else labels[indices.start : indices.stop]
        alone = dataclasses.replace(runtime, rank=0, world_size=1)
        yield from generate(
            run, seeds, asked, sampling=setting.sampling, batch_size=batch_size, runtime=alone
        )

    there = sum(len(part) for part, path in store.runs(share) if path is not None)
    if there:
        log.info("%d of %d images are there already: %s", there, len(share), store.folder)
    with tqdm(total=len(share), unit="image", disable=not runtime.is_main) as bar:
        for batch in resumed(store, share, labels, draw, log.warning):
            yield batch
            bar.update(len(batch[0]))


def from_pictures(args: argparse.Namespace, config: Config, real: Real, runtime: Runtime) -> Source:
    """Pictures that exist, a folder or an .npz."""
    path = Path(args.images)
    train = None if real.sets is None else real.sets.train
    given = {override.partition("=")[0] for override in args.overrides}
    pictures = read_pictures(
        path,
        () if train is None else train.class_names,
        image_size=config.image_size if "image_size" in given else None,
        image_channels=config.image_channels if train is None else train.spec.channels,
    )
    data, labels = pictures.data, pictures.labels
    chosen = list(chosen_images(len(data), args.num_samples))
    if args.num_samples is not None and args.num_samples > len(data):
        raise ConfigError(f"--num_samples {args.num_samples}: {path} holds {len(data)} pictures")
    if labels is not None:
        labels = [labels[i] for i in chosen]

    def batches(setting: Setting, name: str) -> Iterator[tuple]:
        share = runtime.share(len(chosen))
        start = share.start
        mine = chosen[share.start : share.stop]
        for images, _ in image_batches(data, mine, args.batch_size):
            stop = start + len(images)
            yield images, None if labels is None else labels[start:stop], None
            start = stop

    return Source(
        name=str(path),
        spec=data.spec._replace(num_classes=0 if train is None else train.num_classes),
        num_images=len(chosen),
        labels=labels,
        unlabelled=pictures.unlabelled or "",
        settings=[None],
        batches=batches,
        discard=lambda setting: None,
        facts={"images": str(path), "images_fingerprint": data.fingerprint},
        home=path.with_name(f"{path.stem}_eval"),
    )


def evaluate(args: argparse.Namespace, source: Source, real: Real, runtime: Runtime) -> int:
    """Plan, then score and report each setting. Returns the exit code: 0 even if metrics are
    skipped or fail, unless --strict."""
    names = args.metrics.split(",") if args.metrics is not None else real.config.eval_metrics
    path = report_path(args.output, source.home)
    evaluation = Evaluation(
        check_metric_names(names),
        runtime=runtime,
        spec=source.spec,
        num_images=source.num_images,
        labels=source.labels,
        unlabelled=source.unlabelled,
        real=real.sets,
        no_real=real.missing,
        reference=real.statistics,
        weights={"inception": args.inception_weights, "lpips": args.lpips_weights},
        folder=path.parent,
        cache_dir=source.home,
        flip=datasets.default_flip(real.config),
        download=not args.dry_run,
        log=log.info,
        warn=log.warning,
    )
    describe(source, runtime, evaluation, path)
    if args.dry_run:
        return EXIT_OK
    make_folders(path.parent, source.home, args.save_images_dir)

    evaluation.see_real()
    if args.write_reference is not None:
        evaluation.write_reference(Path(args.write_reference))
    shared = {"command": args.command, **source.facts, "n": source.num_images}
    shared |= facts_of(real, runtime) | {"code": code_version()}
    old = None if args.compare is None else read_report(args.compare)
    reports: list[tuple[Setting, Path, Report]] = []
    for setting in source.settings:
        started = time.perf_counter()
        name = setting.name() if len(source.settings) > 1 else ""
        drawn = {} if setting is None else setting.facts()
        report = evaluation.score(
            source.batches(setting, name),
            facts=shared | drawn,
            started=started,
            always_sample=args.save_images_dir is not None,
        )
        if report is not None:
            single = path.with_stem(f"{path.stem}_{name}") if name else path
            evaluation.save(single, report, old)
            reports.append((setting, single, report))
            log.info("%s\nreport: %s", summary(report), single.with_suffix(".html"))
            source.discard(setting)
    evaluation.close()
    if len(reports) > 1:
        save_sweep(path, reports, shared)
    values = [entry["value"] for _, _, report in reports for entry in report["metrics"].values()]
    incomplete = runtime.broadcast_object(None in values)
    return EXIT_INCOMPLETE if args.strict and incomplete else EXIT_OK


def facts_of(real: Real, runtime: Runtime) -> dict[str, Any]:
    """What images are compared with, and on what."""
    images = None if real.sets is None else real.sets.reference
    return {
        "split": images and images.split,
        "dataset": {
            "name": images and real.config.dataset,
            "fingerprint": images and images.fingerprint,
            "num_images": images and len(images.indices),
        },
        "device": describe_device(runtime.device),
        "world_size": runtime.world_size,
    }


def describe(source: Source, runtime: Runtime, evaluation: Evaluation, path: Path) -> None:
    device = f"{describe_device(runtime.device)}, {runtime.world_size} process(es)"
    log.info("%s on %s", source.name, device)
    for setting in source.settings:
        how = "as they are" if setting is None else setting.describe()
        log.info("%d images %s", source.num_images, how)
    for line in evaluation.plan.lines():
        log.info("%s", line)
    log.info("report: %s", path)


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


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
