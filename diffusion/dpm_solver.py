"""DPM-Solver++(2M): a second-order multistep solver (Lu et al. 2022, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from diffusion.gaussian import GaussianDiffusion, Step
from diffusion.guidance import Denoiser
from diffusion.schedules import with_previous


def dpmpp_2m(
    denoise: Denoiser,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    timesteps: Sequence[int],
    randn_like: Callable[[Tensor], Tensor],
) -> Iterator[Step]:
    """Deterministic; one forward per step. The first and the last step are of first order (the
    last has infinite log-SNR, where the step is x_0 itself), and so is a jump to t = 0."""
    x = x_T
    previous_x_0, previous_h = None, 0.0
    for t, s in with_previous(timesteps):
        x_0, _ = denoise(x, t)
        if s < 0:
            yield Step(s, x_0, x_0)
            return
        a_t, a_s = diffusion.alpha_cumprod(t), diffusion.alpha_cumprod(s)
        # half log-SNR, lambda = log(sqrt(a) / sqrt(1 - a))
        h = 0.5 * (math.log(a_s / (1 - a_s)) - math.log(a_t / (1 - a_t)))
        slope = x_0
        # A jump to t = 0 (leading, linspace) is several times as long in log-SNR as the step before
        # it, and extrapolation over it is worse than none.
        if previous_x_0 is not None and not (s == 0 and t > 2):
            r = previous_h / h
            slope = (1 + 0.5 / r) * x_0 - 0.5 / r * previous_x_0
        x = ((1 - a_s) / (1 - a_t)) ** 0.5 * x - a_s**0.5 * math.expm1(-h) * slope
        previous_x_0, previous_h = x_0, h
        yield Step(s, x, x_0)
