"""From a trained model to images: the one sampling path of sample.py, previews and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from diffusion import SAMPLERS, Step, make_denoiser, timestep_grid
from diffusion.guidance import Denoiser, conditioned
from generation.run import Run
from utils.config import Config, guidance_problem, steps_problem
from utils.distributed import Runtime
from utils.errors import ConfigError, UserError
from utils.images import to_uint8
from utils.precision import resolve_precision, sampling_autocast
from utils.rng import sample_noise

Labels = Sequence[int] | None  # a class in [0, K) for each image; None: a model without classes
Draw = Callable[[tuple[int, ...]], Tensor]  # shape -> noise
Frames = dict[int, list[Tensor]]  # the number of a step -> the images after it, batch by batch

UNCONDITIONAL = "unconditional: labels are ignored; 1 is conditional without guidance"

log = logging.getLogger("diffusion")


@dataclass(frozen=True)
class Sampling:
    """How to sample: see the config keys of the same names."""

    method: str
    num_inference_steps: int
    eta: float
    cfg_scale: float
    cfg_interval: tuple[float, float] | None
    threshold: str
    spacing: str
    conditional: bool
    cfg_rescale: float = 0.0
    spacing_shift: float = 1.0
    has_guide: bool = False  # the run's guide takes the place of the model without labels
    condition_scale: float = 1.0

    @property
    def options(self) -> dict[str, float]:
        """The arguments of this sampler's function that others do not take."""
        return {name: getattr(self, name) for name in SAMPLERS[self.method].options}

    @property
    def sampler(self) -> Callable[..., Iterator[Step]]:
        """The function of the sampler, its options filled in."""
        return partial(SAMPLERS[self.method].run, **self.options)

    @property
    def is_deterministic(self) -> bool:
        """True if the images follow from x_T alone."""
        rule = SAMPLERS[self.method].deterministic
        return rule(**self.options) if callable(rule) else rule

    def describe(self) -> str:
        kinds = {0.0: UNCONDITIONAL, 1.0: "conditional, no guidance"}
        kind = kinds.get(self.cfg_scale, f"guided, cfg_scale {self.cfg_scale:g}")
        if self.has_guide and self.cfg_scale != 1:
            kind = f"autoguided, cfg_scale {self.cfg_scale:g}"
        elif not self.conditional:
            kind = "model without classes"
        forwards = SAMPLERS[self.method].forwards_per_step
        steps = f"{self.num_inference_steps} steps" + f" of {forwards} forwards" * (forwards > 1)
        options = [f"{name} {value:g}" for name, value in self.options.items() if value]
        options += [f"condition_scale {self.condition_scale:g}"] * (self.condition_scale != 1)
        return ", ".join([self.method, steps, *options, kind])


def sampler_names(config: Config, functions: Iterable[Callable[..., Iterator[Step]]]) -> list[str]:
    """Names of the samplers that run one of these functions; the config's own comes first."""
    names = [name for name, sampler in SAMPLERS.items() if sampler.run in functions]
    return sorted(names, key=lambda name: name != config.sampling_method)


def sampling_from(
    config: Config,
    method: str | None = None,
    num_inference_steps: int | None = None,
    eta: float | None = None,
    cfg_scale: float | None = None,
    *,
    has_guide: bool = False,
) -> Sampling:
    """The config's sampling settings, with what the caller gives laid over them.

    The config's number of steps belongs to its own method: another one starts from its default.
    A guide, see `make_denoiser`, allows every scale, but is of no use with the 1 of a default.
    Raises a ConfigError for values that the model or the method cannot take.
    """
    chosen = method or config.sampling_method
    if chosen not in SAMPLERS:
        raise ConfigError(f"sampling_method={chosen!r}: use {', '.join(SAMPLERS)}")
    steps = num_inference_steps
    if steps is None and chosen == config.sampling_method:
        steps = config.num_inference_steps
    if steps is None:
        steps = min(SAMPLERS[chosen].default_steps or config.num_timesteps, config.num_timesteps)
    scale = config.guidance_scale if cfg_scale is None else cfg_scale
    if not 0 <= scale < float("inf"):
        raise ConfigError(f"cfg_scale={scale:g}: must be 0 or more")
    if eta is not None and "eta" not in SAMPLERS[chosen].options:
        takers = " or ".join(name for name in SAMPLERS if "eta" in SAMPLERS[name].options)
        raise ConfigError(f"--ddim_eta {eta:g}: {chosen} takes none; use {takers}, or leave it out")
    eta = config.ddim_eta if eta is None else eta
    if not 0 <= eta <= 1:
        raise ConfigError(f"ddim_eta={eta:g}: must lie in 0..1")
    if has_guide and cfg_scale is None and scale == 1:
        raise ConfigError("--guide: has no effect with cfg_scale=1; give --cfg_scale, such as 2")
    problem = None if has_guide else guidance_problem(config, scale)
    if problem := steps_problem(config, steps) or problem:
        raise ConfigError(problem)
    kept = config.cfg_interval, config.threshold, config.timestep_spacing, config.conditional
    more = config.cfg_rescale, config.timestep_spacing_shift, has_guide, config.condition_scale
    return Sampling(chosen, steps, eta, float(scale), *kept, *more)


def label_denoiser(run: Run, labels: Labels, sampling: Sampling, device: torch.device) -> Denoiser:
    """The run's model, asked for a class for each image."""
    y = None if labels is None else torch.tensor(labels, dtype=torch.int64, device=device)
    names = "cfg_scale", "cfg_interval", "cfg_rescale", "threshold"
    settings = {name: getattr(sampling, name) for name in names}
    guide = run.guide.model if sampling.has_guide else None
    return make_denoiser(run.process, run.model, y, guide=guide, **settings)


def timesteps_of(run: Run, sampling: Sampling) -> list[int]:
    """The timesteps that sampling visits, from noise to image."""
    counts = run.process.num_timesteps, sampling.num_inference_steps
    more = dict(shift=sampling.spacing_shift, half_log_snr=run.process.half_log_snr)
    return timestep_grid(*counts, sampling.spacing, **more)


def steps_from(
    run: Run, denoise: Denoiser, x_T: Tensor, sampling: Sampling, draw: Draw
) -> Iterator[Step]:
    """The sampler's steps from x_T (b, C, H, W) on, for one batch; the last one's x is the images.

    `draw` gives the noise along the way, see `sample_noise`; that of no seeds refuses to give any.
    """
    timesteps = timesteps_of(run, sampling)
    yield from sampling.sampler(denoise, x_T, run.process, timesteps, lambda x: draw(x.shape))


def sample_steps(
    run: Run, seeds: Sequence[int], labels: Labels, sampling: Sampling, device: torch.device
) -> Iterator[Step]:
    """The sampler's steps for one batch of new images, see `steps_from`.

    Each image depends on its own seed and label alone (up to floating-point rounding).
    """
    draw = sample_noise(list(seeds), device)
    x_T = draw((len(seeds), *run.spec.shape))
    yield from steps_from(run, label_denoiser(run, labels, sampling, device), x_T, sampling, draw)


def batch_rows(num_images: int, batch_size: int, runtime: Runtime) -> list[slice]:
    """This rank's share of `num_images`, cut into batches: slices of 0..num_images."""
    share = runtime.share(num_images)
    return [slice(i, min(i + batch_size, share.stop)) for i in share[::batch_size]]


def run_steps(
    run: Run, steps: Iterator[Step], count: int, device: torch.device, frames: Frames | None = None
) -> Tensor:
    """Take the steps of one batch of `count` images in the config's precision.

    Returns the images, uint8 or, of a run with `values`, float32 (count, C, H, W) on the CPU; those
    after the steps whose numbers `frames` has are appended there. Raises a UserError if the
    device's memory is too small.
    """
    precision = resolve_precision(run.config.precision, device)
    models = [member.model for member in (run, run.guide) if member is not None]
    made = partial(torch.nan_to_num, nan=-1, posinf=1, neginf=-1) if run.values else to_uint8
    try:
        with sampling_autocast(precision, device, *models):
            for number, step in enumerate(steps):
                if frames and number in frames:
                    frames[number].append(made(step.x).cpu())
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory on {device} while sampling {count} images at a time; draw fewer: lower "
            "--batch_size (of previews: num_samples)"
        ) from error
    if black := count - int(torch.isfinite(step.x).flatten(1).all(1).sum()):
        log.warning(
            f"{black} of {count} images are not finite and come out black: the network overflows "
            f"in {precision}; try precision=fp32, or an earlier checkpoint"
        )
    return made(step.x).cpu()


def generate(
    run: Run,
    seeds: Sequence[int],
    labels: Labels,
    *,
    sampling: Sampling,
    batch_size: int,
    runtime: Runtime,
    frames: Frames | None = None,
    planes_of: Callable[[slice], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Sample this rank's share of one image per seed: batches (b, C, H, W), see `run_steps`.

    Images on the way are kept in `frames`, see `run_steps`. A model with a condition needs the
    planes of any rows of the seeds, see `conditioned`.
    """
    device = runtime.device
    for rows in batch_rows(len(seeds), batch_size, runtime):
        planes = planes_of and planes_of(rows).to(device)
        given = partial(conditioned, planes=planes, scale=sampling.condition_scale)
        guide = run.guide and replace(run.guide, model=given(run.guide.model))
        member = replace(run, model=given(run.model), guide=guide)
        steps = sample_steps(member, seeds[rows], labels and labels[rows], sampling, device)
        yield run_steps(run, steps, len(seeds[rows]), device, frames)


def gather_images(parts: Iterable[Tensor], run: Run, runtime: Runtime) -> Tensor | None:
    """All images, (N, C, H, W) on the CPU of the main process; None on the others.

    `parts` are the batches of this rank's share of a run's images in order, on the CPU.
    """
    none = torch.zeros((0, *run.spec.shape), dtype=torch.float32 if run.values else torch.uint8)
    return runtime.gather(torch.cat([none, *parts]))


def evenly_spaced(count: int, most: int) -> list[int]:
    """0..count - 1, or if that is more than `most`, so many of them, from end to end."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()
