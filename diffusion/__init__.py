"""Processes (DDPM, flow, EDM) and samplers. Knows nothing of data sets or networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from diffusion.ddim import ddim
from diffusion.ddpm import ddpm
from diffusion.densities import DENSITIES
from diffusion.dpm_solver import dpmpp_2m
from diffusion.guidance import make_denoiser
from diffusion.heun import heun
from diffusion.process import Prediction, Process, Step
from diffusion.schedules import PROCESSES, SCHEDULES, timestep_grid
from utils.config import Config, Parts, Problem, kind_of, unknown_name

__all__ = ["DENSITIES", "PROCESSES", "SAMPLERS", "SCHEDULES", "Prediction", "Process", "Sampler"]
__all__ += ["Step", "build_process", "check_config", "make_denoiser", "timestep_grid"]


class Sampler(NamedTuple):
    """All that others need to know of a sampler. It is a function (denoise, x_T, process,
    timesteps, randn_like, **options); whether it is deterministic may be a function of options."""

    run: Callable[..., Iterator[Step]]
    default_steps: int | None  # how many steps it takes when nobody says; None: all T
    deterministic: bool | Callable[..., bool] = False  # if x_T alone decides the images
    options: tuple[str, ...] = ()  # fields of `generation.sampling.Sampling` that `run` takes
    forwards_per_step: int = 1  # how often a step calls `denoise`; the last one does so once
    multistep: bool = False  # a step uses what earlier ones saw, so none can be taken again


_SAMPLERS = {
    "ddpm": Sampler(ddpm, None),
    "ddim": Sampler(ddim, 50, deterministic=lambda eta: eta == 0, options=("eta",)),
    "heun": Sampler(heun, 20, deterministic=True, forwards_per_step=2),
    "dpmpp_2m": Sampler(dpmpp_2m, 20, deterministic=True, multistep=True),
}
SAMPLERS = Parts(_SAMPLERS, kind_of(Sampler, "a sampler"))
TABLES = {  # config key -> the names it may have
    "process": PROCESSES,
    "beta_schedule": SCHEDULES,
    "timestep_sampling": DENSITIES,
    "sampling_method": SAMPLERS,
}


def build_process(config: Config) -> Process:
    levels = PROCESSES[config.process](config)
    return Process(
        levels._replace(scale=levels.scale / config.noise_scale),
        prediction_type=config.prediction_type,
        loss_space=config.loss_space,
        loss_type=config.loss_type,
        loss_weighting=config.loss_weighting,
        min_snr_gamma=config.min_snr_gamma,
    )


def check_config(config: Config) -> Iterator[Problem]:
    """Names that must be in the tables above."""
    for key, table in TABLES.items():
        yield from unknown_name(key, getattr(config, key), table)
