"""The commands that start from pictures: drawn again, partly drawn anew, turned into noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import datasets
from datasets.pictures import fitted_pictures, read_mask
from datasets.real import chosen_images
from diffusion import SAMPLERS
from editing.command import Job, Pictures, spread, wrote
from editing.mathematics import INVERSES, img2img_steps, inpaint_steps, invert_steps, last_timesteps
from generation.sample_store import tell_clipped
from generation.sampling import gather_images, sampler_names, timesteps_of
from utils.captions import contact_sheet
from utils.errors import ConfigError, DataError
from utils.files import check_inputs_stay, check_picture_folder, numbered, write_each, write_npz
from utils.images import MAX_COLUMNS, MAX_GRID_IMAGES, as_pictures, save_image, to_file
from utils.labels import save_images

HOLE_LEVEL = 128  # grey level of what is to be drawn, in the picture of the hole


def inputs_of(job: Job) -> Pictures:
    """The pictures, with a class and a seed each. A single picture serves several of these.

    Raises a ConfigError or DataError if there are no pictures, too many, or numbers that do not go
    together, and a UserError if the folder of --save_images holds pictures that would stay.
    """
    args, run = job.args, job.run
    if (args.input is None) == (args.real_split is None):
        raise ConfigError("give --input or --real_split, one of them")
    if args.input is None:
        name, missing = f"{run.config.dataset} ({args.real_split})", None
        with job.runtime.main_first():
            dataset = datasets.build_dataset(run.config, args.real_split)
        own = dataset.labels.tolist()
    else:
        numbers = tuple(map(str, range(run.spec.num_classes)))
        names = () if args.labels or not run.config.conditional else run.class_names or numbers
        name = args.input
        dataset, own, missing = fitted_pictures(args.input, run.spec, names, run.values)
    if (dataset.spec.shape, dataset.values) != (run.spec.shape, run.values):
        theirs, ours = (f"{x.spec}, {x.values or '8 bits'}" for x in (dataset, run))
        raise DataError(f"{name}: images of {theirs}, but the model draws {ours}")
    asked_for = len(dataset) if args.num_samples is None else args.num_samples
    if not 1 <= asked_for <= min(len(dataset), MAX_GRID_IMAGES):
        how = f"--num_samples says how many of them to take, at most {MAX_GRID_IMAGES}"
        raise ConfigError(f"{name} holds {len(dataset)} pictures; {how}")
    chosen = chosen_images(len(dataset), args.num_samples)
    images = torch.stack([dataset[i][0] for i in chosen])
    seeds = getattr(args, "seeds", None)  # inverting takes none
    count = max(len(images), len(args.labels or ()), len(seeds or ()))
    if len(images) not in (1, count):
        raise ConfigError(f"{len(images)} pictures, but {count} --labels or --seeds")
    kinds = {".png": True, ".npz": args.command == "invert", "_images": args.save_images}
    outputs = [job.path(kind) for kind, is_written in kinds.items() if is_written]
    check_inputs_stay(outputs, args.input, getattr(args, "mask", None))
    if args.save_images:
        check_picture_folder(job.path("_images"), numbered(count), run.suffix)
    labels = job.labels(own and [own[i] for i in chosen], count, missing)
    seeds = spread(seeds, count, "--seeds") if seeds else [job.first_seed + i for i in range(count)]
    return Pictures(images.expand(count, -1, -1, -1), labels, seeds)


def write_pictures(
    job: Job,
    kinds: Mapping[str, Tensor],
    inputs: Pictures,
    more: Mapping[Path, Callable[[Path], object]] = {},
) -> list[Path]:
    """Write a sheet of all kinds, one above the other, `more`, and if asked each picture of the
    last kind. Raises a UserError, after all the rest, for what cannot be written."""
    count, captions = len(inputs.images), job.captions(inputs.labels, len(inputs.images))
    rows, above = [], []
    for start in range(0, count, MAX_COLUMNS):
        columns = range(start, min(start + MAX_COLUMNS, count))
        rows += [[k * count + i for i in columns] for k in range(len(kinds))]
        above += [[captions[i] for i in columns], *[[]] * (len(kinds) - 1)]
    left = [*kinds] * (len(rows) // len(kinds))
    *_, results = kinds.values()
    every = as_pictures(torch.cat([*kinds.values()]), job.run.config.preview_channels)
    sheet = contact_sheet(every, rows, above=above, left=left)
    outputs = {job.path(".png"): partial(save_image, image=sheet)} | more
    if job.args.save_images:
        results, clipped = to_file(results, job.run.values)
        tell_clipped(clipped, job.run.values)
        outputs[job.path("_images")] = partial(save_images, images=results, labels=inputs.labels)
    return list(write_each(outputs))


def box_mask(box: Sequence[int], height: int, width: int) -> Tensor:
    """Bool (1, H, W), True within `box`: x0, y0, x1, y1 in pixels from the left upper corner.

    x1 and y1 are the first column and row outside it. Raises a ConfigError if there is no such box.
    """
    if len(box) != 4 or not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
        allowed = f"0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}"
        raise ConfigError(f"box {','.join(map(str, box))}: give x0,y0,x1,y1 with {allowed}")
    mask = torch.zeros((1, height, width), dtype=torch.bool)
    mask[:, box[1] : box[3], box[0] : box[2]] = True
    return mask


def img2img(job: Job) -> Iterator[str]:
    """Add noise to pictures and draw them again (SDEdit)."""
    run, device, strength = job.run, job.runtime.device, job.args.strength
    sampling = job.sampling()
    steps = last_timesteps(timesteps_of(run, sampling), strength)
    inputs = inputs_of(job)
    count, share = len(inputs.images), f"strength {strength:g}: the last {len(steps)} steps"
    yield f"{count} pictures, {share} of {sampling.describe()}"

    images = job.draw(
        count, lambda rows: img2img_steps(run, inputs.batch(rows, device), steps, sampling)
    )
    if images is not None:
        paths = write_pictures(job, {"input": inputs.images, "output": images}, inputs)
        following = f"the same with a smaller --strength than {strength:g}"
        yield wrote(paths, f"{following}, to stay closer to the input")


def inpaint(job: Job) -> Iterator[str]:
    """Draw parts of pictures anew, and keep the rest as it is."""
    args, run, device, sampling = job.args, job.run, job.runtime.device, job.sampling()
    times, size = args.resample, run.spec.shape[1:]
    if (args.mask is None) == (args.box is None):
        raise ConfigError("give --mask or --box, one of them")
    if times > 1 and SAMPLERS[sampling.method].multistep:
        others = " or ".join(name for name, sampler in SAMPLERS.items() if not sampler.multistep)
        raise ConfigError(f"--resample: {sampling.method} remembers its last step; use {others}")
    unknown = box_mask(args.box, *size) if args.mask is None else read_mask(args.mask, *size)
    inputs = inputs_of(job)
    if not unknown.any():
        raise ConfigError("--mask: nothing in it is white, at least half so; white is painted anew")
    count, area = len(inputs.images), f"{int(unknown.sum())} of {unknown.numel()} pixels"
    again = f", each step {times} times" if times > 1 else ""
    yield f"{count} pictures, {area} to be drawn: {sampling.describe()}{again}"

    images = job.draw(
        count, lambda r: inpaint_steps(run, inputs.batch(r, device), unknown, times, sampling)
    )
    if images is not None:
        holes = inputs.images.masked_fill(unknown, 0.0 if run.values else HOLE_LEVEL)
        kinds = {"input": inputs.images, "known": holes, "output": images}
        following = "the same with other --seeds, for other ways to fill the hole"
        if times == 1:
            following = "the same with --resample 5, if what is drawn does not fit what is known"
        yield wrote(write_pictures(job, kinds, inputs), following)


def invert(job: Job) -> Iterator[str]:
    """Turn pictures into the noise that gives them, and back (DDIM inversion)."""
    args, run, device = job.args, job.run, job.runtime.device
    if args.seed is not None:
        raise ConfigError("--seed: inverting draws no noise, it finds some")
    names = sampler_names(run.config, INVERSES)
    sampling = job.sampling(names[0], None, 0.0, 1.0)
    if sampling.method not in names or not sampling.is_deterministic:
        undone = " or ".join(names)
        raise ConfigError(f"invert undoes the steps of {undone} with ddim_eta 0, no others")
    inputs, times = inputs_of(job), args.iterations
    count, iterations = len(inputs.images), f"{times} iterations a step"
    yield f"{count} pictures to noise, {iterations}, and back: {sampling.describe()}"

    noise = [torch.zeros(0, *run.spec.shape)]  # makes it float32 where there are no pictures, too
    images = job.draw(
        count, lambda r: invert_steps(run, inputs.batch(r, device), times, sampling, noise)
    )
    parts = [part.float().cpu() for part in noise]
    x_T = gather_images(parts, run, job.runtime)
    if images is None:
        return
    yield from errors_of(images, inputs)
    path = job.path(".npz")
    labels = {} if inputs.labels is None else {"labels": np.array(inputs.labels)}
    steps, scale = sampling.num_inference_steps, sampling.cfg_scale
    arrays = dict(x_T=x_T.numpy(), num_inference_steps=steps, cfg_scale=scale, **labels)
    noise_file = {path: partial(write_npz, **arrays)}
    paths = write_pictures(job, {"input": inputs.images, "output": images}, inputs, noise_file)
    yield wrote(paths, job.command("edit.py decode", "--latents", path))


def errors_of(images: Tensor, inputs: Pictures) -> Iterator[str]:
    """Lines: how far each reconstruction is from its picture, as RMSE in 8-bit grey levels."""
    difference = images.double() - inputs.images.double()
    difference *= 127.5 if images.is_floating_point() else 1
    errors = difference.square().mean((1, 2, 3)).sqrt().tolist()
    for i, error in enumerate(errors):
        label = "" if inputs.labels is None else f" (label {inputs.labels[i]})"
        yield f"picture {i}{label}: error {error:.2f}"
    mean = sum(errors) / len(errors)
    yield f"mean error {mean:.2f}, largest {max(errors):.2f}: RMSE in grey levels of 256"
