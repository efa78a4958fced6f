"""A trained model as what packages for inverse problems, and samplers of their own, ask for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion import make_denoiser
from generation.run import Run, load_run
from utils.errors import ConfigError
from utils.labels import NULL_LABEL


def load_denoiser(
    checkpoint: str | Path,
    device: torch.device | str = "cpu",
    *,
    cfg_scale: float = 1.0,
    unit_range: bool = False,
    use_ema: bool | None = None,
) -> SigmaDenoiser:
    """The model of a checkpoint, or of a run's folder, as a function of an image with noise.

    Raises a CheckpointError if there is none, and a ConfigError for a scale that needs what the
    model was not trained with. For the arguments see `SigmaDenoiser` and `load_run`.
    """
    run = load_run(checkpoint, torch.device(device), use_ema=use_ema)
    return SigmaDenoiser(run, cfg_scale=cfg_scale, unit_range=unit_range)


class SigmaDenoiser(nn.Module):
    """D(x, sigma, y): the mean of the images that x = image + sigma * noise may come from.

    That of Karras et al. 2022, whatever the process of the model is: it is asked at the timestep
    whose noise-to-signal ratio is nearest to sigma, on a logarithmic scale; sigmas beyond the first
    and the last timestep are taken for these. Gradients with respect to x flow, as methods such as
    DPS need them; the weights are frozen.

    Args:
        cfg_scale: 1 asks the model for the class alone, 0 ignores it, other values guide.
        unit_range: images are in [0, 1], and sigma is of that range, as deepinv has it; else both
            are of [-1, 1].
    """

    def __init__(self, run: Run, *, cfg_scale: float = 1.0, unit_range: bool = False) -> None:
        super().__init__()
        if run.config.condition is not None:
            raise ConfigError(f"condition={run.config.condition!r}: D takes no pictures")
        if cfg_scale != 1 and run.config.label_dropout == 0:
            raise ConfigError(f"cfg_scale={cfg_scale:g}: needs training with dropped labels; use 1")
        self.model, self.process, self.cfg_scale = run.model, run.process, cfg_scale
        self.unit_range, self.conditional = unit_range, run.config.conditional
        self.dtype = next(run.model.parameters()).dtype
        self.register_buffer("log_sigmas", -self.process.half_log_snr, persistent=False)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The smallest and the largest sigma that the model was trained with."""
        factor = 0.5 if self.unit_range else 1.0
        first, last = self.log_sigmas[[0, -1]].exp().tolist()
        return factor * first, factor * last

    def forward(self, x: Tensor, sigma: Tensor | float, y: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) of images (B, C, H, W) with noise.

        Args:
            sigma: of all images, or (B,) one for each.
            y: (B,) int64 classes in [0, K); None: none is asked for.
        """
        sigma = torch.as_tensor(sigma, dtype=torch.float64).to(x.device).flatten().expand(len(x))
        if self.unit_range:
            x, sigma = 2 * x - 1, 2 * sigma
        t = (self.log_sigmas.to(x.device) - sigma.log()[:, None]).abs().argmin(1)
        x_t = self.process.q_sample(x, t, torch.zeros_like(x)).to(self.dtype)
        if self.conditional and y is None:
            y = torch.full_like(t, NULL_LABEL)
        settings = dict(cfg_scale=self.cfg_scale, threshold="none")
        denoise = make_denoiser(self.process, self.model, y, **settings)
        x_0 = denoise(x_t, t).x_0.to(x.dtype)
        return (x_0 + 1) / 2 if self.unit_range else x_0
