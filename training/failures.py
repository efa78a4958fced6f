"""Training that goes wrong is told so: losses and previews beside what needs no learning."""

from __future__ import annotations

import logging
import math

import torch

from diffusion import DENSITIES, Process
from training.job import Job
from training.objective import QUARTILES, quartile_of
from utils.images import to_float

FIRST_STEPS, FAIR_STEPS = 20, 150  # whose losses say little, and after which a run is judged
NUM_IMAGES = 32  # of the data, that previews are compared with
NUM_DRAWS, NUM_QUANTILES = 10_000, 12  # timesteps, and values of each of x_0 and eps, in a mean


def trivial_losses(process: Process, std: float) -> torch.Tensor:
    """The loss at each t, (T,) float64, of the best answer to all x_t: x_0 is the images' mean, and
    eps is 0, for values that are normal about a known mean with this standard deviation."""
    normal = torch.special.ndtri((torch.arange(NUM_QUANTILES).double() + 0.5) / NUM_QUANTILES)
    pairs = torch.cartesian_prod(normal, normal) / normal.square().mean().sqrt()
    t = torch.arange(process.num_timesteps)
    x_0, noise = pairs.T[:, None].expand(-1, len(t), -1)  # less the mean, and over the deviation
    return process.loss(lambda x_t, t, y: torch.zeros_like(x_t), std * x_0, None, t, noise)


def measure(images: torch.Tensor, patch: int) -> torch.Tensor:
    """Of images (B, C, H, W): how far they deviate from each other, the share of values not clipped
    to -1 or 1, and the mean square of differences of neighbours across borders of patches."""
    steps = [x.diff(dim=2)[:, :, patch - 1 :: patch].flatten() for x in (images, images.mT)]
    inside, rough = (images.abs() < 0.99).float().mean(), torch.cat(steps).square().mean()
    return torch.stack([images.std(0, correction=0).mean(), inside, rough]) + 1e-3


class FailureWatch:
    """Warns once in a run of each symptom, on the main process; a checkpoint keeps those `told`."""

    def __init__(self, job: Job) -> None:
        config, dataset, n = job.config, job.dataset, len(job.dataset)
        self.told = list(job.resume.state.get("failures", ())) if job.resume else []
        self._rate, self._step = config.learning_rate, 0
        self._best = self._least = self._rough = math.inf
        self._patch = p if isinstance(p := getattr(job.model, "patch_size", 1), int) else 1
        images = to_float(torch.stack([dataset[i][0] for i in range(0, n, -(-n // NUM_IMAGES))]))
        self._real, self._std = measure(images, self._patch), float(images.std())
        self._peak_steps = 0.0 if self._std > 0.02 else -math.inf  # there is nothing to learn
        t = DENSITIES[config.timestep_sampling](job.process, config, NUM_DRAWS, torch.Generator())
        losses = trivial_losses(job.process, self._std + 1e-6)[t]
        k = quartile_of(t, config.num_timesteps)
        self._trivial = {name: losses[k == q].mean().item() for q, name in enumerate(QUARTILES)}

    def _tell(self, is_so: bool, line: str) -> None:
        if is_so and (symptom := line.partition(":")[0]) not in self.told:
            self.told.append(symptom)
            logging.getLogger("diffusion").warning(f"step {self._step}: {line}; docs/watching.md")

    def take_losses(self, step: int, scalars: dict[str, float]) -> None:
        """Judge the losses of a log line, that of `step`."""
        smoothed, rate = scalars["train/loss_smoothed"], f"learning_rate={self._rate:g}"
        self._peak_steps += (step - self._step) * scalars["train/lr"] / self._rate
        # The mean loss of the first few images may be low by chance.
        self._step, self._best = step, min(self._best, smoothed if step > FIRST_STEPS else math.inf)
        ratios = [scalars[name] / loss for name, loss in self._trivial.items()]
        self._least = min([self._least, *filter(math.isfinite, ratios)])
        self._tell(self._peak_steps < 0, f"images hardly vary: by {self._std:.2g}; see value_range")
        line = f"loss has risen: {smoothed:.3g} from {self._best:.3g}; lower {rate} or grad_clip"
        self._tell(smoothed > 3 * self._best, line)
        line = f"nothing is learnt: {self._least:.2f} times the loss of an answer that is always "
        line += f"the same; change {rate}, or see what is frozen, or whether x_t is used"
        self._tell(self._peak_steps >= FAIR_STEPS and self._least > 0.85, line)

    def take_samples(self, drawn: torch.Tensor) -> None:
        """Judge the images of a preview, (B, C, H, W) as `generate` draws them."""
        if self._peak_steps < FAIR_STEPS or len(drawn) < 2:
            return
        between, inside, rough = (measure(to_float(drawn), self._patch) / self._real).tolist()
        line = f"previews are empty: {between:.0%} of the deviation and {inside:.0%} of the values "
        line += "between black and white that the data have; lower learning_rate or cfg_scale"
        self._tell(between < 0.1 or inside < 0.05, line)
        line = f"previews are noise or a grid: neighbours differ {rough:.1f} times as in the data, "
        line += "and no less than before; lower patch_size or learning_rate, or predict x_0"
        self._tell(self._patch > 1 and rough > max(3, 0.97 * self._rough), line)
        self._rough = rough
