"""What the command lines of the scripts share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from utils.errors import EXIT_USAGE


class Parser(argparse.ArgumentParser):
    """Tells a fault in one line, and not below the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"error: {message}; see python {self.prog} --help\n")


def new_parser(
    description: str, make: Callable[..., argparse.ArgumentParser] = Parser
) -> argparse.ArgumentParser:
    """A parser with the options every script has. Finish with `parse_args` of this module.

    Args:
        make: what makes a parser; that of a subcommand is made by its parent.
    """
    parser = make(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Config keys can follow as key=value, e.g. batch_size=64 model_params.dropout=0.1",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="set_values",
        help="override a config key (same as a bare key=value)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 or mps; default: the best there is")
    parser.add_argument("--print_config", action="store_true", help="print the config and stop")
    parser.add_argument("--dry_run", action="store_true", help="check everything, write nothing")
    return parser


def add_checkpoint_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Which weights, for every script that reads a checkpoint."""
    add = parser.add_argument
    known = "a .pth or exported .safetensors file, or a run directory"
    add("--checkpoint", "--ckpt", required=required, help=known)
    add("--config", help="config file laid over the one in the checkpoint")
    add("--use_ema", action="store_true", default=None, help="averaged weights (the default)")
    add("--no_ema", action="store_false", dest="use_ema", help="raw weights")


def add_sampling_options(
    parser: argparse.ArgumentParser,
    samplers: Iterable[str],
    *,
    sweep: bool = False,
    needs_checkpoint: bool = True,
) -> None:
    """What all that sample take: which weights, and how to sample from them.

    With `sweep`, steps and cfg_scale are lists of values.
    """
    add = parser.add_argument
    steps, scale = (parse_int_list, parse_float_list) if sweep else (int, float)
    several = "; a list such as %s makes a sweep" if sweep else "%.0s"
    add_checkpoint_options(parser, required=needs_checkpoint)
    add("--sampling_method", help=f"{', '.join(samplers)}; default: the config's")
    add("--num_inference_steps", "--steps", type=steps, help="sampling steps" + several % "20,50")
    add("--ddim_eta", type=float, help="0 deterministic, 1 as DDPM")
    scales = "0 unconditional, 1 conditional, above 1 guided" + several % "1,1.5,2"
    add("--cfg_scale", type=scale, help=scales)
    add("--seed", type=int, help="image i uses seed + i; default: the config's seed")
    add("--compile", choices=("model", "blocks"), help="torch.compile it: for many images on a GPU")


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse; hyphens in option names count as underscores. `.overrides` lists the key=values."""
    # not intermixed: a subcommand's parser takes nothing in between
    args, rest = parser.parse_known_args(with_underscores(argv))
    if unknown := [token for token in rest if token.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.overrides = [*args.set_values, *rest]
    return args


def with_underscores(argv: Sequence[str]) -> list[str]:
    """`--dry-run` -> `--dry_run`."""
    found = []
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token.partition("=")
            token = "--" + name[2:].replace("-", "_") + equals + value
        found.append(token)
    return found


def parse_float_list(text: str) -> list[float]:
    """`"1,1.5,2"` -> [1.0, 1.5, 2.0]."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers such as 1,1.5,2") from None


def parse_int_list(text: str) -> list[int]:
    """`"0,1,5-7"` -> [0, 1, 5, 6, 7]. For --labels and --seeds."""
    numbers = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            found = range(int(first), int(last) + 1) if dash else [int(first)]
        except ValueError:
            found = []
        if not found:
            raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers such as 0,1,2 or 0-9")
        numbers += found
    return numbers
