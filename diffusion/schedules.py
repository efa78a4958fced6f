"""Noise schedules and the timesteps that sampling visits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

COSINE_OFFSET = 0.008
MAX_BETA = 0.999


def linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Ho et al. 2020 (DDPM): betas (T,) float64."""
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


def quadratic_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Linear in sqrt(beta), as latent diffusion's `scaled_linear`: betas (T,) float64."""
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64)
    return roots**2


def cosine_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Nichol and Dhariwal 2021, eq. 17: betas (T,) float64. The two ends are not used."""
    t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    alphas_cumprod = torch.cos((t + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=MAX_BETA)


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas, "quadratic": quadratic_betas}


def timestep_grid(num_timesteps: int, num_inference_steps: int, spacing: str) -> list[int]:
    """Which of 0..T-1 a sampler visits, from noise to image.

    Args:
        spacing: `trailing` starts at T - 1 and so at pure noise; `leading` ends at 0; `linspace`
            has both ends (the three of Lin et al. 2023, table 2). Others are a ValueError.
    """
    assert 1 <= num_inference_steps <= num_timesteps
    steps = torch.arange(num_inference_steps, dtype=torch.float64)
    if spacing == "trailing":
        grid = num_timesteps - steps * num_timesteps / num_inference_steps - 1
    elif spacing == "leading":
        grid = steps.flip(0) * (num_timesteps // num_inference_steps)
    elif spacing == "linspace":
        grid = torch.linspace(num_timesteps - 1, 0, num_inference_steps, dtype=torch.float64)
    else:
        raise ValueError(f"timestep_spacing={spacing!r}: use trailing, leading or linspace")
    return grid.round().long().tolist()


def with_previous(timesteps: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Each timestep with the one it steps to; the last steps to -1, the clean image."""
    return zip(timesteps, [*timesteps[1:], -1], strict=True)
