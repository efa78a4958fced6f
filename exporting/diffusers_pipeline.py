"""A run as a folder that diffusers loads: a DDIMPipeline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from diffusion import SCHEDULES
from diffusion.ddim import ddim
from diffusion.guidance import DYNAMIC_QUANTILE
from exporting.diffusers_unet import to_unet2d, unet2d_config
from exporting.safetensors import output_difference
from generation.run import Run
from generation.sampling import Sampling, sampler_names, sampling_from
from utils.config import Config
from utils.errors import ConfigError, UserError, require
from utils.files import atomic_path, write_text

MAX_DIFFERENCE = 1e-4  # between the networks' outputs, over our largest; rounding gives 1e-6

_PREDICTION_TYPES = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
_NO_MAXIMUM = 1e9  # their cap on a dynamic threshold, which ours does not have


def to_pipeline(run: Run) -> tuple[Any, Sampling, float]:
    """The run as a DDIMPipeline, the settings to sample with, and its `output_difference`.

    Raises a ConfigError if diffusers has no counterpart to the network or to the sampling, and a
    UserError if it is not installed, or its network computes something else.
    """
    sampling = sampling_from(run.config, sampler_names(run.config, [ddim])[0])
    if run.suffix != ".png":
        reason = "diffusers' DDIMPipeline makes 8-bit images of 1 or 3 channels"
        raise ConfigError(f"{run.spec}: {reason}. Use --format safetensors")
    scheduler = ddim_scheduler_config(run.config, sampling)
    arguments = unet2d_config(run.model, run.config, run.spec)
    require("diffusers", "safetensors")
    import diffusers

    unet = to_unet2d(run.model, arguments)
    difference = output_difference(
        run, lambda x, t, y: unet(x, t, None if y is None else y + 1).sample
    )
    if not difference < MAX_DIFFERENCE:
        raise UserError(
            f"diffusers {diffusers.__version__} gives outputs that differ by {difference:.1e} of "
            "the largest value: its UNet2DModel is not the one this project knows"
        )
    pipeline = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(**scheduler))
    return pipeline, sampling, difference


def ddim_scheduler_config(config: Config, sampling: Sampling) -> dict[str, Any]:
    """Arguments of the DDIMScheduler that takes the same steps.

    Its `step` needs `use_clipped_model_output=True`, which re-derives eps from a thresholded x_0,
    and `eta`. Raises a ConfigError that names the setting if one prevents such a scheduler.
    """
    T, steps = config.num_timesteps, sampling.num_inference_steps
    other = "diffusers has no pipeline that computes the same. Use --format safetensors"
    shown = "condition", "process", "noise_scale", "timestep_spacing_shift", "cfg_rescale"
    for key in shown:
        if (value := getattr(config, key)) != Config.model_fields[key].default:
            raise ConfigError(f"{key}={value!r}: {other}")
    betas = SCHEDULES[config.beta_schedule](T, config.beta_start, config.beta_end)
    # Theirs steps from t to t - T // steps, wherever its next timestep lies.
    if sampling.spacing not in ("trailing", "leading"):
        theirs = "diffusers' DDIMScheduler does not step from one of its timesteps to the next"
        message = f"timestep_spacing={sampling.spacing!r}: {theirs}. Use trailing or leading"
        raise ConfigError(message)
    if sampling.spacing == "trailing" and T % steps:
        raise ConfigError(
            f"num_inference_steps={steps}: with timestep_spacing='trailing', diffusers' "
            f"DDIMScheduler takes our steps only where their number divides {T}"
        )
    return dict(
        num_train_timesteps=T,
        trained_betas=betas.tolist(),
        prediction_type=_PREDICTION_TYPES[config.prediction_type],
        clip_sample=sampling.threshold == "static",
        clip_sample_range=1.0,
        thresholding=sampling.threshold == "dynamic",
        dynamic_thresholding_ratio=DYNAMIC_QUANTILE,
        sample_max_value=_NO_MAXIMUM,
        timestep_spacing=sampling.spacing,
        set_alpha_to_one=True,
        steps_offset=0,
    )


def write_folder(output: Path, pipeline: Any, card: str) -> None:
    """Write the pipeline and the card, its README.md: all of it, or nothing and an OSError."""
    try:
        with atomic_path(output) as temporary:
            pipeline.save_pretrained(temporary)
            write_text(temporary / "README.md", card)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
