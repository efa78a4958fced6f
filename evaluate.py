"""Score a trained checkpoint, or pictures that exist: FID, IS, LPIPS, accuracy of the class ...

python evaluate.py --checkpoint checkpoints/digits_unet --num_samples 1000 --metrics class_acc
python evaluate.py --images samples/images --config configs/digits_unet.py
torchrun --standalone --nproc_per_node=2 evaluate.py --checkpoint checkpoints/cifar10_unet
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
from diffusion import SAMPLERS
from generation.evaluated import PRESETS, compared_with, drawn_images, existing_images, score_sets
from generation.run import CONFIG_CHECKS, Run, load_run_of
from metrics import METRICS, check_metric_names, networks_of
from metrics.evaluation import Evaluation
from metrics.report import code_version, read_report, report_path
from utils import files
from utils.cli import add_sampling_options, image_count, new_parser, parse_args
from utils.config import Config, RawConfig, apply_overrides, format_config, load_config, validate
from utils.distributed import Runtime, describe_device, distributed_runtime
from utils.errors import EXIT_INCOMPLETE, EXIT_OK, ConfigError, exit_code_of, say, shell_line
from utils.labels import LABEL_MODES
from utils.logs import setup_logging

TIMEOUT_MINUTES = 240.0  # the others wait while the main process downloads, trains, or is slower
ONLY_CHECKPOINT = (
    "use_ema", "sampling_method", "num_inference_steps", "ddim_eta", "cfg_scale", "seed",
    "repeats", "preset", "save_images_dir", "label_mode", "guide", "ema_width",
)  # fmt: skip
log = logging.getLogger("diffusion")


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__ or "")
    kinds = dict(sweep=True, needs_checkpoint=False, takes_guide=True)
    add_sampling_options(parser, SAMPLERS, **kinds)
    add = parser.add_argument
    add("--images", metavar="DIR|NPZ", help="score these pictures instead of a checkpoint's")
    add("--metrics", help=f"of {','.join(METRICS)}, or all; default: the config's eval_metrics")
    images = "images; default: the config's eval_num_samples (not --n under torchrun)"
    add("--num_samples", "--n", type=image_count, help=images)
    add("--repeats", type=image_count, help="sets of images with seeds of their own (default: 1)")
    add("--preset", choices=list(PRESETS), help="64 images, 5,000, or 3 sets of 50,000")
    add("--label_mode", help=f"{', '.join(LABEL_MODES)} or a class; default: balanced")
    add("--real_split", choices=datasets.SPLITS, default="train", help="images to compare with")
    add("--num_real", type=image_count, help="how many of them; default: all")
    add("--reference", metavar="NPZ|DIR", help="compare with mu and sigma (fid), or a folder")
    add("--write_reference", metavar="NPZ", help="write those of the real images (needs fid)")
    add("--batch_size", type=image_count, default=128, help="images at a time, on each process")
    add("--save_images_dir", help="also write every image there as 000000.png ...")
    add("--keep_samples", action="store_true", help="keep the images for another evaluation")
    add("--output", help="report file (.json) or its folder; default: eval/ beside the checkpoint")
    add("--compare", metavar="REPORT", help="an older report.json; shows what changed")
    add("--strict", action="store_true", help="exit with 3 if a metric has no value")
    for network in networks_of(METRICS):
        add(network.flag, metavar="PATH", help=network.help)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_args(make_parser(), argv)
    args.command = shell_line("python", "evaluate.py", *argv)
    check_arguments(args)
    with distributed_runtime(args.device, timeout_minutes=TIMEOUT_MINUTES) as runtime:
        setup_logging(is_main=runtime.is_main and not args.print_config)
        run = None if args.images is not None else load_run_of(args, runtime.device, args.compile)
        config = config_of_pictures(args) if run is None else run.config
        if args.print_config:
            if runtime.is_main:
                say(format_config(config))
            return EXIT_OK
        return evaluate(args, config, run, runtime)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise a ConfigError for what is wrong in the arguments themselves, or in the old report."""
    check_metric_names(args.metrics.split(",") if args.metrics is not None else METRICS)
    if (args.checkpoint is None) == (args.images is None):
        raise ConfigError("give --checkpoint or --images, one of them")
    given = [name for name in ONLY_CHECKPOINT if getattr(args, name) is not None]
    if args.images is not None and given:
        raise ConfigError(f"--{given[0]}: for images drawn from a --checkpoint, not for --images")
    if args.compare is not None:
        read_report(args.compare)


def config_of_pictures(args: argparse.Namespace) -> Config:
    """The config of --config, or the default one, with the command line's values laid over it."""
    if args.config is not None:
        return load_config(args.config, args.overrides, checks=CONFIG_CHECKS)
    name = Path(args.images).stem
    raw = RawConfig({"experiment_name": name if files.is_file_name(name) else "pictures"}, {})
    return validate(raw, problems=apply_overrides(raw, args.overrides))


def evaluate(args: argparse.Namespace, config: Config, run: Run | None, runtime: Runtime) -> int:
    """Plan, then score and report each set. Returns the exit code: 0 even if metrics are skipped
    or fail, unless --strict."""
    real = compared_with(args, config, run, runtime)
    if run is None:
        images = existing_images(args, config, real)
    else:
        images = drawn_images(args, run, real, runtime)
    path, device = report_path(args.output, images.home), describe_device(runtime.device)
    evaluation = Evaluation(
        check_metric_names(args.metrics.split(",") if args.metrics else config.eval_metrics),
        images.generated,
        real,
        runtime=runtime,
        cache_dir=images.home if files.is_writable(images.home) else path.parent,
        weights={n.name: getattr(args, n.flag.strip("-")) for n in networks_of(METRICS)},
        download=not args.dry_run,
    )
    count, processes = images.generated.num_images, runtime.world_size
    log.info("%s on %s, %d process(es)", images.name, device, processes)
    for setting in images.settings:
        width = f", EMA width {setting.ema_width}" if setting and setting.ema_width else ""
        how = setting and f"from seed {setting.seed}{width}: {setting.sampling.describe()}"
        log.info("%d images %s", count, how or "as they are")
    for line in evaluation.plan.lines():
        log.info("%s", line)
    log.info("report: %s", path)
    if args.dry_run:
        return EXIT_OK
    files.make_output_dir(path.parent, "--output")
    if args.save_images_dir is not None:
        names = [setting.name() for setting in images.settings] if images.settings[1:] else [""]
        folders = [Path(args.save_images_dir, name) for name in names]
        own = config.data_root if config.dataset == "custom" else None
        files.check_inputs_stay(folders, args.reference, own)
        for folder in folders:
            files.check_picture_folder(folder, files.numbered(count), run.suffix)
        files.make_output_dir(args.save_images_dir, "--save_images_dir")

    evaluation.prepare()
    if args.write_reference is not None:
        evaluation.write_reference(Path(args.write_reference))
    facts = {"command": args.command, **images.facts, "n": count, **real.facts()}
    facts |= {"device": device, "world_size": processes, "code": code_version()}
    reports = score_sets(args, config, images, evaluation, path, facts)
    values = [entry["value"] for report in reports for entry in report["metrics"].values()]
    incomplete = runtime.broadcast_object(None in values)
    return EXIT_INCOMPLETE if args.strict and incomplete else EXIT_OK


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
