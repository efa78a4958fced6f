"""A path through noise, classes, or both, as a strip and a film."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from diffusion import Step
from editing.command import (
    AddOption,
    Command,
    Job,
    deterministic,
    draw,
    first_seed,
    output,
    sampling_of,
    spread,
)
from editing.mathematics import Frame, Waypoint, frames_along, morph_steps
from generation.run import check_labels
from generation.sampling import Run
from utils.captions import class_captions, contact_sheet
from utils.cli import parse_int_list
from utils.distributed import Runtime
from utils.errors import ConfigError
from utils.images import (
    MAX_COLUMNS,
    can_write_mp4,
    grid_rows,
    make_grid,
    save_gif,
    save_image,
    save_mp4,
)

FILM_CELL_SIZE = 128  # pixels; a film shows few images at a time


def add_options(add: AddOption) -> None:
    add("--seeds", type=parse_int_list, action="append", help="noise along the way; again: a row")
    add("--labels", type=parse_int_list, action="append", help="classes along the way, likewise")
    add("--frames", type=int, default=16, help="from one stop to the next, both counted")
    add("--format", choices=("gif", "mp4"), default="gif", help="of the film")
    add("--fps", type=float, default=12.0, help="frames a second")
    add("--final_seconds", type=float, default=1.0, help="how long the last frame stays")


def prepare(args: argparse.Namespace, run: Run, runtime: Runtime) -> Job:
    sampling = deterministic(sampling_of(args, run))
    chains = chains_of(args, run)
    if args.frames < 2:
        raise ConfigError(f"--frames {args.frames}: both ends count, so give at least 2")
    if not (0 < args.fps < float("inf") and 0 <= args.final_seconds < float("inf")):
        raise ConfigError("--fps must be above 0 and --final_seconds at least 0")
    if args.format == "mp4" and not can_write_mp4():
        raise ConfigError("--format mp4 needs a package: pip install imageio-ffmpeg; or use gif")
    frames = [frame for chain in chains for frame in frames_along(chain, args.frames)]

    def steps_of(rows: slice) -> Iterator[Step]:
        return morph_steps(run, frames[rows], sampling, runtime.device)

    def write() -> list[Path]:
        images = draw(args, run, runtime, len(frames), steps_of)
        if images is None:
            return []
        rows, left = strips(chains, args.frames, run.class_names)
        strip, film = output(args, ".png"), output(args, f".{args.format}")
        save_image(strip, contact_sheet(images, rows, left=left))
        moments = images.unflatten(0, (len(chains), -1)).transpose(0, 1)
        layout = grid_rows(len(chains))
        shown = [make_grid(m, layout, min_cell_size=FILM_CELL_SIZE) for m in moments]
        save = save_gif if args.format == "gif" else save_mp4
        save(film, shown, fps=args.fps, final_seconds=args.final_seconds)
        return [strip, film]

    stops = "; ".join(" to ".join(describe_stop(stop) for stop in chain) for chain in chains)
    return Job(
        f"{len(frames)} frames, {stops}: {sampling.describe()}",
        write,
        f"python edit.py grid --checkpoint {args.checkpoint} --seeds {chains[0][0].seed}",
    )


def chains_of(args: argparse.Namespace, run: Run) -> list[list[Waypoint]]:
    """The stops of each row, as many in every row.

    Raises:
        ConfigError: seeds and labels that do not go together, or no way to go.
    """
    if run.config.conditional and not args.labels:
        raise ConfigError("--labels: give a class, or one for each stop, e.g. 2,7")
    for labels in args.labels or []:
        check_labels(labels, run)
    seeds, labels = args.seeds or [[first_seed(args, run)]], args.labels or [[None]]
    count = max(len(seeds), len(labels))
    seeds, labels = spread(seeds, count, "--seeds"), spread(labels, count, "--labels")
    chains = []
    for row_seeds, row_labels in zip(seeds, labels, strict=True):
        stops = max(len(row_seeds), len(row_labels))
        if stops < 2:
            raise ConfigError("nothing to go to; give two or more --seeds or --labels, e.g. 2,7")
        pairs = zip(
            spread(row_seeds, stops, "--seeds of a row"),
            spread(row_labels, stops, "--labels of a row"),
            strict=True,
        )
        chains.append([Waypoint(seed, label) for seed, label in pairs])
    if len({len(chain) for chain in chains}) > 1:
        raise ConfigError("every row needs the same number of stops")
    return chains


def strips(
    chains: list[list[Waypoint]], num_frames: int, class_names: Sequence[str]
) -> tuple[list[list[int]], list[str]]:
    """Rows of frames, one from each stop to the next, thinned to what a sheet is wide; titles."""
    last = num_frames - 1
    shown = [round(i) for i in np.linspace(0, last, min(num_frames, MAX_COLUMNS))]
    rows, left = [], []
    for r, chain in enumerate(chains):
        first = r * ((len(chain) - 1) * last + 1)
        for k in range(len(chain) - 1):
            rows.append([first + k * last + i for i in shown])
            left.append(title(Frame(chain[k], chain[k + 1], 0.0), class_names))
    return rows, left


def title(frame: Frame, class_names: Sequence[str]) -> str:
    """Such as `2 to 7, seed 3`."""
    seeds = dict.fromkeys(str(stop.seed) for stop in frame[:2])
    words = f"seed {' to '.join(seeds)}"
    if frame.start.label is None:
        return words
    names = class_captions([stop.label for stop in frame[:2]], class_names)
    return f"{' to '.join(dict.fromkeys(names))}, {words}"


def describe_stop(stop: Waypoint) -> str:
    return f"seed {stop.seed}" + ("" if stop.label is None else f" label {stop.label}")


COMMAND = Command(
    "a path through noise, classes, or both, as a strip and a film", add_options, prepare
)
