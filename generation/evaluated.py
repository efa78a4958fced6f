"""The sets of images that an evaluation scores, and what they are compared with."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from datasets import default_flip
from datasets.loader import image_batches
from datasets.pictures import folder_settings, read_pictures
from datasets.real import RealImages, chosen_images, real_sets
from generation.run import Run
from generation.sample_store import SampleStore, saved
from generation.sampling import generate
from generation.sweep import Setting, settings_of
from metrics.base import Generated, Real
from metrics.evaluation import Evaluation
from metrics.inception import FID_FEATURES
from metrics.reference import read_reference
from metrics.report import Report, report_path, save_sweep, summary
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import ConfigError, DataError
from utils.files import content_key, file_sha256
from utils.labels import requested_labels

# --preset -> images of one set, sets with seeds of their own
PRESETS = {"smoke": (64, 1), "quick": (5_000, 1), "paper": (50_000, 3)}

log = logging.getLogger("diffusion")


class DrawnImages(NamedTuple):
    """Images that a trained model draws, a set for each setting.

    Attributes:
        facts: which weights and labels they come from, for the report.
        folder: sets wait in there until they are scored; so an interrupted evaluation goes on.
        batch_size: images at a time on each process.
    """

    run: Run
    runtime: Runtime
    generated: Generated
    facts: Mapping[str, Any]
    folder: Path
    batch_size: int

    @property
    def name(self) -> str:
        """What the images are of, in a line."""
        return self.run.describe()

    @property
    def home(self) -> Path:
        """The folder for reports, and for what serves later evaluations."""
        return self.run.checkpoint.parent / "eval"

    def store(self, setting: Setting) -> SampleStore:
        """Where the set of this setting waits; the name holds all that the images depend on."""
        content = {**self.facts, "precision": self.run.config.precision, **setting.facts()}
        return SampleStore(self.folder / f"samples_{content_key(content)}", self.run.spec.shape)

    def batches(self, setting: Setting) -> Iterator[Tensor]:
        """This process's share of the images, those of an interrupted run first, with a bar."""
        store, share = self.store(setting), self.runtime.share(self.generated.num_images)
        there = sum(len(part) for part, path in store.runs(share) if path is not None)
        if there:
            log.info("%d of %d images are there already: %s", there, len(share), store.folder)
        with tqdm(total=len(share), unit="image", disable=not self.runtime.is_main) as bar:
            for images in store.resumed(share, lambda indices: self._draw(setting, indices)):
                yield images
                bar.update(len(images))

    def forget(self, setting: Setting) -> None:
        """Remove the set of this setting from the disk."""
        self.store(setting).remove()

    def _draw(self, setting: Setting, indices: range) -> Iterator[Tensor]:
        labels = self.generated.labels
        return generate(
            self.run,
            range(setting.seed + indices.start, setting.seed + indices.stop),
            None if labels is None else labels[indices.start : indices.stop],
            sampling=setting.sampling,
            batch_size=self.batch_size,
            runtime=dataclasses.replace(self.runtime, rank=0, world_size=1),
        )


def drawn_images(
    args: argparse.Namespace, run: Run, real: Real, runtime: Runtime
) -> tuple[DrawnImages, list[Setting]]:
    """The images that the command line of evaluate.py asks a model for, and how to draw them.

    Raises:
        ConfigError: settings or classes that the model does not know.
    """
    preset_count, preset_repeats = PRESETS.get(args.preset, (None, 1))
    count = args.num_samples or preset_count or run.config.eval_num_samples
    mode, labels = args.label_mode, None
    if run.config.conditional:
        mode = mode or "balanced"
        counted = None if real.sets is None else real.sets.train.labels
        labels = requested_labels(
            mode, count, run.spec.num_classes, classes=run.classes, train_labels=counted
        )
    elif mode is not None:
        raise ConfigError("--label_mode: this model was trained without class labels")
    settings = settings_of(
        run.config,
        count,
        method=args.sampling_method,
        eta=args.ddim_eta,
        cfg_scales=args.cfg_scale,
        step_counts=args.num_inference_steps,
        seed=args.seed,
        repeats=args.repeats or preset_repeats,
    )
    facts = {
        "checkpoint": str(run.checkpoint),
        "sha256": file_sha256(run.checkpoint),
        "step": run.step,
        "epoch": run.epoch,
        "ema": run.ema,
        "label_mode": mode,
    }
    unlabelled = "the model was trained without class labels"
    generated = Generated(run.spec, count, labels, unlabelled)
    folder = report_path(args.output, run.checkpoint.parent / "eval").parent
    return DrawnImages(run, runtime, generated, facts, folder, args.batch_size), settings


class ExistingImages(NamedTuple):
    """Pictures that exist; those at `images.indices` are scored, as one set without a setting.

    `name` is the path of their folder or file.
    """

    name: str
    runtime: Runtime
    generated: Generated
    images: RealImages

    @property
    def facts(self) -> dict[str, Any]:
        """Which pictures these are, for the report."""
        return {"images": self.name, "images_fingerprint": self.images.fingerprint}

    @property
    def home(self) -> Path:
        """The folder for reports, and for what serves later evaluations."""
        return Path(self.name).with_name(f"{Path(self.name).stem}_eval")

    def batches(self, setting: None) -> Iterator[Tensor]:
        """This process's share of the pictures."""
        return (batch for batch, _ in self.images.fetch(self.images.share(self.runtime)))

    def forget(self, setting: None) -> None:
        """Keep the pictures, which are not ours."""


def existing_images(
    args: argparse.Namespace, config: Config, real: Real, runtime: Runtime
) -> ExistingImages:
    """The pictures, a folder or an .npz, that the command line of evaluate.py names.

    Raises:
        ConfigError: there are fewer pictures than `args.num_samples`.
        DataError: see `read_pictures`.
    """
    train = None if real.sets is None else real.sets.train
    given = {override.partition("=")[0] for override in args.overrides}
    pictures = read_pictures(
        Path(args.images),
        () if train is None else train.class_names,
        image_size=config.image_size if "image_size" in given else None,
        image_channels=config.image_channels if train is None else train.spec.channels,
    )
    data, labels = pictures.data, pictures.labels
    if args.num_samples is not None and args.num_samples > len(data):
        raise ConfigError(
            f"--num_samples {args.num_samples}: {args.images} holds {len(data)} pictures"
        )
    chosen = chosen_images(len(data), args.num_samples)
    images = RealImages(
        labels=data.labels,
        indices=chosen,
        fetch=lambda indices: image_batches(data, indices, args.batch_size),
        spec=data.spec,
        fingerprint=data.fingerprint,
    )
    generated = Generated(
        data.spec._replace(num_classes=0 if train is None else train.num_classes),
        len(chosen),
        None if labels is None else [labels[i] for i in chosen],
        pictures.unlabelled or "",
    )
    return ExistingImages(str(Path(args.images)), runtime, generated, images)


def compared_with(
    args: argparse.Namespace, config: Config, run: Run | None, runtime: Runtime
) -> Real:
    """What the command line of evaluate.py compares images with: the data set of the config,
    or of the folder --reference, or statistics.

    Args:
        run: the model that draws the images, if there is one.
    """
    statistics, in_folder = None, args.reference is not None and Path(args.reference).is_dir()
    if args.reference is not None and not in_folder:
        statistics = read_reference(args.reference, FID_FEATURES)
    if in_folder:
        config = config.model_copy(update=folder_settings(args.reference))
        if run is not None:  # as its own images were: brought to the size of the model
            shape = {"image_size": run.spec.shape[1:], "image_channels": run.spec.channels}
            config = config.model_copy(update=shape)
    elif run is None and args.config is None:
        missing = "no real images: name their data set by --config, or a folder by --reference"
        return Real(None, missing, statistics)
    try:
        sets = real_sets(
            config, runtime, args.batch_size, split=args.real_split, limit=args.num_real
        )
    except DataError as error:
        return Real(None, f"no real images: {error}", statistics)
    return Real(sets, None, statistics, config.dataset, flip=default_flip(config))


def score_sets(
    evaluation: Evaluation,
    images: DrawnImages | ExistingImages,
    settings: Sequence[Setting | None],
    *,
    path: Path,
    facts: Mapping[str, Any],
    old: Report | None,
    save_images_dir: str | None,
    keep_samples: bool,
) -> list[Report]:
    """Score a set for each setting and write its report; of several sets also one over all.

    Args:
        path: of the report, or of the one over all; the others stand beside it.
        facts: provenance that all sets share.
        old: an older report to compare with.
        save_images_dir: also write every image into this folder.
        keep_samples: leave the sets of drawn images on the disk.

    Returns:
        the reports, on the main process.
    """
    generated, start = images.generated, images.runtime.share(images.generated.num_images).start
    reports = []
    for setting in settings:
        name = setting.name() if len(settings) > 1 else ""
        batches = images.batches(setting)
        if save_images_dir is not None:
            batches = saved(batches, Path(save_images_dir, name), start, generated.labels)
        report = evaluation.score(
            batches,
            facts={**facts, **({} if setting is None else setting.facts())},
            always_sample=save_images_dir is not None,
        )
        if report is not None:
            single = path.with_stem(f"{path.stem}_{name}") if name else path
            evaluation.save(single, report, old)
            reports.append((setting, single, report))
            log.info("%s\nreport: %s", summary(report), single.with_suffix(".html"))
            if not keep_samples:
                images.forget(setting)
    if len(reports) > 1:
        save_sweep(path, reports, facts)
    return [report for *_, report in reports]
