"""Our DDIM as the DDIMScheduler of diffusers."""

from __future__ import annotations

from typing import Any

from diffusion.gaussian import GaussianDiffusion
from diffusion.guidance import DYNAMIC_QUANTILE
from generation.sampling import Sampling
from utils.errors import ConfigError

_PREDICTION_TYPES = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
_NO_MAXIMUM = 1e9  # their cap on a dynamic threshold, which ours does not have


def ddim_scheduler_config(diffusion: GaussianDiffusion, sampling: Sampling) -> dict[str, Any]:
    """Arguments of the DDIMScheduler that takes the same steps.

    Its `step` needs `use_clipped_model_output=True`, which re-derives eps from a thresholded x_0,
    and `eta`.

    Raises:
        ConfigError: there is none. Names the setting that prevents it.
    """
    T, steps = diffusion.num_timesteps, sampling.num_inference_steps
    # Theirs steps from t to t - T // steps, wherever its next timestep lies.
    if sampling.spacing == "linspace":
        raise ConfigError(
            "timestep_spacing='linspace': diffusers' DDIMScheduler does not step from one of its "
            "timesteps to the next. Use trailing or leading"
        )
    if sampling.spacing == "trailing" and T % steps:
        raise ConfigError(
            f"num_inference_steps={steps}: with timestep_spacing='trailing', diffusers' "
            f"DDIMScheduler takes our steps only where their number divides {T}"
        )
    return dict(
        num_train_timesteps=T,
        trained_betas=diffusion.betas.tolist(),
        prediction_type=_PREDICTION_TYPES[diffusion.prediction_type],
        clip_sample=sampling.threshold == "static",
        clip_sample_range=1.0,
        thresholding=sampling.threshold == "dynamic",
        dynamic_thresholding_ratio=DYNAMIC_QUANTILE,
        sample_max_value=_NO_MAXIMUM,
        timestep_spacing=sampling.spacing,
        set_alpha_to_one=True,
        steps_offset=0,
    )
