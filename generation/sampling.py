"""From a trained model to images: the one sampling path of sample.py, previews and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
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

SamplerFunction = Callable[..., Iterator[Step]]  # (denoise, x_T, diffusion, timesteps, randn_like)

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
    def is_deterministic(self) -> bool:
        """Whether the image follows from x_T alone."""
        return self.method == "dpmpp_2m" or (self.method == "ddim" and self.eta == 0)

    def describe(self) -> str:
        kinds = {0.0: "unconditional", 1.0: "conditional, no guidance"}
        kind = kinds.get(self.cfg_scale, f"guided, cfg_scale {self.cfg_scale:g}")
        kind = kind if self.conditional else "model without classes"
        eta = f", eta {self.eta:g}" if self.method == "ddim" and self.eta else ""
        return f"{self.method}, {self.num_inference_steps} steps{eta}, {kind}"


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


def label_denoiser(
    run: Run, labels: Sequence[int] | None, sampling: Sampling, device: torch.device
) -> Denoiser:
    """The run's model, asked for one class in [0, K) per image; None if it has no classes."""
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
    return timestep_grid(
        run.diffusion.num_timesteps, sampling.num_inference_steps, sampling.spacing
    )


def sampler_of(sampling: Sampling) -> SamplerFunction:
    """`sampling`'s function of the table, its options filled in."""
    function = SAMPLERS[sampling.method].run
    return partial(function, eta=sampling.eta) if sampling.method == "ddim" else function


def sample_steps(
    run: Run,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    sampling: Sampling,
    device: torch.device,
) -> Iterator[Step]:
    """The sampler's steps for one batch; the last one's x is the images, (b, C, H, W).

    Each image depends on its own seed and label alone (up to floating-point rounding).
    """
    denoise = label_denoiser(run, labels, sampling, device)
    draw = sample_noise(list(seeds), device)
    x_T = draw((len(seeds), *run.spec.shape))
    timesteps = timesteps_of(run, sampling)
    sampler = sampler_of(sampling)
    yield from sampler(denoise, x_T, run.diffusion, timesteps, lambda x: draw(tuple(x.shape)))


def last_steps(
    run: Run,
    num_images: int,
    steps_of: Callable[[slice], Iterator[Step]],
    *,
    batch_size: int,
    runtime: Runtime,
    on_step: Callable[[int, Step], None] | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Run this rank's share of `num_images`, a batch at a time, in the config's precision.

    Args:
        steps_of: the steps of the images in a slice of 0..num_images.
        on_step: called with (step number, step) during every batch.

    Yields:
        the slice, and the last step's x, (b, C, H, W) on the device.
    """
    precision = resolve_precision(run.config.precision, runtime.device)
    share = runtime.share(num_images)
    for start in range(share.start, share.stop, batch_size):
        rows = slice(start, min(start + batch_size, share.stop))
        try:
            with torch.inference_mode(), autocast(precision, runtime.device):
                for number, step in enumerate(steps_of(rows)):
                    if on_step is not None:
                        on_step(number, step)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory on {runtime.device} while sampling {rows.stop - rows.start} "
                "images at a time; lower --batch_size (of previews: num_samples)"
            ) from error
        finite = int(torch.isfinite(step.x).flatten(1).all(1).sum())
        if finite < len(step.x):
            log.warning(
                "%d of %d images are not finite and come out black: the network overflows in %s; "
                "try precision=fp32, or an earlier checkpoint",
                len(step.x) - finite,
                len(step.x),
                precision,
            )
        yield rows, step.x


def generate(
    run: Run,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    *,
    sampling: Sampling,
    batch_size: int,
    runtime: Runtime,
    on_step: Callable[[int, Step], None] | None = None,
) -> Iterator[tuple[Tensor, list[int] | None, list[int]]]:
    """Sample this rank's share of one image per seed.

    Args:
        labels: one in [0, K) per seed; None for a model without classes.
        on_step: called with (step number, step) during every batch.

    Yields:
        images uint8 (b, C, H, W) on the CPU, their labels and their seeds, in order.
    """

    def labels_of(rows: slice) -> list[int] | None:
        return None if labels is None else list(labels[rows])

    def steps_of(rows: slice) -> Iterator[Step]:
        return sample_steps(run, seeds[rows], labels_of(rows), sampling, runtime.device)

    for rows, x in last_steps(
        run, len(seeds), steps_of, batch_size=batch_size, runtime=runtime, on_step=on_step
    ):
        yield to_uint8(x).cpu(), labels_of(rows), list(seeds[rows])


class FrameRecorder:
    """Keeps 8-bit copies of evenly spaced steps of every batch, for GIFs and step pictures."""

    def __init__(self, num_steps: int) -> None:
        count = min(num_steps, MAX_GIF_FRAMES)
        self._kept = {round(i) for i in np.linspace(0, num_steps - 1, count)}
        self._frames: dict[int, list[Tensor]] = {number: [] for number in sorted(self._kept)}

    def __call__(self, number: int, step: Step) -> None:
        if number in self._kept:
            self._frames[number].append(to_uint8(step.x).cpu())

    def frames(self, shape: tuple[int, ...]) -> list[Tensor]:
        """One (n, C, H, W) tensor per kept step."""
        empty = torch.zeros((0, *shape), dtype=torch.uint8)
        return [torch.cat([empty, *batches]) for batches in self._frames.values()]
