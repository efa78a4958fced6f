"""Pictures to the noise that gives them, and back."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from diffusion import Step
from editing.command import AddOption, Command, Job, add_label_option, draw, output, part
from editing.latents import Latents, save_latents
from editing.mathematics import invert_steps
from editing.pictures import Inputs, add_input_options, inputs_of, write_pictures
from generation.sampling import Run, sampling_from
from utils.distributed import Runtime
from utils.errors import ConfigError
from utils.images import to_float


def add_options(add: AddOption) -> None:
    add_input_options(add)
    add_label_option(add)
    add("--iterations", type=int, default=5, help="forwards a step on the way to the noise")


def prepare(args: argparse.Namespace, run: Run, runtime: Runtime) -> Job:
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


def report_errors(images: Tensor, inputs: Inputs) -> None:
    """Print how far each reconstruction is from its picture: RMSE in 8-bit grey levels."""
    difference = images.double() - inputs.images.double()
    errors = difference.square().mean((1, 2, 3)).sqrt().tolist()
    for i, error in enumerate(errors):
        label = "" if inputs.labels is None else f" (label {inputs.labels[i]})"
        print(f"picture {i}{label}: error {error:.2f}")
    mean = sum(errors) / len(errors)
    print(f"mean error {mean:.2f}, largest {max(errors):.2f}: RMSE in grey levels of 256")


COMMAND = Command("pictures to the noise that gives them, and back", add_options, prepare)
