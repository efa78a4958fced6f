"""How near images drawn from pictures of real ones are to these, beside the pictures themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from datasets.conditions import KINDS, shown
from metrics.base import Context, Entry, Metric, measured, number
from metrics.gallery import ChosenImages
from metrics.lpips_score import ALEXNET, distances
from utils.images import to_float, to_uint8
from utils.rng import fixed_subset

NUM_IMAGES, BATCH = 2000, 32  # compared at most, spread over all that are drawn, and at a time
LEAST_ERROR = 1e-10  # of squares where white is 1: equal images have 100 dB


class Psnr(ChosenImages, Metric):
    """Peak signal-to-noise ratio in dB, the mean over the images; of one at most 100."""

    better = "higher"
    real_images = paired = True

    def __init__(self, context: Context) -> None:
        super().__init__(fixed_subset(context.generated.num_images, NUM_IMAGES))
        self.real, self.config = context.real.sets, context.generated.drawn_from

    def score(self, images: Tensor, real: Tensor) -> Tensor:
        """Compare images, uint8 or float32 in [-1, 1] (b, C, H, W), twice -> (b,)."""
        error = ((to_float(images) - to_float(real)) / 2).double().square().flatten(1).mean(1)
        return -10 * error.clamp(min=LEAST_ERROR).log10()

    def compute(self) -> Entry:
        reference, values, name = self.real.reference, [], None
        for images, places in zip(self.values.split(BATCH), self.chosen.split(BATCH), strict=True):
            indices = reference.at(places.tolist())
            real, _ = reference.load(indices)
            guess = shown(reference.planes(indices), self.config)
            if guess.shape[1] in (1, real.shape[1]):
                name = KINDS[self.config.condition][2]
            guess = to_uint8(guess).expand_as(real) if name else real
            values.append(torch.stack([self.score(x, real).double() for x in (images, guess)]))
        value, baseline = torch.cat(values, 1).mean(1).tolist()
        details = {"n": len(self.chosen), "baseline": baseline if name else None}
        return measured(value, baseline_name=name, **details)

    @classmethod
    def note(cls, result: Entry) -> str:
        return result["baseline_name"] and f"{result['baseline_name']} {number(result['baseline'])}"


class Ssim(Psnr):
    """Structural similarity (Wang et al. 2004) by scikit-image, in windows of 7 x 7 pixels."""

    package = "skimage"

    def score(self, images: Tensor, real: Tensor) -> Tensor:
        from skimage.metrics import structural_similarity

        pairs = zip(*((to_float(x).numpy() + 1) / 2 for x in (images, real)), strict=True)
        how = {"channel_axis": 0, "data_range": 1}
        return torch.tensor([structural_similarity(*pair, **how) for pair in pairs])


class LpipsPaired(Psnr):
    """LPIPS distance (Zhang et al. 2018) between each image and the real one, with AlexNet."""

    better = "lower"
    network = ALEXNET

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.distance, self.device = context.networks[ALEXNET], context.runtime.device

    def score(self, images: Tensor, real: Tensor) -> Tensor:
        return distances(self.distance, [(images, real)], self.device)
