"""Distances between generated and real images in the features of a classifier of that data.

Frechet distance and precision, recall, density, coverage: as with Inception, but with features that
fit the data, need no download and mean something on grey images. Values compare only under one
classifier.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metrics.fid import frechet_distance
from metrics.moments import FeatureMoments
from metrics.prdc import choose_rows, prdc, too_few
from metrics.rows import KeptRows
from metrics.scoring import Entry, entry
from utils.distributed import Runtime

TOO_FEW = "{} generated and {} real images have no covariance"
MAX_NEIGHBOURS = 10_000  # images that neighbours are searched among, of each kind


class DomainDistances:
    """Features of real images (on the main process alone), unseen real ones, and generated ones.

    Args:
        num_images: generated images over all processes.
        num_features: of the classifier.
    """

    def __init__(self, num_images: int, num_features: int) -> None:
        self.num_images, self.num_features = num_images, num_features
        chosen = torch.from_numpy(choose_rows(num_images, MAX_NEIGHBOURS, seed=0))
        self.kept = KeptRows(chosen, (num_features,), torch.float32)
        self.real = [torch.zeros(0, num_features)]
        self.unseen = [torch.zeros(0, num_features)]
        self.clear()

    def clear(self) -> None:
        """Forget the generated images."""
        self.moments = FeatureMoments(self.num_features)
        self.kept.clear()

    def add_real(self, features: Tensor) -> None:
        self.real.append(features)

    def add_unseen(self, features: Tensor) -> None:
        self.unseen.append(features)

    def add_generated(self, features: Tensor, indices: range) -> None:
        self.moments.update(features)
        self.kept.put(features, indices)

    def all_reduce(self, runtime: Runtime) -> None:
        self.moments.all_reduce(runtime)
        self.kept.all_reduce(runtime)

    def results(self) -> dict[str, Entry]:
        """`fd_domain` and `prdc_domain`."""
        real, unseen = torch.cat(self.real), torch.cat(self.unseen)
        found = {"fd_domain": self._frechet(real, unseen)}
        if reason := too_few(len(real), len(self.kept.chosen)):
            return found | {"prdc_domain": entry("unreliable", None, reason)}
        rows = choose_rows(len(real), MAX_NEIGHBOURS, seed=0)
        scores = prdc(real[rows].numpy(), self.kept.values.numpy())
        found["prdc_domain"] = entry("ok", scores.precision, **scores._asdict(), better="higher")
        return found

    def _frechet(self, real: Tensor, unseen: Tensor) -> Entry:
        if min(self.num_images, len(real)) < 2:
            return entry("unreliable", None, TOO_FEW.format(self.num_images, len(real)))
        target = _moments(real).mean_cov()
        distance = frechet_distance(*self.moments.mean_cov(), *target)
        baseline = None
        if len(unseen) >= 2:
            baseline = frechet_distance(*_moments(unseen).mean_cov(), *target).value
        dim = self.num_features
        few = min(self.num_images, len(real)) <= dim
        return entry(
            "unreliable" if few else "ok",
            distance.value,
            f"{self.num_images} generated and {len(real)} real images are too few for a "
            f"covariance of {dim} features"
            if few
            else None,
            raw=distance.raw,
            real_value=baseline,  # unseen real images: what a perfect model would get
            n=self.num_images,
            n_real=len(real),
            n_unseen=len(unseen),
            num_features=dim,
            better="lower",
        )


def _moments(features: Tensor) -> FeatureMoments:
    moments = FeatureMoments(features.shape[1])
    moments.update(features)
    return moments
