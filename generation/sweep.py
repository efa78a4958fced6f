"""Sets of images to draw: every combination of swept settings, with seeds of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from generation.sampling import Sampling, sampling_from
from utils.config import Config


class Setting(NamedTuple):
    """How to draw one set: image i from `seed` + i."""

    sampling: Sampling
    seed: int
    is_repeat: bool = False

    def name(self) -> str:
        """Part of a file name."""
        scale, steps = self.sampling.cfg_scale, self.sampling.num_inference_steps
        return f"cfg{scale:g}_steps{steps}" + (f"_seed{self.seed}" if self.is_repeat else "")

    def facts(self) -> dict[str, Any]:
        """How to draw it, for a report, as plain types."""
        return {
            "sampler": self.sampling.method,
            "steps": self.sampling.num_inference_steps,
            "eta": self.sampling.eta,
            "cfg_scale": self.sampling.cfg_scale,
            "sampling": asdict(self.sampling),
            "seed": self.seed,
        }


def settings_of(
    config: Config,
    num_images: int,
    *,
    method: str | None = None,
    eta: float | None = None,
    cfg_scales: Sequence[float] | None = None,
    step_counts: Sequence[int] | None = None,
    seed: int | None = None,
    repeats: int = 1,
) -> list[Setting]:
    """Combine the swept values, where None means the config's; repeats share no seed.

    Raises:
        ConfigError: values that the model or the method cannot take.
    """
    first = config.seed if seed is None else seed
    several = repeats > 1
    return [
        Setting(sampling_from(config, method, steps, eta, scale), first + i * num_images, several)
        for scale in cfg_scales or [None]
        for steps in step_counts or [None]
        for i in range(repeats)
    ]
