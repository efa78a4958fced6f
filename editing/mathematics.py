"""Samples from something else than fresh noise: paths between samples, and pictures to start from.

First the mathematics, functions of tensors and denoisers; then the steps of one batch of each kind,
for `sampling.run_steps`. The last step's x is the result, (b, C, H, W); pictures are in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion import SAMPLERS
from diffusion.ddim import ddim
from diffusion.guidance import Denoiser
from diffusion.process import Prediction, Process, Step
from editing.command import Pictures
from generation.run import Run
from generation.sampling import Labels, Sampling, label_denoiser, steps_from, timesteps_of
from utils.errors import ConfigError
from utils.rng import sample_noise

SamplerFunction = Callable[..., Iterator[Step]]  # (denoise, x_T, process, timesteps, randn_like)
PARALLEL = 1e-6  # radians; below it a great circle is not defined, and a straight line is as good


def slerp(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Along the great circle from `first` to `second`, each (B, ...); weight (B,) in [0, 1].

    A straight line between two noises would pass through shorter vectors, which no model has seen
    (Song et al. 2021, DDIM, appendix D.5). The ends are exact; equal ends stay where they are.
    """
    a, b = first.double().flatten(1), second.double().flatten(1)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    angle = cosine.clamp(-1, 1).acos()
    w = weight.to(angle)
    is_line = angle < PARALLEL
    whole = torch.where(is_line, 1.0, angle.sin())
    of_first = torch.where(is_line, 1 - w, ((1 - w) * angle).sin() / whole)
    of_second = torch.where(is_line, w, (w * angle).sin() / whole)
    mixed = of_first[:, None] * a + of_second[:, None] * b
    return mixed.reshape(first.shape).to(first.dtype)


def blend(first: Denoiser, second: Denoiser, weight: Tensor) -> Denoiser:
    """The predictions of two denoisers, mixed: weight (B,) is the share of the second one.

    For two classes that mixes their (guided) scores, which are then those of p_first^(1 - w) times
    p_second^w, up to a factor (Liu et al. 2022, composable diffusion). It asks nothing of the
    network but its predictions. A pair x_0, eps stays one, because x_t is linear in both.
    """

    def denoise(x_t: Tensor, t: int) -> Prediction:
        w = weight.to(x_t).reshape(-1, *[1] * (x_t.ndim - 1))
        pairs = zip(first(x_t, t), second(x_t, t), strict=True)
        return Prediction(*(torch.lerp(a, b, w) for a, b in pairs))

    return denoise


def last_timesteps(timesteps: Sequence[int], strength: float) -> list[int]:
    """The share `strength` of the sampling steps that comes last, at least one; 1 is all of them.

    Raises a ConfigError for a strength outside (0, 1].
    """
    if not 0 < strength <= 1:
        raise ConfigError(f"strength={strength:g}: must be above 0 and at most 1")
    count = max(1, round(strength * len(timesteps)))
    return list(timesteps[-count:])


def keep_known(denoise: Denoiser, process: Process, x_0: Tensor, unknown: Tensor) -> Denoiser:
    """A denoiser that knows the picture x_0 (B, C, H, W) wherever `unknown` (.., H, W) is False.

    There the sampler goes towards x_0 along the forward process: each x_t is a draw of
    q(x_t | x_0), as in RePaint (Lugmayr et al. 2022, eq. 8), and the last one is x_0 itself.
    """

    def denoise_unknown(x_t: Tensor, t: int) -> Prediction:
        times = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
        pairs = zip(denoise(x_t, t), process.with_x_0(x_0, x_t, times), strict=True)
        return Prediction(*(torch.where(unknown, drawn, known) for drawn, known in pairs))

    return denoise_unknown


def resampling(sampler: SamplerFunction, times: int) -> SamplerFunction:
    """Every step but the last taken `times` times, noised back in between (RePaint, algorithm 1).

    What is drawn so hears of what is known again and again before the noise is less. For samplers
    whose step follows from x_t alone, which multistep ones do not.
    """

    def sample(denoise, x_T, process, timesteps, randn_like):
        x = x_T
        for t, s, (signal_t, noise_t), (signal_s, noise_s) in process.steps(timesteps):
            one_step = [t] if s < 0 else [t, s]
            for repeat in range(1 if s < 0 else times):
                if repeat:
                    ratio = signal_t / signal_s
                    std = max(0.0, noise_t**2 - (ratio * noise_s) ** 2) ** 0.5
                    x = ratio * x + std * randn_like(x)  # q(x_t | x_s)
                step = next(sampler(denoise, x, process, one_step, randn_like))
                x = step.x
            yield step

    return sample


def ddim_invert(
    denoise: Denoiser,
    x_0: Tensor,
    process: Process,
    timesteps: Sequence[int],
    *,
    iterations: int,
) -> Iterator[Step]:
    """From pictures to the noise that DDIM with eta = 0 turns into them; the last Step has x_T.

    x_t and v(x_t, t) stand for x_0 and eps, so with t's rates, its noise and the levels of s a step
    of DDIM from t to s is x_s = a x_t - b v(x_t, t), on the linear path Euler's step, with
    signal^2 + noise^2 = 1 a rotation (Salimans and Ho 2022, appendix D). So

        x_t = (x_s + b v(x_t, t)) / a

    One iteration takes v at x_s, which is the ODE backwards (Song et al. 2021, section 5.4); more
    of them iterate to the fixed point, which undoes the step (Pan et al. 2023).
    """
    x = x_0
    for t, _, (signal_t, noise_t), (signal_s, noise_s) in reversed(list(process.steps(timesteps))):
        signal_rate, noise_rate = process.rates(t)
        of_x = (noise_rate * signal_s - signal_rate * noise_s) / process.scale
        of_v = (noise_t * signal_s - signal_t * noise_s) / process.scale
        x_t = x
        for _ in range(iterations):
            predicted, eps = denoise(x_t, t)
            x_t = (x + of_v * (noise_rate * eps + signal_rate * predicted)) / of_x
        x = x_t
        yield Step(t, x, predicted)


INVERSES = {ddim: ddim_invert}  # a sampler's function -> the function that undoes its steps


class Waypoint(NamedTuple):
    """What one sample comes from; label None for a model without classes."""

    seed: int
    label: int | None

    def __str__(self) -> str:
        return f"seed {self.seed}" + ("" if self.label is None else f" label {self.label}")


class Frame(NamedTuple):
    """A point on the way: `weight` is the share of `end`, in [0, 1]."""

    start: Waypoint
    end: Waypoint
    weight: float


def frames_along(waypoints: Sequence[Waypoint], num_frames: int) -> list[Frame]:
    """From each waypoint to the next in `num_frames` frames, both ends counted.

    A waypoint in the middle ends one stretch and begins the next, as one frame: n waypoints give
    (n - 1) (num_frames - 1) + 1 frames.
    """
    weights = [i / (num_frames - 1) for i in range(1, num_frames)]
    later = [Frame(*ends, weight) for ends in pairwise(waypoints) for weight in weights]
    return [Frame(*waypoints[:2], 0.0), *later]


def morph_steps(
    run: Run, frames: Sequence[Frame], sampling: Sampling, device: torch.device
) -> Iterator[Step]:
    """The samples at these points: noise on the great circle, predictions mixed."""
    starts, ends, weights = zip(*frames, strict=True)
    weight = torch.tensor(weights, dtype=torch.float64)
    noise, denoisers = [], []
    for stops in (starts, ends):
        seeds, labels = zip(*stops, strict=True)
        noise.append(sample_noise(list(seeds), weight.device)((len(stops), *run.spec.shape)))
        labels = None if None in labels else labels
        denoisers.append(label_denoiser(run, labels, sampling, device))
    denoise = denoisers[0]
    if any(start.label != end.label for start, end in zip(starts, ends, strict=True)):
        denoise = blend(*denoisers, weight.float().to(device))
    x_T = slerp(*noise, weight).to(device)
    yield from steps_from(run, denoise, x_T, sampling, sample_noise([], device))


def img2img_steps(
    run: Run, pictures: Pictures, timesteps: Sequence[int], sampling: Sampling
) -> Iterator[Step]:
    """Noise the pictures as far as the first of the timesteps, with the noise of their seeds, and
    sample from there (Meng et al. 2022, SDEdit)."""
    x_0, labels, seeds = pictures
    draw = sample_noise(seeds, x_0.device)
    t = torch.full((len(x_0),), timesteps[0], dtype=torch.int64, device=x_0.device)
    x_t = run.process.q_sample(x_0, t, draw(x_0.shape))
    denoise = label_denoiser(run, labels, sampling, x_0.device)
    yield from sampling.sampler(denoise, x_t, run.process, timesteps, lambda x: draw(x.shape))


def inpaint_steps(
    run: Run, pictures: Pictures, unknown: Tensor, num_resamples: int, sampling: Sampling
) -> Iterator[Step]:
    """Draw what is `unknown` (bool (1, H, W)) of the pictures, as `keep_known` keeps the rest.

    Where all is unknown that is a plain sample of the same seeds.
    """
    x_0, labels, seeds = pictures
    draw = sample_noise(seeds, x_0.device)
    x_T = draw(x_0.shape)
    denoise = label_denoiser(run, labels, sampling, x_0.device)
    known = keep_known(denoise, run.process, x_0, unknown.to(x_0.device))
    timesteps, sampler = timesteps_of(run, sampling), sampling.sampler
    if num_resamples > 1:
        sampler = resampling(sampler, num_resamples)
    yield from sampler(known, x_T, run.process, timesteps, lambda x: draw(x.shape))


def invert_steps(
    run: Run, pictures: Pictures, iterations: int, sampling: Sampling, noise: list[Tensor]
) -> Iterator[Step]:
    """Invert the pictures to noise, append that to `noise`, and sample from it."""
    x_0, labels, _ = pictures
    denoise = label_denoiser(run, labels, sampling, x_0.device)
    timesteps, undo = timesteps_of(run, sampling), INVERSES[SAMPLERS[sampling.method].run]
    for step in undo(denoise, x_0, run.process, timesteps, iterations=iterations):
        x_T = step.x
    noise.append(x_T)
    yield from decode_steps(run, x_T, labels, sampling)


def decode_steps(run: Run, x_T: Tensor, labels: Labels, sampling: Sampling) -> Iterator[Step]:
    """Sample from the noise x_T alone."""
    denoise = label_denoiser(run, labels, sampling, x_T.device)
    yield from steps_from(run, denoise, x_T, sampling, sample_noise([], x_T.device))
