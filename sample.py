"""Draw images from a trained checkpoint: a grid, single files, NPZ, or a GIF of the denoising.

python sample.py --checkpoint checkpoints/digits_unet --labels 0,1,2,3 --num_samples 16 --create_gif
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from datasets.conditions import condition_sheet, planes_at
from datasets.pictures import read_inputs
from diffusion import SAMPLERS
from generation.run import Run, check_labels, load_run_of
from generation.sample_store import tell_clipped
from generation.sampling import batch_rows, evenly_spaced, gather_images, generate, sampling_from
from utils import files
from utils import images as pictures
from utils.captions import class_captions, contact_sheet
from utils.cli import add_sampling_options, image_count, new_parser, parse_args, parse_int_list
from utils.config import format_config
from utils.distributed import describe_device, distributed_runtime
from utils.errors import EXIT_OK, ConfigError, exit_code_of, say
from utils.labels import save_images
from utils.logs import setup_logging

MAX_GIF_FRAMES = 60


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__ or "")
    add_sampling_options(parser, SAMPLERS, takes_guide=True)
    add = parser.add_argument
    images = "number of images; default: the config's (not --n under torchrun)"
    add("--num_samples", "--n", type=image_count, help=images)
    add("--batch_size", type=image_count, default=64, help="images sampled at a time")
    add("--output_dir", default="samples", help="where files go (default: samples)")
    add("--output_name", default="samples", help="their name (default: samples)")
    add("--labels", type=parse_int_list, help="classes to draw, e.g. 0,1,2 or 0-9; default: all")
    add("--seeds", type=parse_int_list, help="a seed for each image, e.g. 0-63")
    add("--captions", action="store_true", help="class names above the images of the grid")
    add("--create_gif", action="store_true", help="GIF from noise to images")
    add("--gif_fps", type=float, default=20.0, help="frames a second")
    add("--gif_final_seconds", type=float, default=2.0, help="how long the last frame stays")
    add("--save_intermediate", action="store_true", help="grids of the steps as PNG files")
    add("--condition", metavar="DIR|FILE", help="pictures to draw from, --num_samples (1) of each")
    add("--condition_scale", type=float, help="0 ignores them, 1 is one forward, above 1 guided")
    add("--save_images", action="store_true", help="images/000000.png ..., or as --condition is")
    add("--npz", action="store_true", help="all images (arr_0) and labels (arr_1) in one file")
    return parser


def plan(args: argparse.Namespace, run: Run) -> tuple[list[int], list[int] | None]:
    """Seeds and labels of the images asked for; a ConfigError if the model cannot draw them."""
    num_samples = args.num_samples or len(args.seeds or ()) or run.config.num_samples
    num_samples = num_samples if args.inputs is None else len(args.inputs.outputs)
    seed = run.config.seed if args.seed is None else args.seed
    seeds = args.seeds or list(range(seed, seed + num_samples))
    if len(seeds) != num_samples:
        given = f"{num_samples} images, {len(seeds)} seeds"
        raise ConfigError(f"{given}: give one non-negative seed per image")
    if args.captions and args.inputs is not None:
        raise ConfigError("--captions: rows are named after the pictures of --condition already")
    if not run.config.conditional and not args.labels:
        if args.captions:
            raise ConfigError("--captions: class names, but this model was trained without classes")
        return seeds, None
    classes = args.labels or list(run.classes)
    check_labels(classes, run)
    return seeds, pictures.block_labels(num_samples, classes)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(make_parser(), sys.argv[1:] if argv is None else argv)
    with distributed_runtime(args.device) as runtime:
        tell = say if runtime.is_main else (lambda *_: None)
        setup_logging(is_main=runtime.is_main and not args.print_config)
        if args.condition_scale is not None:
            args.overrides.append(f"condition_scale={args.condition_scale!r}")
        run = load_run_of(args, runtime.device, args.compile)
        if args.print_config:
            tell(format_config(run.config))
            return EXIT_OK
        asked = args.sampling_method, args.num_inference_steps, args.ddim_eta, args.cfg_scale
        sampling = sampling_from(run.config, *asked, has_guide=run.guide is not None)
        args.inputs = read_inputs(
            args.condition, run.config, run.spec, args.num_samples or 1, run.values
        )
        seeds, labels = plan(args, run)
        tell(f"{run.describe()} on {describe_device(runtime.device)}")
        tell(f"{len(seeds)} images: {sampling.describe()}")
        check_outputs(args, run, len(seeds))
        if args.dry_run:
            return EXIT_OK
        files.make_output_dir(args.output_dir, "--output_dir")

        shows_steps = args.create_gif or args.save_intermediate
        num_steps = sampling.num_inference_steps if shows_steps else 0
        steps = {number: [] for number in evenly_spaced(num_steps, MAX_GIF_FRAMES)}
        options = dict(sampling=sampling, batch_size=args.batch_size, runtime=runtime)
        if args.inputs is not None:
            sources = [i * len(args.inputs) // len(seeds) for i in range(len(seeds))]
            options["planes_of"] = partial(planes_at, run.config, args.inputs, sources)
        batches = generate(run, seeds, labels, frames=steps, **options)
        total = len(batch_rows(len(seeds), args.batch_size, runtime))
        bar = tqdm(batches, total=total, unit="batch", disable=not runtime.is_main)
        images = gather_images(bar, run, runtime)
        frames = [gather_images(parts, run, runtime) for parts in steps.values()]
        if images is not None:
            for path in write_outputs(args, run, labels, [images, *frames]):
                tell(f"wrote {path}")
    return EXIT_OK


def check_outputs(args: argparse.Namespace, run: Run, num_images: int) -> None:
    """Raise a UserError before sampling if the files asked for cannot be written."""
    if args.create_gif and num_images > pictures.MAX_GRID_IMAGES:
        most = f"--create_gif shows at most {pictures.MAX_GRID_IMAGES} images"
        raise ConfigError(f"{most}; lower --num_samples")
    pictures.check_film(args.gif_fps, args.gif_final_seconds, "--gif_")
    args.output_name = files.output_name(args.output_name)
    if args.save_images:
        stems = args.inputs.outputs if args.inputs else files.numbered(num_images)
        folder = Path(args.output_dir) / "images"
        files.check_picture_folder(folder, stems, run.suffix)
    outputs = [f"{args.output_name}.png"] + ["images"] * args.save_images
    files.check_inputs_stay([Path(args.output_dir, name) for name in outputs], args.condition)


def write_outputs(
    args: argparse.Namespace, run: Run, labels: list[int] | None, drawn: list[Tensor]
) -> Iterator[Path]:
    """Write all that was asked for, and yield where.

    What was `drawn` are the images (N, C, H, W), and then the same after some of the steps.
    """
    folder, name, images = Path(args.output_dir), args.output_name, drawn[0]
    shown = evenly_spaced(len(images), pictures.MAX_GRID_IMAGES)
    rows = pictures.grid_rows(len(shown), labels and [labels[i] for i in shown])
    views = [pictures.as_pictures(x[shown], run.config.preview_channels) for x in drawn]
    sheet, *grids = (pictures.make_grid(view, rows) for view in views)
    if args.captions:
        names = class_captions([labels[i] for i in shown], run.class_names)
        sheet = contact_sheet(views[0], rows, above=[[names[i] for i in row] for row in rows])
    images, clipped = pictures.to_file(images, run.values)
    tell_clipped(clipped if args.save_images or args.npz else 0, run.values)

    if inputs := args.inputs:
        views = pictures.as_pictures(drawn[0], run.config.preview_channels)
        others = views.unflatten(0, (len(inputs), -1)).unbind(1)
        chosen = evenly_spaced(len(inputs), -(-pictures.MAX_GRID_IMAGES // (1 + len(others))))
        planes = planes_at(run.config, inputs, chosen)
        names = [inputs.names[i] for i in chosen]
        sheet = condition_sheet(planes, run.config, [x[chosen] for x in others], names)

    arrays = {"arr_0": images.permute(0, 2, 3, 1).numpy()}
    if labels is not None:
        arrays["arr_1"] = np.array(labels)

    def write_steps(path: Path) -> None:
        for number, grid in enumerate(grids):
            pictures.save_image(path / f"{number:03d}.png", grid)

    saved = dict(images=images, labels=labels, stems=inputs.outputs if inputs else ())
    size = "x".join(map(str, arrays["arr_0"].shape))
    seconds = args.gif_final_seconds
    gif = partial(pictures.save_gif, frames=grids, fps=args.gif_fps, final_seconds=seconds)
    outputs = {
        f"{name}.png": partial(pictures.save_image, image=sheet),
        f"{name}.gif": args.create_gif and gif,
        f"{name}_steps": args.save_intermediate and write_steps,
        "images": args.save_images and partial(save_images, **saved),
        f"{name}_{size}.npz": args.npz and partial(files.write_npz, **arrays),
    }
    return files.write_each({folder / name: write for name, write in outputs.items() if write})


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
