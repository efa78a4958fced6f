"""From a model and labels to a denoiser: classifier-free guidance and bounds on x_0."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.gaussian import GaussianDiffusion, Model, Prediction
from utils.labels import NULL_LABEL

Denoiser = Callable[[Tensor, int], Prediction]

DYNAMIC_QUANTILE = 0.995  # Saharia et al. 2022 (Imagen), section 2.3
# Values of x_t, both halves together, above which a CPU is faster with one half after the other:
# the activations of both no longer fit its cache.
LARGEST_JOINT_CPU_BATCH = 2**16


def threshold_x_0(x_0: Tensor, threshold: str) -> Tensor:
    """Bound predicted images: `static` clamps to [-1, 1]; `dynamic` clamps each image to its own
    99.5 % quantile (at least 1) and divides by it; `none` does nothing."""
    if threshold == "none":
        return x_0
    if threshold == "static":
        return x_0.clamp(-1, 1)
    if threshold != "dynamic":
        raise ValueError(f"threshold={threshold!r}: use static, dynamic or none")
    limit = torch.quantile(x_0.abs().flatten(1), DYNAMIC_QUANTILE, dim=1).clamp(min=1)
    limit = limit.reshape(-1, *[1] * (x_0.ndim - 1))
    return x_0.clamp(-limit, limit) / limit


def make_denoiser(
    diffusion: GaussianDiffusion,
    model: Model,
    y: Tensor | None,
    *,
    cfg_scale: float = 1.0,
    cfg_interval: tuple[float, float] | None = None,
    threshold: str = "static",
) -> Denoiser:
    """A function (x_t, t) -> Prediction, t the same int for the whole batch.

    Guidance is out_null + cfg_scale * (out_y - out_null) (Ho and Salimans 2022): 1 is plain
    conditional and 0 unconditional, a single forward each; any other scale is one forward of
    twice the batch (on a CPU, two forwards where that would be too large for its cache).

    Args:
        y: (B,) int64 in [0, K), or None for a model without classes, whose only scale is 1.
        cfg_interval: guide only while low <= t / T <= high (Kynkaanniemi et al. 2024); outside
            it the prediction is plain conditional, but for scale 0, unconditional everywhere.
    """
    assert y is not None or cfg_scale == 1.0, "guidance joins predictions with and without classes"
    null = None if y is None else torch.full_like(y, NULL_LABEL)
    low, high = cfg_interval or (0.0, 1.0)

    def denoise(x_t: Tensor, t: int) -> Prediction:
        times = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
        if cfg_scale == 0.0:
            output = model(x_t, times, null)
        elif cfg_scale == 1.0 or not low <= t / diffusion.num_timesteps <= high:
            output = model(x_t, times, y)
        else:
            out_y, out_null = with_and_without(model, x_t, times, y, null)
            output = out_null + cfg_scale * (out_y - out_null)
        prediction = diffusion.predict(output, x_t, times)
        if threshold == "none":
            return prediction
        return diffusion.with_x_0(threshold_x_0(prediction.x_0, threshold), x_t, times)

    return denoise


def with_and_without(
    model: Model, x_t: Tensor, times: Tensor, y: Tensor, null: Tensor
) -> tuple[Tensor, Tensor]:
    """The model's output for y and for null, float32."""
    if x_t.device.type == "cpu" and 2 * x_t.numel() > LARGEST_JOINT_CPU_BATCH:
        return model(x_t, times, y).float(), model(x_t, times, null).float()
    both = model(torch.cat([x_t, x_t]), times.repeat(2), torch.cat([y, null]))
    out_y, out_null = both.float().chunk(2)
    return out_y, out_null
