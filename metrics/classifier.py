"""A small CNN that learns the classes of real images: seconds to minutes, no download.

Each is kept, with what it reaches on unseen images, in a file named by a key of all it depends on.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import cudnn

from datasets.real import RealImages, RealSets
from metrics.base import Collector, Context, Entry
from utils.checkpoint import read_tensors, save_checkpoint
from utils.distributed import Runtime
from utils.errors import one_line
from utils.files import content_key
from utils.images import ImageSpec, to_float
from utils.precision import full_float32
from utils.rng import EvaluationDraw, Stream, derive_seed, numpy_generator, torch_generator

VERSION = 1  # counts changes of the classifier and its training; a part of its key
MAX_SIZE = 64  # pixels; larger images are scaled down for the classifier
MAX_TRAIN_IMAGES = 60_000
MAX_TEST_IMAGES = 10_000
HELD_OUT_SHARE = 0.1  # of the train images, held out where there is no test split
TEST_BATCH = 500
MIN_CEILING = 0.9
MAX_MISTAKES = 40  # pictures of wrong classes kept for the report
# A context in which cuDNN chooses the same algorithms in every run
deterministic_cudnn = partial(cudnn.flags, enabled=True, deterministic=True, allow_tf32=False)

log = logging.getLogger("diffusion")


@dataclass(frozen=True)
class ClassifierSpec:
    """What is trained, and how. Everything here is part of the classifier's key."""

    channels: int
    height: int
    width: int
    num_classes: int
    base_width: int
    num_steps: int
    flip: bool  # mirror at random: never for digits or letters
    seed: int = 0
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.02


def classifier_spec(images: ImageSpec, num_images: int, *, flip: bool) -> ClassifierSpec:
    """Choose a size that fits the data: narrow and short for grey or few images, else wider.

    The narrow one takes seconds to minutes on a CPU. The wide one (colour, 20,000 images and more)
    takes seconds on a GPU, an hour on a CPU.
    """
    wide = images.channels == 3 and num_images >= 20_000
    epochs, base_width = (15, 32) if wide else (2, 16)
    num_steps = max(250, epochs * math.ceil(min(num_images, MAX_TRAIN_IMAGES) / 128))
    return ClassifierSpec(*images, base_width, num_steps, flip)


class Classifier(nn.Module):
    """Stem and three stages that double the width; a stage halves sides above 4 pixels."""

    def __init__(self, spec: ClassifierSpec) -> None:
        from torchvision.ops import Conv2dNormActivation as ConvBlock  # 3 x 3, batch norm, ReLU

        super().__init__()
        width = spec.base_width
        self.stem = ConvBlock(spec.channels, width)
        self.stages = nn.ModuleList(ConvBlock(width * n, width * n * 2) for n in (1, 2, 4))
        self.mixer = ConvBlock(width * 8, width * 8)
        self.head = nn.Linear(width * 8, spec.num_classes)

    def features(self, x: Tensor) -> Tensor:
        """float32 (B, C, H, W) in [-1, 1] -> (B, 8 * base_width)."""
        side = max(x.shape[-2:])
        if side > MAX_SIZE:
            x = F.interpolate(x, scale_factor=MAX_SIZE / side, mode="area")
        x = self.stem(x)  # (B, w, H, W)
        for stage in self.stages:
            x = stage(x)
            if min(x.shape[-2:]) > 4:
                x = F.max_pool2d(x, 2)
        x = x + self.mixer(x)  # (B, 8w, H', W')
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def new_classifier(spec: ClassifierSpec, device: torch.device) -> Classifier:
    """Build an untrained one in evaluation mode. The global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        # `torch.manual_seed` would seed the GPUs' generators, too.
        torch.default_generator.manual_seed(derive_seed(spec.seed, Stream.CLASSIFIER, 0))
        return Classifier(spec).to(device).eval()


def shift_randomly(images: Tensor, rng: torch.Generator) -> Tensor:
    """Move each image of a batch by up to 1/12 of its sides; the border is repeated."""
    batch, _, height, width = images.shape
    dy, dx = max(1, height // 12), max(1, width // 12)
    padded = F.pad(images, (dx, dx, dy, dy), mode="replicate")
    y0 = torch.randint(0, 2 * dy + 1, (batch, 1), generator=rng).to(images.device)
    x0 = torch.randint(0, 2 * dx + 1, (batch, 1), generator=rng).to(images.device)
    rows = (y0 + torch.arange(height, device=images.device))[:, :, None]  # (B, H, 1)
    columns = (x0 + torch.arange(width, device=images.device))[:, None, :]  # (B, 1, W)
    picked = torch.arange(batch, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[picked, rows, columns].permute(0, 3, 1, 2).contiguous()


def train_classifier(
    images: Tensor, labels: Tensor, spec: ClassifierSpec, device: torch.device
) -> Classifier:
    """Train on uint8 (N, C, H, W) and int64 (N,) labels. The same arguments give the same network.

    The global random state is left as it was.
    """
    network = new_classifier(spec, device)
    rates = {"lr": spec.learning_rate, "weight_decay": spec.weight_decay}
    optimizer = torch.optim.AdamW(network.parameters(), **rates)
    factor = partial(rate_factor, num_steps=spec.num_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    batch_size = min(spec.batch_size, len(images))
    steps_per_epoch = len(images) // batch_size
    network.train()
    with torch.enable_grad(), full_float32(device), deterministic_cudnn():
        for step in range(spec.num_steps):
            epoch, offset = divmod(step, steps_per_epoch)
            if offset == 0:
                draw = (spec.seed, Stream.CLASSIFIER, epoch + 1)  # 0 is the initialisation
                order = numpy_generator(*draw).permutation(len(images))
                rng = torch_generator(*draw)
            rows = torch.from_numpy(order[offset * batch_size : (offset + 1) * batch_size])
            x = shift_randomly(to_float(images[rows].to(device)), rng)
            if spec.flip:
                mirrored = (torch.rand(len(x), 1, 1, 1, generator=rng) < 0.5).to(device)
                x = torch.where(mirrored, x.flip(3), x)
            loss = F.cross_entropy(network(x), labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if (step + 1) % 200 == 0:
                log.info("  step %d of %d", step + 1, spec.num_steps)
    return network.eval()


def rate_factor(step: int, num_steps: int) -> float:
    """Scale the learning rate: a linear rise over a fifth of the steps, then a cosine to 0."""
    rise = max(1, num_steps // 5)
    if step < rise:
        return (step + 1) / rise
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, num_steps - rise))


def classify(network: Classifier, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """uint8 images (N, C, H, W) -> probabilities (N, K) and features (N, F), on the CPU."""
    with torch.inference_mode(), full_float32(device), deterministic_cudnn():
        parts = [network.features(to_float(part.to(device))) for part in images.split(TEST_BATCH)]
        features = torch.cat(parts)
        return network.head(features).softmax(1).cpu(), features.cpu()


def count_pairs(labels: Tensor, seen: Tensor, num_classes: int) -> Tensor:
    """(N,) and (N,) -> (K, K) int64: how often each label was seen as each class."""
    cells = torch.bincount(labels * num_classes + seen, minlength=num_classes**2)
    return cells.view(num_classes, num_classes)


def accuracy(confusion: Tensor) -> float:
    """The share of images on the diagonal; NaN without any image."""
    return confusion.diagonal().sum().item() / int(confusion.sum()) if confusion.any() else math.nan


def split_images(real: RealSets, *, seed: int) -> tuple[RealImages, RealImages]:
    """The train images to learn from, at most `MAX_TRAIN_IMAGES`, and other images to test on.

    Those are test images, or where there are none, a tenth of the train images, held out.
    """
    num_images, test = len(real.train.dataset), real.test
    rng = numpy_generator(seed, Stream.EVALUATION, EvaluationDraw.CLASSIFIER_SPLIT)
    order = rng.permutation(num_images).tolist()
    num_held_out = max(1, int(num_images * HELD_OUT_SHARE)) if test is None else 0
    seen = sorted(order[num_held_out:][:MAX_TRAIN_IMAGES])
    unseen = replace(real.train, indices=sorted(order[:num_held_out]))
    if test is not None:
        unseen = replace(test, indices=list(test.indices[:MAX_TEST_IMAGES]))
    return replace(real.train, indices=seen), unseen


def trained_classifier(
    real: RealSets, spec: ClassifierSpec, device: torch.device, cache_dir: Path | None
) -> tuple[Classifier, Tensor, dict[str, Any]]:
    """Take the classifier of `real.train` from `cache_dir`, or train it and keep it there.

    Returns it, the (K, K) int64 confusion of the unseen images of `split_images`, class x class
    seen, and what identifies it, as plain types.
    """
    train, test = real.train, real.test
    fingerprints = [train.dataset.fingerprint, test.dataset.fingerprint if test else "held out"]
    key = content_key([VERSION, asdict(spec), fingerprints])
    path = None if cache_dir is None else cache_dir / f"classifier_{key}.pth"
    details = {"key": key, "path": path and str(path), "spec": asdict(spec)}
    details["ceiling_split"] = test.split if test else "a tenth of train, held out"
    network = new_classifier(spec, device)
    if path is not None and path.is_file():
        try:
            stored = read_tensors(path, needs_checksum=True)
            network.load_state_dict(stored["state_dict"])
            return network, stored["ceiling_confusion"], details
        except Exception as error:  # whatever a damaged file makes torch raise
            log.info("%s is damaged and will be made again: %s", path, one_line(error))
    seen, unseen = split_images(real, seed=spec.seed)
    count = len(seen.indices)
    size = f"{spec.num_steps} steps of {min(spec.batch_size, count)}"
    log.info("training the classifier of class_acc: %d real images, %s", count, size)
    network = train_classifier(*seen.load(seen.indices), spec, device)
    images, labels = unseen.load(unseen.indices)
    probs, _ = classify(network, images, device)
    confusion = count_pairs(labels, probs.argmax(1), spec.num_classes)
    log.info("  accuracy on %d unseen real images: %.4f", len(unseen.indices), accuracy(confusion))
    if path is not None:
        state = {k: v.cpu() for k, v in network.state_dict().items()}
        content = {"state_dict": state, "ceiling_confusion": confusion}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(path, content | {"details": json.dumps(details)})
        except (OSError, RuntimeError) as error:
            log.info("the classifier could not be stored, the next run trains it again: %s", error)
    return network, confusion, details


class ClassifierViews(Collector):
    """The classes that are seen in images, and their features.

    The main process trains the classifier, or takes it from the cache, and hands it to the others.
    It alone has these attributes, after `reduce_real` and `reduce`.

    Attributes:
        details: what identifies the classifier, for the report.
        confusion: (K, K) int64, class x class seen, of real images that are new to the classifier.
        real, unseen: if "domain" is kept, features (N, F) of the real images to compare with, and
            of other real images.
        views, features: float64 (N, 3) and (N, F) of the generated images: the class seen, its
            probability, and that of the requested class; and the features.
        mistakes: if "accuracy" is kept, some images of a wrong class: (image, class requested,
            class seen).
    """

    def __init__(self, context: Context) -> None:
        self.context, self.device = context, context.runtime.device
        self.num_images = context.generated.num_images
        self.labels = context.generated.labels if "accuracy" in context.keeps else None

    def update_real(self, real: RealSets, runtime: Runtime) -> None:
        if len(real.train.dataset) < 2:
            raise ValueError("the classifier needs at least 2 real images to train on")
        train, keeps, dataset = real.train, self.context.keeps, real.train.dataset
        self.class_names = dataset.class_names
        spec = classifier_spec(dataset.spec, len(dataset), flip=self.context.real.flip)
        self.network = new_classifier(spec, self.device)
        if not runtime.is_main:
            return
        trained = trained_classifier(real, spec, self.device, self.context.cache_dir)
        self.network, self.confusion, self.details = trained
        if real.test is None and "accuracy" in keeps:
            self.details["note"] = "no test split: the ceiling is from a held-out tenth of train"
        if "domain" in keeps:
            seen, unseen = split_images(real, seed=spec.seed)
            wanted = set(train.indices)
            seen = replace(seen, indices=[index for index in seen.indices if index in wanted])
            if real.reference is not train:
                seen, unseen = real.reference, seen
            self.real, self.unseen = self._features(seen), self._features(unseen)

    def _features(self, images: RealImages) -> Tensor:
        rows = (classify(self.network, x, self.device)[1] for x, _ in images.fetch(images.indices))
        return torch.cat([torch.zeros(0, self.network.head.in_features), *rows])

    def reduce_real(self, runtime: Runtime) -> None:
        for tensor in self.network.state_dict().values():
            runtime.broadcast(tensor)

    def reset(self) -> None:
        self.parts = [torch.zeros(0, 3 + self.network.head.in_features, dtype=torch.float64)]
        self.mistakes: list[tuple[Tensor, int, int]] = []

    def update(self, images: Tensor, indices: range) -> None:
        probs, features = classify(self.network, images, self.device)
        sure, seen = probs.max(1)
        asked = seen
        if self.labels is not None:
            asked = torch.tensor(self.labels[indices.start : indices.stop])
        views = torch.stack([seen, sure, probs.gather(1, asked[:, None])[:, 0]], 1)
        self.parts.append(torch.cat([views, features], 1).double())
        for i in (seen != asked).nonzero()[:, 0].tolist():
            if len(self.mistakes) < MAX_MISTAKES:
                self.mistakes.append((images[i], int(asked[i]), int(seen[i])))

    def reduce(self, runtime: Runtime) -> None:
        rows = runtime.gather(torch.cat(self.parts))
        if rows is not None:
            self.views, self.features = rows[:, :3], rows[:, 3:]
        self.parts = []
        shares = runtime.gather_objects(self.mistakes)
        self.mistakes = list(itertools.chain.from_iterable(shares))[:MAX_MISTAKES]

    def judged(self, result: Entry) -> Entry:
        """`result`, with the classifier it comes from; "unreliable" if that one is weak."""
        right = accuracy(self.confusion)
        if result["status"] == "ok" and not right >= MIN_CEILING:  # it may be NaN
            doubt = f"the classifier itself is right on only {right:.1%} of real images"
            result |= {"status": "unreliable", "reason": doubt}
        return result | {"classifier": self.details}
