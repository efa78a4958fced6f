"""Inception score (Salimans et al. 2016, arXiv:1606.03498), by torch-fidelity."""

from __future__ import annotations

from collections.abc import Iterable

from metrics.base import Entry, Metric, entry, number
from metrics.fid import SINGULAR_BELOW, inception_warnings
from metrics.inception import INCEPTION, InceptionFeatures

NUM_SPLITS = 10


class InceptionScore(Metric):
    """How clear the ImageNet classes of the images are, and how varied."""

    better = "higher"
    network = INCEPTION
    collector = InceptionFeatures
    keeps = "logits"

    def compute(self) -> Entry:
        from torch_fidelity.metric_isc import isc_features_to_metric

        seen: InceptionFeatures = self.collected
        num_splits = min(NUM_SPLITS, seen.num_images)
        score = isc_features_to_metric(seen.generated.rows["logits"], splits=num_splits)
        few = seen.num_images <= SINGULAR_BELOW
        return entry(
            "unreliable" if few else "ok",
            score["inception_score_mean"],
            f"biased low at {seen.num_images} images" if few else None,
            std=score["inception_score_std"],
            num_splits=num_splits,
            n=seen.num_images,
            better=self.better,
            extractor=seen.details,
        )

    @classmethod
    def note(cls, result: Entry) -> str:
        return f"+- {number(result['std'])} over {result['num_splits']} splits"

    @classmethod
    def warnings(cls, num_images: int, channels: int) -> Iterable[str]:
        return inception_warnings(num_images, channels)
