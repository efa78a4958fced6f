"""Inception features, for every metric that is computed from them.

The network is torch-fidelity's, whose features are called FID everywhere (TF1 weights, TF1 resize);
no other is ever put in its place. It sees each image once for all metrics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.real import RealSets
from metrics.base import Collector, Context
from metrics.reference import FeatureMoments, Reference, read_reference, write_reference
from metrics.weights import Network, load_plain, usable
from utils.distributed import Runtime
from utils.errors import ConfigError, show
from utils.files import content_key
from utils.images import to_rgb
from utils.precision import full_float32

NUM_LOGITS = 1008
FID_FEATURES = 2048  # width of the layer whose distance is called FID


@dataclass(frozen=True)
class Extractor:
    """A network: uint8 (B, 3, H, W) -> features (B, feature_dim), logits (B, num_logits)."""

    extract: Callable[[Tensor], tuple[Tensor, Tensor]]
    feature_dim: int
    num_logits: int
    details: dict[str, Any] = field(default_factory=dict)  # what the report says of it

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Take uint8 (B, 1 or 3, H, W), grey repeated to three channels, through the network."""
        with torch.inference_mode(), full_float32(images.device):
            features, logits = self.extract(to_rgb(images).contiguous())
        assert features.shape == (len(images), self.feature_dim), features.shape
        return features, logits


def load_inception(path: Path, device: torch.device, *, layer: str = "2048") -> Extractor:
    """Load torch-fidelity's Inception with the weights at `path`.

    The features are those of `layer`: "64", "192", "768" or "2048"; only the last one gives what is
    called FID. Raises a MissingWeightsError if the file is damaged, not plain tensors, or of
    another network.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    load_plain(path, INCEPTION)  # torch-fidelity itself would unpickle whatever the file holds
    layers = [layer, "logits_unbiased"]
    with usable(INCEPTION, f"{show(path)} does not fit"), torch.random.fork_rng(devices=[]):
        network = FeatureExtractorInceptionV3(  # building it draws initial weights
            "inception-v3-compat", layers, feature_extractor_weights_path=str(path)
        )
    details = {"layer": layer, "resize": "tf1-bilinear-299", "comparable": layer == "2048"}
    return Extractor(network.to(device), int(layer), NUM_LOGITS, details)


INCEPTION = Network(
    name="inception",
    title="Inception",
    load=load_inception,
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    other_names=("pt_inception-2015-12-05-6726825d.pth",),  # pytorch-fid's name for the same
    help="for fid, kid, is, prdc; default: cache",
)


class FeatureSet:
    """What is kept of one set of images: of "moments", "features" and "logits" those in `keeps`.

    After `reduce`, `moments` has the sums of features over all processes, None if they are not
    kept, and `rows`, on the main process, float32 (N, width) for "features" and "logits".
    """

    def __init__(self, keeps: Collection[str], extractor: Extractor, device: torch.device) -> None:
        widths = {"features": extractor.feature_dim, "logits": extractor.num_logits}
        self.moments = FeatureMoments(extractor.feature_dim, device) if "moments" in keeps else None
        self.rows: dict[str, Tensor] = {}
        self._parts = {kind: [torch.zeros(0, widths[kind])] for kind in widths if kind in keeps}

    def update(self, features: Tensor, logits: Tensor) -> None:
        """Add features (b, D) and logits (b, L) of the next images of this process's share."""
        if self.moments is not None:
            self.moments.update(features)
        for kind, parts in self._parts.items():
            parts.append((features if kind == "features" else logits).float().cpu())

    def reduce(self, runtime: Runtime, num_images: int) -> None:
        """Bring together what the processes have of `num_images` images. A collective."""
        if self.moments is not None:
            self.moments.all_reduce(runtime)
        for kind, parts in self._parts.items():
            self.rows[kind] = runtime.gather(torch.cat(parts), num_images)
        self._parts = {}


class InceptionFeatures(Collector):
    """Features of real and generated images, as far as the metrics ask for them.

    On the main process, `reference` has the statistics that take the place of the real images' own:
    those of --reference, or those that an earlier evaluation left in the cache.
    """

    def __init__(self, context: Context) -> None:
        self.extractor: Extractor = context.networks[INCEPTION]
        self.details = {**self.extractor.details, **context.origin_of(INCEPTION)}
        self.runtime, self.num_images = context.runtime, context.generated.num_images
        self.keeps = context.keeps & {"moments", "features", "logits"}
        self.reference = context.real.statistics
        self.meta: dict[str, Any] = {}  # everything that the real images' statistics depend on
        self.store: Path | None = None
        sets = context.real.sets
        if self.reference is None and sets is not None and context.cache_dir is not None:
            self.meta = {
                "extractor": dict(self.extractor.details),
                "weights_sha256": context.weights[INCEPTION].sha256,
                "data_fingerprint": sets.reference.fingerprint,
                "split": sets.reference.split,
                "num_images": len(sets.reference.indices),
                "shape": list(context.generated.spec.shape),
                "range": "uint8, grey repeated to three channels",
            }
            self.store = context.cache_dir / f"reference_{content_key(self.meta)}.npz"
            # Metrics of all features need the images themselves.
            if "features" not in self.keeps and self.runtime.is_main and self.store.is_file():
                with contextlib.suppress(ConfigError):  # a damaged one is made again
                    self.reference = read_reference(self.store, self.extractor.feature_dim)
        # Only the main process reads the file; the others need not look at the images either.
        known = self.runtime.broadcast_object(self.reference is not None)
        self.keeps_real = self.keeps - ({"logits", "moments"} if known else {"logits"})
        self.real = FeatureSet(self.keeps_real, self.extractor, self.runtime.device)
        self.num_real = 0  # how many were looked at
        self.reset()

    def update_real(self, real: RealSets | None, runtime: Runtime) -> None:
        if not self.keeps_real:
            return
        if real is None:
            raise ValueError("real images are needed")
        self.num_real = len(real.reference.indices)
        for images, _ in real.reference.fetch(real.reference.share(runtime)):
            self.real.update(*self.extractor(images.to(runtime.device)))

    def reduce_real(self, runtime: Runtime) -> None:
        self.real.reduce(runtime, self.num_real)
        if runtime.is_main and self.store is not None and self.real.moments is not None:
            # A disk that refuses costs the next evaluation its time, not this one its result.
            with contextlib.suppress(OSError, ValueError):
                write_reference(self.store, self.statistics())

    def statistics(self) -> Reference:
        """What FID compares the generated images with, on the main process.

        Raises a ValueError if there are fewer than two real images.
        """
        if self.reference is not None:
            return self.reference
        return Reference(*self.real.moments.mean_cov(), self.num_real, self.meta)

    def counts(self) -> dict[str, Any]:
        """What was compared, for the entry of a metric."""
        return {"n": self.num_images, "n_real": self.num_real, "extractor": self.details}

    def reset(self) -> None:
        self.generated = FeatureSet(self.keeps, self.extractor, self.runtime.device)

    def update(self, images: Tensor, indices: range) -> None:
        self.generated.update(*self.extractor(images.to(self.runtime.device)))

    def reduce(self, runtime: Runtime) -> None:
        self.generated.reduce(runtime, self.num_images)
