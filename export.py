"""Take a trained model elsewhere: one `.safetensors` file, or a folder that diffusers loads.

python export.py --checkpoint checkpoints/digits_unet --format safetensors --output a.safetensors
python export.py --checkpoint checkpoints/cifar10_unet --format diffusers --output cifar10
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from exporting.diffusers_pipeline import to_pipeline, write_folder
from exporting.hub import LICENSES, REPOSITORY, model_card, push
from exporting.safetensors import save_weights, weights_in
from generation.run import load_run_of
from utils.checkpoint import WEIGHTS_SUFFIX
from utils.cli import add_checkpoint_options, new_parser, parse_args
from utils.config import format_config
from utils.distributed import choose_device
from utils.errors import EXIT_OK, ConfigError, UserError, exit_code_of, require, say, show, told_as
from utils.logs import setup_logging


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__ or "")
    add_checkpoint_options(parser)
    add = parser.add_argument
    add("--ema_width", type=float, help="average over this share of the training, from snapshots")
    add("--format", required=True, choices=("safetensors", "diffusers"), help="what to write")
    add("--dtype", choices=("float32", "float16"), default="float32", help="of safetensors")
    add("--output", required=True, help="the file or folder to write; it must not exist")
    add("--license", choices=LICENSES.split(), help="what the model card names")
    add("--push", metavar="USER/NAME", help="upload it to this repository of the Hub, too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(make_parser(), sys.argv[1:] if argv is None else argv)
    setup_logging(is_main=not args.print_config)
    output = Path(args.output)
    check_output(output, args.format, args.push)
    if args.format != "safetensors" and args.dtype != "float32":
        raise ConfigError(f"--dtype {args.dtype}: for --format safetensors; leave it out")
    run = load_run_of(args, choose_device(args.device))
    run.model.cpu()
    if args.print_config:
        say(format_config(run.config))
        return EXIT_OK
    say(run.describe())
    sampling, size = None, ""
    if args.format == "safetensors":
        require("safetensors")
        weights, difference = weights_in(run, args.dtype)
        size = f"{sum(tensor.nbytes for tensor in weights.values()) / 1e6:.2f} MB, {args.dtype}; "
        write = partial(save_weights, output, run, weights, args.dtype)
    else:
        pipeline, sampling, difference = to_pipeline(run)
        write = partial(write_folder, output, pipeline)
    say(f"{size}network outputs differ by {difference:.1e} of the largest value")
    card = model_card(run, output, args.license, sampling, difference)
    if args.dry_run:
        return EXIT_OK
    with told_as(UserError, f"--output {output}: cannot be written", OSError):
        write(card)
    say(f"wrote {output}")
    if args.push is not None:
        say(f"uploaded: {push(args.push, output)}")
    return EXIT_OK


def check_output(output: Path, file_format: str, repository: str | None) -> None:
    """Raises ConfigError unless all that is to be written is free, and named as it has to be."""
    if file_format == "safetensors" and output.suffix != WEIGHTS_SUFFIX:
        needed = f"--format safetensors writes a file named *{WEIGHTS_SUFFIX}"
        raise ConfigError(f"--output {output}: {needed}")
    card = output.with_suffix(".md") if file_format == "safetensors" else output
    for taken in filter(Path.exists, (output, card)):
        raise ConfigError(f"--output {taken}: exists already; remove it, or give another name")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: {output.parent} is not a folder")
    if repository is not None:
        require("huggingface_hub")
        if not REPOSITORY.fullmatch(repository):
            raise ConfigError(f"--push {show(repository)}: give USER/NAME, as the Hub has them")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
