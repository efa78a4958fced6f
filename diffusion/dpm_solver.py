"""DPM-Solver++(2M): a second-order multistep solver (Lu et al. 2022, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from diffusion.guidance import Denoiser
from diffusion.process import Process, Step


def dpmpp_2m(
    denoise: Denoiser,
    x_T: Tensor,
    process: Process,
    timesteps: Sequence[int],
    randn_like: Callable[[Tensor], Tensor],
) -> Iterator[Step]:
    """Deterministic; one forward per step. The first and the last step are of first order (the
    last has infinite log-SNR, where the step is x_0 itself), and so is a longer one to t = 0."""
    x = x_T
    previous_x_0, previous_h = None, 0.0
    for t, s, (signal_t, noise_t), (signal_s, noise_s) in process.steps(timesteps):
        x_0, _ = denoise(x, t)
        if s < 0:
            yield Step(s, x_0, x_0)
            return
        # half log-SNR, lambda = log(signal / noise)
        h = math.log(signal_s / noise_s) - math.log(signal_t / noise_t)
        slope = x_0
        # A jump to t = 0 (leading, linspace) is several times as long in log-SNR as the step before
        # it, and extrapolation over it is worse than none, unless the grid is even in log-SNR.
        if previous_h > 0 and h > 0:
            r = previous_h / h
            if s > 0 or t <= 2 or abs(1 / r - 1) <= 0.1:
                slope = (1 + 0.5 / r) * x_0 - 0.5 / r * previous_x_0
        x = noise_s / noise_t * x - signal_s * math.expm1(-h) * slope
        previous_x_0, previous_h = x_0, h
        yield Step(s, x, x_0)
