"""From a model and labels to a denoiser: classifier-free guidance and bounds on x_0."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.process import Model, Prediction, Process
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


def rescaled(guided: Tensor, out_y: Tensor, share: float) -> Tensor:
    """Bring the standard deviation of each guided output this share of the way back to that of the
    conditional one, which guidance raises (Lin et al. 2023, eq. 15 and 16)."""
    dims = tuple(range(1, guided.ndim))
    ratio = out_y.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (share * ratio + (1 - share))


def conditioned(model: Model, planes: Tensor | None, scale: float = 1.0) -> Model:
    """The model with its condition, planes (b, Cc, H, W) that follow the channels of x_t. Outputs
    are none + scale (given - none), none with zeros as planes; 1 and 0 are a single forward."""
    if planes is None:
        return model

    def output(x_t: Tensor, t: Tensor, y: Tensor | None, share: float = scale) -> Tensor:
        if share not in (0, 1):
            given, none = (output(x_t, t, y, s).to(x_t.dtype) for s in (1, 0))
            return none + share * (given - none)
        beside = (share * planes).repeat(len(x_t) // len(planes), 1, 1, 1)  # y and null together
        return model(torch.cat([x_t, beside], 1), t, y)

    return output


def make_denoiser(
    process: Process,
    model: Model,
    y: Tensor | None,
    *,
    cfg_scale: float = 1.0,
    cfg_interval: tuple[float, float] | None = None,
    cfg_rescale: float = 0.0,
    threshold: str = "static",
    guide: Model | None = None,
) -> Denoiser:
    """A function (x_t, t) -> Prediction, t the same int for the whole batch, or without an interval
    also (B,) int64.

    Guidance is out_null + cfg_scale * (out_y - out_null) (Ho and Salimans 2022): 1 is plain
    conditional and 0 unconditional, a single forward each; any other scale is one forward of
    twice the batch (on a CPU, two forwards where that would be too large for its cache).

    Args:
        y: (B,) int64 in [0, K), or None for a model without classes, whose only scale without a
            guide is 1.
        cfg_interval: guide only while low <= t / T <= high (Kynkaanniemi et al. 2024); outside
            it the prediction is plain conditional, but for scale 0, unconditional everywhere.
        cfg_rescale: see `rescaled`; 0 leaves guided outputs as they are.
        guide: a weaker network of the same process, whose output for y takes the place of out_null
            (Karras et al. 2024, autoguidance).
    """
    has_both = y is not None or guide is not None or cfg_scale == 1.0
    assert has_both, "guidance joins predictions with and without classes"
    null = None if y is None else torch.full_like(y, NULL_LABEL)
    low, high = cfg_interval or (0.0, 1.0)

    def denoise(x_t: Tensor, t: int | Tensor) -> Prediction:
        times = t  # one int is filled in on the device, where a copy would make the host wait
        if not isinstance(t, Tensor):
            times = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
        if cfg_scale == 0.0:
            output = model(x_t, times, null) if guide is None else guide(x_t, times, y)
        elif cfg_scale == 1.0 or (cfg_interval and not low <= t / process.num_timesteps <= high):
            output = model(x_t, times, y)
        else:
            if guide is None:
                out_y, out_null = with_and_without(model, x_t, times, y, null)
            else:
                out_y, out_null = (m(x_t, times, y).to(x_t.dtype) for m in (model, guide))
            output = out_null + cfg_scale * (out_y - out_null)
            if cfg_rescale:
                output = rescaled(output, out_y, cfg_rescale)
        prediction = process.predict(output, x_t, times)
        if threshold == "none":
            return prediction
        return process.with_x_0(threshold_x_0(prediction.x_0, threshold), x_t, times)

    return denoise


def with_and_without(
    model: Model, x_t: Tensor, times: Tensor, y: Tensor, null: Tensor
) -> tuple[Tensor, Tensor]:
    """The model's output for y and for null, in the precision of x_t."""
    if x_t.device.type == "cpu" and 2 * x_t.numel() > LARGEST_JOINT_CPU_BATCH:
        return model(x_t, times, y).to(x_t.dtype), model(x_t, times, null).to(x_t.dtype)
    both = model(torch.cat([x_t, x_t]), times.repeat(2), torch.cat([y, null]))
    return both.to(x_t.dtype).chunk(2)
