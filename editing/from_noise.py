"""The commands that start from noise: along a path, from a file of `invert`, or from seeds."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor

from diffusion import SAMPLERS
from editing.command import Job, spread_both, wrote
from editing.mathematics import INVERSES, Waypoint, decode_steps, frames_along, morph_steps
from generation.run import check_labels
from generation.sampling import Sampling, evenly_spaced, sample_steps, sampler_names, sampling_from
from utils import images as pictures
from utils.captions import class_captions, contact_sheet
from utils.errors import ConfigError, DataError
from utils.files import read_npz, write_each

FILM_CELL_SIZE = 128  # pixels; a film shows few images at a time


def interpolate(job: Job) -> Iterator[str]:
    """Draw a path through noise, classes, or both, as a strip and a film."""
    args, run, device, sampling = job.args, job.run, job.runtime.device, job.sampling()
    check_deterministic(sampling)
    chains = chains_of(job)
    if args.frames < 2:
        raise ConfigError(f"--frames {args.frames}: both ends count, so give at least 2")
    pictures.check_film(args.fps, args.final_seconds)
    if args.format == "mp4" and not pictures.can_write_mp4():
        raise ConfigError("--format mp4 needs a package: pip install imageio-ffmpeg; or use gif")
    frames = [frame for chain in chains for frame in frames_along(chain, args.frames)]
    stops = "; ".join(" to ".join(map(str, chain)) for chain in chains)
    yield f"{len(frames)} frames, {stops}: {sampling.describe()}"

    images = job.draw(len(frames), lambda rows: morph_steps(run, frames[rows], sampling, device))
    if images is None:
        return
    images = pictures.as_pictures(images, run.config.preview_channels)
    strip, film = job.path(".png"), job.path(f".{args.format}")
    numbers = torch.arange(len(frames)).unflatten(0, (len(chains), -1))
    stretches = numbers.unfold(1, args.frames, args.frames - 1).flatten(0, 1)
    rows = stretches[:, evenly_spaced(args.frames, pictures.MAX_COLUMNS)].tolist()
    left = [title(ends, run.class_names) for chain in chains for ends in pairwise(chain)]
    moments = images.unflatten(0, (len(chains), -1)).transpose(0, 1)
    layout = pictures.grid_rows(len(chains))
    shown = [pictures.make_grid(m, layout, min_cell_size=FILM_CELL_SIZE) for m in moments]
    save = pictures.save_gif if args.format == "gif" else pictures.save_mp4
    sheet = partial(pictures.save_image, image=contact_sheet(images, rows, left=left))
    moving = partial(save, frames=shown, fps=args.fps, final_seconds=args.final_seconds)
    paths = list(write_each({strip: sheet, film: moving}))
    yield wrote(paths, job.command("edit.py grid", "--seeds", chains[0][0].seed))


def chains_of(job: Job) -> list[list[Waypoint]]:
    """The stops of each row, as many in every row; a ConfigError if there is no way to go."""
    args, run = job.args, job.run
    if run.config.conditional and not args.labels:
        raise ConfigError("--labels: give a class, or one for each stop, e.g. 2,7")
    for labels in args.labels or []:
        check_labels(labels, run)
    given = spread_both(args.seeds or [[job.first_seed]], args.labels or [[None]])
    rows = [spread_both(*both, " of a row") for both in zip(*given, strict=True)]
    chains = [list(map(Waypoint, *both)) for both in rows]
    if min(map(len, chains)) < 2:
        raise ConfigError("nothing to go to; give two or more --seeds or --labels, e.g. 2,7")
    if len(set(map(len, chains))) > 1:
        raise ConfigError("every row needs the same number of stops")
    return chains


def title(ends: Sequence[Waypoint], class_names: Sequence[str]) -> str:
    """The title of the strip between two stops, such as `2 to 7, seed 3`."""
    words = "seed " + " to ".join(dict.fromkeys(str(stop.seed) for stop in ends))
    if ends[0].label is None:
        return words
    names = class_captions([stop.label for stop in ends], class_names)
    return f"{' to '.join(dict.fromkeys(names))}, {words}"


def check_deterministic(sampling: Sampling) -> None:
    """Raise a ConfigError, which names other samplers, unless images follow from x_T alone."""
    names = [n for n in SAMPLERS if replace(sampling, method=n, eta=0.0).is_deterministic]
    if not sampling.is_deterministic:
        others = f"--ddim_eta 0 and --sampling_method {' or '.join(names)}"
        raise ConfigError(f"{sampling.describe()}: draws noise on the way; use {others}")


def decode(job: Job) -> Iterator[str]:
    """Draw samples from the noise that invert wrote."""
    args, run, device = job.args, job.run, job.runtime.device
    if args.seed is not None:
        raise ConfigError("--seed: the noise is that of --latents")
    noise, own, steps, scale = read_latents(args.latents, run.spec.shape)
    names, count = sampler_names(run.config, INVERSES), len(noise)
    if args.sampling_method not in (None, *names):
        steps = None
    sampling = job.sampling(names[0], steps, 0.0, scale)
    check_deterministic(sampling)
    labels = job.labels(own, count, f"{args.latents} has no labels")
    yield f"{count} images from {args.latents}: {sampling.describe()}"

    images = job.draw(
        count, lambda r: decode_steps(run, noise[r].to(device), labels and labels[r], sampling)
    )
    if images is not None:
        rows, names = pictures.grid_rows(count), job.captions(labels, count)
        above = [[names[i] for i in row] for row in rows]
        images = pictures.as_pictures(images, run.config.preview_channels)
        pictures.save_image(job.path(".png"), contact_sheet(images, rows, above=above))
        guided = "a larger --cfg_scale, which leads away from the pictures"
        yield wrote([job.path(".png")], f"the same with other --labels, or {guided}")


def read_latents(path: str, shape: tuple[int, ...]) -> tuple[Tensor, list[int] | None, int, float]:
    """Read what `invert` wrote, for a model of images of this shape.

    Returns the noise x_T, float32 (N, C, H, W), the pictures' classes or None, and the number of
    steps and the scale it was found with. Raises a DataError if the file is of another kind,
    damaged, or not for images of this shape.
    """
    try:
        needed = ("x_T", "num_inference_steps", "cfg_scale")
        x_T, steps, scale, *labels = read_npz(path, needed, ["labels"]).values()
        steps, scale = operator.index(steps.item()), float(scale)
        labels = labels[0] if labels else None
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{path}: not what edit.py invert writes ({error})") from error
    if x_T.dtype != np.float32 or x_T.shape[1:] != shape or not len(x_T):
        needed = f"the model draws from float32 (N, {', '.join(map(str, shape))})"
        raise DataError(f"{path}: x_T is {x_T.dtype} {x_T.shape}, but {needed}")
    if not np.isfinite(x_T).all():
        raise DataError(f"{path}: x_T is not finite")
    if labels is not None and (labels.shape != x_T.shape[:1] or labels.dtype.kind not in "iu"):
        raise DataError(f"{path}: labels: {labels.dtype} {labels.shape}, not {len(x_T)} integers")
    return torch.from_numpy(x_T), None if labels is None else labels.tolist(), steps, scale


def grid(job: Job) -> Iterator[str]:
    """Draw one sheet: a row for each guidance scale, a column for each number of steps."""
    args, run, device = job.args, job.run, job.runtime.device
    scales, counts = args.cfg_scale or [None], args.num_inference_steps or [None]
    method, eta, pairs = args.sampling_method, args.ddim_eta, product(scales, counts)
    samplings = [sampling_from(run.config, method, steps, eta, scale) for scale, steps in pairs]
    if args.labels:
        check_labels(args.labels, run)
    every = list(run.classes) if run.config.conditional else [None]
    seeds, labels = spread_both(args.seeds or [job.first_seed], args.labels or every)
    count, last = len(seeds), samplings[-1]
    if count * len(samplings) > (most := pictures.MAX_GRID_IMAGES):
        cells = f"{len(samplings)} cells of {count} images: a sheet shows at most {most} images"
        raise ConfigError(f"{cells}; give fewer --labels or --seeds")
    yield f"{len(samplings)} settings of {count} images, up to {last.describe()}"

    labels, cells = labels if run.config.conditional else None, []
    for s in samplings:
        images = job.draw(
            count,
            lambda rows, s=s: sample_steps(run, seeds[rows], labels and labels[rows], s, device),
        )
        if images is not None:
            images = pictures.as_pictures(images, run.config.preview_channels)
            cells.append(images[0] if count == 1 else pictures.make_grid(images, [[*range(count)]]))
    if not cells:
        return
    rows = torch.arange(len(cells)).unflatten(0, (len(scales), -1)).tolist()
    above = [[f"{s.num_inference_steps} steps" for s in samplings[: len(counts)]]]
    left = [f"cfg {s.cfg_scale:g}" for s in samplings[:: len(counts)]]
    above += [[]] * (len(rows) - 1)
    sheet = contact_sheet(torch.stack(cells), rows, above=above, left=left)
    pictures.save_image(job.path(".png"), sheet)
    steps, scale = last.num_inference_steps, f"{last.cfg_scale:g}"
    command = job.command("sample.py", "--num_inference_steps", steps, "--cfg_scale", scale)
    yield wrote([job.path(".png")], f"{command}, with the best of them")
