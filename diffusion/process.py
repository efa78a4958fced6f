"""The forward process q(x_t | x_0), what a model predicts about it, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.schedules import Levels, with_previous

Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Pair = tuple[float, float]  # of signal and noise

PREDICTIONS = ("eps", "x_0", "v")
LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}
WEIGHTINGS = ("uniform", "min_snr")
# Where the error of one quantity is that of another divided by signal or noise, the divisor is at
# least this (`t_eps` of JiT, Li and He 2025): the weight of a timestep is at most 400.
SMALLEST_DIVISOR = 0.05


class Prediction(NamedTuple):
    """A model's opinion of x_t, both ways: x_t = signal x_0 + noise eps. x_0 is an image."""

    x_0: Tensor
    eps: Tensor


class Step(NamedTuple):
    """After one sampler step: x at timestep `t` (-1: the image), and the x_0 it went towards."""

    t: int
    x: Tensor
    x_0: Tensor


class Process:
    """A path from images to noise in T levels, t = 0 the least noisy one: DDPM's, EDM's, a flow's.

    Args:
        levels: signal and noise at each t.
        prediction_type: what the model's output means: `eps`, `x_0` (as `levels.scale` has it), or
            `v`, the path's derivative: signal eps - noise x_0 where signal^2 + noise^2 = 1
            (Salimans and Ho 2022), eps - x_0 on the linear path.
        loss_space: of which of the three the error is taken; None: of what is predicted.
        loss_type: `l1`, `l2` or `huber` (delta 1), averaged over pixels.
        loss_weighting: `uniform` in that quantity, or `min_snr` (Hang et al. 2023).
        min_snr_gamma: cap of the latter.

    Raises a ValueError for other names, and for levels that are no path, see `Levels`.
    """

    def __init__(
        self,
        levels: Levels,
        *,
        prediction_type: str = "eps",
        loss_space: str | None = None,
        loss_type: str = "l2",
        loss_weighting: str = "uniform",
        min_snr_gamma: float = 5.0,
    ) -> None:
        self.prediction_type = prediction_type
        self.loss_space = loss_space or prediction_type
        self.loss_type = loss_type
        self.loss_weighting = loss_weighting
        self.min_snr_gamma = min_snr_gamma
        allowed = dict(prediction_type=PREDICTIONS, loss_space=PREDICTIONS)
        for key, names in (allowed | dict(loss_type=LOSSES, loss_weighting=WEIGHTINGS)).items():
            if (name := getattr(self, key)) not in names:
                raise ValueError(f"{key}={name!r}: use {', '.join(names)}")
        *rows, self.scale = levels
        signal, noise, signal_rate, noise_rate = rows
        power = signal**2 + noise**2
        rows = signal * self.scale, noise, signal_rate * self.scale, noise_rate, power
        self._table = torch.stack(rows)  # (5, T); all that multiplies x_0 is times the scale
        self.num_timesteps = len(signal)
        self.half_log_snr = (self._table[0] / noise).log()  # (T,), minus the log of EDM's sigma
        # Of very long chains so little is left at the end that it stays the same.
        if self._table.dtype != torch.float64 or (self.half_log_snr.diff() > 0).any():
            raise ValueError("levels must be float64, with ever less signal for the noise")
        if (signal * noise_rate - noise * signal_rate - 1).abs().max() > 1e-9:
            raise ValueError("signal * noise_rate - noise * signal_rate must be 1 at every t")
        # float64 until here; as the images per device, because MPS has no float64
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def levels(self, t: int) -> Pair:
        """Signal and noise: x_t = signal x_0 + noise eps; (1, 0) for t = -1, the clean image."""
        return (1.0, 0.0) if t < 0 else tuple(self._table[:2, t].tolist())

    def steps(self, timesteps: Sequence[int]) -> Iterator[tuple[int, int, Pair, Pair]]:
        """Of each step of a sampler its t, the s that it goes to, and the `levels` of both."""
        for t, s in with_previous(timesteps):
            yield t, s, self.levels(t), self.levels(s)

    def rates(self, t: int) -> Pair:
        """How fast both change: v = signal_rate x_0 + noise_rate eps."""
        return tuple(self._table[2:4, t].tolist())

    def _rows(self, t: Tensor, like: Tensor) -> Tensor:
        """Signal, noise, their rates and the power at each t, (5, B, 1, ...): they multiply images
        with the dimensions of `like`, in its precision, at least float32."""
        key = t.device, torch.promote_types(like.dtype, torch.float32)
        if key not in self._tables:
            self._tables[key] = self._table.to(key[1]).to(t.device)
        return self._tables[key][:, t].reshape(5, -1, *[1] * (like.ndim - 1))

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw x_t ~ q(x_t | x_0) (DDPM eq. 4). x_0, noise (B, C, H, W); t (B,) int64."""
        signal, sigma, *_ = self._rows(t, x_0)
        return signal * x_0 + sigma * noise

    def target(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the model should output for q_sample(x_0, t, noise)."""
        if self.prediction_type == "eps":
            return noise
        if self.prediction_type == "x_0":
            return self.scale * x_0
        _, _, signal_rate, noise_rate, _ = self._rows(t, x_0)
        return noise_rate * noise + signal_rate * x_0

    def predict(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Read a model's output as x_0 and eps, in the precision of x_t, at least float32."""
        signal, sigma, signal_rate, noise_rate, _ = self._rows(t, x_t)
        output = output.to(signal.dtype)
        if self.prediction_type == "eps":
            return Prediction((x_t - sigma * output) / signal, output)
        if self.prediction_type == "x_0":
            return self.with_x_0(output / self.scale, x_t, t)
        # The scale is the determinant of x_t and v as functions of x_0 and eps.
        x_0, eps = noise_rate * x_t - sigma * output, signal * output - signal_rate * x_t
        return Prediction(x_0 / self.scale, eps / self.scale)

    def with_x_0(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """The consistent pair for a changed (say, clamped) x_0: eps is re-derived."""
        signal, sigma, *_ = self._rows(t, x_t)
        return Prediction(x_0, (x_t - signal * x_0) / sigma)

    def loss(self, model: Model, x_0: Tensor, y: Tensor | None, t: Tensor, noise: Tensor) -> Tensor:
        """Weighted distance to the target, (B,) float32: one value per example."""
        output = model(self.q_sample(x_0, t, noise), t, y).to(x_0.dtype)
        target = self.target(x_0, t, noise)
        if self.loss_space != self.prediction_type:
            factor = self._error_ratio(t, x_0)
            output, target = factor * output, factor * target
        distance = LOSSES[self.loss_type](output, target, reduction="none")
        per_example = distance.flatten(1).mean(1)
        if self.loss_weighting == "uniform":
            return per_example
        return per_example * self._min_snr_weight(t, per_example)

    def _error_ratio(self, t: Tensor, like: Tensor) -> Tensor:
        """The error of what the loss is about, over that of what is predicted from the same x_t."""
        signal, sigma, *_ = self._rows(t, like)
        errors = {"eps": signal / self.scale, "x_0": sigma, "v": torch.ones_like(sigma)}
        return errors[self.loss_space] / errors[self.prediction_type].clamp(min=SMALLEST_DIVISOR)

    def _min_snr_weight(self, t: Tensor, like: Tensor) -> Tensor:
        """min(SNR, gamma) in x_0, rescaled to the loss space (Hang et al. 2023, eq. 7)."""
        signal, sigma, *_, power = self._rows(t, like)
        snr = (signal / self.scale / sigma) ** 2
        weight = snr.clamp(max=self.min_snr_gamma)
        if self.loss_space == "eps":
            return weight / snr
        return weight if self.loss_space == "x_0" else weight / (snr + 1) * power
