"""Ancestral sampling (Ho et al. 2020, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from diffusion.gaussian import GaussianDiffusion, Step
from diffusion.guidance import Denoiser
from diffusion.schedules import with_previous


def ddpm(
    denoise: Denoiser,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    timesteps: Sequence[int],
    randn_like: Callable[[Tensor], Tensor],
) -> Iterator[Step]:
    """Sample the posterior q(x_s | x_t, x_0) (eq. 6 and 7) with its own, small variance.

    A grid with gaps is the shorter chain with the same alphas_cumprod (Nichol and Dhariwal 2021).
    """
    x = x_T
    for t, s in with_previous(timesteps):
        x_0, _ = denoise(x, t)
        a_t, a_s = diffusion.alpha_cumprod(t), diffusion.alpha_cumprod(s)
        alpha = a_t / a_s
        x = (a_s**0.5 * (1 - alpha) * x_0 + alpha**0.5 * (1 - a_s) * x) / (1 - a_t)
        if s >= 0:
            x = x + ((1 - alpha) * (1 - a_s) / (1 - a_t)) ** 0.5 * randn_like(x)
        yield Step(s, x, x_0)
