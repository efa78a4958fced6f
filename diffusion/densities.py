"""How often training visits each timestep."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.process import Process
from utils.config import Config, Parts, function_of


def uniform(process: Process, config: Config, count: int, generator: torch.Generator) -> Tensor:
    """All alike (Ho et al. 2020)."""
    device = generator.device
    return torch.randint(process.num_timesteps, (count,), generator=generator, device=device)


def logit_normal(
    process: Process, config: Config, count: int, generator: torch.Generator
) -> Tensor:
    """The logit of t / T is normal (Esser et al. 2024, section 3.1)."""
    normal = torch.randn(count, generator=generator, device=generator.device)
    share = torch.sigmoid(config.timestep_mean + config.timestep_std * normal)
    return _timestep_at(share, process.num_timesteps)


def lognormal(process: Process, config: Config, count: int, generator: torch.Generator) -> Tensor:
    """The logarithm of sigma, noise over signal, is normal (Karras et al. 2022): the nearest t."""
    normal = torch.randn(count, generator=generator, device=generator.device)
    log_sigma = -process.half_log_snr.float().to(generator.device)
    between = (log_sigma[1:] + log_sigma[:-1]) / 2
    return torch.bucketize(config.timestep_mean + config.timestep_std * normal, between)


def shift(process: Process, config: Config, count: int, generator: torch.Generator) -> Tensor:
    """Uniform in a share u of T, moved to k u / (1 + (k - 1) u) (Esser et al. 2024, eq. 23)."""
    u, k = torch.rand(count, generator=generator, device=generator.device), config.timestep_shift
    return _timestep_at(k * u / (1 + (k - 1) * u), process.num_timesteps)


def _timestep_at(share: Tensor, num_timesteps: int) -> Tensor:
    """The timestep that is this share of the way, in [0, 1], from image to noise."""
    return (share * num_timesteps).long().clamp(max=num_timesteps - 1)


DENSITIES = Parts(
    {"uniform": uniform, "logit_normal": logit_normal, "lognormal": lognormal, "shift": shift},
    function_of("process", "config", "count", "generator"),
)
