"""The sets of images that an evaluation scores, and what they are compared with."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from datasets import default_flip
from datasets.loader import image_batches
from datasets.packed import open_root
from datasets.pictures import folder_settings, read_pictures
from datasets.real import chosen_images, real_sets
from datasets.remarks import passed_over
from diffusion.likelihood import Likelihood
from generation.run import Run
from generation.sample_store import remove, resumed, saved, tell_clipped
from generation.sampling import Sampling, generate, sampling_from
from metrics.base import Generated, Real
from metrics.evaluation import Evaluation
from metrics.reference import given_references
from metrics.report import Report, read_report, save_sweep, summary
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import ConfigError, DataError, show
from utils.files import content_key, file_sha256, numbered
from utils.images import image_suffix
from utils.labels import requested_labels, save_labels
from utils.precision import resolve_precision

# --preset -> images of one set, sets with seeds of their own
PRESETS = {"smoke": (64, 1), "quick": (5_000, 1), "paper": (50_000, 3)}

log = logging.getLogger("diffusion")


class Setting(NamedTuple):
    """How to draw one set of images: image i from `seed` + i."""

    sampling: Sampling
    seed: int
    is_repeat: bool = False
    ema_width: float | None = None  # of the weights; None: those that the model has

    def name(self) -> str:
        """The part of a file name that tells this setting from others."""
        scale, steps = self.sampling.cfg_scale, self.sampling.num_inference_steps
        width = "" if self.ema_width is None else f"width{self.ema_width:.12g}_"
        seed = f"_seed{self.seed}" if self.is_repeat else ""
        return f"{width}cfg{scale:.12g}_steps{steps}{seed}"

    def facts(self) -> dict[str, Any]:
        """How to draw it, for a report, as plain types."""
        width = {} if self.ema_width is None else {"ema_width": self.ema_width}
        return width | {
            "sampler": self.sampling.method,
            "steps": self.sampling.num_inference_steps,
            "eta": self.sampling.eta,
            "cfg_scale": self.sampling.cfg_scale,
            "sampling": asdict(self.sampling),
            "seed": self.seed,
        }


class ImageSets(NamedTuple):
    """The images to score: sets of equal size.

    Attributes:
        name: what the images are of, in a line.
        home: the folder for reports, and for what serves later evaluations.
        facts: where the images come from, for the report.
        settings: how a model draws each set; a single None for pictures that exist.
        draw: makes the images of a set with these global indices, (b, C, H, W), by batches.
        labels_from: what the first labels follow from, however many there are, as plain types.
    """

    name: str
    home: Path
    generated: Generated
    facts: dict[str, Any]
    settings: Sequence[Setting | None]
    draw: Callable[[Setting | None, range], Iterator[Tensor]]
    labels_from: Sequence[int] | None = None


def drawn_images(args: argparse.Namespace, run: Run, real: Real, runtime: Runtime) -> ImageSets:
    """The images that the command line of evaluate.py asks a model for.

    Raises a ConfigError for settings or classes that the model does not know.
    """
    config, mode, labels, labels_from = run.config, args.label_mode, None, None
    count, repeats = PRESETS.get(args.preset, (config.eval_num_samples, 1))
    count, repeats = args.num_samples or count, args.repeats or repeats
    pairs = real.sets and real.sets.reference
    if config.condition and pairs is None:
        raise ConfigError(f"this model draws from pictures of real images: {real.missing}")
    if config.conditional and config.condition and mode is None:
        labels = pairs.dataset.labels[pairs.at(range(count))].tolist()
    elif config.conditional:
        mode, classes = mode or "balanced", run.classes
        seen = real.sets and real.sets.train.dataset.labels
        labels = requested_labels(
            mode, count, run.spec.num_classes, classes=classes, train_labels=seen
        )
        labels_from = seen.bincount().tolist() if mode == "train" else list(classes)
    elif mode is not None:
        raise ConfigError("--label_mode: this model was trained without class labels")
    first_seed = config.seed if args.seed is None else args.seed
    settings = []
    values = (dict.fromkeys(v or [None]) for v in (args.cfg_scale, args.num_inference_steps))
    for width, scale, steps in product(run.averages or (None,), *values):
        asked = args.sampling_method, steps, args.ddim_eta, scale
        sampling = sampling_from(config, *asked, has_guide=run.guide is not None)
        seeds = (first_seed + i * count for i in range(repeats))  # no image shares another's
        settings += [Setting(sampling, seed, repeats > 1, width) for seed in seeds]
    facts = _origin_of(run) | {"label_mode": mode}
    facts |= {"conditions": real.facts()} if config.condition else {}

    def draw(setting: Setting, indices: range) -> Iterator[Tensor]:
        if setting.ema_width is not None:
            run.model.load_state_dict(run.averages[setting.ema_width])
        return generate(
            run,
            range(setting.seed + indices.start, setting.seed + indices.stop),
            labels and labels[indices.start : indices.stop],
            sampling=setting.sampling,
            batch_size=args.batch_size,
            runtime=replace(runtime, rank=0, world_size=1),
            planes_of=config.condition and partial(pairs.planes, pairs.at(indices)),
        )

    own = run.values, config.preview_channels, config.condition and config
    if run.values is None and config.condition is None:
        own += (Likelihood(run.process, run.model, config.conditional, runtime.device),)
    unlabelled, home = "the model was trained without class labels", run.checkpoint.parent / "eval"
    generated = Generated(run.spec, count, labels, unlabelled, *own)
    return ImageSets(run.describe(), home, generated, facts, settings, draw, labels_from)


def _origin_of(run: Run) -> dict[str, Any]:
    """Which weights these are, and which guide them, for the report."""
    facts = {
        "checkpoint": str(run.checkpoint),
        "sha256": file_sha256(run.checkpoint),
        "step": run.step,
        "epoch": run.epoch,
        "ema": run.ema,
    }
    if run.guide is not None:
        file = run.guide.checkpoint
        facts |= {"guide": str(file), "guide_sha256": file_sha256(file), "guide_ema": run.guide.ema}
    return facts


def existing_images(args: argparse.Namespace, config: Config, real: Real) -> ImageSets:
    """The pictures, a folder or an .npz, that the command line of evaluate.py names: one set.

    Raises a ConfigError if there are fewer than --num_samples, and what `read_pictures` raises.
    """
    path, train = Path(args.images), real.sets and real.sets.train.dataset
    has_size = any(override.startswith("image_size=") for override in args.overrides)
    pictures = read_pictures(
        path,
        train.class_names if train else (),
        image_size=config.image_size if has_size else None,
        image_channels=train.spec.channels if train else config.image_channels,
        values=train and train.values,
    )
    dataset, labels, asked = pictures.data, pictures.labels, args.num_samples
    if asked is not None and asked > len(dataset):
        raise ConfigError(f"--num_samples {asked}: {path} holds {len(dataset)} pictures")
    chosen = chosen_images(len(dataset), asked)

    def draw(setting: None, indices: range) -> Iterator[Tensor]:
        batches = image_batches(dataset, chosen[indices.start : indices.stop], args.batch_size)
        return (images for images, _ in batches)

    spec = dataset.spec._replace(num_classes=train.spec.num_classes if train else 0)
    labels = labels and [labels[i] for i in chosen]
    own = pictures.unlabelled or "", dataset.values, config.preview_channels
    generated = Generated(spec, len(chosen), labels, *own)
    facts = {"images": str(path), "images_fingerprint": dataset.fingerprint}
    home = Path(os.path.abspath(path))  # of `.` and `..`, too
    home = home.with_name(f"{home.stem}_eval")
    return ImageSets(str(path), home, generated, facts, [None], draw)


def compared_with(
    args: argparse.Namespace, config: Config, run: Run | None, runtime: Runtime
) -> Real:
    """What the command line of evaluate.py compares images with: the data set of the config,
    or of the folder --reference, or statistics. `run` draws the images, if a model does."""
    statistics = {}
    if args.reference is not None and open_root(args.reference).is_dir():
        config = config.model_copy(update=folder_settings(args.reference))
        if run is not None:  # as its own images were: brought to the size of the model
            shape = {"image_size": run.spec.shape[1:], "image_channels": run.spec.channels}
            config = config.model_copy(update=shape)
    else:
        if args.reference is not None:
            statistics = given_references(args.reference)
        if run is None and args.config is None:
            missing = "no real images: name their data set by --config, or a folder by --reference"
            return Real(None, missing, statistics)
    try:
        sets = real_sets(
            config, runtime, args.batch_size, split=args.real_split, limit=args.num_real
        )
    except DataError as error:
        return Real(None, f"no real images: {error}", statistics)
    for line in passed_over(getattr(sets.reference.dataset, "listing", None)):
        log.warning("%s: %s", show(config.data_root), line)
    return Real(sets, None, statistics, config.dataset, flip=default_flip(config))


def score_sets(
    args: argparse.Namespace,
    config: Config,
    images: ImageSets,
    evaluation: Evaluation,
    path: Path,
    facts: Mapping[str, Any],
) -> list[Report]:
    """Score each set and write its report; of several sets also one over all. On every process.

    Drawn images wait beside the reports until they are scored, so an interrupted evaluation goes
    on. The reports are returned, on the main process alone.

    Args:
        path: of the report, or of the one over all; the others stand beside it.
        facts: provenance that all sets share.
    """
    generated, is_main = images.generated, evaluation.runtime.is_main
    share = evaluation.runtime.share(generated.num_images)
    old = None if args.compare is None else read_report(args.compare)
    reports = []
    for setting in images.settings:
        name = setting.name() if len(images.settings) > 1 else ""
        if setting is None:
            own, store, batches = {}, None, images.draw(None, share)
        else:
            own, draw = setting.facts(), partial(images.draw, setting)
            precision = resolve_precision(config.precision, evaluation.runtime.device)
            decisive = {"precision": precision, "labels_from": images.labels_from}
            key = content_key({**images.facts, **decisive, **own})
            store = path.parent / f"samples_{key}"
            batches = resumed(store, generated.spec.shape, share, draw, show_progress=is_main)
        to_save, written = args.save_images_dir is not None, []
        if to_save:
            folder = Path(args.save_images_dir, name)
            batches = saved(batches, folder, share.start, written, generated.values)
        report = evaluation.score(batches, facts={**facts, **own}, always_sample=to_save)
        tell_clipped(sum(written), generated.values)
        # Not before the pictures of all processes are there: older ones are of other classes.
        if to_save and not evaluation.runtime.any(len(written) < len(share)) and is_main:
            try:
                suffix = image_suffix(generated.spec.channels, generated.values is None)
                names = [stem + suffix for stem in numbered(generated.num_images)]
                save_labels(folder, generated.labels, names)
            except OSError as error:
                log.warning("--save_images_dir: the labels are not written: %s", error)
        if report is not None:
            single = path.with_stem(f"{path.stem}_{name}") if name else path
            evaluation.save(single, report, old)
            reports.append((setting, single, report))
            log.info("%s\nreport: %s", summary(report), single.with_suffix(".html"))
            if store is not None and not args.keep_samples:
                remove(store)
    if len(reports) > 1:
        save_sweep(path, reports, facts)
    return [report for *_, report in reports]
