"""Inception features: torch-fidelity's network, our streaming float64 moments, and the metrics.

The network is the one whose features are called FID everywhere (TF1 weights, TF1 resize); no other
is ever put in its place. It sees each image once for all metrics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.real import RealSets
from metrics import fid
from metrics.features import FeatureStore
from metrics.inception_score import InceptionScoreSums
from metrics.kid import SUBSET_SIZE, kernel_inception_distance
from metrics.moments import FeatureMoments
from metrics.prdc import choose_rows, prdc, too_few
from metrics.reference import Reference, write_reference
from metrics.scoring import Entry, entry
from metrics.weights import Weights, WeightsSource, load_plain, wrong_weights
from utils.distributed import Runtime
from utils.images import to_rgb
from utils.precision import full_float32

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
FID_FEATURES = 2048  # of the layer whose distance is called FID


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


class InceptionScorer:
    """FID, KID, IS and precision/recall from one pass of one network (see
    `metrics.scoring.Scorer`).

    Args:
        names: of "fid", "kid", "is" and "prdc".
        num_images: generated images over all processes.
        features_dir: a folder all processes share, for the features that "kid" and "prdc" need:
            4 bytes x feature_dim an image, generated and real.
        reference: statistics to compare with instead of the real images' ("fid" only).
        store: where the real images' statistics are kept for the next evaluation, with what
            describes them.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        extractor: Extractor,
        device: torch.device,
        *,
        num_images: int,
        weights: Weights | None = None,
        features_dir: Path | None = None,
        reference: Reference | None = None,
        store: tuple[Path, Mapping[str, Any]] | None = None,
    ) -> None:
        self.names = names
        self.extractor = extractor
        self.device = device
        self.num_images = num_images
        dim = extractor.feature_dim
        self.reference, self.store = reference, store
        needs_real = "fid" in names and reference is None
        self.real = FeatureMoments(dim, device) if needs_real else None
        self.real_features: FeatureStore | None = None
        self.features: FeatureStore | None = None
        if {"kid", "prdc"} & set(names):
            if features_dir is None:
                raise ValueError("kid and prdc need a features_dir")
            self.real_features = FeatureStore(features_dir / "real", dim)
            self.features = FeatureStore(features_dir / "generated", dim)
        self.num_real = 0
        self.details = dict(extractor.details)
        if weights is not None:
            self.details |= {"path": str(weights.path), "sha256": weights.sha256}
        self.clear()

    def clear(self) -> None:
        names, dim = self.names, self.extractor.feature_dim
        self.generated = FeatureMoments(dim, self.device) if "fid" in names else None
        self.score = None
        if "is" in names:
            self.score = InceptionScoreSums(
                self.num_images, self.extractor.num_logits, device=self.device
            )
        if self.features is not None:
            self.features.close()

    def see_real(self, real: RealSets | None, runtime: Runtime) -> None:
        if self.real is None and self.real_features is None:
            return
        if real is None:
            raise ValueError(f"{', '.join(self.names)}: real images are needed")
        real = real.reference
        self.num_real = len(real.indices)
        start = runtime.share(self.num_real).start
        for images, _ in real.fetch(real.share(runtime)):
            features = self.extractor(images.to(self.device))[0]
            if self.real is not None:
                self.real.update(features)
            if self.real_features is not None:
                self.real_features.append(features, range(start, start + len(images)))
            start += len(images)

    def reduce_real(self, runtime: Runtime) -> None:
        if self.real is not None:
            self.real.all_reduce(runtime)
            if runtime.is_main and self.store is not None:
                self._keep(*self.store)
        _finish(self.real_features, runtime)

    def _keep(self, path: Path, meta: Mapping[str, Any]) -> None:
        """A disk that refuses costs the next evaluation its time, not this one its result."""
        with contextlib.suppress(OSError, ValueError):
            write_reference(path, self.real_statistics(meta))

    def real_statistics(self, meta: Mapping[str, Any]) -> Reference:
        """What the generated images are compared with. On the main process."""
        if self.reference is not None:
            return self.reference
        return Reference(*self.real.mean_cov(), int(self.real.count.item()), meta)

    def see_generated(self, images: Tensor, labels: list[int] | None, indices: range) -> None:
        features, logits = self.extractor(images.to(self.device))
        if self.generated is not None:
            self.generated.update(features)
        if self.score is not None:
            self.score.update(logits, indices)
        if self.features is not None:
            self.features.append(features, indices)

    def reduce_generated(self, runtime: Runtime) -> None:
        for sums in (self.generated, self.score):
            if sums is not None:
                sums.all_reduce(runtime)
        _finish(self.features, runtime)

    def results(self) -> dict[str, Entry]:
        found = {}
        few = self.num_images <= fid.SINGULAR_BELOW
        if self.generated is not None and self._too_few():
            found["fid"] = entry("unreliable", None, self._too_few())
        elif self.generated is not None:
            real = self.real_statistics({})
            distance = fid.frechet_distance(*self.generated.mean_cov(), real.mu, real.sigma)
            num_real = real.num_images
            few_real = num_real is not None and num_real <= fid.SINGULAR_BELOW
            counts = f"{self.num_images} generated and {num_real or 'unknown'} real images"
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
                reference=dict(real.meta) or None,
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
        if self.features is not None:
            found |= self._from_features()
        return found

    def _too_few(self) -> str | None:
        """Why there is no covariance, or None."""
        num_real = 2 if self.reference is not None else self.num_real
        if min(self.num_images, num_real) >= 2:
            return None
        return f"{self.num_images} generated and {self.num_real} real images have no covariance"

    def _from_features(self) -> dict[str, Entry]:
        """KID and precision, recall, density, coverage."""
        found = {}
        generated = self.features.read(self.num_images)
        real = self.real_features.read(self.num_real)
        counts = {"n": self.num_images, "n_real": self.num_real, "extractor": self.details}
        if "kid" in self.names and min(self.num_images, self.num_real) < 2:
            found["kid"] = entry("unreliable", None, "KID needs 2 images of each kind", **counts)
        elif "kid" in self.names:
            kid = kernel_inception_distance(generated, real)
            few = kid.subset_size < SUBSET_SIZE
            found["kid"] = entry(
                "unreliable" if few else "ok",
                kid.mean,
                f"subsets of {kid.subset_size} images instead of {SUBSET_SIZE}" if few else None,
                std=kid.std,
                subset_size=kid.subset_size,
                better="lower",
                **counts,
            )
        if "prdc" in self.names and (reason := too_few(self.num_real, self.num_images)):
            found["prdc"] = entry("unreliable", None, reason, **counts)
        elif "prdc" in self.names:
            scores = prdc(*(f.rows(choose_rows(len(f))) for f in (real, generated)))
            found["prdc"] = entry(
                "ok", scores.precision, **scores._asdict(), better="higher", **counts
            )
        return found


def _finish(store: FeatureStore | None, runtime: Runtime) -> None:
    """After this the main process may read what all have written. A collective."""
    if store is not None:
        store.close()
        runtime.barrier()
