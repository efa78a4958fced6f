"""Denoising diffusion implicit models (Song et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from diffusion.guidance import Denoiser
from diffusion.process import Process, Step


def ddim(
    denoise: Denoiser,
    x_T: Tensor,
    process: Process,
    timesteps: Sequence[int],
    randn_like: Callable[[Tensor], Tensor],
    *,
    eta: float = 0.0,
) -> Iterator[Step]:
    """Eq. 12 with sigma of eq. 16: eta = 0 is deterministic, and on the linear path the Euler
    method; eta = 1 equals DDPM."""
    x = x_T
    for t, s, (signal_t, noise_t), (signal_s, noise_s) in process.steps(timesteps):
        x_0, eps = denoise(x, t)
        step_variance = noise_t**2 - (signal_t / signal_s * noise_s) ** 2
        variance = (eta * noise_s / noise_t) ** 2 * step_variance
        x = signal_s * x_0 + max(0.0, noise_s**2 - variance) ** 0.5 * eps
        if variance > 0:
            x = x + variance**0.5 * randn_like(x)
        yield Step(s, x, x_0)
