"""Edit with a trained checkpoint: interpolation, img2img (SDEdit), inpainting, inversion.

python edit.py interpolate --checkpoint checkpoints/digits_unet --seeds 3,8 --labels 2,7
python edit.py img2img --checkpoint checkpoints/digits_unet --real_split test --n 8 --labels 3
python edit.py inpaint --checkpoint checkpoints/digits_unet --real_split test --n 8 --box 0,8,16,16
python edit.py invert --checkpoint checkpoints/digits_unet --real_split test --n 8
python edit.py decode --checkpoint checkpoints/digits_unet --latents samples/invert.npz
python edit.py grid --checkpoint checkpoints/digits_unet --cfg_scale 1,2,4 --steps 5,10,25
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from diffusion import SAMPLERS
from editing import COMMANDS
from editing.command import Job
from generation.run import load_run_of
from utils.cli import Parser, add_sampling_options, image_count, new_parser, parse_args
from utils.config import format_config
from utils.distributed import describe_device, distributed_runtime
from utils.errors import EXIT_OK, ConfigError, exit_code_of, say
from utils.files import make_output_dir, output_name
from utils.logs import setup_logging


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        text = command.run.__doc__ or ""
        sub = new_parser(text, partial(parsers.add_parser, name, help=text))
        add_sampling_options(sub, SAMPLERS, sweep=command.sweeps)
        sub.add_argument("--batch_size", type=image_count, default=64, help="images at a time")
        sub.add_argument("--output_dir", default="samples", help="where files go")
        sub.add_argument("--output_name", default=name, help=f"their name (default: {name})")
        for names, settings in command.options.items():
            sub.add_argument(*names.split(), **settings)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(make_parser(), sys.argv[1:] if argv is None else argv)
    with distributed_runtime(args.device) as runtime:
        tell = say if runtime.is_main else (lambda *_: None)
        setup_logging(is_main=runtime.is_main and not args.print_config)
        run = load_run_of(args, runtime.device, args.compile)
        if args.print_config:
            tell(format_config(run.config))
            return EXIT_OK
        if run.config.condition:
            raise ConfigError("edit.py has no pictures for this model; use sample.py --condition")
        args.output_name = output_name(args.output_name)
        lines = COMMANDS[args.command].run(Job(args, run, runtime))
        tell(f"{run.describe()} on {describe_device(runtime.device)}\n{next(lines)}")
        if args.dry_run:
            return EXIT_OK
        make_output_dir(args.output_dir, "--output_dir")
        for line in lines:
            tell(line)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
