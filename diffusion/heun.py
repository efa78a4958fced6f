"""Heun's method: the second-order solver of EDM and JiT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from diffusion.guidance import Denoiser
from diffusion.process import Process, Step


def heun(
    denoise: Denoiser,
    x_T: Tensor,
    process: Process,
    timesteps: Sequence[int],
    randn_like: Callable[[Tensor], Tensor],
) -> Iterator[Step]:
    """Deterministic; two forwards a step, but one in the last, which ends at the image.

    Divided by signal + noise, every process runs on the linear path, (1 - tau) x_0 + tau eps with
    the slope eps - x_0, which is finite at both ends. A step goes to where DDIM with eta = 0 does,
    and is corrected by the slope there (Karras et al. 2022, algorithm 1, in that time).
    """
    x = x_T
    for t, s, (signal_t, noise_t), (signal_s, noise_s) in process.steps(timesteps):
        x_0, eps = denoise(x, t)
        x = signal_s * x_0 + noise_s * eps
        if s >= 0:
            later_x_0, later_eps = denoise(x, s)
            duration = noise_s / (signal_s + noise_s) - noise_t / (signal_t + noise_t)
            change = (later_eps - later_x_0) - (eps - x_0)
            x = x + 0.5 * (signal_s + noise_s) * duration * change
        yield Step(s, x, x_0)
