"""Does the model draw the class it was asked for? Judged by a small CNN trained on real images.

The classifier is trained here, from the train split, in seconds to minutes; no download. Its own
accuracy on real images it has not seen is the ceiling of what generated images can be expected to
reach. Values compare only under one classifier (`key` in the report).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metrics.domain import DomainDistances
from metrics.inception import full_float32
from metrics.scoring import Entry, RealImages, entry
from utils.checkpoint import save_checkpoint
from utils.distributed import Runtime
from utils.images import to_float
from utils.rng import Stream, derive_seed, numpy_generator, torch_generator

VERSION = 1  # of the classifier and its training; part of its key
MAX_SIZE = 64  # pixels; larger images are scaled down for the classifier
MAX_TRAIN_IMAGES = 60_000
MAX_TEST_IMAGES = 10_000
MIN_CEILING = 0.9
HELD_OUT_SHARE = 0.1  # of the train split, where there is no test split
TEST_BATCH = 500
MAX_FAILURES = 40  # pictures of wrong classes kept for the report


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


def classifier_spec(
    shape: tuple[int, int, int], num_classes: int, num_images: int, *, flip: bool, seed: int = 0
) -> ClassifierSpec:
    """A size that fits the data: narrow and short for grey or few images, else a wider one.

    The narrow one takes seconds to minutes on a CPU. The wide one (colour, 20,000 images and more)
    takes seconds on a GPU, an hour on a CPU.
    """
    wide = shape[0] == 3 and num_images >= 20_000
    epochs, base_width = (15, 32) if wide else (2, 16)
    num_steps = max(250, epochs * math.ceil(min(num_images, MAX_TRAIN_IMAGES) / 128))
    return ClassifierSpec(*shape, num_classes, base_width, num_steps, flip, seed)


class ConvBlock(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class Classifier(nn.Module):
    """Stem and three stages that double the width; a stage halves sides above 4 pixels."""

    def __init__(self, spec: ClassifierSpec) -> None:
        super().__init__()
        width = spec.base_width
        self.stem = ConvBlock(spec.channels, width)
        self.stages = nn.ModuleList(ConvBlock(width * 2**i, width * 2 ** (i + 1)) for i in range(3))
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
    images: Tensor,
    labels: Tensor,
    spec: ClassifierSpec,
    device: torch.device,
    *,
    on_step: Callable[[int], None] = lambda _: None,
) -> Classifier:
    """Train on uint8 (N, C, H, W) and int64 (N,) labels. The same arguments give the same network.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(spec.seed, Stream.CLASSIFIER, 0))
        network = Classifier(spec).to(device)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, spec.num_steps)
    )
    batch_size = min(spec.batch_size, len(images))
    steps_per_epoch = len(images) // batch_size
    network.train()
    with torch.enable_grad(), full_float32(device), deterministic_cudnn():
        for step in range(spec.num_steps):
            epoch, offset = divmod(step, steps_per_epoch)
            if offset == 0:
                # Epochs count from 1: index 0 is the initialisation's.
                order = numpy_generator(spec.seed, Stream.CLASSIFIER, epoch + 1).permutation(
                    len(images)
                )
                rng = torch_generator(spec.seed, Stream.CLASSIFIER, epoch + 1)
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
            on_step(step + 1)
    return network.eval()


def rate_factor(step: int, num_steps: int) -> float:
    """Share of the learning rate: a linear rise over a fifth of the steps, then a cosine to 0."""
    rise = max(1, num_steps // 5)
    if step < rise:
        return (step + 1) / rise
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, num_steps - rise))


@contextlib.contextmanager
def deterministic_cudnn() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


class View(NamedTuple):
    """What a classifier makes of images: probabilities (N, K) and features (N, F), on the CPU."""

    probs: Tensor
    features: Tensor


def look(network: Classifier, images: Tensor, device: torch.device) -> View:
    """At uint8 (N, C, H, W)."""
    with torch.inference_mode(), full_float32(device), deterministic_cudnn():
        parts = [network.features(to_float(part.to(device))) for part in images.split(TEST_BATCH)]
        features = torch.cat(parts)
        return View(network.head(features).softmax(1).cpu(), features.cpu())


class ClassTotals:
    """What accuracy is computed from; sums only, so processes and batches can be added up."""

    def __init__(self, num_classes: int) -> None:
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # asked x seen
        self.requested_prob = torch.zeros((), dtype=torch.float64)
        self.unsure = torch.zeros((), dtype=torch.int64)  # no class above 0.5

    def update(self, probs: Tensor, labels: Tensor) -> None:
        """Add probabilities (b, K) of images that were requested (or are) of `labels` (b,)."""
        num_classes = len(self.confusion)
        confidence, predicted = probs.max(1)
        cells = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
        self.confusion += cells.view(num_classes, num_classes)
        self.requested_prob += probs.double().gather(1, labels[:, None]).sum()
        self.unsure += (confidence < 0.5).sum()

    def all_reduce(self, runtime: Runtime) -> None:
        for total in (self.confusion, self.requested_prob, self.unsure):
            runtime.all_reduce(total)

    @property
    def count(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Top-1 over all images; NaN without any."""
        return self.confusion.diagonal().sum().item() / self.count if self.count else math.nan

    def per_class(self) -> list[float | None]:
        """Accuracy of each class; None where it has no image."""
        hits, totals = self.confusion.diagonal().tolist(), self.confusion.sum(1).tolist()
        return [h / n if n else None for h, n in zip(hits, totals, strict=True)]


def wilson_interval(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927); sensible at 0, 1 and small counts."""
    if count == 0:
        return 0.0, 1.0
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    spread /= 1 + z * z / count
    return max(0.0, centre - spread), min(1.0, centre + spread)


class Holdout(NamedTuple):
    """Rows of the train split to train on, and to measure the ceiling on (none: a test split)."""

    train: list[int]
    test: list[int]


def split_train(indices: Sequence[int], *, hold_out: bool, seed: int) -> Holdout:
    """Cut off a tenth if `hold_out`, and cap the rest at `MAX_TRAIN_IMAGES`."""
    order = numpy_generator(seed, Stream.EVALUATION, 3).permutation(len(indices))
    num_test = max(1, int(len(indices) * HELD_OUT_SHARE)) if hold_out else 0
    chosen = order[num_test:][:MAX_TRAIN_IMAGES]
    return Holdout(sorted(indices[i] for i in chosen), sorted(indices[i] for i in order[:num_test]))


class Failure(NamedTuple):
    """A generated image in which the classifier sees another class than the requested one."""

    image: Tensor  # uint8 (C, H, W)
    requested: int
    seen: int


class ClassScorer:
    """Accuracy of the requested class, and distances in the classifier's features (see
    `metrics.scoring.Scorer`).

    Args:
        names: of "class_acc", "fd_domain" and "prdc_domain".
        num_images: generated images over all processes.
        shape: (C, H, W) of one image.
        test: real images that training did not see; None: hold out a tenth of the train split.
        cache_dir: trained classifiers are kept here; None: not kept.
        flip: mirrored images are as good as the originals.
        log: told what takes long.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        names: tuple[str, ...] = ("class_acc",),
        num_images: int = 0,
        shape: tuple[int, int, int],
        num_classes: int,
        test: RealImages | None,
        cache_dir: Path | None = None,
        flip: bool = False,
        seed: int = 0,
        log: Callable[[str], None] = lambda _: None,
        num_steps: int | None = None,
    ) -> None:
        self.names = names
        self.device = device
        self.shape = shape
        self.test = test
        self.cache_dir = cache_dir
        self.flip = flip
        self.seed = seed
        self.log = log
        self.num_steps = num_steps
        self.network: Classifier | None = None
        self.num_classes = num_classes
        self.ceiling = ClassTotals(num_classes)
        self.class_names: Sequence[str] = ()
        self.details: dict[str, Any] = {}
        self.num_images = num_images
        self.domain: DomainDistances | None = None  # from `see_real` on, if it was asked for
        self.clear()

    def clear(self) -> None:
        self.generated = ClassTotals(self.num_classes)
        self.failures: list[Failure] = []
        if self.domain is not None:
            self.domain.clear()

    def see_real(self, real: RealImages | None, runtime: Runtime) -> None:
        if real is None:
            raise ValueError("the classifier needs real images to train on")
        num_classes = real.num_classes
        self.class_names = real.class_names or [str(k) for k in range(num_classes)]
        spec = classifier_spec(
            self.shape, num_classes, len(real.labels), flip=self.flip, seed=self.seed
        )
        if self.num_steps is not None:
            spec = ClassifierSpec(**(asdict(spec) | {"num_steps": self.num_steps}))
        self.network = Classifier(spec).to(self.device).eval()
        if {"fd_domain", "prdc_domain"} & set(self.names):
            self.domain = DomainDistances(self.num_images, self.network.head.in_features)
        if runtime.is_main:
            parts = self._train_or_load(real, spec)
            if self.domain is not None:
                self._look_at_real(real, parts)

    def _look_at_real(self, real: RealImages, parts: Holdout) -> None:
        """Features of the images to compare with, and of unseen ones as their baseline."""
        unseen, rows = (real, parts.test) if self.test is None else (self.test, self.test.indices)
        wanted = set(real.indices)
        for images, _ in real.fetch([index for index in parts.train if index in wanted]):
            self.domain.add_real(look(self.network, images, self.device).features)
        for images, _ in unseen.fetch(list(rows)[:MAX_TEST_IMAGES]):
            self.domain.add_unseen(look(self.network, images, self.device).features)

    def _train_or_load(self, real: RealImages, spec: ClassifierSpec) -> Holdout:
        test_fingerprint = self.test.fingerprint if self.test is not None else "held out"
        key = classifier_key(spec, real.fingerprint, test_fingerprint)
        path = self.cache_dir / f"classifier_{key}.pth" if self.cache_dir is not None else None
        held_out = self.test is None
        self.details = {
            "key": key,
            "path": path and str(path),
            "spec": asdict(spec),
            "ceiling_split": "a tenth of train, held out" if held_out else self.test.split,
        }
        parts = split_train(range(len(real.labels)), hold_out=held_out, seed=self.seed)
        if path is not None and self._load(path):
            return parts
        self.log(
            f"training the classifier of class_acc: {len(parts.train)} real images, "
            f"{spec.num_steps} steps of {min(spec.batch_size, len(parts.train))}"
        )
        self.network = train_classifier(
            real.load(parts.train), real.labels[parts.train], spec, self.device,
            on_step=lambda n: n % 200 == 0 and self.log(f"  step {n} of {spec.num_steps}"),
        )  # fmt: skip
        judge = real if held_out else self.test
        rows = parts.test if held_out else list(judge.indices)[:MAX_TEST_IMAGES]
        probs = look(self.network, judge.load(rows), self.device).probs
        self.ceiling.update(probs, judge.labels[rows])
        self.log(f"  accuracy on {len(rows)} unseen real images: {self.ceiling.accuracy:.4f}")
        if path is not None:
            self._store(path)
        return parts

    def _load(self, path: Path) -> bool:
        """Take the classifier an earlier evaluation stored; False if there is none to use."""
        if not path.is_file():
            return False
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            self.network.load_state_dict(stored["state_dict"])
            self.ceiling.confusion = stored["ceiling_confusion"]
        except Exception as error:  # whatever a damaged file makes torch raise
            self.log(f"{path} is damaged and will be made again: {error}")
            return False
        return True

    def _store(self, path: Path) -> None:
        content = {
            "state_dict": {k: v.cpu() for k, v in self.network.state_dict().items()},
            "ceiling_confusion": self.ceiling.confusion,
            "details": json.dumps(self.details),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(path, content)
        except (OSError, RuntimeError) as error:
            self.log(f"the classifier could not be stored, the next run trains it again: {error}")

    def reduce_real(self, runtime: Runtime) -> None:
        if runtime.world_size == 1:
            return
        for tensor in self.network.state_dict().values():
            # The main process trained; a sum with zeros hands its tensors to the others.
            runtime.all_reduce(tensor if runtime.is_main else tensor.zero_())

    def see_generated(self, images: Tensor, labels: list[int] | None, indices: range) -> None:
        view = look(self.network, images, self.device)
        if "class_acc" in self.names:
            if labels is None:
                raise ValueError("accuracy needs to know which class was requested")
            requested = torch.tensor(labels, dtype=torch.int64)
            self.generated.update(view.probs, requested)
            seen = view.probs.argmax(1)
            for i in torch.nonzero(seen != requested).flatten().tolist():
                if len(self.failures) < MAX_FAILURES:
                    self.failures.append(Failure(images[i], labels[i], int(seen[i])))
        if self.domain is not None:
            self.domain.add_generated(view.features, indices)

    def reduce_generated(self, runtime: Runtime) -> None:
        self.generated.all_reduce(runtime)
        self._share_failures(runtime)
        if self.domain is not None:
            self.domain.all_reduce(runtime)

    def _share_failures(self, runtime: Runtime) -> None:
        """Every process's failures on all of them: a block of rows each, zero elsewhere."""
        first = runtime.rank * MAX_FAILURES
        size = runtime.world_size * MAX_FAILURES
        images = torch.zeros((size, *self.shape), dtype=torch.uint8)
        classes = torch.full((size, 2), 0, dtype=torch.int64)  # 1 + requested, 1 + seen
        for i, failure in enumerate(self.failures, first):
            images[i] = failure.image
            classes[i] = torch.tensor([failure.requested + 1, failure.seen + 1])
        runtime.all_reduce(images)
        runtime.all_reduce(classes)
        rows = torch.nonzero(classes[:, 0]).flatten().tolist()[:MAX_FAILURES]
        pairs = (classes - 1).tolist()
        self.failures = [Failure(images[i], *pairs[i]) for i in rows]

    def results(self) -> dict[str, Entry]:
        found = {"class_acc": self._accuracy()} if "class_acc" in self.names else {}
        if self.domain is not None:
            weak = not self.ceiling.accuracy >= MIN_CEILING
            for name, result in self.domain.results().items():
                if name in self.names:
                    found[name] = result | {"classifier": self.details}
                    if weak and result["status"] == "ok":
                        found[name] |= {"status": "unreliable", "reason": self._weakness()}
        return found

    def _weakness(self) -> str:
        return f"the classifier itself is right on only {self.ceiling.accuracy:.1%} of real images"

    def _accuracy(self) -> Entry:
        totals, ceiling = self.generated, self.ceiling
        low, high = wilson_interval(int(totals.confusion.diagonal().sum()), totals.count)
        weak = not ceiling.accuracy >= MIN_CEILING
        if self.test is None:
            self.details["note"] = "no test split: the ceiling is from a held-out tenth of train"
        per_class = dict(zip(self.class_names, totals.per_class(), strict=True))
        seen = {name: share for name, share in per_class.items() if share is not None}
        return entry(
            "unreliable" if weak else "ok",
            totals.accuracy,
            self._weakness() if weak else None,
            ci95=[low, high],
            real_ceiling=ceiling.accuracy,
            per_class=per_class,
            per_class_real=dict(zip(self.class_names, ceiling.per_class(), strict=True)),
            worst_class=min(seen, key=seen.get) if seen else None,
            mean_requested_prob=totals.requested_prob.item() / max(1, totals.count),
            unsure_share=totals.unsure.item() / max(1, totals.count),
            confusion=totals.confusion.tolist(),
            n=totals.count,
            n_real=ceiling.count,
            better="higher",
            classifier=self.details,
        )


def classifier_key(spec: ClassifierSpec, *fingerprints: str) -> str:
    """12 hex digits that change with the data, the spec or the version of this code."""
    content = json.dumps([VERSION, asdict(spec), fingerprints], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]
