"""From a checkpoint to a model that can be sampled from: the one way that all scripts take."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import datasets
import diffusion
import metrics
import models
from diffusion import Process
from training.ema import states_of_widths
from training.optim import OPTIMIZERS
from training.pretrained import SAME_MODEL, changed_settings, weights_of
from utils.checkpoint import load_any, misfit, resolve_checkpoint
from utils.cli import read_sequence
from utils.config import (
    Config,
    RawConfig,
    apply_overrides,
    keys_by_resume,
    read_config_file,
    unknown_name,
    validate,
    warnings_of,
)
from utils.errors import CheckpointError, ConfigError, show
from utils.images import ImageSpec, Values, image_suffix
from utils.precision import resolve_precision

log = logging.getLogger("diffusion")

DRAWING_CHECKS = (  # of what a trained model needs
    datasets.check_config,
    diffusion.check_config,
    metrics.check_config,
    lambda config: models.check_config(config, expected_spec(config)),
)
CONFIG_CHECKS = (
    *DRAWING_CHECKS,
    lambda config: unknown_name("optimizer", config.optimizer, OPTIMIZERS),
)


@dataclass(frozen=True)
class Run:
    """A trained model with all that is needed to sample from it."""

    model: nn.Module
    process: Process
    spec: ImageSpec
    config: Config
    checkpoint: Path | None = None
    step: int = 0
    epoch: int = 0
    ema: bool = False
    class_names: tuple[str, ...] = ()  # as the data set called them; may be unknown
    averages: Mapping[float, Mapping[str, Tensor]] = field(default_factory=dict)  # by ema_width
    guide: Run | None = None  # a weaker model of the same images, for autoguidance
    values: Values | None = None  # of images that are floats; None: they are uint8

    @property
    def classes(self) -> Sequence[int]:
        """The classes it was trained on, in [0, K)."""
        return self.config.classes or range(self.spec.num_classes)

    @property
    def suffix(self) -> str:
        """That of files for its images."""
        return image_suffix(self.spec.channels, self.values is None)

    def describe(self) -> str:
        weights = "EMA weights" if self.ema else "raw weights"
        if self.averages:
            weights += f" of width {', '.join(map(str, self.averages))}"
        guide = "" if self.guide is None else f", guided by {self.guide.describe()}"
        return f"{self.checkpoint} (step {self.step}, {weights}){guide}"


def expected_spec(config: Config) -> ImageSpec | None:
    """The images as far as the config alone tells. A number of classes that only the files tell is
    a placeholder: no size depends on it."""
    spec = datasets.native_spec(config)
    if spec is None and config.dataset in datasets.DATASETS and config.image_size is not None:
        num_classes = config.model_params.get("num_classes", 1)
        return ImageSpec(config.image_channels or 3, *config.image_size, num_classes)
    return spec


def load_run(
    checkpoint: str | Path,
    device: torch.device,
    *,
    use_ema: bool | None = None,
    ema_width: float | Sequence[float] | None = None,
    config_path: str | None = None,
    overrides: Sequence[str] = (),
    compile: str | None = None,
) -> Run:
    """Rebuild what a checkpoint (a file, also an exported one, or a run directory) holds.

    Raises a CheckpointError or a ConfigError that says what is missing or does not fit.

    Args:
        use_ema: averaged or raw weights; None takes the averaged ones if there are any.
        ema_width: of the average, see `states_of_widths`; of several, `Run.averages` has them all.
        config_path, overrides: settings laid over those stored in the checkpoint.
        compile: how, see `compile_model`. (The `compile` of the config is for training.)
    """
    path = resolve_checkpoint(checkpoint)
    state = load_any(path)
    values = Values(*state["values"]) if "values" in state else None
    state["config"] |= {"value_range": values and list(values[1:])}  # as it was measured
    raw = RawConfig(dict(state["config"]), dict.fromkeys(state["config"], str(path)))
    if config_path is not None:
        given = read_config_file(Path(config_path))
        raw.values.update(given.values)
        raw.sources.update(given.sources)
    config = validate(raw, checks=DRAWING_CHECKS, problems=apply_overrides(raw, overrides))
    resolve_precision(config.precision, device)
    if changed := changed_settings(state["config"], config.to_dict(), (*SAME_MODEL, "value_range")):
        belong = f"{path}: these settings belong to the weights:"
        raise ConfigError("\n       ".join([belong, *changed]))
    spec = ImageSpec(*state["spec"])
    if (native := datasets.native_spec(config)) not in (None, spec):
        belong = "the data set and its size belong to the checkpoint"
        raise ConfigError(f"{path} draws images of {spec}, the config describes {native}; {belong}")
    averages = {}
    if ema_width is not None:
        if use_ema is False:
            raise ConfigError("--no_ema takes raw weights, --ema_width averages; give one of them")
        states = states_of_widths(path, state, read_sequence(ema_width))
        averages = {w: weights_of(path, each, use_ema=True)[0] for w, each in states.items()}
        state, use_ema = next(iter(states.values())), True
    weights, ema = weights_of(path, state, use_ema=use_ema, prefer_ema=config.use_ema)
    if problem := misfit(weights, models.skeleton(config, spec).state_dict()):
        raise CheckpointError(f"{show(path)}: does not fit the config: {problem}")
    model = models.build_model(config, spec, device)
    model.load_state_dict(weights)
    model.eval().requires_grad_(False)
    models.compile_model(model, models.usable_mode(compile, device))
    names = tuple(state.get("class_names") or ())
    facts = path, state["step"], state["epoch"], ema, names, averages
    return Run(model, diffusion.build_process(config), spec, config, *facts, values=values)


def load_run_of(args: argparse.Namespace, device: torch.device, compile: str | None = None) -> Run:
    """`load_run` of what the command line says, see `cli.add_checkpoint_options`. Keys on it that
    have no effect are warned of."""
    given = dict(use_ema=args.use_ema, config_path=args.config, overrides=args.overrides)
    given["ema_width"] = getattr(args, "ema_width", None)
    run = load_run(args.checkpoint, device, compile=compile, **given)
    method = getattr(args, "sampling_method", None) or run.config.sampling_method
    sampled = run.config.model_copy(update={"sampling_method": method})
    named = {text.partition("=")[0] for text in args.overrides}
    for warning in warnings_of(sampled):
        if warning.split()[0] in named:
            log.warning(warning)
    guide = getattr(args, "guide", None)
    return with_guide(run, load_run(guide, device)) if guide else run


def with_guide(run: Run, guide: Run) -> Run:
    """The run, with another one as its guide. Their networks may differ. Raises a ConfigError if
    the guide draws other images, or its outputs mean something else."""
    pair = guide.config.to_dict(), run.config.to_dict()
    if (guide.spec, guide.values) != (run.spec, run.values):
        raise ConfigError(f"--guide {guide.checkpoint} draws {guide.spec}, the model {run.spec}")
    keys = (*keys_by_resume("meaning"), "condition", "condition_channels", "condition_colors")
    if changed := changed_settings(*pair, keys):
        belong = f"--guide {guide.checkpoint}: must be trained with the model's settings:"
        raise ConfigError("\n       ".join([belong, *changed]))
    return replace(run, guide=guide)


def check_labels(labels: Sequence[int], run: Run) -> None:
    """Raise a ConfigError if the model has no classes, or not these."""
    if not run.config.conditional:
        raise ConfigError("--labels: this model was trained without class labels")
    wrong = [label for label in labels if not 0 <= label < run.spec.num_classes]
    if wrong:
        raise ConfigError(f"--labels {wrong}: classes are 0..{run.spec.num_classes - 1}")
