"""Denoising diffusion implicit models (Song et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from diffusion.gaussian import GaussianDiffusion, Step
from diffusion.guidance import Denoiser
from diffusion.schedules import with_previous


def ddim(
    denoise: Denoiser,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    timesteps: Sequence[int],
    randn_like: Callable[[Tensor], Tensor],
    *,
    eta: float = 0.0,
) -> Iterator[Step]:
    """Eq. 12 with sigma of eq. 16: eta = 0 is deterministic, eta = 1 equals DDPM."""
    x = x_T
    for t, s in with_previous(timesteps):
        x_0, eps = denoise(x, t)
        a_t, a_s = diffusion.alpha_cumprod(t), diffusion.alpha_cumprod(s)
        variance = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
        x = a_s**0.5 * x_0 + max(0.0, 1 - a_s - variance) ** 0.5 * eps
        if variance > 0:
            x = x + variance**0.5 * randn_like(x)
        yield Step(s, x, x_0)
