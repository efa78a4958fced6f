"""What the command lines of the scripts share, and how values written there or in a config read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from utils.errors import EXIT_USAGE, one_line, printable, shell_line
from utils.files import expand_home

COMPILE_MODES = ("model", "blocks", "graphs")
MAX_IMAGES = 10**6  # of one command: the images, or their numbers, must fit into memory
PLAIN_NUMBER = re.compile(
    r"[-+]?(?=[.]?[0-9])(0|[1-9][0-9]{0,2}(_[0-9]{3})+|[1-9][0-9]*)?([.][0-9]*)?([eE][-+]?[0-9]+)?"
)


class Parser(argparse.ArgumentParser):
    """A parser that tells a fault in one line, without the usage that argparse puts above it, and
    with what to write instead of the options that other projects have."""

    given: Sequence[str] = ()

    def __init__(self, **settings: Any) -> None:
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=as_written, allow_abbrev=False, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse does, but unknown options are an error; also of a subcommand's parser."""
        self.given = args or ()
        known, rest = super().parse_known_args(args, namespace)
        if unknown := [token for token in rest if token.startswith("-")]:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, rest

    def error(self, message: str) -> NoReturn:
        hint = instead_of_foreign(self.given, self._option_string_actions)
        self.exit(EXIT_USAGE, printable(f"error: {message}{hint}; see python {self.prog} --help\n"))


def instead_of_foreign(argv: Sequence[str], options: Collection[str]) -> str:
    """The end of a message: what to write for those options of `argv` that are none of `options`,
    be it one of these or key=value; "" if nothing is known of them."""
    from utils.config import ALIASES, RULES, did_you_mean  # which needs this module

    foreign: dict[str, list[str]] = {}
    values: list[str] = []  # of the option before; nobody asks for those of a known one
    for token in argv:
        option, _, value = token.partition("=")
        if token.startswith("--"):
            values = [value] if value else []
            if option not in options:
                foreign[option[2:]] = values
        elif "=" not in token:
            values.append(token)
    keys, hints = {}, []
    for name, values in foreign.items():
        key = ALIASES.get(name, name)
        if f"--{key}" not in options and key in RULES and "--config" in options:
            keys[key] = ",".join(values) or "true"
        elif near := did_you_mean(key, [option.lstrip("-") for option in options]):
            hints.append(near.replace("; ", f"; --{name}: ").replace("'", "'--", 1))
    if keys:
        has_config = any(token.startswith("--config") for token in argv)
        config = f"--config {_shipped_config(keys.get('dataset', ''))}"
        place = "the other options" if has_config or "--checkpoint" in options else config
        pairs = shell_line(*(f"{key}={value}" for key, value in keys.items()))
        hints.append(f"; write {pairs} behind {place}")
    return "".join(hints)


def _shipped_config(dataset: str) -> str:
    """The config that is there for a data set, the UNet's if there are several."""
    name = re.sub(r"[\W_]", "", dataset.lower())
    paths = Path("configs").glob(f"{name}_*.py") if name else ()
    fitting = sorted(paths, key=lambda path: (path.stem != f"{name}_unet", path.name))
    return str(fitting[0]) if fitting else "FILE"


def new_parser(
    description: str, make: Callable[..., argparse.ArgumentParser] = Parser
) -> argparse.ArgumentParser:
    """A parser with the options that every script has; `parse_args` below reads the command line.
    The parser of a subcommand is made (`make`) by the parser above it."""
    keys = "Config keys can follow as key=value, e.g. batch_size=64 model_params.dropout=0.1"
    parser = make(description=description, epilog=keys)
    add = parser.add_argument
    override = "override a config key (same as a bare key=value)"
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="set_values", help=override)
    add("--device", help="cpu, cuda, cuda:1 or mps; default: the best there is")
    add("--print_config", action="store_true", help="print the config and stop")
    add("--dry_run", action="store_true", help="check everything, write nothing")
    return parser


def add_checkpoint_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """The options of every script that reads a checkpoint: which file, and which of its weights."""
    add = parser.add_argument
    kinds = "a .pth or exported .safetensors file, or a run directory"
    add("--checkpoint", "--ckpt", required=required, help=kinds)
    add("--config", help="config file laid over the one in the checkpoint")
    add("--use_ema", action="store_true", default=None, help="averaged weights (the default)")
    add("--no_ema", action="store_false", dest="use_ema", help="raw weights")


def add_sampling_options(
    parser: argparse.ArgumentParser,
    samplers: Iterable[str],
    *,
    sweep: bool = False,
    needs_checkpoint: bool = True,
    takes_guide: bool = False,
) -> None:
    """The options of every script that samples: which weights, and how to sample from them, with
    one of `samplers`. In a `sweep` the number of steps and cfg_scale may be lists of values."""
    add = parser.add_argument
    steps, scale = (parse_int_list, parse_float_list) if sweep else (int, float)
    several = "; a list such as %s makes a sweep" if sweep else "%.0s"
    add_checkpoint_options(parser, required=needs_checkpoint)
    add("--sampling_method", help=f"{', '.join(samplers)}; default: the config's")
    add("--num_inference_steps", "--steps", type=steps, help="sampling steps" + several % "20,50")
    add("--ddim_eta", type=float, help="0 deterministic, 1 as DDPM")
    scales = "0 unconditional, 1 conditional, above 1 guided" + several % "1,1.5,2"
    add("--cfg_scale", type=scale, help=scales)
    if takes_guide:
        instead = "checkpoint of a weaker model that guides, instead of the model without labels"
        add("--guide", metavar="CHECKPOINT", help=instead)
        width = "average over this share of the training, from snapshots"
        add("--ema_width", type=scale, help=width + several % "0.05,0.1")
    add("--seed", type=whole_number, help="image i uses seed + i; default: the config's seed")
    add("--compile", choices=COMPILE_MODES, help="torch.compile it: for many images on a GPU")


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse; hyphens in option names count as underscores. `.overrides` lists the key=values."""
    # not intermixed: a subcommand's parser takes nothing in between
    args, rest = parser.parse_known_args(normalized(argv))
    args.overrides = [*args.set_values, *rest]
    return args


def normalized(argv: Sequence[str]) -> list[str]:
    """The arguments with underscores in the names of options, `--dry-run` -> `--dry_run`, and with
    the home directory for `~` where a value begins with it, as no other value does. Raises a
    ConfigError if there is no such home."""
    arguments = []
    for given in argv:
        option, value = re.fullmatch("(--[^=]*=?)?(.*)", given, re.DOTALL).groups("")
        value = expand_home(value) if value.startswith("~") else value
        arguments.append(option[:2] + option[2:].replace("-", "_") + value)
    return arguments


def plain_number(text: str) -> int | float:
    """The number in `text`. Raises a ValueError for any but a plain decimal: readers do not agree
    on what 0123, 1:30, 1_0 and 0x10 are. 10_000 is plain to all of them."""
    if not PLAIN_NUMBER.fullmatch(text):
        raise ValueError("a number is needed, as a plain decimal such as 10 or 0.1")
    return int(text) if text.lstrip("+-").replace("_", "").isdigit() else float(text)


def plain_name(value: Any) -> Any:
    """A name in small letters; dotted names and paths, whose case counts, as they are."""
    return value.lower() if isinstance(value, str) and re.fullmatch(r"[\w-]+", value) else value


# What follows reads values of config keys before pydantic checks their types, and raises a
# ValueError. Its own lax mode takes True for 1, "no" for False and 1 for True. Here a bool is never
# a number, and a number is never a bool; "2e-4" is a float because PyYAML reads it as a string.


def read_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    if isinstance(value, str):
        value = plain_number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def read_sequence(value: Any) -> Any:
    return (value,) if isinstance(value, int | float | str) else value


def read_image_size(value: Any) -> Any:
    sides = value if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2:
        raise ValueError("one side or (height, width) is needed")
    return sides


def read_compile(value: Any) -> Any:
    return {True: "model", False: None}[value] if isinstance(value, bool) else value


def parse_float_list(text: str) -> list[float]:
    """The numbers of an option such as `--cfg_scale 1,1.5,2`."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers such as 1,1.5,2") from None


def whole_number(text: str, least: int = 0, most: int = 2**63 - 1) -> int:
    """The number of an option such as `--seed 3`; none that is larger than 64 bits hold."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{one_line(text, 40)!r}: give a whole number") from None
    if not least <= number <= most:
        bound = f"at least {least}" if number < least else f"at most {most}"
        raise argparse.ArgumentTypeError(f"{one_line(text, 40)}: must be {bound}")
    return number


def image_count(text: str) -> int:
    """The number of an option such as `--num_samples 64`."""
    return whole_number(text, 1, MAX_IMAGES)


def parse_int_list(text: str) -> list[int]:
    """The numbers of an option such as `--labels 0,1,5-7`, a range with both its ends."""
    numbers = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            added = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            added = range(0)
        if not added:
            form = "give whole numbers such as 0,1,2 or 0-9"
            raise argparse.ArgumentTypeError(f"{one_line(text, 40)!r}: {form}")
        whole_number(str(added[-1]))
        numbers += islice(added, MAX_IMAGES + 1)
        if len(numbers) > MAX_IMAGES:
            raise argparse.ArgumentTypeError(f"{text[:40]}: more than {MAX_IMAGES} numbers")
    return numbers
