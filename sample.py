"""Draw images from a trained checkpoint: a grid, single files, NPZ, or a GIF of the denoising.

python sample.py --checkpoint checkpoints/digits_unet --labels 0,1,2,3 --num_samples 16 --create_gif
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import datasets
import diffusion
import metrics
import models
from diffusion import SAMPLERS
from diffusion.generation import FrameRecorder, Run, Sampling, generate, sampling_from
from models.lora import merged_weights
from utils import images as pictures
from utils.captions import class_captions, contact_sheet
from utils.checkpoint import resolve_checkpoint
from utils.cli import add_sampling_options, new_parser, parse_args, parse_int_list
from utils.config import (
    Check,
    Config,
    RawConfig,
    apply_overrides,
    format_config,
    read_config_file,
    validate,
)
from utils.distributed import describe_device, distributed_runtime
from utils.errors import EXIT_OK, CheckpointError, ConfigError, UserError, exit_code_of
from utils.images import ImageSpec
from utils.labels import save_labels
from utils.logs import setup_logging
from utils.precision import resolve_precision
from utils.resume import SAME_MODEL, changed_settings
from utils.weights_file import load_any

__all__ = ["CONFIG_CHECKS", "Run", "Sampling", "generate", "load_run", "sampling_from"]

MAX_GRID_IMAGES = 400

CONFIG_CHECKS: tuple[Check, ...] = (
    datasets.check_config,
    diffusion.check_config,
    metrics.check_config,
    lambda config: models.check_config(config, expected_spec(config)),
)


def expected_spec(config: Config) -> ImageSpec | None:
    """The images as far as the config alone tells. A custom set's number of classes, which its
    folders tell, is a placeholder: no size depends on it."""
    spec = datasets.native_spec(config)
    if spec is None and config.dataset == "custom" and config.image_size is not None:
        num_classes = config.model_params.get("num_classes", 1)
        return ImageSpec(config.image_channels or 3, *config.image_size, num_classes)
    return spec


def load_run(
    checkpoint: str | Path,
    device: torch.device,
    *,
    use_ema: bool | None = None,
    config_path: str | None = None,
    overrides: Sequence[str] = (),
    compile: Literal["model", "blocks"] | None = None,
) -> Run:
    """Rebuild what a checkpoint (a file, also an exported one, or a run directory) holds.

    Args:
        use_ema: averaged or raw weights; None takes the averaged ones if there are any.
        config_path, overrides: settings laid over those stored in the checkpoint.
        compile: the network, see `compile_model`. (The config's own `compile` is for training.)

    Raises:
        CheckpointError, ConfigError: what is missing or does not fit.
    """
    path = resolve_checkpoint(checkpoint)
    state = load_any(path)
    raw = RawConfig(dict(state["config"]), dict.fromkeys(state["config"], str(path)))
    if config_path is not None:
        given = read_config_file(Path(config_path))
        raw.values.update(given.values)
        raw.sources.update(given.sources)
    config = validate(raw, checks=CONFIG_CHECKS, problems=apply_overrides(raw, overrides))
    resolve_precision(config.precision, device)
    if changed := changed_settings(state["config"], config.to_dict(), SAME_MODEL):
        raise ConfigError(
            f"{path}: these settings belong to the weights:\n       " + "\n       ".join(changed)
        )
    spec = ImageSpec(*state["spec"])
    native = datasets.native_spec(config)
    if native is not None and native != spec:
        raise ConfigError(
            f"{path} draws images of {spec}, the config describes {native}; the data set and "
            "its size belong to the checkpoint"
        )
    has_ema = "ema_model_state_dict" in state
    if use_ema and not has_ema:
        raise CheckpointError(f"{path}: holds no EMA weights; use --no_ema")
    ema = has_ema and config.use_ema if use_ema is None else use_ema
    weights = state.get("ema_model_state_dict" if ema else "model_state_dict")
    if weights is None:
        raise CheckpointError(f"{path}: holds EMA weights alone; leave out --no_ema, use_ema=false")
    if config.lora_rank:
        weights = merged_weights(weights, config.lora_alpha)
    model = models.build_model(config, spec, device)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: does not fit the config: {reason}") from error
    model.eval().requires_grad_(False)
    models.compile_model(model, compile)
    built = diffusion.build_diffusion(config)
    names = tuple(state.get("class_names") or ())
    return Run(model, built, spec, config, path, state["step"], state["epoch"], ema, names)


def load_run_of(
    args: argparse.Namespace,
    device: torch.device,
    compile: Literal["model", "blocks"] | None = None,
) -> Run:
    """`load_run` of what the command line says, see `cli.add_checkpoint_options`."""
    return load_run(
        args.checkpoint,
        device,
        use_ema=args.use_ema,
        config_path=args.config,
        overrides=args.overrides,
        compile=compile,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__ or "")
    add_sampling_options(parser, SAMPLERS)
    add = parser.add_argument
    add("--num_samples", "--n", type=int, help="number of images; default: the config's")
    add("--batch_size", type=int, default=64, help="images sampled at a time")
    add("--output_dir", default="samples", help="where files go (default: samples)")
    add("--output_name", default="samples", help="their name (default: samples)")
    add("--labels", type=parse_int_list, help="classes to draw, e.g. 0,1,2 or 0-9; default: all")
    add("--seeds", type=parse_int_list, help="a seed for each image, e.g. 0-63")
    add("--captions", action="store_true", help="class names above the images of the grid")
    add("--create_gif", action="store_true", help="GIF from noise to images")
    add("--gif_fps", type=float, default=20.0, help="frames a second")
    add("--gif_final_seconds", type=float, default=2.0, help="how long the last frame stays")
    add("--save_intermediate", action="store_true", help="grids of the steps as PNG files")
    add("--save_images", action="store_true", help="each image as images/000000.png ...")
    add("--npz", action="store_true", help="all images (arr_0) and labels (arr_1) in one file")
    return parser


def plan(args: argparse.Namespace, run: Run) -> tuple[list[int], list[int] | None]:
    """Seeds and labels of the images asked for.

    Raises:
        ConfigError: labels the model does not have, or no images.
    """
    default = len(args.seeds) if args.seeds else run.config.num_samples
    num_samples = default if args.num_samples is None else args.num_samples
    seed = run.config.seed if args.seed is None else args.seed
    seeds = args.seeds or list(range(seed, seed + num_samples))
    if len(seeds) != num_samples or num_samples < 1 or min(seeds) < 0 or args.batch_size < 1:
        raise ConfigError(
            f"{num_samples} images, {len(seeds)} seeds, batch_size {args.batch_size}: give at "
            "least one image, one non-negative seed per image, and a batch_size of at least 1"
        )
    if not run.config.conditional and not args.labels:
        if args.captions:
            raise ConfigError("--captions: class names, but this model was trained without classes")
        return seeds, None
    classes = args.labels or list(run.classes)
    check_labels(classes, run)
    return seeds, pictures.block_labels(num_samples, classes)


def check_labels(labels: Sequence[int], run: Run) -> None:
    """
    Raises:
        ConfigError: the model has no classes, or not these.
    """
    if not run.config.conditional:
        raise ConfigError("--labels: this model was trained without class labels")
    wrong = [label for label in labels if not 0 <= label < run.spec.num_classes]
    if wrong:
        raise ConfigError(f"--labels {wrong}: classes are 0..{run.spec.num_classes - 1}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(make_parser(), sys.argv[1:] if argv is None else argv)
    with distributed_runtime(args.device) as runtime:
        say = print if runtime.is_main else (lambda *_: None)
        setup_logging(is_main=runtime.is_main and not args.print_config)
        run = load_run_of(args, runtime.device, args.compile)
        if args.print_config:
            say(format_config(run.config))
            return EXIT_OK
        sampling = sampling_from(
            run.config,
            args.sampling_method,
            args.num_inference_steps,
            args.ddim_eta,
            args.cfg_scale,
        )
        seeds, labels = plan(args, run)
        say(f"{run.describe()} on {describe_device(runtime.device)}")
        say(f"{len(seeds)} images: {sampling.describe()}")
        if args.dry_run:
            return EXIT_OK
        check_outputs(args, len(seeds))

        recorder = FrameRecorder(sampling.num_inference_steps)
        batches = generate(
            run,
            seeds,
            labels,
            sampling=sampling,
            batch_size=args.batch_size,
            runtime=runtime,
            on_step=recorder if args.create_gif or args.save_intermediate else None,
        )
        total = -(-len(runtime.share(len(seeds))) // args.batch_size)
        bar = tqdm(batches, total=total, unit="batch", disable=not runtime.is_main)
        empty = torch.zeros((0, *run.spec.shape), dtype=torch.uint8)
        images = runtime.gather(torch.cat([empty, *(b for b, _, _ in bar)]), len(seeds))
        frames = [runtime.gather(f, len(seeds)) for f in recorder.frames(run.spec.shape)]
        if images is not None:
            for path in write_outputs(args, images, labels, frames, run.class_names):
                say(f"wrote {path}")
    return EXIT_OK


def check_outputs(args: argparse.Namespace, num_images: int) -> None:
    """Find out before sampling whether the files asked for can be written.

    Raises:
        UserError: they cannot.
    """
    if args.create_gif and num_images > MAX_GRID_IMAGES:
        raise ConfigError(
            f"--create_gif shows at most {MAX_GRID_IMAGES} images; lower --num_samples"
        )
    if not (0 < args.gif_fps < float("inf") and 0 <= args.gif_final_seconds < float("inf")):
        raise ConfigError("--gif_fps must be above 0 and --gif_final_seconds at least 0")
    if args.save_images:
        check_picture_folder(Path(args.output_dir) / "images", num_images)
    make_output_dir(args.output_dir)


def check_picture_folder(folder: Path, num_images: int) -> None:
    """
    Raises:
        UserError: older pictures in there would stay among 000000.png ..., the new ones.
    """
    replaced = {f"{i:06d}.png" for i in range(num_images)}
    if others := sorted(path.name for path in folder.glob("*.png") if path.name not in replaced):
        raise UserError(
            f"--save_images: {folder} holds {len(others)} pictures ({others[0]} ...) that these "
            f"{num_images} would not replace; choose another --output_dir, or remove them"
        )


def make_output_dir(path: str) -> None:
    """
    Raises:
        UserError: it cannot be made, or not be written to.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"--output_dir {path}: cannot be written")


def write_outputs(
    args: argparse.Namespace,
    images: Tensor,
    labels: list[int] | None,
    frames: list[Tensor],
    class_names: Sequence[str],
) -> Iterator[Path]:
    """Write everything that was asked for; yields what was written."""
    folder, name = Path(args.output_dir), args.output_name
    count = len(images)
    shown = sorted({round(i) for i in np.linspace(0, count - 1, min(count, MAX_GRID_IMAGES))})
    rows = pictures.grid_rows(len(shown), None if labels is None else [labels[i] for i in shown])

    def grid(batch: Tensor) -> Tensor:
        return pictures.make_grid(batch[shown], rows)

    sheet = grid(images)
    if args.captions:
        names = class_captions([labels[i] for i in shown], class_names)
        sheet = contact_sheet(images[shown], rows, above=[[names[i] for i in row] for row in rows])
    pictures.save_image(folder / f"{name}.png", sheet)
    yield folder / f"{name}.png"
    if args.create_gif:
        grids = [grid(frame) for frame in frames]
        pictures.save_gif(
            folder / f"{name}.gif", grids, fps=args.gif_fps, final_seconds=args.gif_final_seconds
        )
        yield folder / f"{name}.gif"
    if args.save_intermediate:
        for number, frame in enumerate(frames):
            pictures.save_image(folder / f"{name}_steps" / f"{number:03d}.png", grid(frame))
        yield folder / f"{name}_steps"
    if args.save_images:
        for i, image in enumerate(images):
            pictures.save_image(folder / "images" / f"{i:06d}.png", image)
        if labels is not None:
            save_labels(folder / "images", labels)
        yield folder / "images"
    if args.npz:
        array = images.permute(0, 2, 3, 1).numpy()
        path = folder / f"{name}_{'x'.join(map(str, array.shape))}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        given = {} if labels is None else {"arr_1": np.array(labels)}
        np.savez_compressed(path, arr_0=array, **given)
        yield path


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
