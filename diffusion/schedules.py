"""Noise schedules, the levels of signal and noise they give, and the timesteps sampling visits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.config import Config, Parts, function_of

COSINE_OFFSET = 0.008
MAX_BETA = 0.999
SIGMOID_END = 6.0
SMALLEST_SIGNAL = 1e-4  # of the linear path: pure noise has no log-SNR
SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5  # Karras et al. 2022 (EDM), table 1


class Levels(NamedTuple):
    """A path from images to noise: x_t = signal * scale * x_0 + noise * eps at each t.

    All but `scale` are (T,) float64, and the ratio of noise to signal grows with t. The rates are
    the derivative of the path, v = signal_rate * scale * x_0 + noise_rate * eps, in a time in which
    signal * noise_rate - noise * signal_rate = 1. The network sees `scale` times the image.
    """

    signal: Tensor
    noise: Tensor
    signal_rate: Tensor
    noise_rate: Tensor
    scale: float = 1.0


def linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Ho et al. 2020 (DDPM): betas (T,) float64."""
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


def quadratic_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Linear in sqrt(beta), as latent diffusion's `scaled_linear`: betas (T,) float64."""
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64)
    return roots**2


def sigmoid_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Along a sigmoid of -6 to 6 (Xu et al. 2022, GeoDiff): betas (T,) float64."""
    steps = torch.linspace(-SIGMOID_END, SIGMOID_END, num_timesteps, dtype=torch.float64)
    return steps.sigmoid() * (beta_end - beta_start) + beta_start


def cosine_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Nichol and Dhariwal 2021, eq. 17: betas (T,) float64. The two ends are not used."""
    t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    alphas_cumprod = torch.cos((t + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=MAX_BETA)


SCHEDULES = Parts(
    {
        "linear": linear_betas,
        "cosine": cosine_betas,
        "quadratic": quadratic_betas,
        "sigmoid": sigmoid_betas,
    },
    function_of("num_timesteps", "beta_start", "beta_end"),
)


def levels_of_betas(betas: Tensor) -> Levels:
    """The variance-preserving levels of DDPM's chain: sqrt(a) and sqrt(1 - a), a the product of
    1 - beta up to t. v is Salimans and Ho's (2022). Raises a ValueError for betas
    that are not float64 in (0, 1)."""
    if betas.dtype != torch.float64 or betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError("betas must be a float64 vector within (0, 1)")
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    signal, noise = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    return Levels(signal, noise, -noise, signal)


def ddpm_levels(config: Config) -> Levels:
    """The levels of the config's `beta_schedule`."""
    betas = SCHEDULES[config.beta_schedule]
    return levels_of_betas(betas(config.num_timesteps, config.beta_start, config.beta_end))


def flow_levels(config: Config) -> Levels:
    """The linear path of flow matching (Lipman et al. 2023; Liu et al. 2023): noise (t + 1) / T,
    signal 1 - noise, of which the last level keeps a little. v is eps - x_0."""
    T = config.num_timesteps
    tau = torch.arange(1, T + 1, dtype=torch.float64) / T
    noise = tau.clamp(max=1 - min(SMALLEST_SIGNAL, 0.5 / T))
    return Levels(1 - noise, noise, -torch.ones_like(noise), torch.ones_like(noise))


def edm_levels(config: Config) -> Levels:
    """Karras et al. 2022: image + sigma * eps, log-uniform sigma, times their c_in. The network
    sees images over sigma_data, and its v is their F with the sign changed."""
    ends = math.log(SIGMA_MIN), math.log(SIGMA_MAX)
    sigma = torch.linspace(*ends, config.num_timesteps, dtype=torch.float64).exp()
    length = (sigma**2 + SIGMA_DATA**2).sqrt()
    signal, noise = SIGMA_DATA / length, sigma / length
    return Levels(signal, noise, -noise, signal, scale=1 / SIGMA_DATA)


PROCESSES = Parts(
    {"ddpm": ddpm_levels, "flow": flow_levels, "edm": edm_levels}, function_of("config")
)


def timestep_grid(
    num_timesteps: int,
    num_inference_steps: int,
    spacing: str,
    *,
    shift: float = 1.0,
    half_log_snr: Tensor | None = None,
) -> list[int]:
    """Which of 0..T-1 a sampler visits, from noise to image: all of them different.

    Args:
        spacing: `trailing` starts at T - 1 and so at pure noise; `leading` ends at 0; `linspace`
            has both ends (the three of Lin et al. 2023, table 2). `log_snr` starts at T - 1 and is
            uniform in the log-SNR that a sigma of EDM's range has. Others are a ValueError.
        shift: moves the share u = (t + 1) / T of the time to shift u / (1 + (shift - 1) u), so
            above 1 more steps are spent on noise (Esser et al. 2024, eq. 23).
        half_log_snr: that of the `Process`; for the spacing `log_snr` alone.
    """
    assert 1 <= num_inference_steps <= num_timesteps
    T, N = num_timesteps, num_inference_steps
    steps = torch.arange(N, dtype=torch.float64)
    if spacing == "trailing":
        grid = torch.from_numpy(np.arange(T, 0, -T / N)[:N].round()) - 1
    elif spacing == "leading":
        grid = steps.flip(0) * (T // N)
    elif spacing == "linspace":
        grid = torch.linspace(T - 1, 0, N, dtype=torch.float64)
    elif spacing == "log_snr":
        # Beyond, there is no detail to gain, and the cosine schedule would lose a third of its
        # steps on the last few timesteps.
        ends = half_log_snr[[-1, 0]].clamp(-math.log(SIGMA_MAX), -math.log(SIGMA_MIN))
        wanted = np.linspace(*ends.tolist(), N)
        grid = torch.from_numpy(np.interp(-wanted, -half_log_snr.numpy(), np.arange(T)))
        grid[0] = T - 1
    else:
        known = "trailing, leading, linspace or log_snr"
        raise ValueError(f"timestep_spacing={spacing!r}: use {known}")
    if shift != 1:
        u = (grid + 1) / T
        grid = shift * u / (1 + (shift - 1) * u) * T - 1
    # Rounding may bring two together: then each is below the one before, and enough are left.
    grid = (grid.round() + steps).clamp(max=T - 1).cummin(0)[0] - steps
    return torch.maximum(grid, N - 1 - steps).long().tolist()


def with_previous(timesteps: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Each timestep with the one it steps to; the last steps to -1, the clean image."""
    return zip(timesteps, [*timesteps[1:], -1], strict=True)
