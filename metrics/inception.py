"""Inception features: torch-fidelity's network, our streaming float64 moments, FID and IS.

The network is the one whose features are called FID everywhere (TF1 weights, TF1 resize); no other
is ever put in its place. It sees each image once for both metrics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metrics import fid
from metrics.inception_score import InceptionScoreSums
from metrics.scoring import Entry, RealImages, entry
from metrics.weights import Weights, WeightsSource, load_plain, wrong_weights
from utils.distributed import Runtime
from utils.images import to_rgb

INCEPTION = WeightsSource(
    name="Inception",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    flag="--inception_weights",
    # The second is pytorch-fid's name for the same weights.
    file_names=(
        "weights-inception-2015-12-05-6726825d.pth",
        "pt_inception-2015-12-05-6726825d.pth",
    ),
)
NUM_LOGITS = 1008


@dataclass(frozen=True)
class Extractor:
    """A feature network: uint8 (B, 3, H, W) -> features (B, feature_dim), logits (B, L)."""

    extract: Callable[[Tensor], tuple[Tensor, Tensor]]
    feature_dim: int
    num_logits: int
    details: dict[str, Any] = field(default_factory=dict)  # goes into the report

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, 1 or 3, H, W); grey is repeated to three channels."""
        with torch.inference_mode(), full_float32(images.device):
            features, logits = self.extract(to_rgb(images).contiguous())
        if features.shape != (len(images), self.feature_dim):
            raise ValueError(
                f"features of shape {tuple(features.shape)}, not {(len(images), self.feature_dim)}"
            )
        return features, logits


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32: both move a FID by more than a model's improvement does."""
    # Not the older `allow_tf32` flags: they cannot be read once anything has set these.
    settings = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def load_inception(path: Path, device: torch.device, *, layer: str = "2048") -> Extractor:
    """torch-fidelity's Inception with the weights at `path`.

    Args:
        layer: "64", "192", "768" or "2048"; only the last one gives what is called FID.

    Raises:
        MissingWeightsError: the file is damaged, not plain tensors, or of another network.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    load_plain(path, INCEPTION)  # torch-fidelity itself would unpickle whatever the file holds
    try:
        with torch.random.fork_rng(devices=[]):  # building it draws initial weights
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat",
                [layer, "logits_unbiased"],
                feature_extractor_weights_path=str(path),
            )
    except RuntimeError as error:
        raise wrong_weights(path, INCEPTION, error) from error
    details = {"layer": layer, "resize": "tf1-bilinear-299", "comparable": layer == "2048"}
    return Extractor(network.to(device), int(layer), NUM_LOGITS, details)


class FeatureMoments:
    """Count, sum and sum of outer products of features, in float64.

    In float32 the covariance is lost where the mean is large beside the spread.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        # MPS has no float64.
        device = "cpu" if torch.device(device).type == "mps" else device
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add features (b, D); b may be 0."""
        x = features.to(self.sum.device).double()
        self.count += len(x)
        self.sum += x.sum(0)
        self.outer.addmm_(x.T, x)

    def all_reduce(self, runtime: Runtime) -> None:
        for total in (self.count, self.sum, self.outer):
            runtime.all_reduce(total)

    def mean_cov(self) -> tuple[Tensor, Tensor]:
        """(D,) mean and (D, D) unbiased covariance.

        Raises:
            ValueError: fewer than two images.
        """
        count = self.count.item()
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 images, there are {count:.0f}")
        mean = self.sum / count
        covariance = (self.outer - count * torch.outer(mean, mean)) / (count - 1)
        return mean, covariance


class InceptionScorer:
    """FID and IS from one pass of one network (see `metrics.scoring.Scorer`).

    Args:
        names: "fid", "is" or both.
        num_images: generated images over all processes.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        extractor: Extractor,
        device: torch.device,
        *,
        num_images: int,
        weights: Weights | None = None,
    ) -> None:
        self.names = names
        self.extractor = extractor
        self.device = device
        self.num_images = num_images
        self.real = FeatureMoments(extractor.feature_dim, device) if "fid" in names else None
        self.generated = FeatureMoments(extractor.feature_dim, device) if "fid" in names else None
        self.score = None
        if "is" in names:
            self.score = InceptionScoreSums(num_images, extractor.num_logits, device=device)
        self.details = dict(extractor.details)
        if weights is not None:
            self.details |= {"path": str(weights.path), "sha256": weights.sha256}

    def see_real(self, real: RealImages | None, runtime: Runtime) -> None:
        if self.real is None:
            return
        if real is None:
            raise ValueError("FID needs real images")
        for images, _ in real.fetch(real.share(runtime)):
            self.real.update(self.extractor(images.to(self.device))[0])

    def reduce_real(self, runtime: Runtime) -> None:
        if self.real is not None:
            self.real.all_reduce(runtime)

    def see_generated(self, images: Tensor, labels: list[int] | None, indices: range) -> None:
        features, logits = self.extractor(images.to(self.device))
        if self.generated is not None:
            self.generated.update(features)
        if self.score is not None:
            self.score.update(logits, indices)

    def reduce_generated(self, runtime: Runtime) -> None:
        for sums in (self.generated, self.score):
            if sums is not None:
                sums.all_reduce(runtime)

    def results(self) -> dict[str, Entry]:
        found = {}
        few = self.num_images <= fid.SINGULAR_BELOW
        if self.real is not None and self.generated is not None:
            distance = fid.frechet_distance(*self.generated.mean_cov(), *self.real.mean_cov())
            num_real = int(self.real.count.item())
            few_real = num_real <= fid.SINGULAR_BELOW
            counts = f"{self.num_images} generated and {num_real} real images"
            found["fid"] = entry(
                "unreliable" if few or few_real else "ok",
                distance.value,
                f"{counts} are too few for a covariance of {self.extractor.feature_dim} features"
                if few or few_real
                else None,
                name=fid.count_name(self.num_images),
                raw=distance.raw,
                n=self.num_images,
                n_real=num_real,
                better="lower",
                extractor=self.details,
            )
        if self.score is not None:
            mean, std = self.score.compute()
            found["is"] = entry(
                "unreliable" if few else "ok",
                mean,
                f"biased low at {self.num_images} images" if few else None,
                std=std,
                num_splits=self.score.num_splits,
                n=self.num_images,
                better="higher",
                extractor=self.details,
            )
        return found
