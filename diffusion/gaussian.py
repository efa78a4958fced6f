"""The forward process q(x_t | x_0), what a model predicts about it, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}


class Prediction(NamedTuple):
    """A model's opinion of x_t, both ways: x_t = sqrt(a) x_0 + sqrt(1 - a) eps."""

    x_0: Tensor
    eps: Tensor


class Step(NamedTuple):
    """After one sampler step: x at timestep `t` (-1: the image), and the x_0 it went towards."""

    t: int
    x: Tensor
    x_0: Tensor


class GaussianDiffusion:
    """DDPM's Markov chain with T steps; t = 0 is the least noisy one.

    Args:
        betas: (T,) float64 in (0, 1).
        prediction_type: what the model's output means: `eps`, `x_0`, or
            `v` = sqrt(a) eps - sqrt(1 - a) x_0 (Salimans and Ho 2022).
        loss_type: `l1`, `l2` or `huber` (delta 1), averaged over pixels.
        loss_weighting: `uniform` in the predicted quantity, or `min_snr` (Hang et al. 2023).
        min_snr_gamma: cap of the latter.
    """

    def __init__(
        self,
        betas: Tensor,
        *,
        prediction_type: str = "eps",
        loss_type: str = "l2",
        loss_weighting: str = "uniform",
        min_snr_gamma: float = 5.0,
    ) -> None:
        if betas.dtype != torch.float64 or betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError("betas must be a float64 vector within (0, 1)")
        if prediction_type not in ("eps", "x_0", "v"):
            raise ValueError(f"prediction_type={prediction_type!r}: use eps, x_0 or v")
        if loss_type not in LOSSES:
            raise ValueError(f"loss_type={loss_type!r}: use {', '.join(LOSSES)}")
        if loss_weighting not in ("uniform", "min_snr"):
            raise ValueError(f"loss_weighting={loss_weighting!r}: use uniform or min_snr")
        self.betas = betas
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)  # (T,) float64
        self.num_timesteps = len(betas)
        self.prediction_type = prediction_type
        self.loss_type = loss_type
        self.loss_weighting = loss_weighting
        self.min_snr_gamma = min_snr_gamma
        # float64 until here; float32 per device, because MPS has no float64
        self._tables: dict[torch.device, Tensor] = {}

    def alpha_cumprod(self, t: int) -> float:
        """Product of alphas up to and including t; 1 for t = -1, the clean image."""
        return 1.0 if t < 0 else float(self.alphas_cumprod[t])

    def _signal_and_noise(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), shaped (B, 1, ...) to multiply `ndim`-dimensional images."""
        if t.device not in self._tables:
            table = torch.stack([self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()])
            self._tables[t.device] = table.float().to(t.device)
        signal, noise = self._tables[t.device][:, t].reshape(2, -1, *[1] * (ndim - 1))
        return signal, noise

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw x_t ~ q(x_t | x_0) (DDPM eq. 4). x_0, noise (B, C, H, W); t (B,) int64."""
        signal, sigma = self._signal_and_noise(t, x_0.ndim)
        return signal * x_0 + sigma * noise

    def target(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the model should output for q_sample(x_0, t, noise)."""
        if self.prediction_type == "eps":
            return noise
        if self.prediction_type == "x_0":
            return x_0
        signal, sigma = self._signal_and_noise(t, x_0.ndim)
        return signal * noise - sigma * x_0

    def predict(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Read a model's output as x_0 and eps, float32."""
        output = output.float()
        signal, sigma = self._signal_and_noise(t, x_t.ndim)
        if self.prediction_type == "eps":
            return Prediction((x_t - sigma * output) / signal, output)
        if self.prediction_type == "x_0":
            return Prediction(output, (x_t - signal * output) / sigma)
        return Prediction(signal * x_t - sigma * output, sigma * x_t + signal * output)

    def with_x_0(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """The consistent pair for a changed (say, clamped) x_0: eps is re-derived."""
        signal, sigma = self._signal_and_noise(t, x_t.ndim)
        return Prediction(x_0, (x_t - signal * x_0) / sigma)

    def loss(self, model: Model, x_0: Tensor, y: Tensor | None, t: Tensor, noise: Tensor) -> Tensor:
        """Weighted distance to the target, (B,) float32: one value per example."""
        output = model(self.q_sample(x_0, t, noise), t, y).float()
        distance = LOSSES[self.loss_type](output, self.target(x_0, t, noise), reduction="none")
        per_example = distance.flatten(1).mean(1)
        if self.loss_weighting == "uniform":
            return per_example
        return per_example * self._min_snr_weight(t)

    def _min_snr_weight(self, t: Tensor) -> Tensor:
        """min(SNR, gamma) in x_0, rescaled to the predicted quantity (Hang et al. 2023, eq. 7)."""
        signal, sigma = self._signal_and_noise(t, 1)
        snr = (signal / sigma) ** 2
        weight = snr.clamp(max=self.min_snr_gamma)
        if self.prediction_type == "eps":
            return weight / snr
        return weight if self.prediction_type == "x_0" else weight / (snr + 1)
