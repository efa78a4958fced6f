"""The commands of `edit.py`: one more is a function, and a row of this table.

A command is a generator of lines to print. Before the first line, which says what it is about to
do, it has checked all that it was given. What it draws and writes, it does after that one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from datasets import SPLITS
from editing.command import Job
from editing.from_noise import decode, grid, interpolate
from editing.from_pictures import img2img, inpaint, invert
from utils.cli import image_count, parse_int_list


class Command(NamedTuple):
    """A subcommand. One that `sweeps` takes lists of numbers of steps and of guidance scales."""

    run: Callable[[Job], Iterator[str]]  # its docstring is the help text
    options: dict[str, dict[str, Any]]  # names, separated by spaces -> settings of `add_argument`
    sweeps: bool = False


LABELS = {"--labels": dict(type=parse_int_list, help="a class for all images, or one for each")}
SEEDS = {"--seeds": dict(type=parse_int_list, help="a seed for all images, or one for each")}
PICTURES = {
    "--input": dict(metavar="PATH", help="pictures: an image file, a folder, or an .npz"),
    "--real_split": dict(choices=SPLITS, help="or images of the model's data set"),
    "--num_samples --n": dict(
        type=int, help="how many of them; default: all (not --n under torchrun)"
    ),
    "--save_images": dict(action="store_true", help="each result as NAME_images/000000.png ..."),
    **LABELS,
}
WAY = dict(type=parse_int_list, action="append")
FILM = {
    "--seeds": WAY | dict(help="stops of the noise; given again: another row"),
    "--labels": WAY | dict(help="stops of the class, likewise"),
    "--frames": dict(type=image_count, default=16, help="from one stop to the next, both counted"),
    "--format": dict(choices=("gif", "mp4"), default="gif", help="format of the film"),
    "--fps": dict(type=float, default=12.0, help="frames a second"),
    "--final_seconds": dict(type=float, default=1.0, help="how long the last frame stays"),
}
STRENGTH = {
    "--strength": dict(type=float, default=0.6, help="share of the steps: 1 forgets the picture")
}
HOLE = {
    "--mask": dict(metavar="PATH", help="an image as large as the model's; white is drawn"),
    "--box": dict(type=parse_int_list, metavar="X0,Y0,X1,Y1", help="or a rectangle, in pixels"),
    "--resample": dict(
        type=image_count, default=1, help="take each step so often (RePaint); default: 1"
    ),
}
ITERATIONS = {
    "--iterations": dict(type=image_count, default=5, help="forwards a step towards the noise")
}
NOISE = {
    "--latents": dict(required=True, metavar="NPZ", help="the file that invert wrote"),
    "--labels": dict(type=parse_int_list, help="other classes than those in the file"),
}

COMMANDS = {
    "interpolate": Command(interpolate, FILM),
    "img2img": Command(img2img, PICTURES | SEEDS | STRENGTH),
    "inpaint": Command(inpaint, PICTURES | SEEDS | HOLE),
    "invert": Command(invert, PICTURES | ITERATIONS),
    "decode": Command(decode, NOISE),
    "grid": Command(grid, LABELS | SEEDS, sweeps=True),
}
