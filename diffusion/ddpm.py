"""Ancestral sampling (Ho et al. 2020, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from diffusion.guidance import Denoiser
from diffusion.process import Process, Step


def ddpm(
    denoise: Denoiser,
    x_T: Tensor,
    process: Process,
    timesteps: Sequence[int],
    randn_like: Callable[[Tensor], Tensor],
) -> Iterator[Step]:
    """Sample the posterior q(x_s | x_t, x_0) (eq. 6 and 7) with its own, small variance.

    A grid with gaps is the shorter chain with the same levels (Nichol and Dhariwal 2021).
    """
    x = x_T
    for t, s, (signal_t, noise_t), (signal_s, noise_s) in process.steps(timesteps):
        x_0, _ = denoise(x, t)
        ratio = signal_t / signal_s
        step_variance = max(0.0, noise_t**2 - (ratio * noise_s) ** 2)  # of q(x_t | x_s)
        x = (signal_s * step_variance * x_0 + ratio * noise_s**2 * x) / noise_t**2
        if s >= 0:
            x = x + step_variance**0.5 * noise_s / noise_t * randn_like(x)
        yield Step(s, x, x_0)
