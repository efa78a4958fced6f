"""From a trained model to images: the one sampling path of sample.py, previews and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from diffusion import SAMPLERS, Step, make_denoiser, timestep_grid
from diffusion.guidance import Denoiser
from generation.run import Run
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import ConfigError, UserError
from utils.images import to_uint8
from utils.precision import autocast, resolve_precision
from utils.rng import sample_noise

MAX_GIF_FRAMES = 60

Labels = Sequence[int] | None  # a class in [0, K) for each image; None: a model without classes
OnStep = Callable[[int, Step], None]  # called with (step number, step) after every step of a batch

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

    @property
    def options(self) -> dict[str, float]:
        """What this sampler takes beside what all samplers take."""
        return {name: getattr(self, name) for name in SAMPLERS[self.method].options}

    @property
    def is_deterministic(self) -> bool:
        """True if the images follow from x_T alone."""
        rule = SAMPLERS[self.method].deterministic
        return rule(**self.options) if callable(rule) else rule

    def describe(self) -> str:
        kinds = {0.0: "unconditional", 1.0: "conditional, no guidance"}
        kind = kinds.get(self.cfg_scale, f"guided, cfg_scale {self.cfg_scale:g}")
        kind = kind if self.conditional else "model without classes"
        forwards = SAMPLERS[self.method].forwards_per_step
        steps = f"{self.num_inference_steps} steps" + f" of {forwards} forwards" * (forwards > 1)
        options = [f"{name} {value:g}" for name, value in self.options.items() if value]
        return ", ".join([self.method, steps, *options, kind])


def sampling_from(
    config: Config,
    method: str | None = None,
    num_inference_steps: int | None = None,
    eta: float | None = None,
    cfg_scale: float | None = None,
) -> Sampling:
    """The config's sampling settings, with what the caller gives laid over them.

    The config's number of steps belongs to its own method: another one starts from its default.

    Raises:
        ConfigError: values that the model or the method cannot take.
    """
    chosen = method or config.sampling_method
    if chosen not in SAMPLERS:
        raise ConfigError(f"sampling_method={chosen!r}: use {', '.join(SAMPLERS)}")
    steps = num_inference_steps
    if steps is None and chosen == config.sampling_method:
        steps = config.num_inference_steps
    if steps is None:
        steps = min(SAMPLERS[chosen].default_steps or config.num_timesteps, config.num_timesteps)
    if problem := config.steps_problem(steps):
        raise ConfigError(problem)
    scale = config.guidance_scale if cfg_scale is None else cfg_scale
    if not 0 <= scale < float("inf"):
        raise ConfigError(f"cfg_scale={scale:g}: must be 0 or more")
    if problem := config.guidance_problem(scale):
        raise ConfigError(problem)
    eta = config.ddim_eta if eta is None else eta
    if not 0 <= eta <= 1:
        raise ConfigError(f"ddim_eta={eta:g}: must lie in 0..1")
    return Sampling(
        method=chosen,
        num_inference_steps=steps,
        eta=eta,
        cfg_scale=float(scale),
        cfg_interval=config.cfg_interval,
        threshold=config.threshold,
        spacing=config.timestep_spacing,
        conditional=config.conditional,
    )


def label_denoiser(run: Run, labels: Labels, sampling: Sampling, device: torch.device) -> Denoiser:
    """The run's model, asked for a class for each image."""
    return make_denoiser(
        run.diffusion,
        run.model,
        None if labels is None else torch.tensor(labels, dtype=torch.int64, device=device),
        cfg_scale=sampling.cfg_scale,
        cfg_interval=sampling.cfg_interval,
        threshold=sampling.threshold,
    )


def timesteps_of(run: Run, sampling: Sampling) -> list[int]:
    """The timesteps that sampling visits, from noise to image."""
    return timestep_grid(run.config.num_timesteps, sampling.num_inference_steps, sampling.spacing)


def sampler_of(sampling: Sampling) -> Callable[..., Iterator[Step]]:
    """The function of the sampler, its options filled in."""
    return partial(SAMPLERS[sampling.method].run, **sampling.options)


def sample_steps(
    run: Run, seeds: Sequence[int], labels: Labels, sampling: Sampling, device: torch.device
) -> Iterator[Step]:
    """The sampler's steps for one batch; the last one's x is the images, (b, C, H, W).

    Each image depends on its own seed and label alone (up to floating-point rounding).
    """
    denoise = label_denoiser(run, labels, sampling, device)
    draw = sample_noise(list(seeds), device)
    x_T = draw((len(seeds), *run.spec.shape))
    timesteps, sampler = timesteps_of(run, sampling), sampler_of(sampling)
    yield from sampler(denoise, x_T, run.diffusion, timesteps, lambda x: draw(tuple(x.shape)))


def batch_rows(num_images: int, batch_size: int, runtime: Runtime) -> list[slice]:
    """This rank's share of `num_images`, cut into batches: slices of 0..num_images."""
    share = runtime.share(num_images)
    starts = range(share.start, share.stop, batch_size)
    return [slice(start, min(start + batch_size, share.stop)) for start in starts]


def run_steps(
    run: Run, steps: Iterator[Step], device: torch.device, on_step: OnStep | None = None
) -> Tensor:
    """Take the steps of one batch in the config's precision; returns the last x, (b, C, H, W).

    Raises:
        UserError: the device has not the memory for so large a batch.
    """
    precision = resolve_precision(run.config.precision, device)
    try:
        with torch.inference_mode(), autocast(precision, device):
            for number, step in enumerate(steps):
                if on_step is not None:
                    on_step(number, step)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory on {device} while sampling; draw fewer images at a time: lower "
            "--batch_size (of previews: num_samples)"
        ) from error
    count = len(step.x)
    if black := count - int(torch.isfinite(step.x).flatten(1).all(1).sum()):
        log.warning(
            f"{black} of {count} images are not finite and come out black: the network overflows "
            f"in {precision}; try precision=fp32, or an earlier checkpoint"
        )
    return step.x


def generate(
    run: Run,
    seeds: Sequence[int],
    labels: Labels,
    *,
    sampling: Sampling,
    batch_size: int,
    runtime: Runtime,
    on_step: OnStep | None = None,
) -> Iterator[Tensor]:
    """Sample this rank's share of one image per seed: batches, uint8 (b, C, H, W) on the CPU."""
    for rows in batch_rows(len(seeds), batch_size, runtime):
        asked = None if labels is None else labels[rows]
        steps = sample_steps(run, seeds[rows], asked, sampling, runtime.device)
        yield to_uint8(run_steps(run, steps, runtime.device, on_step)).cpu()


def gather_images(
    parts: Iterable[Tensor],
    num_images: int,
    shape: tuple[int, ...],
    runtime: Runtime,
    *,
    dtype: torch.dtype = torch.uint8,
) -> Tensor | None:
    """All images, (num_images, *shape) on the CPU of the main process; None on the others.

    `parts` are the batches of this rank's share in order, each (b, *shape) on the CPU.
    """
    rows = torch.cat([torch.zeros((0, *shape), dtype=dtype), *parts])
    return runtime.gather(rows, num_images)


class FrameRecorder:
    """An `OnStep` that keeps evenly spaced steps, for GIFs and step pictures, in `frames`: from
    the number of a step to its batches, uint8 (b, C, H, W)."""

    def __init__(self, num_steps: int) -> None:
        kept = np.linspace(0, num_steps - 1, min(num_steps, MAX_GIF_FRAMES)).round().astype(int)
        self.frames: dict[int, list[Tensor]] = {number: [] for number in kept.tolist()}

    def __call__(self, number: int, step: Step) -> None:
        if number in self.frames:
            self.frames[number].append(to_uint8(step.x).cpu())
