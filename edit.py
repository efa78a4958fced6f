"""Work with a trained checkpoint: morphs, pictures as a start, holes filled, pictures inverted.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import datasets
from datasets.pictures import fitted_pictures, read_mask
from diffusion import SAMPLERS, Step
from diffusion.editing import (
    Frame,
    Waypoint,
    box_mask,
    frames_along,
    img2img_steps,
    inpaint_steps,
    invert_steps,
    label_denoiser,
    last_timesteps,
    morph_steps,
    steps_from,
    timesteps_of,
)
from diffusion.generation import Run, Sampling, last_steps, sample_steps, sampling_from
from diffusion.sweep import settings_of
from sample import (
    MAX_GRID_IMAGES,
    check_labels,
    check_picture_folder,
    load_run_of,
    make_output_dir,
)
from utils.captions import class_captions, contact_sheet
from utils.cli import Parser, add_sampling_options, new_parser, parse_args, parse_int_list
from utils.config import format_config
from utils.distributed import Runtime, describe_device, distributed_runtime
from utils.errors import EXIT_OK, ConfigError, DataError, exit_code_of
from utils.images import (
    MAX_COLUMNS,
    can_write_mp4,
    grid_rows,
    make_grid,
    save_gif,
    save_image,
    save_mp4,
    to_float,
    to_uint8,
)
from utils.labels import save_labels
from utils.latents import Latents, read_latents, save_latents
from utils.logs import setup_logging
from utils.real_images import choose_indices

FILM_CELL_SIZE = 128  # pixels; a film shows few images at a time
HOLE_LEVEL = 128  # grey level of what is to be drawn, in the picture of the hole

T = TypeVar("T")


class Job(NamedTuple):
    """A command whose arguments have been checked.

    Attributes:
        summary: what it does, in a line.
        write: sample, on every process, and write, on the main one, which returns the files.
        following: a command that could come next.
    """

    summary: str
    write: Callable[[], list[Path]]
    following: str


class Inputs(NamedTuple):
    """Pictures to work on, uint8 (N, C, H, W), each with a seed, a caption, and perhaps a class."""

    images: Tensor
    labels: list[int] | None
    seeds: list[int]
    captions: list[str]


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, *, sweep: bool = False) -> Callable[..., argparse.Action]:
        sub = new_parser(help, partial(commands.add_parser, name, help=help))
        add_sampling_options(sub, SAMPLERS, sweep=sweep)
        sub.add_argument("--batch_size", type=int, default=64, help="images sampled at a time")
        sub.add_argument("--output_dir", default="samples", help="where files go")
        sub.add_argument("--output_name", default=name, help=f"their name (default: {name})")
        return sub.add_argument

    def labels_and_seeds(add: Callable[..., argparse.Action]) -> None:
        add("--labels", type=parse_int_list, help="a class for all images, or one for each")
        add("--seeds", type=parse_int_list, help="a seed for all images, or one for each")

    def inputs(add: Callable[..., argparse.Action]) -> None:
        add("--input", metavar="PATH", help="pictures: an image file, a folder, or an .npz")
        add("--real_split", choices=datasets.SPLITS, help="or images of the model's data set")
        add("--num_samples", "--n", type=int, help="how many of them; default: all")
        add("--save_images", action="store_true", help="each result as NAME_images/000000.png ...")

    add = command("interpolate", "a path through noise, classes, or both, as a strip and a film")
    add("--seeds", type=parse_int_list, action="append", help="noise along the way; again: a row")
    add("--labels", type=parse_int_list, action="append", help="classes along the way, likewise")
    add("--frames", type=int, default=16, help="from one stop to the next, both counted")
    add("--format", choices=("gif", "mp4"), default="gif", help="of the film")
    add("--fps", type=float, default=12.0, help="frames a second")
    add("--final_seconds", type=float, default=1.0, help="how long the last frame stays")

    add = command("img2img", "pictures, noised and drawn again")
    inputs(add)
    labels_and_seeds(add)
    add("--strength", type=float, default=0.6, help="share of the steps: 1 forgets the picture")

    add = command("inpaint", "parts of pictures drawn anew, the rest kept as it is")
    inputs(add)
    labels_and_seeds(add)
    add("--mask", metavar="PATH", help="an image as large as the model's; white is drawn")
    add("--box", type=parse_int_list, metavar="X0,Y0,X1,Y1", help="or a rectangle, in pixels")
    add("--resample", type=int, default=1, help="take each step so often (RePaint); default: 1")

    add = command("invert", "pictures to the noise that gives them, and back")
    inputs(add)
    add("--labels", type=parse_int_list, help="a class for all images, or one for each")
    add("--iterations", type=int, default=5, help="forwards a step on the way to the noise")

    add = command("decode", "samples from the noise that invert wrote")
    add("--latents", required=True, metavar="NPZ", help="the file")
    add("--labels", type=parse_int_list, help="other classes than those in the file")

    add = command("grid", "guidance against steps on one sheet", sweep=True)
    labels_and_seeds(add)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(make_parser(), sys.argv[1:] if argv is None else argv)
    with distributed_runtime(args.device) as runtime:
        say = print if runtime.is_main else (lambda *_: None)
        setup_logging(is_main=runtime.is_main and not args.print_config)
        run = load_run_of(args, runtime.device, args.compile)
        if args.print_config:
            say(format_config(run.config))
            return EXIT_OK
        if args.batch_size < 1:
            raise ConfigError(f"--batch_size {args.batch_size}: must be at least 1")
        if args.seed is not None and args.seed < 0:
            raise ConfigError(f"--seed {args.seed}: must be 0 or more")
        job = COMMANDS[args.command](args, run, runtime)
        say(f"{run.describe()} on {describe_device(runtime.device)}")
        say(job.summary)
        if args.dry_run:
            return EXIT_OK
        make_output_dir(args.output_dir)
        paths = job.write()
        say(f"wrote {', '.join(map(str, paths))}; next: {job.following}")
    return EXIT_OK


# --- the commands


def interpolate(args: argparse.Namespace, run: Run, runtime: Runtime) -> Job:
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


def img2img(args: argparse.Namespace, run: Run, runtime: Runtime) -> Job:
    sampling = sampling_of(args, run)
    count = len(last_timesteps(timesteps_of(run, sampling), args.strength))
    inputs = inputs_of(args, run, runtime)

    def steps_of(rows: slice) -> Iterator[Step]:
        x_0 = to_float(inputs.images[rows].to(runtime.device))
        seeds, labels = inputs.seeds[rows], part(inputs.labels, rows)
        return img2img_steps(run, x_0, seeds, labels, args.strength, sampling)

    def write() -> list[Path]:
        images = draw(args, run, runtime, len(inputs.images), steps_of)
        if images is None:
            return []
        return write_pictures(args, {"input": inputs.images, "output": images}, inputs)

    return Job(
        f"{len(inputs.images)} pictures, strength {args.strength:g}: the last {count} steps of "
        f"{sampling.describe()}",
        write,
        f"the same with a smaller --strength than {args.strength:g}, to stay closer to the input",
    )


def inpaint(args: argparse.Namespace, run: Run, runtime: Runtime) -> Job:
    sampling = sampling_of(args, run)
    if (args.mask is None) == (args.box is None):
        raise ConfigError("give --mask or --box, one of them")
    if args.resample < 1:
        raise ConfigError(f"--resample {args.resample}: must be at least 1")
    if args.resample > 1 and sampling.method == "dpmpp_2m":
        raise ConfigError("--resample: dpmpp_2m remembers its last step; use ddim or ddpm")
    height, width = run.spec.height, run.spec.width
    if args.mask is not None:
        unknown = read_mask(args.mask, height, width)
    else:
        unknown = box_mask(args.box, height, width)
    inputs = inputs_of(args, run, runtime)

    def steps_of(rows: slice) -> Iterator[Step]:
        x_0 = to_float(inputs.images[rows].to(runtime.device))
        seeds, labels = inputs.seeds[rows], part(inputs.labels, rows)
        return inpaint_steps(run, x_0, unknown, seeds, labels, args.resample, sampling)

    def write() -> list[Path]:
        images = draw(args, run, runtime, len(inputs.images), steps_of)
        if images is None:
            return []
        holes = inputs.images.masked_fill(unknown, HOLE_LEVEL)
        kinds = {"input": inputs.images, "known": holes, "output": images}
        return write_pictures(args, kinds, inputs)

    times = f", each step {args.resample} times" if args.resample > 1 else ""
    return Job(
        f"{len(inputs.images)} pictures, {int(unknown.sum())} of {height * width} pixels to be "
        f"drawn: {sampling.describe()}{times}",
        write,
        "the same with --resample 5, if what is drawn does not fit what is known"
        if args.resample == 1
        else "the same with other --seeds, for other ways to fill the hole",
    )


def invert(args: argparse.Namespace, run: Run, runtime: Runtime) -> Job:
    if args.seed is not None:
        raise ConfigError("--seed: inverting draws no noise, it finds some")
    if args.sampling_method not in (None, "ddim") or args.ddim_eta:
        raise ConfigError("invert undoes the steps of ddim with ddim_eta 0, no others")
    if args.iterations < 1:
        raise ConfigError(f"--iterations {args.iterations}: must be at least 1")
    scale = 1.0 if args.cfg_scale is None else args.cfg_scale
    sampling = sampling_from(run.config, "ddim", args.num_inference_steps, 0.0, scale)
    inputs = inputs_of(args, run, runtime)
    found: list[Tensor] = []

    def steps_of(rows: slice) -> Iterator[Step]:
        x_0 = to_float(inputs.images[rows].to(runtime.device))
        return invert_steps(run, x_0, part(inputs.labels, rows), args.iterations, sampling)

    def keep_noise(number: int, step: Step) -> None:
        if number == sampling.num_inference_steps - 1:
            found.append(step.x.float().cpu())

    def write() -> list[Path]:
        count = len(inputs.images)
        images = draw(args, run, runtime, count, steps_of, keep_noise)
        x_T = runtime.gather(torch.cat([torch.zeros((0, *run.spec.shape)), *found]), count)
        if images is None:
            return []
        report_errors(images, inputs)
        latents = output(args, ".npz")
        kept = (sampling.num_inference_steps, sampling.cfg_scale)
        save_latents(latents, Latents(x_T, inputs.labels, *kept))
        kinds = {"input": inputs.images, "output": images}
        return [*write_pictures(args, kinds, inputs), latents]

    return Job(
        f"{len(inputs.images)} pictures to noise, {args.iterations} iterations a step, and back: "
        f"{sampling.describe()}",
        write,
        f"python edit.py decode --checkpoint {args.checkpoint} --latents {output(args, '.npz')}",
    )


def decode(args: argparse.Namespace, run: Run, runtime: Runtime) -> Job:
    if args.seed is not None:
        raise ConfigError("--seed: the noise is that of --latents")
    latents = read_latents(args.latents, run.spec)
    method, steps, scale = args.sampling_method or "ddim", args.num_inference_steps, args.cfg_scale
    if steps is None and method == "ddim":
        steps = latents.num_inference_steps
    scale = latents.cfg_scale if scale is None else scale
    sampling = deterministic(sampling_from(run.config, method, steps, args.ddim_eta or 0.0, scale))
    count = len(latents.noise)
    labels = labels_of(args, run, latents.labels, count, f"{args.latents} has no labels")

    def steps_of(rows: slice) -> Iterator[Step]:
        denoise = label_denoiser(run, part(labels, rows), sampling, runtime.device)
        return steps_from(run, denoise, latents.noise[rows].to(runtime.device), sampling)

    def write() -> list[Path]:
        images = draw(args, run, runtime, count, steps_of)
        if images is None:
            return []
        path = output(args, ".png")
        rows = grid_rows(count)
        names = captions_of(labels, count, run)
        above = [[names[i] for i in row] for row in rows]
        save_image(path, contact_sheet(images, rows, above=above))
        return [path]

    return Job(
        f"{count} images from {args.latents}: {sampling.describe()}",
        write,
        "the same with other --labels, or a larger --cfg_scale, which leads away from the pictures",
    )


def grid(args: argparse.Namespace, run: Run, runtime: Runtime) -> Job:
    scales, counts = args.cfg_scale or [None], args.num_inference_steps or [None]
    settings = settings_of(
        run.config,
        1,
        method=args.sampling_method,
        eta=args.ddim_eta,
        cfg_scales=scales,
        step_counts=counts,
    )
    if args.labels:
        check_labels(args.labels, run)
    every = run.classes if run.config.conditional else [None]
    labels, seeds = args.labels or list(every), args.seeds or [first_seed(args, run)]
    count = max(len(labels), len(seeds))
    labels, seeds = spread(labels, count, "--labels"), spread(seeds, count, "--seeds")
    if count * len(settings) > MAX_GRID_IMAGES:
        raise ConfigError(
            f"{len(settings)} cells of {count} images: a sheet shows at most {MAX_GRID_IMAGES} "
            "images; give fewer --labels or --seeds"
        )

    def steps_of(sampling: Sampling, rows: slice) -> Iterator[Step]:
        asked = labels[rows] if run.config.conditional else None
        return sample_steps(run, seeds[rows], asked, sampling, runtime.device)

    def write() -> list[Path]:
        cells = []
        for setting in settings:
            images = draw(args, run, runtime, count, partial(steps_of, setting.sampling))
            if images is not None:
                cells.append(images[0] if count == 1 else make_grid(images, [list(range(count))]))
        if not cells:
            return []
        columns = len(counts)
        rows = [list(range(len(cells)))[i : i + columns] for i in range(0, len(cells), columns)]
        steps = [f"{s.sampling.num_inference_steps} steps" for s in settings[:columns]]
        left = [f"cfg {s.sampling.cfg_scale:g}" for s in settings[::columns]]
        path = output(args, ".png")
        above = [steps] + [[]] * (len(rows) - 1)
        save_image(path, contact_sheet(torch.stack(cells), rows, above=above, left=left))
        return [path]

    last = settings[-1].sampling
    return Job(
        f"{len(settings)} settings of {count} images, up to {last.describe()}",
        write,
        f"python sample.py --checkpoint {args.checkpoint} --num_inference_steps "
        f"{last.num_inference_steps} --cfg_scale {last.cfg_scale:g}, with the best of them",
    )


COMMANDS: dict[str, Callable[[argparse.Namespace, Run, Runtime], Job]] = {
    "interpolate": interpolate,
    "img2img": img2img,
    "inpaint": inpaint,
    "invert": invert,
    "decode": decode,
    "grid": grid,
}


# --- what is asked for


def sampling_of(args: argparse.Namespace, run: Run) -> Sampling:
    return sampling_from(
        run.config, args.sampling_method, args.num_inference_steps, args.ddim_eta, args.cfg_scale
    )


def deterministic(sampling: Sampling) -> Sampling:
    """
    Raises:
        ConfigError: the image does not follow from x_T alone.
    """
    if not sampling.is_deterministic:
        raise ConfigError(
            f"{sampling.describe()}: draws noise on the way; use --sampling_method ddim "
            "--ddim_eta 0, or dpmpp_2m"
        )
    return sampling


def first_seed(args: argparse.Namespace, run: Run) -> int:
    return run.config.seed if args.seed is None else args.seed


def spread(values: list[T], count: int, name: str) -> list[T]:
    """
    Raises:
        ConfigError: neither one value for all nor `count` of them.
    """
    if len(values) not in (1, count):
        raise ConfigError(f"{name}: {len(values)} given; give 1 for all, or {count}")
    return values * count if len(values) == 1 else values


def labels_of(
    args: argparse.Namespace, run: Run, own: list[int] | None, count: int, missing: str | None
) -> list[int] | None:
    """The class of each of `count` images: that of --labels, else its own.

    Raises:
        ConfigError: there is none, the model does not have it, or their number is wrong.
    """
    if args.labels is not None:
        check_labels(args.labels, run)
        return spread(args.labels, count, "--labels")
    if not run.config.conditional:
        return None
    if own is None:
        raise ConfigError(f"--labels: give a class for all images, or one for each; {missing}")
    check_labels(own, run)
    return spread(own, count, "labels of the pictures")


def chains_of(args: argparse.Namespace, run: Run) -> list[list[Waypoint]]:
    """The stops of each row of an interpolation, as many in every row.

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


def inputs_of(args: argparse.Namespace, run: Run, runtime: Runtime) -> Inputs:
    """The pictures, with a class and a seed each. A single picture serves several of these.

    Raises:
        ConfigError, DataError: no pictures, too many, or numbers that do not go together.
        UserError: the folder of --save_images holds pictures that would stay.
    """
    if (args.input is None) == (args.real_split is None):
        raise ConfigError("give --input or --real_split, one of them")
    own, missing = None, None
    if args.real_split is not None:
        name = f"{run.config.dataset} ({args.real_split})"
        with runtime.main_first():
            data = datasets.build_dataset(run.config, args.real_split)
        if data.spec.shape != run.spec.shape:
            raise DataError(f"{name}: images of {data.spec}, but the model draws {run.spec}")
        own = data.labels.tolist()
    else:
        name = args.input
        asked = run.config.conditional and args.labels is None
        numbers = tuple(map(str, range(run.spec.num_classes)))
        names = (run.class_names or numbers) if asked else ()
        data, own, missing = fitted_pictures(args.input, run.spec, names)
    asked_for = len(data) if args.num_samples is None else args.num_samples
    if not 1 <= asked_for <= min(len(data), MAX_GRID_IMAGES):
        raise ConfigError(
            f"{name} holds {len(data)} pictures; --num_samples says how many of them to take, at "
            f"most {MAX_GRID_IMAGES}"
        )
    chosen = choose_indices(len(data), args.num_samples)
    images = torch.stack([data[i][0] for i in chosen])
    seeds = getattr(args, "seeds", None)
    count = max(len(images), len(args.labels or ()), len(seeds or ()))
    if len(images) not in (1, count):
        raise ConfigError(f"{len(images)} pictures, but {count} --labels or --seeds")
    if args.save_images:
        check_picture_folder(output(args, "_images"), count)
    own = own and [own[i] for i in chosen]
    first = first_seed(args, run)
    labels = labels_of(args, run, own, count, missing)
    return Inputs(
        images.expand(count, -1, -1, -1),
        labels,
        spread(seeds, count, "--seeds") if seeds else list(range(first, first + count)),
        captions_of(labels, count, run),
    )


# --- what is drawn and written


def part(labels: list[int] | None, rows: slice) -> list[int] | None:
    return None if labels is None else labels[rows]


def captions_of(labels: list[int] | None, count: int, run: Run) -> list[str]:
    return [""] * count if labels is None else class_captions(labels, run.class_names)


def draw(
    args: argparse.Namespace,
    run: Run,
    runtime: Runtime,
    num_images: int,
    steps_of: Callable[[slice], Iterator[Step]],
    on_step: Callable[[int, Step], None] | None = None,
) -> Tensor | None:
    """The images, uint8 (N, C, H, W), on the main process; None on others."""
    batches = last_steps(
        run, num_images, steps_of, batch_size=args.batch_size, runtime=runtime, on_step=on_step
    )
    total = -(-len(runtime.share(num_images)) // args.batch_size)
    bar = tqdm(batches, total=total, unit="batch", disable=not runtime.is_main)
    empty = torch.zeros((0, *run.spec.shape), dtype=torch.uint8)
    return runtime.gather(torch.cat([empty, *(to_uint8(x).cpu() for _, x in bar)]), num_images)


def output(args: argparse.Namespace, suffix: str) -> Path:
    return Path(args.output_dir, args.output_name + suffix)


def write_pictures(
    args: argparse.Namespace, kinds: Mapping[str, Tensor], inputs: Inputs
) -> list[Path]:
    """A sheet of all kinds, one above the other, and the results, which come last, one by one."""
    count = len(inputs.images)
    rows, above, left = [], [], []
    for start in range(0, count, MAX_COLUMNS):
        columns = range(start, min(start + MAX_COLUMNS, count))
        for k, kind in enumerate(kinds):
            rows.append([k * count + i for i in columns])
            above.append([inputs.captions[i] for i in columns] if k == 0 else [])
            left.append(kind)
    path = output(args, ".png")
    save_image(path, contact_sheet(torch.cat(list(kinds.values())), rows, above=above, left=left))
    if not args.save_images:
        return [path]
    folder = output(args, "_images")
    for i, image in enumerate(list(kinds.values())[-1]):
        save_image(folder / f"{i:06d}.png", image)
    if inputs.labels is not None:
        save_labels(folder, inputs.labels)
    return [path, folder]


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


def report_errors(images: Tensor, inputs: Inputs) -> None:
    """Print how far each reconstruction is from its picture: RMSE in 8-bit grey levels."""
    difference = images.double() - inputs.images.double()
    errors = difference.square().mean((1, 2, 3)).sqrt().tolist()
    for i, error in enumerate(errors):
        label = "" if inputs.labels is None else f" (label {inputs.labels[i]})"
        print(f"picture {i}{label}: error {error:.2f}")
    mean = sum(errors) / len(errors)
    print(f"mean error {mean:.2f}, largest {max(errors):.2f}: RMSE in grey levels of 256")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
